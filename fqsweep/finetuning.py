"""From the full-precision parent to weights on their grids.

importance (shared) -> allocation -> quantisers -> weights reconstructed, outputs matched -> fine-tuning.

Axes: u units, b bit choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from fqsweep.assignment import MOST_ROUNDS, Budget, allowed_choices, assign_bits, assign_bits_in_file
from fqsweep.baseline import baseline_curve, ensure_importance
from fqsweep.cells import Cell, finetune_epochs, matches_moments, reconstructs
from fqsweep.checkpoints import Checkpoint
from fqsweep.config import Allocating, BaqMethod, Finetuning, Fp32Method, UniformMethod
from fqsweep.cost_table import Importance
from fqsweep.errors import TrialError
from fqsweep.files import SweepPaths
from fqsweep.importance import start_steps
from fqsweep.quant.at_once import can_quantise_at_once
from fqsweep.quant.baq import LearnedBits
from fqsweep.quant.convert import QuantisedState, attach_quantisers, detach_quantisers, freeze_bits
from fqsweep.quant.costs import FULL_PRECISION_BITS, fixed_packed_bytes
from fqsweep.quant.kernels import Kernels, choose_kernels
from fqsweep.quant.moments import Moments, match_moments, noting_moments
from fqsweep.quant.reconstruction import Reconstruction, noting_patches
from fqsweep.quant.remainder import Remainder, bound_remainder
from fqsweep.quant.units import UnitTable
from fqsweep.setting import Setting
from fqsweep.training import Recorder, TrainingLog, TrainingPlan, train

# In one batch: at 224 px the outputs of a ResNet50's first stage take 0.8 GB.
MOST_MATCHED_IMAGES = 256


@dataclass(frozen=True, kw_only=True)
class Start:
    """What quantisers begin with.

    Attributes:
        bits_u: a width per unit, int64 (u,).
        step_ub: steps at the widths 0 to 8, float32 (u, 9).
        counted_u: weights per unit that the budget counts, int64 (u,): of a budget in bytes, those that are left
            where channels of 0 bits have left the file.
        remainder_of: of a budget in bytes, bits (u,) -> what the file holds at most; else None.
    """

    units: UnitTable
    bits_u: np.ndarray
    step_ub: np.ndarray
    counted_u: np.ndarray
    remainder_of: Callable[[np.ndarray], Remainder] | None = None

    @property
    def steps(self) -> dict[str, torch.Tensor]:
        """The steps by name of the layer."""
        return {name: torch.from_numpy(part) for name, part in self.units.split(self.step_ub).items()}


def quantise(
    setting: Setting,
    parent: nn.Module,
    units: UnitTable,
    weights: dict[str, float],
    paths: SweepPaths,
    recorder: Recorder,
    checkpoint: Checkpoint,
) -> tuple[QuantisedState, np.ndarray, TrainingLog]:
    """Quantise the parent in place as the cell's method says.

    Args:
        weights: values of the cell's free weights.

    Returns:
        the model's state, the bits of each unit, int64 (u,), and the log of the fine-tuning; of full precision the
        parent's state and curve.

    Raises:
        TrialError: no allocation fits the budget, or training fails.
    """
    cell = setting.cell
    settings = cell.point.settings
    if isinstance(settings, Fp32Method):
        # The parent's curve; its training time is not this trial's.
        log = TrainingLog(epochs=baseline_curve(setting, paths))
        tensors = {name: tensor.cpu() for name, tensor in parent.state_dict().items()}
        state = QuantisedState(tensors=tensors, bits={}, steps={})
        return state, np.full(units.num_units, FULL_PRECISION_BITS), log
    if isinstance(settings, UniformMethod):
        bits = settings.bits[0]
        step_ub = start_steps(
            parent, units, setting.calibration_batches(), choices=(bits,), scale=settings.scale
        )
        start = Start(
            units=units,
            bits_u=np.full(units.num_units, bits),
            step_ub=step_ub,
            counted_u=units.num_weights_u,
        )
    else:
        start = _allocate(setting, settings, parent, units, ensure_importance(setting, parent, paths, recorder))
    return _finetune(setting, parent, start, weights, recorder, checkpoint)


def _allocate(
    setting: Setting, settings: Allocating, parent: nn.Module, units: UnitTable, importance: Importance
) -> Start:
    """Bits under the cell's budget, of mean bits or of bytes on disk.

    Raises:
        TrialError: no allocation fits.
    """
    cell = setting.cell
    if cell.budget_bytes is None:
        bits_u = assign_bits(settings, importance, units, budget=Budget(mean_bits=cell.budget_bits)).bits_u
        return Start(units=units, bits_u=bits_u, step_ub=importance.step_ub, counted_u=units.num_weights_u)
    # A copy: training changes the parent's own.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in parent.state_dict().items()}
    remainder_of = partial(bound_remainder, tensors, units, metadata=setting.file_notes)
    allocation, remainder = assign_bits_in_file(
        settings,
        importance,
        units,
        budget_bytes=cell.budget_bytes,
        fixed_bytes=fixed_packed_bytes(tensors, units, metadata=setting.file_notes),
        remainder_of=remainder_of,
    )
    return Start(
        units=units,
        bits_u=allocation.bits_u,
        step_ub=importance.step_ub,
        counted_u=remainder.counted_u,
        remainder_of=remainder_of,
    )


def _finetune(
    setting: Setting,
    parent: nn.Module,
    start: Start,
    weights: dict[str, float],
    recorder: Recorder,
    checkpoint: Checkpoint,
) -> tuple[QuantisedState, np.ndarray, TrainingLog]:
    plan = _plan_training(setting, parent, weights)
    matched, moments, before = _calibrate(setting, parent, start.units)
    loader = setting.training_batches(seed=setting.cell.seed + 1)
    if plan.at_once and setting.device.type == "cuda" and setting.channels_last:
        parent.to(memory_format=torch.channels_last)
    kernels = _kernels(setting, plan, start.units, num_batches=loader.num_batches, recorder=recorder)
    _attach_quantisers(setting, plan, parent, start, kernels, weights)
    if matched is not None:
        match_moments(parent, moments, matched, before=before)
    del matched, moments  # training has need of the memory
    log = TrainingLog()
    if plan.epochs:
        log = train(
            parent,
            loader,
            plan,
            evaluate=lambda model: setting.score(model, "val", autocast=True)[0],
            recorder=recorder,
            checkpoint=checkpoint,
        )
    state = detach_quantisers(parent)
    return state, start.units.join(state.bits), log


def _plan_training(setting: Setting, parent: nn.Module, weights: dict[str, float]) -> TrainingPlan:
    cell = setting.cell
    settings = cell.point.settings
    assert isinstance(settings, UniformMethod | Allocating)
    epochs = finetune_epochs(cell)
    teacher = (
        setting.model_with(parent.state_dict()).requires_grad_(False)
        if settings.distillation_weight > 0 and epochs
        else None
    )
    return TrainingPlan(
        epochs=epochs,
        learning_rate=cell.recipe.finetune_learning_rate,
        weight_decay=cell.recipe.weight_decay,
        warmup_frac=0.0,
        gradient_clip=cell.recipe.gradient_clip,
        num_groups=len(setting.group.names),
        regulariser=settings.regulariser,
        fairness_weight=_weight("fairness_weight", settings, weights),
        distillation_weight=settings.distillation_weight,
        teacher=teacher,
        schedule=cell.recipe.schedule,
        autocast=setting.autocast,
        channels_last=setting.channels_last,
        at_once=epochs > 0 and _quantises_at_once(setting, settings),
    )


def _kernels(
    setting: Setting, plan: TrainingPlan, units: UnitTable, *, num_batches: int, recorder: Recorder
) -> Kernels:
    """The form of the quantisers' arithmetic; where one Triton kernel does all layers, what is left runs eagerly."""
    one_launch = plan.at_once and setting.device.type == "cuda"
    kernels, remark = choose_kernels(
        "eager" if one_launch else setting.cell.recipe.quantiser_kernels,
        setting.device,
        num_weights=int(units.num_weights_u.sum()),
        num_steps=plan.epochs * num_batches,
        at_once=plan.at_once,
    )
    if remark:
        recorder.note(remark)
    return kernels


def _attach_quantisers(
    setting: Setting,
    plan: TrainingPlan,
    parent: nn.Module,
    start: Start,
    kernels: Kernels,
    weights: dict[str, float],
) -> None:
    """Quantise every layer, at widths that stay, or that the plan then learns."""
    cell = setting.cell
    settings = cell.point.settings
    if isinstance(settings, BaqMethod) and plan.epochs:
        _learn_bits_into(plan, cell, settings, parent, start, kernels, weights)
    else:
        attach_quantisers(parent, start.units, start.steps, start.bits_u, kernels=kernels)


@torch.no_grad()
def _calibrate(
    setting: Setting, parent: nn.Module, units: UnitTable
) -> tuple[torch.Tensor | None, dict[str, Moments], Reconstruction | None]:
    """What the parent's layers see and say: images to match outputs on, their moments, and what re-fits weights.

    Without images where outputs are not matched, and without what re-fits where weights stay.
    """
    if not matches_moments(setting.cell):
        return None, {}, None
    matched = images_to_match(setting)
    refits = reconstructs(setting.cell)
    refitted = [layer.name for layer in units.layers] if refits else []
    with (
        noting_moments(parent) as moments,
        noting_patches(parent, names=refitted, num_images=len(matched)) as patches,
    ):
        parent(matched)
    settings = setting.cell.point.settings
    assert isinstance(settings, UniformMethod | Allocating)
    before = Reconstruction(patches, num_images=len(matched), rule=settings.scale) if refits else None
    return matched, moments, before


def images_to_match(setting: Setting) -> torch.Tensor:
    """Calibration images that outputs are matched on, float32 (b, c, h, w): one batch, as all correct each layer."""
    return torch.cat([image_bchw for image_bchw, _, _ in setting.calibration_batches(MOST_MATCHED_IMAGES)()])


def _quantises_at_once(setting: Setting, settings: Finetuning) -> bool:
    """Whether training quantises all layers together; on a GPU not where eager kernels were asked for."""
    bit_gradient = settings.bit_gradient if isinstance(settings, BaqMethod) else None
    wanted = setting.device.type == "cpu" or setting.cell.recipe.quantiser_kernels != "eager"
    return wanted and can_quantise_at_once(setting.device, bit_gradient=bit_gradient)


def _learn_bits_into(
    plan: TrainingPlan,
    cell: Cell,
    settings: BaqMethod,
    model: nn.Module,
    start: Start,
    kernels: Kernels,
    weights: dict[str, float],
) -> None:
    """Attach quantisers with learned widths and tell the plan how they learn and when they settle."""
    units = start.units
    attach_quantisers(
        model,
        units,
        start.steps,
        start.bits_u,
        learn_bits=settings.bit_gradient,
        smallest=settings.measured_choices[0],
        mix_temperature=settings.mix_temperature,
        kernels=kernels,
    )
    lowest_u, highest_u = _limits_of_learning(
        allowed_choices(settings, units, settings.measured_choices),
        np.array(settings.measured_choices),
        start.bits_u,
    )
    spent_bits = float(start.counted_u @ start.bits_u) / float(start.counted_u.sum())
    learned = LearnedBits(
        model,
        units,
        counted_u=start.counted_u,
        lowest_u=lowest_u,
        highest_u=highest_u,
        budget_bits=spent_bits if cell.budget_bits is None else cell.budget_bits,
        learning_rate=settings.bit_learning_rate,
    )
    plan.learned_bits = learned
    plan.bitrate_weight = _weight("bitrate_weight", settings, weights)
    plan.bit_warmup_frac = settings.bit_warmup_frac
    plan.settle_epoch = plan.epochs * (1 - settings.settle_frac)
    plan.freeze = lambda: freeze_bits(model, units, _round_under_budget(learned, start, cell))


def _round_under_budget(learned: LearnedBits, start: Start, cell: Cell) -> np.ndarray:
    """Whole widths within the budget, int64 (u,); of a budget in bytes, which the file then keeps.

    What channels leave behind depends a little on the others' widths, so that equal counts are not quite equal files.

    Raises:
        TrialError: no widths that the learned ones come near to fit the file.
    """
    bits_u = learned.round_under_budget()
    if start.remainder_of is None or cell.budget_bytes is None:
        return bits_u
    too_much = 0
    for _ in range(MOST_ROUNDS):
        excess = start.remainder_of(bits_u).most_bytes - cell.budget_bytes
        if excess <= 0:
            return bits_u
        too_much += excess
        bits_u = learned.round_under_budget(less_bits=8 * too_much / float(start.counted_u.sum()))
    raise TrialError(f"learned bits do not fit a file of {cell.budget_bytes:,} bytes: lower bit_learning_rate")


def _limits_of_learning(
    allowed_ub: np.ndarray, choice_b: np.ndarray, bits_u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest width that each unit's learning may reach, int64 (u,) each.

    What the allocation drops stays dropped, and what it keeps keeps at least 1 bit. A mix of 0 and 1 bits is a
    channel's weights times a factor, to which a normalisation layer behind it is blind: the loss says nothing
    about that step, and learned there, bits walk at random (1/8 bit, synthderm, 2 seeds: worst group .781, without
    learning .809).
    """
    lowest_u = choice_b[allowed_ub.argmax(axis=1)]
    highest_u = choice_b[allowed_ub.shape[1] - 1 - allowed_ub[:, ::-1].argmax(axis=1)]
    dropped_u = bits_u == 0
    smallest_kept_u = choice_b[(allowed_ub & (choice_b > 0)).argmax(axis=1)]
    return np.where(dropped_u, 0, np.maximum(lowest_u, smallest_kept_u)), np.where(dropped_u, 0, highest_u)


def _weight(name: str, settings: Finetuning, weights: dict[str, float]) -> float:
    """A weight's value: the search's, or the one that the space fixes."""
    value = weights.get(name, getattr(settings, name))
    if not isinstance(value, float | int):
        raise TrialError(f"{name} is free in the search space, but the trial came without its value")
    return float(value)

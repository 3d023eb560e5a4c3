"""The training loop for full-precision parents and quantised children, and prediction.

Axes: b images of a batch, g groups.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fqsweep.checkpoints import Checkpoint, random_state, restore_random_state
from fqsweep.config import Regulariser, Schedule
from fqsweep.data.loading import Batch, BatchLoader
from fqsweep.errors import TrialError
from fqsweep.names import LEARNED_BITS
from fqsweep.quant.at_once import AtOnce
from fqsweep.quant.baq import LearnedBits

RUNNING_MOMENTUM = 0.1
DRO_TEMPERATURE = 0.1
GAIN_LEARNING_RATE = 2e-3
FINAL_RATE_FRAC = 0.02
STEP_FACTOR = 0.1
STEPS_AT = (0.5, 0.75)


class Recorder(Protocol):
    """Where progress goes while a trial runs."""

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None: ...

    def note(self, text: str) -> None: ...


class GroupRegulariser(nn.Module):
    """Pulls the groups' losses together, from running estimates instead of single batches.

    The maximum minus the minimum over the groups of one batch is biased upwards by noise, and fails
    where a group is missing. Here running means say which group is worst and which is best; the
    gradient flows through the batch's own losses of those groups. A missing group leaves its running
    mean as it was and gives no gradient.

    - ``gap``: worst minus best group loss (FairQuant's disparity);
    - ``group_dro``: sum of group losses weighted by the softmax of their running losses over ``DRO_TEMPERATURE``.
      The worst groups weigh most, as in Sagawa et al. 2020, whose weights instead grow by a factor in every step.
    """

    running_g: torch.Tensor
    seen_g: torch.Tensor

    def __init__(self, kind: Regulariser, num_groups: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("running_g", torch.zeros(num_groups))
        self.register_buffer("seen_g", torch.zeros(num_groups, dtype=torch.bool))

    def forward(self, loss_b: torch.Tensor, group_b: torch.Tensor) -> torch.Tensor:
        # Comparisons and gathers, not one_hot and indices: those would make the host wait for the device.
        group_g = torch.arange(len(self.running_g), device=group_b.device)
        member_bg = (group_b[:, None] == group_g).to(loss_b.dtype)
        count_g = member_bg.sum(dim=0)
        present_g = count_g > 0
        batch_g = (loss_b[:, None] * member_bg).sum(dim=0) / count_g.clamp(min=1)
        with torch.no_grad():
            momentum_g = torch.where(self.seen_g, RUNNING_MOMENTUM, 1.0) * present_g
            self.running_g.lerp_(batch_g.to(self.running_g.dtype), momentum_g)
            self.seen_g |= present_g
        # Value: the running mean. Gradient: the batch's mean, for groups that are present.
        estimate_g = self.running_g.clone() + torch.where(present_g, batch_g - batch_g.detach(), 0.0)
        if self.kind == "group_dro":
            weight_g = torch.softmax(
                torch.where(self.seen_g, self.running_g / DRO_TEMPERATURE, -torch.inf), dim=0
            )
            return (weight_g * estimate_g).sum()
        worst = torch.where(self.seen_g, self.running_g, -torch.inf).argmax(dim=0, keepdim=True)
        best = torch.where(self.seen_g, self.running_g, torch.inf).argmin(dim=0, keepdim=True)
        # Both or none: a batch with the best group alone would only push that group's loss up.
        both = present_g.gather(0, worst) & present_g.gather(0, best)
        gap = self.running_g.gather(0, worst) - self.running_g.gather(0, best)
        moving_gap = estimate_g.gather(0, worst) - estimate_g.gather(0, best)
        return torch.where(both, moving_gap, gap).squeeze(0)


@dataclass(kw_only=True)
class TrainingPlan:
    """What a training run does, every value given.

    Attributes:
        patience: stop after this many epochs without a lower validation loss, and go back to the best
            epoch; None trains all epochs and keeps the last.
        regulariser, fairness_weight, distillation_weight: see ``config.Finetuning``; ``teacher`` is the parent.
        learned_bits: the bits' optimiser, stepped until ``settle_epoch`` (a fraction of an epoch counts);
            ``freeze`` is then called once and returns nothing. ``bit_warmup_frac``: see ``config.BaqMethod``.
        schedule: of the learning rate, see ``config.TrainingRecipe``.
        ema_decay: evaluate and keep the running mean of the weights; not together with learned bits.
        autocast: bf16 on the model's device.
        channels_last: memory layout of images, and of weights without quantisers.
        at_once: the quantisers of all layers work together (``quant.at_once``).
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    warmup_frac: float
    gradient_clip: float | None
    patience: int | None = None
    num_groups: int = 0
    regulariser: Regulariser = "none"
    fairness_weight: float = 0.0
    distillation_weight: float = 0.0
    teacher: nn.Module | None = None
    learned_bits: LearnedBits | None = None
    bitrate_weight: float = 0.0
    settle_epoch: float = 0.0
    bit_warmup_frac: float = 0.0
    freeze: Callable[[], None] = lambda: None
    schedule: Schedule = "cosine"
    ema_decay: float | None = None
    autocast: bool = False
    channels_last: bool = False
    at_once: bool = False
    frozen: bool = False

    def freeze_bits(self) -> None:
        """Round and freeze the learned widths, once."""
        self.freeze()
        self.frozen = True


@dataclass(kw_only=True)
class TrainingLog:
    """What happened: one entry an epoch, and the time spent in training alone."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    train_s: float = 0.0
    best_epoch: int = 0


def train(
    model: nn.Module,
    loader: BatchLoader,
    plan: TrainingPlan,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]],
    recorder: Recorder,
    checkpoint: Checkpoint | None = None,
) -> TrainingLog:
    """Train in place.

    Args:
        evaluate: metrics on the validation split after each epoch; ``val/loss`` is needed for patience.
        checkpoint: where the state after each epoch is kept. Training goes on from it where there is one, with
            the same results to the last digit as without the break; the caller removes it.

    Raises:
        TrialError: a loss that is not finite, naming epoch and step.
    """
    run = _Run.begin(model, loader, plan)
    if checkpoint is not None and run.resume(checkpoint.load()):
        recorder.note(f"training goes on after epoch {run.epoch} of {plan.epochs}")
    while run.epoch < plan.epochs and not run.is_patience_over:
        start = time.perf_counter()
        train_loss = _train_epoch(run)
        run.log.train_s += time.perf_counter() - start
        metrics = {"train/loss": train_loss, **evaluate(run.evaluated)}
        if plan.learned_bits is not None:
            metrics[LEARNED_BITS] = plan.learned_bits.whole_mean_bits()
        recorder.log_metrics(metrics, epoch=run.epoch)
        run.end_epoch(metrics)
        if checkpoint is not None:
            checkpoint.save(run.state_dict())
    if plan.learned_bits is not None and not plan.frozen:
        run.freeze_bits()
    if run.best_state is not None:
        model.load_state_dict(run.best_state)
    elif run.mean is not None:
        model.load_state_dict(run.mean.module.state_dict())
    return run.log


def _average_numbers(decay: float) -> Callable[..., None]:
    """A running mean of tensors, all of one type; those of whole numbers, such as tables of indices, are copied."""
    move = get_ema_multi_avg_fn(decay)

    def average(mean: list[torch.Tensor], now: list[torch.Tensor], num_averaged: Any) -> None:
        if mean[0].is_floating_point():
            move(mean, now, num_averaged)
        else:
            torch._foreach_copy_(mean, now)

    return average


@dataclass(kw_only=True)
class _Run:
    """Everything that a step or an epoch changes; ``epoch`` counts those that are finished."""

    model: nn.Module
    loader: BatchLoader
    plan: TrainingPlan
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    regulariser: GroupRegulariser
    mean: AveragedModel | None
    log: TrainingLog = field(default_factory=TrainingLog)
    epoch: int = 0
    best_loss: float = math.inf
    best_state: dict[str, torch.Tensor] | None = None
    at_once: AtOnce | None = None

    @classmethod
    def begin(cls, model: nn.Module, loader: BatchLoader, plan: TrainingPlan) -> _Run:
        """Nothing is trained yet."""
        if plan.channels_last and not any(parametrize.is_parametrized(module) for module in model.modules()):
            model.to(memory_format=torch.channels_last)
        optimiser = _optimiser(model, plan)
        mean = None
        if plan.ema_decay is not None:
            assert plan.learned_bits is None, "learned bits change the model's parameters when they settle"
            mean = AveragedModel(model, multi_avg_fn=_average_numbers(plan.ema_decay), use_buffers=True)
        return cls(
            model=model,
            loader=loader,
            plan=plan,
            optimiser=optimiser,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimiser, _rate_schedule(plan, loader.num_batches)),
            regulariser=GroupRegulariser(plan.regulariser, max(plan.num_groups, 1)).to(loader.device),
            mean=mean,
            at_once=AtOnce(model) if plan.at_once else None,
        )

    def freeze_bits(self) -> None:
        """Round and freeze the learned widths: the quantisers are others from then on."""
        self.plan.freeze_bits()
        if self.at_once is not None:
            self.at_once = AtOnce(self.model)

    def quantised(self) -> AbstractContextManager[None]:
        """Within it the model's weights are quantised, where all are done at once; else each layer does its own."""
        return contextlib.nullcontext() if self.at_once is None else self.at_once.ready()

    @property
    def evaluated(self) -> nn.Module:
        """The model that is scored: the running mean where there is one."""
        return self.model if self.mean is None else self.mean.module

    @property
    def is_patience_over(self) -> bool:
        return self.plan.patience is not None and self.epoch - 1 - self.log.best_epoch >= self.plan.patience

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Note an epoch's metrics, and its weights if they are the best."""
        self.log.epochs.append(metrics)
        if self.plan.patience is None:
            self.log.best_epoch = self.epoch
        elif metrics["val/loss"] < self.best_loss:
            self.best_loss, self.log.best_epoch = metrics["val/loss"], self.epoch
            self.best_state = {name: tensor.clone() for name, tensor in self.evaluated.state_dict().items()}
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain values."""
        learned = self.plan.learned_bits
        return {
            "extent": [self.plan.epochs, self.loader.num_batches],
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "regulariser": self.regulariser.state_dict(),
            "mean": None if self.mean is None else self.mean.state_dict(),
            "learned_bits": None if learned is None else learned.state_dict(),
            "frozen": self.plan.frozen,
            "best_loss": self.best_loss,
            "best_state": self.best_state,
            "log": asdict(self.log),
            "random": random_state(),
        }

    def resume(self, state: dict[str, Any] | None) -> bool:
        """Go on from a stored state; False, and nothing changed, where there is none of this run."""
        if state is None or state["extent"] != [self.plan.epochs, self.loader.num_batches]:
            return False
        if self.plan.learned_bits is not None:
            self.plan.learned_bits.load_state_dict(state["learned_bits"])
            if state["frozen"]:
                self.freeze_bits()  # as it was then: the widths are those that were rounded
        self.model.load_state_dict(state["model"])
        if self.at_once is not None:
            self.at_once = AtOnce(self.model)  # it has copies of steps and widths
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.regulariser.load_state_dict(state["regulariser"])
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        device = self.loader.device
        best = state["best_state"]
        self.best_state = None if best is None else {name: tensor.to(device) for name, tensor in best.items()}
        self.best_loss, self.epoch = state["best_loss"], state["epoch"]
        self.log = TrainingLog(**state["log"])
        restore_random_state(state["random"])
        return True


def _train_epoch(run: _Run) -> float:
    """One epoch; returns its mean loss."""
    model, plan, num_batches = run.model, run.plan, run.loader.num_batches
    model.train()
    losses = []
    settle_step = plan.settle_epoch * num_batches
    for index, batch in enumerate(run.loader.epoch(run.epoch)):
        step = run.epoch * num_batches + index
        if plan.learned_bits is not None and settle_step <= step and not plan.frozen:
            run.freeze_bits()
        learning_bits = plan.learned_bits is not None and step < settle_step
        with run.quantised():
            loss = _loss(model, batch, plan, run.regulariser, learning_bits=learning_bits)
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if plan.gradient_clip is not None:
            nn.utils.clip_grad_norm_(
                [p for g in run.optimiser.param_groups for p in g["params"]], plan.gradient_clip
            )
        run.optimiser.step()
        run.schedule.step()
        if learning_bits:
            assert plan.learned_bits is not None
            plan.learned_bits.step(rate_frac=bit_rate_frac(step / max(settle_step, 1), plan.bit_warmup_frac))
        if run.mean is not None:
            run.mean.update_parameters(model)
        losses.append(loss.detach())
    return _mean_finite(torch.stack(losses), run.epoch)


def _loss(
    model: nn.Module, batch: Batch, plan: TrainingPlan, regulariser: GroupRegulariser, *, learning_bits: bool
) -> torch.Tensor:
    image_bchw = batch.image_bchw
    if plan.channels_last:
        image_bchw = image_bchw.to(memory_format=torch.channels_last)
    device_type = image_bchw.device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=plan.autocast), parametrize.cached():
        logit_bc = model(image_bchw).float()
        loss_b = F.cross_entropy(logit_bc, batch.label_b, reduction="none")
        loss = loss_b.mean()
        if plan.distillation_weight > 0 and plan.teacher is not None:
            with torch.no_grad():
                target_bc = plan.teacher(image_bchw).float().softmax(dim=1)
            follow = F.kl_div(logit_bc.log_softmax(dim=1), target_bc, reduction="batchmean")
            loss = (1 - plan.distillation_weight) * loss + plan.distillation_weight * follow
        if plan.fairness_weight > 0 and plan.regulariser != "none":
            loss = loss + plan.fairness_weight * regulariser(loss_b, batch.group_b)
    if learning_bits and plan.bitrate_weight > 0:
        assert plan.learned_bits is not None
        loss = loss + plan.bitrate_weight * plan.learned_bits.mean_bits() / plan.learned_bits.budget_bits
    return loss


def _mean_finite(loss_s: torch.Tensor, epoch: int) -> float:
    """The mean of an epoch's losses; one look at the device an epoch finds a step that went wrong."""
    finite = torch.isfinite(loss_s)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        value = float(loss_s[step])
        raise TrialError(
            f"loss is {value} at epoch {epoch + 1}, step {step + 1} of {len(loss_s)}; lower the learning rate "
            "(recipe.learning_rate or recipe.finetune_learning_rate) or set recipe.gradient_clip"
        )
    return float(loss_s.mean())


def _optimiser(model: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW; norms, biases and step factors without decay; learned bits have their own optimiser."""
    decayed, plain, gains = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("free_bits_u") or not parameter.requires_grad:
            continue
        if name.endswith("log_gain_u"):
            gains.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": gains, "weight_decay": 0.0, "lr": GAIN_LEARNING_RATE},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.learning_rate, fused=True)


def _rate_schedule(plan: TrainingPlan, steps_per_epoch: int) -> Callable[[int], float]:
    total = max(1, plan.epochs * steps_per_epoch)
    warmup = int(plan.warmup_frac * total)

    def rate_frac(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if plan.schedule == "constant":
            return 1.0
        if plan.schedule == "step":
            return STEP_FACTOR ** sum(progress >= at for at in STEPS_AT)
        return FINAL_RATE_FRAC + (1 - FINAL_RATE_FRAC) * (1 + math.cos(math.pi * progress)) / 2

    return rate_frac


def bit_rate_frac(progress: float, warmup_frac: float) -> float:
    """Share of the bits' learning rate when ``progress`` (0 to 1) of their learning is done: rising, then falling."""
    return min(1.0, progress / warmup_frac if warmup_frac else 1.0) * (1 - 0.9 * progress)


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[Batch], *, autocast: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Class probabilities of a split.

    Returns:
        probability float64 (n, classes), labels int64 (n,), groups int64 (n,), mean cross-entropy.

    Raises:
        TrialError: the model's output is not finite.
    """
    was_training = model.training
    model.eval()
    logits, labels, groups = [], [], []
    with parametrize.cached():
        for batch in batches:
            with torch.autocast(batch.image_bchw.device.type, dtype=torch.bfloat16, enabled=autocast):
                logits.append(model(batch.image_bchw).float())
            labels.append(batch.label_b)
            groups.append(batch.group_b)
    model.train(was_training)
    logit_nc, label_n, group_n = torch.cat(logits).double(), torch.cat(labels), torch.cat(groups)
    if not bool(torch.isfinite(logit_nc).all()):
        raise TrialError("the model's output is not finite on some image; lower the learning rate")
    loss = float(F.cross_entropy(logit_nc, label_n))
    return logit_nc.softmax(dim=1).cpu().numpy(), label_n.cpu().numpy(), group_n.cpu().numpy(), loss

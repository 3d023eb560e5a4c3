"""A search space becomes ordered cells, and a cell gets its key: a hash of what determines its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeGuard

from fqsweep.config import (
    RECIPES,
    Allocating,
    ArchitectureConfig,
    BaqMethod,
    BitLimits,
    DatasetConfig,
    Finetuning,
    Fp32Method,
    Granularity,
    RecipeMethod,
    Record,
    SearchSpace,
    StaticMethod,
    TrainingRecipe,
    UniformMethod,
    WeightRange,
    content_hash,
)
from fqsweep.names import NO_VALUE, PARAMS_OF_ALLOCATION, PARAMS_OF_FINETUNING, budget_label

# Raised when a change of the code changes results, so that finished trials of older code are not reused.
RESULT_VERSION = 4
BYTES_VERSION = 2  # the same, of cells whose budget is in bytes
GAP_VERSION = 2  # of cells whose allocator is ``gap``
# Settings that came later, with what all did before there were any: only another value stands in a key.
ADDED_SETTINGS = {"bit_warmup_frac": 0.0, "mix_temperature": 1.0}
# Of a method's settings: names, budgets (a cell has its own), and what is hashed by what it comes to.
NOT_IN_KEY = {"label", "budgets_bits", "budgets_bytes", "match_moments", "reconstruct", *ADDED_SETTINGS}
BASELINE_FIELDS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "warmup_frac",
    "patience",
    "class_balance",
    "group_balance",
    "augment",
    "gradient_clip",
    "schedule",
    "ema_decay",
    "precision",
    "channels_last",
)


class MethodPoint(Record):
    """One row of the results: a method with every option fixed but the weights that Optuna searches.

    Attributes:
        method: its name, as recorded; ``variant`` tells rows of one method apart (``uniform-4-ft``).
        bits: the one width of ``uniform``, None for the others.
    """

    method: str
    variant: str
    settings: Fp32Method | UniformMethod | StaticMethod | BaqMethod
    bits: int | None = None

    @property
    def free_weights(self) -> dict[str, WeightRange]:
        """The weights that Optuna searches; none where nothing is fine-tuned with them."""
        found = {}
        for name in ("fairness_weight", "bitrate_weight") if _can_finetune(self.settings) else ():
            value = getattr(self.settings, name, None)
            if isinstance(value, WeightRange):
                found[name] = value
        return found


class Cell(Record):
    """A point of the grid; with values for its free weights it is a trial."""

    dataset: DatasetConfig
    group_attribute: str
    architecture: ArchitectureConfig
    point: MethodPoint
    budget_bits: float | None
    budget_bytes: int | None = None
    seed: int
    recipe: TrainingRecipe

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Cell:
        """A cell with other values, checked like any; pydantic's own would keep the keys of the old ones."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**values, **(update or {})})

    @property
    def title(self) -> str:
        """Short name for people: dataset/group, architecture, row, budget, seed."""
        budget = "" if self.budget_bits is None or self.point.bits else f"@{self.budget_bits:g}"
        if self.budget_bytes is not None:
            budget = f"@{self.budget_bytes}B"
        data = f"{self.dataset.name}/{self.group_attribute}"
        return f"{data} {self.architecture.name} {self.point.variant}{budget} seed {self.seed}"

    @property
    def budget(self) -> str:
        """Its budget as it is written, ``none`` where it has none."""
        known = (math.nan if value is None else float(value) for value in (self.budget_bits, self.budget_bytes))
        return budget_label(*known)

    @property
    def used_recipe(self) -> TrainingRecipe:
        """The recipe, with the default where this cell makes no use of a setting: editing that changes nothing."""
        settings = self.point.settings
        unused = []
        if not _can_finetune(settings) or settings.finetune_epochs is not None:
            unused.append("finetune_epochs")
        if not finetune_epochs(self):
            unused += ["finetune_learning_rate", "quantiser_kernels"]
        if isinstance(settings, Fp32Method):
            unused.append("calibration_images")
        fields = TrainingRecipe.model_fields
        return self.recipe.model_copy(update={name: fields[name].default for name in unused})

    @cached_property
    def key(self) -> str:
        """Hash of what determines the result; names shown to people are left out."""
        data = self.dataset.contents
        point = self.point.model_dump(mode="json", exclude={"variant": True, "settings": NOT_IN_KEY})
        settings = self.point.settings
        added = [(name, getattr(settings, name, as_before)) for name, as_before in ADDED_SETTINGS.items()]
        return content_hash(
            [
                RESULT_VERSION,
                data,
                self.group_attribute,
                self.architecture,
                point,
                self.budget_bits,
                None if self.budget_bytes is None else [BYTES_VERSION, self.budget_bytes],
                self.seed,
                self.used_recipe,
                *(["match_moments"] if matches_moments(self) else []),
                *(["reconstruct"] if reconstructs(self) else []),
                *([["gap", GAP_VERSION]] if getattr(settings, "allocator", None) == "gap" else []),
                *((name, value) for name, value in added if value != ADDED_SETTINGS[name]),
            ]
        )

    @cached_property
    def baseline_key(self) -> str:
        """Hash of what determines the full-precision parent, shared by every method, budget and group attribute.

        Only a parent that is trained on balanced groups depends on what the groups are.
        """
        data = self.dataset.contents
        recipe = self.recipe.model_dump(mode="json", include=set(BASELINE_FIELDS))
        groups = self.group_attribute if self.recipe.group_balance == "sampler" else None
        return content_hash([RESULT_VERSION, data, self.architecture, self.seed, recipe, groups])

    @cached_property
    def importance_key(self) -> str | None:
        """Hash of what determines the cost table, None where the method needs none."""
        settings = self.point.settings
        if not isinstance(settings, Allocating):
            return None
        options: list[Any] = [
            settings.importance,
            settings.granularity,
            settings.measured_choices,
            settings.scale,
        ]
        if settings.exempt:
            options.append(settings.exempt)
        return content_hash([self.baseline_key, self.group_attribute, options, self.recipe.calibration_images])


def points_of(
    method: Fp32Method | UniformMethod | StaticMethod | BaqMethod | RecipeMethod,
) -> list[MethodPoint]:
    """The rows that one entry under ``methods`` asks for: one, or one a width and fine-tuning of ``uniform``."""
    if isinstance(method, UniformMethod):
        return [
            MethodPoint(
                method="uniform",
                variant=f"{method.label or 'uniform'}-{bits}{'-ft' if finetune else ''}",
                settings=method.model_copy(update={"bits": (bits,), "finetune": (finetune,)}),
                bits=bits,
            )
            for bits in method.bits
            for finetune in method.finetune
        ]
    if isinstance(method, RecipeMethod):
        given = method.model_dump(exclude={"method", "label"})
        # A comparator is as it was published unless asked.
        given |= {"match_moments": method.matches, "reconstruct": method.reconstructs}
        settings = StaticMethod(method="static", **{**given, **RECIPES[method.method]})
        return [MethodPoint(method=method.method, variant=method.label or method.method, settings=settings)]
    return [MethodPoint(method=method.method, variant=method.label, settings=method)]


def method_points(space: SearchSpace) -> list[MethodPoint]:
    """Every row that the space asks for, in its order."""
    return [point for method in space.methods for point in points_of(method)]


def budgets_of(space: SearchSpace, point: MethodPoint) -> list[tuple[float | None, int | None]]:
    """The budgets of a row, in mean bits or in bytes: its own, its one width, the space's, or none at all."""
    if point.bits is not None:
        return [(float(point.bits), None)]
    settings = point.settings
    if not isinstance(settings, Allocating):
        return [(None, None)]
    own = settings.budgets_bits is not None or settings.budgets_bytes is not None
    source: Allocating | SearchSpace = settings if own else space
    return [
        *((bits, None) for bits in source.budgets_bits or ()),
        *((None, num_bytes) for num_bytes in source.budgets_bytes or ()),
    ]


def expand_cells(space: SearchSpace) -> list[Cell]:
    """The grid: dataset x group attribute x architecture x seed x row x budget, in that order."""
    cells = []
    for dataset in space.datasets:
        for attribute in dataset.group_attributes:
            for architecture in space.architectures:
                for seed in (*space.seeds, *space.search.repeat_seeds):
                    for point in method_points(space):
                        cells += [
                            Cell(
                                dataset=dataset,
                                group_attribute=attribute,
                                architecture=architecture,
                                point=point,
                                budget_bits=budget_bits,
                                budget_bytes=budget_bytes,
                                seed=seed,
                                recipe=space.recipe,
                            )
                            for budget_bits, budget_bytes in budgets_of(space, point)
                        ]
    return cells


def searched_cell(space: SearchSpace, cell: Cell) -> Cell | None:
    """The cell whose chosen weights this one repeats under another seed, None where it does not."""
    if not cell.point.free_weights or cell.seed not in space.search.repeat_seeds:
        return None
    return cell.model_copy(update={"seed": space.seeds[0]})


def trial_key(cell: Cell, *, number: int, weights: dict[str, float]) -> str:
    """Hash of one trial: its cell, its number in the cell's study, its values of the free weights."""
    return content_hash([cell.key, number, weights])


def run_params(cell: Cell, *, weights: dict[str, float]) -> dict[str, str]:
    """The parameters recorded for a trial: the same keys for every method."""
    settings = cell.point.settings
    epochs = finetune_epochs(cell)

    def option(name: str) -> str:
        if name in weights:
            return f"{weights[name]:.6g}"
        is_asked = epochs or name not in PARAMS_OF_FINETUNING
        return _option_text(getattr(settings, name, None)) if is_asked else NO_VALUE

    return {
        "dataset": cell.dataset.name,
        "architecture": cell.architecture.name,
        "method": cell.point.method,
        "variant": cell.point.variant,
        "budget_bits": NO_VALUE if cell.budget_bits is None else f"{cell.budget_bits:g}",
        "budget_bytes": NO_VALUE if cell.budget_bytes is None else str(cell.budget_bytes),
        "seed": str(cell.seed),
        "group_attribute": cell.group_attribute,
        **{name: option(name) for name in PARAMS_OF_ALLOCATION},
        "match_moments": str(matches_moments(cell)).lower(),
        "reconstruct": str(reconstructs(cell)).lower(),
        "finetune_epochs": str(epochs),
        **{name: option(name) for name in PARAMS_OF_FINETUNING},
    }


def _option_text(value: Any) -> str:
    """A setting as a parameter shows it: ``0,2,4``, ``first:8,last:8``, ``layer4.*:1-4``."""
    if isinstance(value, tuple | dict) and not value:
        return NO_VALUE
    if isinstance(value, BitLimits):
        return f"{value.min}-{value.max}"
    if isinstance(value, dict):
        return ",".join(f"{pattern}:{_option_text(own)}" for pattern, own in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return NO_VALUE if value is None else str(value)


def granularity_of(cell: Cell) -> Granularity:
    """Whether the cell's units are channels or tensors."""
    settings = cell.point.settings
    return settings.granularity if isinstance(settings, Allocating) else "channel"


def exempt_of(cell: Cell) -> tuple[str, ...]:
    """Name patterns of the layers that the cell leaves in full precision."""
    settings = cell.point.settings
    return settings.exempt if isinstance(settings, Finetuning) else ()


def matches_moments(cell: Cell) -> bool:
    """Whether the cell's quantised layers are brought back to full precision's mean and spread."""
    settings = cell.point.settings
    return isinstance(settings, Finetuning) and settings.matches


def reconstructs(cell: Cell) -> bool:
    """Whether the weights of the cell's quantised layers are re-fitted before they are rounded."""
    settings = cell.point.settings
    return isinstance(settings, Finetuning) and settings.reconstructs


def finetune_epochs(cell: Cell) -> int:
    """Epochs of fine-tuning in this cell."""
    return epochs_of(cell.point, cell.recipe)


def _can_finetune(settings: Fp32Method | Finetuning) -> TypeGuard[Finetuning]:
    """Whether there is a network to fine-tune, and the row asks for it."""
    return isinstance(settings, Finetuning) and not (
        isinstance(settings, UniformMethod) and not settings.finetune[0]
    )


def epochs_of(point: MethodPoint, recipe: TrainingRecipe) -> int:
    """Epochs of fine-tuning: the method's own, else the recipe's, 0 where it does none."""
    settings = point.settings
    if not _can_finetune(settings):
        return 0
    own = settings.finetune_epochs
    return recipe.finetune_epochs if own is None else own

"""The networks and methods that a search space can name, with all their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fqsweep.config.records import Record

Choices = tuple[int, ...]
Predictor = Literal["taylor_matched", "taylor", "gradient", "grape", "fisher", "hawq"]
Reducer = Literal["max", "mean", "cvar", "balanced", "subtractive", "none"]
Allocator = Literal["mean", "minimax", "minimax_loss", "gap", "quantile"]
Granularity = Literal["channel", "tensor"]
ScaleRule = Literal["absmax", "mse", "curvature"]
Regulariser = Literal["none", "gap", "group_dro"]


class ArchitectureConfig(Record):
    """A timm classifier; a bare name stands for ``{name: ...}``.

    Attributes:
        name: as timm calls it.
        pretrained: true (weights from the hub), false, or a local file of weights with timm's names.
    """

    name: str = Field(min_length=1)
    pretrained: bool | str = False


class WeightRange(Record):
    """A weight that Optuna searches.

    Attributes:
        low, high: the ends of the range.
        start: the first trial's value; None takes ``low``.
        log: search on a logarithmic scale.
    """

    low: float = Field(ge=0)
    high: float = Field(gt=0)
    start: float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> WeightRange:
        if self.high <= self.low:
            raise ValueError(f"high ({self.high:g}) must be above low ({self.low:g})")
        if self.log and self.low <= 0:
            raise ValueError("a log range must start above 0")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start ({self.start:g}) must lie between low and high")
        return self


Weight = Annotated[float, Field(ge=0)] | WeightRange


Budget = Annotated[float, Field(gt=0, le=8)]
BudgetBytes = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(ge=0, le=8)]


def _ascending(choices: Choices) -> Choices:
    if not choices or any(b < 0 or b > 8 for b in choices):
        raise ValueError("bit choices must be whole numbers from 0 to 8")
    return tuple(sorted(set(choices)))


BitChoices = Annotated[Choices, AfterValidator(_ascending)]


def _check_label(label: str) -> str:
    if not label.isprintable() or label != label.strip():
        raise ValueError("must be one line without tabs, and no blank at its ends")
    return label


class Finetuning(Record):
    """What fine-tuned methods share.

    Attributes:
        finetune_epochs: None takes the recipe's, 0 does none.
        fairness_weight: weight of the group regulariser in the fine-tuning loss.
        regulariser: ``gap`` (worst minus best running group loss) or ``group_dro``.
        distillation_weight: share of the loss that follows the full-precision parent's output, 0 to 1.
        exempt: name patterns of layers that stay in full precision; their weights are not in the mean bits, but
            in the packed size.
        match_moments: bring each quantised layer's outputs back to full precision's mean and spread on calibration
            images, before anything is trained (``quant.moments``); None does so for ``static`` and ``baq`` alone.
        reconstruct: re-fit each quantised layer's weights to its outputs in full precision before they are rounded
            (``quant.reconstruction``); needs ``match_moments``. None does so for ``static`` and ``baq`` that have it.
        budgets_bits, budgets_bytes: budgets of this method alone, in place of the search space's; ``uniform`` has
            ``bits`` instead.
    """

    finetune_epochs: int | None = Field(default=None, ge=0)
    fairness_weight: Weight = 0.0
    regulariser: Regulariser = "gap"
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    exempt: tuple[str, ...] = ()
    match_moments: bool | None = None
    reconstruct: bool | None = None
    budgets_bits: tuple[Budget, ...] | None = None
    budgets_bytes: tuple[BudgetBytes, ...] | None = None

    @property
    def matches(self) -> bool:
        """Whether outputs are matched, by choice or by default."""
        return bool(self.match_moments)

    @property
    def reconstructs(self) -> bool:
        """Whether weights are re-fitted, by choice or by default."""
        return bool(self.reconstruct)

    @model_validator(mode="after")
    def _reconstruction_has_moments(self) -> Finetuning:
        if self.reconstruct and not self.matches:
            raise ValueError("reconstruct leaves mean and spread to match_moments: set that to true too")
        return self

    @model_validator(mode="after")
    def _fairness_weight_has_a_regulariser(self) -> Finetuning:
        if self.regulariser == "none" and self.fairness_weight != 0:
            raise ValueError(
                "fairness_weight weighs the regulariser: name one (gap, group_dro), or leave the weight out"
            )
        if self.regulariser == "group_dro" and self.fairness_weight == 0:
            raise ValueError(
                "regulariser group_dro has no effect at fairness_weight 0: give it a weight, or leave it out"
            )
        return self


Label = Annotated[str, Field(min_length=1), AfterValidator(_check_label)]


class Fp32Method(Record):
    """The full-precision parent itself.

    Attributes:
        label: name of its row in the results.
    """

    method: Literal["fp32"]
    label: Label = "fp32"


class UniformMethod(Finetuning):
    """One bit-width for every weight.

    Attributes:
        label: name of its rows in the results, before the width; None: ``uniform``.
        bits: widths; each gives cells of its own.
        finetune: with ``true`` (``-ft`` in the row's name), without (``false``), or ``[false, true]`` for both.
        scale: how the range of a channel's levels is chosen before fine-tuning.
    """

    method: Literal["uniform"]
    label: Label | None = None
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = Field(default=(4, 8), min_length=1)
    finetune: tuple[bool, ...] = Field(default=(False,), min_length=1)
    scale: ScaleRule = "absmax"

    @model_validator(mode="after")
    def _width_is_the_budget(self) -> UniformMethod:
        if self.budgets_bits is not None or self.budgets_bytes is not None:
            raise ValueError("uniform spends what its widths take: give bits in place of budgets")
        return self


class BitLimits(Record):
    """The smallest and largest width that the units of a layer may have.

    Attributes:
        min, max: in bits.
    """

    min: Width = 0
    max: Width = 8

    @model_validator(mode="after")
    def _ordered(self) -> BitLimits:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must not be below min ({self.min})")
        return self


class Allocating(Finetuning):
    """What methods share that spend a bit budget over units.

    Attributes:
        importance: which predictor of the loss rise fills the cost table; where none is named, ``taylor_matched``,
            and ``taylor`` where ``match_moments`` is off.
        reducer: how group costs become one; ``none`` keeps them apart (allocator ``minimax``).
        allocator: ``mean`` (hull and sort), ``minimax`` (the largest rise of any group's loss), ``minimax_loss``
            (the largest resulting loss), ``gap`` (the largest difference of resulting losses, plus their mean rise)
            or ``quantile`` (the paper's).
        granularity: bits per output ``channel`` or per ``tensor``.
        choices: bit-widths a unit may have; 0 drops it.
        scale: how the range of a unit's levels is chosen before fine-tuning.
        pin: layer-name pattern -> fixed bits, for example ``{first: 8, last: 8}`` or ``{"layer1.*": 4}``.
        limits: layer-name pattern -> smallest and largest bits, for example ``{"layer4.*": {min: 1, max: 4}}``; of
            layers that are pinned, too, the pin counts.
    """

    importance: Predictor = Field(
        default_factory=lambda given: "taylor" if given.get("match_moments") is False else "taylor_matched"
    )
    reducer: Reducer = "none"
    allocator: Allocator = "minimax"
    granularity: Granularity = "channel"
    choices: BitChoices = tuple(range(9))
    scale: ScaleRule = "curvature"
    pin: dict[str, Width] = Field(default_factory=dict)
    limits: dict[str, BitLimits] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _importance_fits_matching(self) -> Allocating:
        if self.importance == "taylor_matched" and self.match_moments is False:
            raise ValueError(
                "importance taylor_matched prices what matching leaves: it needs match_moments, or set it to taylor"
            )
        return self

    @model_validator(mode="after")
    def _reducer_fits_allocator(self) -> Allocating:
        apart = self.allocator in ("minimax", "minimax_loss", "gap")
        if apart and self.reducer != "none":
            raise ValueError(f"allocator {self.allocator} works on the groups' own costs: set reducer to none")
        if not apart and self.reducer == "none":
            raise ValueError(
                f"allocator {self.allocator} needs a reducer (max, mean, cvar, balanced, subtractive)"
            )
        if (self.pin or self.limits) and self.allocator == "quantile":
            raise ValueError("allocator quantile gives bits by rank alone: it cannot pin or limit layers")
        return self

    @property
    def matches(self) -> bool:
        """Outputs are matched unless the space says no."""
        return self.match_moments is not False

    @property
    def reconstructs(self) -> bool:
        """Weights are re-fitted where outputs are matched, unless the space says no."""
        return self.matches if self.reconstruct is None else self.reconstruct

    @property
    def measured_choices(self) -> tuple[int, ...]:
        """Every width that some unit may have: the choices and the pinned widths."""
        return tuple(sorted({*self.choices, *self.pin.values()}))


class StaticMethod(Allocating):
    """Importance, allocation under the budget, fine-tuning with the bits fixed.

    Attributes:
        label: name of its row in the results.
    """

    method: Literal["static"]
    label: Label = "static"


class BaqMethod(Allocating):
    """Bit-aware quantisation: weights and bits learned together, started from the allocation.

    Attributes:
        label: name of its row in the results.
        bit_gradient: ``fracbits`` (difference between the two neighbouring widths) or ``lsq``.
        bit_learning_rate: step of the bits' optimiser, in bits.
        bit_warmup_frac: share of the bits' learning in which their step rises to ``bit_learning_rate``.
        settle_frac: share of fine-tuning after the bits are rounded and frozen.
        mix_temperature: how a width between two whole ones mixes their grids (``fracbits``): 1 in proportion, smaller
            nearer to the closer grid alone; the bits' gradient stays the grids' difference.
        bitrate_weight: pull on the mean bits, as a share of the budget, within the loss.
    """

    method: Literal["baq"]
    label: Label = "baq"
    bit_gradient: Literal["fracbits", "lsq"] = "fracbits"
    bit_learning_rate: float = Field(default=0.02, gt=0)
    bit_warmup_frac: float = Field(default=0.0, ge=0, lt=1)
    settle_frac: float = Field(default=0.34, ge=0, lt=1)
    mix_temperature: float = Field(default=1.0, gt=0, le=1)
    bitrate_weight: Weight = 0.0

    @model_validator(mode="after")
    def _choices_without_holes(self) -> BaqMethod:
        if self.choices != tuple(range(self.choices[0], self.choices[-1] + 1)) or len(self.choices) < 2:
            raise ValueError(
                "learned bits move between neighbouring widths: choices must be two or more without a hole"
            )
        return self

    @model_validator(mode="after")
    def _something_to_mix(self) -> BaqMethod:
        if self.mix_temperature != 1 and self.bit_gradient != "fracbits":
            raise ValueError(
                f"mix_temperature is for bit_gradient fracbits: {self.bit_gradient} mixes no grids"
            )
        return self


# Comparators as settings of ``static``. Sources: FairGRAPE (Lin, Kim, Joo 2022), FairQuantize (Guo et al.
# 2024), HAWQ-V2 (Dong et al. 2020), FairQuant (Woergaard and Selvan 2026). All spend the same exact budget.
# ``reference`` is FairQuant as published, its allocation by rank; ``fairquant`` takes its importance and choices, but
# allocates them at the lowest cost.
RECIPES: dict[str, dict[str, Any]] = {
    "fairgrape": {
        "importance": "grape",
        "reducer": "balanced",
        "allocator": "mean",
        "choices": tuple(range(2, 9)),
        "scale": "absmax",
    },
    "fairquantize": {
        "importance": "gradient",
        "reducer": "subtractive",
        "allocator": "quantile",
        "choices": (2, 4, 8),
        "scale": "absmax",
    },
    "hawq": {
        "importance": "hawq",
        "reducer": "mean",
        "allocator": "mean",
        "granularity": "tensor",
        "choices": tuple(range(2, 9)),
        "scale": "absmax",
    },
    "fairquant": {
        "importance": "grape",
        "reducer": "balanced",
        "allocator": "mean",
        "choices": (2, 4, 8),
        "scale": "absmax",
    },
    "reference": {
        "importance": "grape",
        "reducer": "balanced",
        "allocator": "quantile",
        "choices": (2, 4, 8),
        "scale": "absmax",
    },
}

# Whatever ``RECIPES`` names is a method; a type checker, which cannot read a table, sees text.
if TYPE_CHECKING:
    Recipe = str
else:
    Recipe = Literal[tuple(RECIPES)]


class RecipeMethod(Finetuning):
    """A published comparator at the same budget; what it fixes is in ``fqsweep.config.methods.RECIPES``.

    Attributes:
        method: which one.
        label: name of its row in the results; None: the method's.
    """

    method: Recipe
    label: Label | None = None


MethodConfig = Annotated[
    Fp32Method | UniformMethod | StaticMethod | BaqMethod | RecipeMethod, Field(discriminator="method")
]

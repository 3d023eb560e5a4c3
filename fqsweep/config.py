"""Frozen records of everything a search space can say. YAML holds values, these hold their meaning.

The records check single values and their combinations; where a file is wrong, ``fqsweep.space``
turns the checks' findings into one message with every problem's path and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Choices = tuple[int, ...]
Predictor = Literal["taylor", "gradient", "grape", "fisher", "hawq"]
Reducer = Literal["max", "mean", "cvar", "balanced", "subtractive", "none"]
Allocator = Literal["mean", "minimax", "minimax_loss", "gap", "quantile"]
Granularity = Literal["channel", "tensor"]
ScaleRule = Literal["absmax", "mse", "curvature"]
Regulariser = Literal["none", "gap", "group_dro"]
KernelChoice = Literal["auto", "eager", "compiled"]
Schedule = Literal["cosine", "step", "constant"]
EarlyStopping = Literal["none", "median", "halving"]


class Record(BaseModel):
    """Base of all records: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def content_hash(value: Any) -> str:
    """A 16-digit hash of a record or plain value: the same content gives the same hash on every machine."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=_as_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no content hash")


def _named(value: Any) -> Any:
    """Let a bare string stand for a record that only needs its name."""
    return {"name": value} if isinstance(value, str) else value


# --- data ---------------------------------------------------------------------------------------


class SplitFractions(Record):
    """How the images are divided; the split depends on ``seed`` and the images' content alone."""

    train: float = Field(default=0.6, gt=0, lt=1)
    calibration: float = Field(default=0.1, gt=0, lt=1)
    validation: float = Field(default=0.15, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitFractions:
        total = self.train + self.calibration + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + calibration + validation + test must be 1, but is {total:g}")
        return self


CROSS = " x "


def crossed_parts(attribute: str) -> tuple[str, ...]:
    """The attributes that a group attribute crosses; a plain one is its only part.

    >>> crossed_parts("sex x age"), crossed_parts("sex")
    (('sex', 'age'), ('sex',))
    """
    return tuple(part.strip() for part in attribute.split(CROSS))


def plain_attributes(attributes: tuple[str, ...]) -> tuple[str, ...]:
    """All attributes that take part in ``attributes``, crossed or not, each once."""
    return tuple(dict.fromkeys(part for attribute in attributes for part in crossed_parts(attribute)))


def _attribute_of(*known: str) -> Callable[[str], str]:
    """A check that a group attribute is one of ``known`` or several of them crossed."""

    def check(attribute: str) -> str:
        parts = crossed_parts(attribute)
        if len(set(parts)) < len(parts) or not set(parts) <= set(known):
            raise ValueError(f"must be one of {', '.join(known)}, or several crossed ({CROSS.join(known)!r})")
        return CROSS.join(parts)

    return check


SkinAttribute = Annotated[str, AfterValidator(_attribute_of("skin_type", "skin_tone"))]
PersonAttribute = Annotated[str, AfterValidator(_attribute_of("sex", "age"))]


class DatasetBase(Record):
    """What every data set has.

    Attributes:
        name: the value of the run parameter ``dataset``; unique within a search space.
        group_attributes: whose groups are compared; every attribute gives its own cells, all sharing
            one full-precision parent. ``sex x age`` crosses two: each pair is a group. Samples of unknown group
            in any of them are left out.
        image_size: side of the square images in pixels.
        min_group_count: a group with fewer images in a split is refused, not scored.
        label_map: new class name -> list of the set's own classes; unlisted classes are left out.
        drop_classes: the set's own classes that are left out.
        max_images: use only a seeded subset of this many images (stratified), None for all.
    """

    name: str = Field(min_length=1)
    group_attributes: tuple[str, ...] = Field(min_length=1)
    image_size: int = Field(default=224, ge=16, le=1024)
    splits: SplitFractions = SplitFractions()
    min_group_count: int = Field(default=10, ge=1)
    label_map: dict[str, tuple[str, ...]] | None = None
    drop_classes: tuple[str, ...] = ()
    max_images: int | None = Field(default=None, ge=50)


class FilesBase(DatasetBase):
    """What data sets have that are read from image files.

    Attributes:
        unknown_groups: ``drop`` images whose group is missing in the table, or ``keep`` them as a group.
        missing_images: ``refuse`` a table that lists images which are not there, or ``drop`` those rows (for
            sets that are fetched one by one, of which some are gone for good).
    """

    unknown_groups: Literal["drop", "keep"] = "drop"
    missing_images: Literal["refuse", "drop"] = "refuse"


class SynthdermConfig(DatasetBase):
    """Procedural skin images (see ``fqsweep.data.synthderm``).

    Attributes:
        num_images: images in all splits together.
        difficulty: 0 easy to 1 hard: how far the classes' shapes, borders, colours and textures overlap.
        imbalance: share of images of the lightest type over share of the darkest.
        generator_seed: another seed is another data set.
    """

    kind: Literal["synthderm"]
    name: str = "synthderm"
    group_attributes: tuple[SkinAttribute, ...] = Field(default=("skin_type",), min_length=1)
    image_size: int = Field(default=64, ge=16, le=1024)
    num_images: int = Field(default=6000, ge=100)
    difficulty: float = Field(default=0.5, ge=0, le=1)
    imbalance: float = Field(default=4.0, ge=1, le=50)
    generator_seed: int = 0


class Isic2019Config(FilesBase):
    """ISIC 2019 in its official folder layout, ``<data-dir>/isic2019`` (or ``folder``).

    Attributes:
        age_edges: inner borders of the age bins in years; (40, 60) gives <40, 40-59, 60+.
    """

    kind: Literal["isic2019"]
    name: str = "isic2019"
    folder: str = "isic2019"
    group_attributes: tuple[PersonAttribute, ...] = Field(default=("sex",), min_length=1)
    age_edges: tuple[int, ...] = (40, 60)


class Fitzpatrick17kConfig(FilesBase):
    """Fitzpatrick17k with its public CSV, ``<data-dir>/fitzpatrick17k`` (or ``folder``).

    Attributes:
        label_level: ``label`` (114 conditions), ``nine_partition_label`` or ``three_partition_label``.
        group_attributes: ``skin_type`` (six types) or ``skin_tone`` (types 1-3 against 4-6).
        drop_wrong_labels: leave out the images that the authors' quality check marked "3 Wrongly labelled".
        official_splits: use the lists of the prepared archive (``train.csv`` and others beside the images);
            a split without a list is taken out of the training list.
    """

    kind: Literal["fitzpatrick17k"]
    name: str = "fitzpatrick17k"
    folder: str = "fitzpatrick17k"
    group_attributes: tuple[SkinAttribute, ...] = Field(default=("skin_tone",), min_length=1)
    label_level: Literal["label", "nine_partition_label", "three_partition_label"] = "label"
    drop_wrong_labels: bool = False
    official_splits: bool = False


class TableConfig(FilesBase):
    """Any CSV or Parquet file with an image folder.

    Attributes:
        csv: path of the table, relative to the data folder or absolute; ``.parquet`` is read as Parquet.
        images: the image folder, relative to the data folder or absolute.
        image_column: file name or path below ``images``; a missing suffix is looked up.
        label_column: the class.
        group_columns: group attribute -> column.
        patient_column: images with one value here stay on one side of the split.
        group_maps: group attribute -> {group name: list of values}; unlisted values are unknown.
        group_edges: group attribute -> rising inner borders of bins; [40, 60] gives <40, 40-59 and 60+.
        split_column: the split of each image (train, calibration, validation, test); rows without one are left
            out, and a split that never occurs is taken out of train.
    """

    kind: Literal["table"]
    csv: str
    images: str
    image_column: str
    label_column: str
    group_columns: dict[str, str] = Field(min_length=1)
    patient_column: str | None = None
    group_maps: dict[str, dict[str, tuple[str | int | float, ...]]] = Field(default_factory=dict)
    group_edges: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    split_column: str | None = None

    @model_validator(mode="after")
    def _attributes_have_columns(self) -> TableConfig:
        for attribute in (*plain_attributes(self.group_attributes), *self.group_maps, *self.group_edges):
            if attribute not in self.group_columns:
                known = ", ".join(self.group_columns)
                raise ValueError(f"group attribute {attribute!r} has no entry in group_columns (has: {known})")
        for attribute, edges in self.group_edges.items():
            if attribute in self.group_maps:
                raise ValueError(f"group attribute {attribute!r} has both group_maps and group_edges; keep one")
            if not edges or list(edges) != sorted(set(edges)):
                raise ValueError(f"group_edges of {attribute!r} must be rising numbers such as [40, 60]")
        return self


DatasetConfig = Annotated[
    SynthdermConfig | Isic2019Config | Fitzpatrick17kConfig | TableConfig, Field(discriminator="kind")
]


# --- models, methods ----------------------------------------------------------------------------


class ArchitectureConfig(Record):
    """A timm classifier. ``pretrained``: true (hub weights), false, or a local file of weights."""

    name: str = Field(min_length=1)
    pretrained: bool | str = False


class WeightRange(Record):
    """A weight that Optuna searches between ``low`` and ``high``; ``start`` is its first trial."""

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


def _check_choices(choices: Choices) -> Choices:
    if not choices or any(b < 0 or b > 8 for b in choices):
        raise ValueError("bit choices must be whole numbers from 0 to 8")
    return tuple(sorted(set(choices)))


BitChoices = Annotated[
    Choices, BeforeValidator(lambda v: _check_choices(tuple(v)) if isinstance(v, (list, tuple)) else v)
]


class Finetuning(Record):
    """What fine-tuned methods share.

    Attributes:
        finetune_epochs: None takes the recipe's, 0 does none.
        fairness_weight: weight of the group regulariser in the fine-tuning loss.
        regulariser: ``gap`` (worst minus best running group loss) or ``group_dro``.
        distillation_weight: share of the loss that follows the full-precision parent's output, 0 to 1.
        exempt: name patterns of layers that stay in full precision; their weights are not in the mean bits, but
            in the packed size.
        budgets_bits, budgets_bytes: budgets of this method alone, in place of the search space's.
    """

    finetune_epochs: int | None = Field(default=None, ge=0)
    fairness_weight: Weight = 0.0
    regulariser: Regulariser = "gap"
    distillation_weight: float = Field(default=0.0, ge=0, le=1)
    exempt: tuple[str, ...] = ()
    budgets_bits: tuple[Budget, ...] | None = None
    budgets_bytes: tuple[BudgetBytes, ...] | None = None


class Fp32Method(Record):
    """The full-precision parent itself."""

    method: Literal["fp32"]
    label: str = "fp32"


class UniformMethod(Finetuning):
    """One bit-width for every weight. Each of ``bits`` and ``finetune`` gives cells of its own."""

    method: Literal["uniform"]
    label: str | None = None
    bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (4, 8)
    finetune: tuple[bool, ...] = (False,)
    scale: ScaleRule = "absmax"


class BitLimits(Record):
    """The smallest and largest width that the units of a layer may have."""

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
        importance: which predictor of the loss rise fills the cost table.
        reducer: how group costs become one; ``none`` keeps them apart (allocator ``minimax``).
        allocator: ``mean`` (hull and sort), ``minimax`` (the largest rise of any group's loss), ``minimax_loss``
            (the largest resulting loss), ``gap`` (the largest difference of resulting losses, plus their mean rise)
            or ``quantile`` (the paper's).
        granularity: bits per output ``channel`` or per ``tensor``.
        choices: bit-widths a unit may have; 0 drops it.
        scale: how the range of a unit's levels is chosen before fine-tuning.
        pin: layer-name pattern -> fixed bits, for example ``{first: 8, last: 8}`` or ``{"layer1.*": 4}``.
        limits: layer-name pattern -> smallest and largest bits, for example ``{"layer4.*": {min: 1, max: 4}}``.
    """

    importance: Predictor = "taylor"
    reducer: Reducer = "none"
    allocator: Allocator = "minimax"
    granularity: Granularity = "channel"
    choices: BitChoices = tuple(range(9))
    scale: ScaleRule = "curvature"
    pin: dict[str, Width] = Field(default_factory=dict)
    limits: dict[str, BitLimits] = Field(default_factory=dict)

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
    def measured_choices(self) -> tuple[int, ...]:
        """Every width that some unit may have: the choices and the pinned widths."""
        return tuple(sorted({*self.choices, *self.pin.values()}))


class StaticMethod(Allocating):
    """Importance, allocation under the budget, fine-tuning with the bits fixed."""

    method: Literal["static"]
    label: str = "static"


class BaqMethod(Allocating):
    """Bit-aware quantisation: weights and bits learned together, started from the allocation.

    Attributes:
        bit_gradient: ``fracbits`` (difference between the two neighbouring widths) or ``lsq``.
        bit_learning_rate: step of the bits' optimiser, in bits.
        settle_frac: share of fine-tuning after the bits are rounded and frozen.
        bitrate_weight: pull on the mean bits, as a share of the budget, within the loss.
    """

    method: Literal["baq"]
    label: str = "baq"
    bit_gradient: Literal["fracbits", "lsq"] = "fracbits"
    bit_learning_rate: float = Field(default=0.02, gt=0)
    settle_frac: float = Field(default=0.34, ge=0, lt=1)
    bitrate_weight: Weight = 0.0

    @model_validator(mode="after")
    def _choices_without_holes(self) -> BaqMethod:
        if self.choices != tuple(range(self.choices[0], self.choices[-1] + 1)) or len(self.choices) < 2:
            raise ValueError(
                "learned bits move between neighbouring widths: choices must be two or more without a hole"
            )
        return self


class RecipeMethod(Finetuning):
    """A published comparator at the same exact budget; what it fixes is in ``RECIPES``."""

    method: Literal["fairgrape", "fairquantize", "hawq", "fairquant", "reference"]
    label: str | None = None


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

MethodConfig = Annotated[
    Fp32Method | UniformMethod | StaticMethod | BaqMethod | RecipeMethod, Field(discriminator="method")
]


# --- training, search, resources -----------------------------------------------------------------


class TrainingRecipe(Record):
    """How networks are trained; part of the identity of every baseline and trial.

    Attributes:
        learning_rate, weight_decay: AdamW's; ``finetune_learning_rate`` is used after quantising.
        schedule: ``cosine`` falls to 2 % of the rate; ``step`` divides it by 10 after a half and three quarters of
            the steps; ``constant`` keeps it.
        patience: stop after this many epochs without a better validation loss, None never.
        class_balance: ``sampler`` draws classes equally often, ``none`` as they come.
        group_balance: ``sampler`` draws groups equally often; with ``class_balance`` each class of each group. The
            parent then depends on the group attribute.
        augment: ``none``, ``flips``, ``standard`` (flips, rotation, shift, crop, brightness, contrast) or
            ``autoaugment`` (flips, rotation, shift and AutoAugment's ImageNet policy, with its strong colours).
        gradient_clip: largest norm of the gradient, None for no clipping.
        warmup_frac: share of the steps with a rising rate before the schedule begins.
        ema_decay: evaluate and keep a running mean of the full-precision parent's weights with this decay a
            step, None for the weights themselves.
        calibration_images: how many images of the calibration split importance uses, None for all.
        quantiser_kernels: ``compiled`` fuses the quantisers' arithmetic (10 to 30 s once a process on a CPU);
            ``auto`` does so on a GPU and where training is long enough to earn that back.
        precision: ``bf16`` computes in bfloat16 on a GPU.
        channels_last: memory layout of images and weights; ``auto`` uses it on a GPU.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    schedule: Schedule = "cosine"
    warmup_frac: float = Field(default=0.1, ge=0, lt=1)
    patience: int | None = Field(default=None, ge=1)
    class_balance: Literal["none", "sampler"] = "none"
    group_balance: Literal["none", "sampler"] = "none"
    augment: Literal["none", "flips", "standard", "autoaugment"] = "flips"
    gradient_clip: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    finetune_epochs: int = Field(default=3, ge=0)
    finetune_learning_rate: float = Field(default=1e-4, gt=0)
    calibration_images: int | None = Field(default=None, ge=8)
    precision: Literal["fp32", "bf16"] = "fp32"
    quantiser_kernels: KernelChoice = "auto"
    channels_last: Literal["auto", "always", "never"] = "auto"


class SearchConfig(Record):
    """Optuna inside the cells that have free weights.

    Attributes:
        trials_per_cell: trials of a cell with a free weight; others have one.
        objectives: metrics to optimise, validation only; directions come from ``fqsweep.names``.
        sampler: ``tpe`` or ``nsga2``.
        early_stopping: which rule of ``fqsweep.stopping`` ends unpromising trials on validation data, or ``none``.
        repeat_seeds: seeds beside ``seeds`` in which nothing is searched: a cell with free weights has one trial
            there, with the weights that its first seed chose on validation data; other cells are as in any seed.
    """

    trials_per_cell: int = Field(default=4, ge=1)
    objectives: tuple[str, ...] = ("val/acc_worst", "bits/mean_weight")
    sampler: Literal["tpe", "nsga2"] = "tpe"
    early_stopping: EarlyStopping = "median"
    repeat_seeds: tuple[int, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _validation_only(self) -> SearchConfig:
        from fqsweep.names import metric_keys

        for key in self.objectives:
            if key.startswith("test/"):
                raise ValueError(f"{key}: test data may not choose a model; use val/{key[5:]}")
            if key not in metric_keys():
                raise ValueError(f"{key!r} is no recorded metric")
        return self


class Resources(Record):
    """What one trial takes.

    Attributes:
        gpus_per_trial: may be a fraction: 0.25 puts four trials on a GPU. ``auto``: the first trials of a data
            set and architecture have a GPU each; what they used at most says how many of the next share one.
        max_attempts: how often a trial is tried where its worker dies, hangs or meets a passing fault.
        time_limit_s: a trial that takes longer is killed and tried again, from its last epoch; None: no limit.
    """

    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = 0.0
    max_attempts: int = Field(default=3, ge=1)
    time_limit_s: float | None = Field(default=None, gt=0)

    @property
    def most_gpus(self) -> float:
        """GPUs of one trial as far as it is known before it starts: all of one for ``auto``."""
        return 1.0 if self.gpus_per_trial == "auto" else self.gpus_per_trial


class SearchSpace(Record):
    """A whole search space, as one YAML file says it."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    architectures: tuple[Annotated[ArchitectureConfig, BeforeValidator(_named)], ...] = Field(min_length=1)
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    budgets_bits: tuple[Budget, ...] = ()
    budgets_bytes: tuple[BudgetBytes, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    recipe: TrainingRecipe = TrainingRecipe()
    search: SearchConfig = SearchConfig()
    resources: Resources = Resources()

"""The whole search space: training, search, resources, and the grid over everything else."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fqsweep.config.datasets import DatasetConfig
from fqsweep.config.methods import ArchitectureConfig, Budget, BudgetBytes, MethodConfig
from fqsweep.config.records import Record, named
from fqsweep.names import metric_keys

KernelChoice = Literal["auto", "eager", "compiled"]
Schedule = Literal["cosine", "step", "constant"]
EarlyStopping = Literal["none", "median", "halving"]
Seed = Annotated[int, Field(ge=0)]


class TrainingRecipe(Record):
    """How networks are trained; part of the identity of every baseline and trial.

    Attributes:
        epochs: of the full-precision parent.
        finetune_epochs: of the trials that fine-tune, unless their method says otherwise.
        batch_size: images a step.
        learning_rate, weight_decay: AdamW's.
        finetune_learning_rate: in place of ``learning_rate`` after quantising.
        schedule: ``cosine`` falls to 2 % of the rate; ``step`` divides it by 10 after a half and three quarters of
            the steps; ``constant`` keeps it.
        patience: stop the full-precision parent after this many epochs without a better validation loss, None never.
        class_balance: ``sampler`` draws classes equally often, ``none`` as they come.
        group_balance: ``sampler`` draws groups equally often; with ``class_balance`` each class of each group. The
            parent then depends on the group attribute.
        augment: ``none``, ``flips``, ``standard`` (flips, rotation, shift, crop, brightness, contrast) or
            ``autoaugment`` (flips, rotation, shift and AutoAugment's ImageNet policy, with its strong colours).
        gradient_clip: largest norm of the gradient, None for no clipping.
        warmup_frac: share of the parent's steps with a rising rate before the schedule begins; fine-tuning has none.
        ema_decay: evaluate and keep a running mean of the full-precision parent's weights with this decay a
            step, None for the weights themselves.
        calibration_images: how many images of the calibration split importance uses, None for all.
        quantiser_kernels: ``compiled`` fuses the quantisers' arithmetic, ``auto`` does so too, but on a CPU with the
            bit gradient ``lsq`` only where training is long enough to earn 20 s of compilation back.
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
        early_stopping: which rule of ``fqsweep.engine.stopping`` ends unpromising trials on validation data, or
            ``none``. Trials that an earlier start stopped stay so.
        repeat_seeds: seeds beside ``seeds`` in which nothing is searched: a cell with free weights has one trial
            there, with the weights that its first seed chose on validation data; other cells are as in any seed.
        seed: of the sampler.
    """

    trials_per_cell: int = Field(default=4, ge=1)
    objectives: tuple[str, ...] = Field(default=("val/acc_worst", "bits/mean_weight"), min_length=1)
    sampler: Literal["tpe", "nsga2"] = "tpe"
    early_stopping: EarlyStopping = "median"
    repeat_seeds: tuple[Seed, ...] = ()
    seed: Seed = 0

    @model_validator(mode="after")
    def _validation_only(self) -> SearchConfig:
        for key in self.objectives:
            if key.startswith("test/"):
                raise ValueError(f"{key}: test data may not choose a model; use val/{key[5:]}")
            if key not in metric_keys():
                near = difflib.get_close_matches(key, metric_keys(), n=3, cutoff=0.5) or metric_keys()
                raise ValueError(f"{key!r} is no objective; near: {', '.join(near)}")
        return self


class Resources(Record):
    """What one trial takes.

    Attributes:
        cpus_per_trial: threads of a trial, and how many trials fit on a machine.
        gpus_per_trial: may be a fraction: 0.25 puts four trials on a GPU, and each may take a quarter of its memory.
            ``auto``: the first trials of a data set and architecture have a GPU each, those that train apart from
            those that only score; what they used at most says how many of the next share one.
        max_attempts: how often a trial is tried where its worker dies, hangs or meets a passing fault.
        time_limit_s: a trial that takes longer is killed and tried again, from its last saved epoch; None: no limit.
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
    """A whole search space, as one YAML file says it.

    Attributes:
        name: of the sweep, and of its output folder unless ``--out`` is given.
        datasets, architectures, methods, seeds: the axes of the grid.
        budgets_bits: mean bits a quantised weight, for every method that spends a budget.
        budgets_bytes: the same in bytes of the packed file.
        recipe: how networks are trained.
        search: how free weights are searched.
        resources: what one trial takes.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    architectures: tuple[Annotated[ArchitectureConfig, BeforeValidator(named("name"))], ...] = Field(
        min_length=1
    )
    methods: tuple[Annotated[MethodConfig, BeforeValidator(named("method"))], ...] = Field(min_length=1)
    budgets_bits: tuple[Budget, ...] = ()
    budgets_bytes: tuple[BudgetBytes, ...] = ()
    seeds: tuple[Seed, ...] = Field(min_length=1)
    recipe: TrainingRecipe = TrainingRecipe()
    search: SearchConfig = SearchConfig()
    resources: Resources = Resources()

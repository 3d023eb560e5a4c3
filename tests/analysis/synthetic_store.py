"""Writes MLflow stores as a sweep does, with made-up figures.

python tests/analysis/synthetic_store.py sqlite:///demo.db demo
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from fqsweep import names

SCRIPT_NAME = "<script>alert(1)</script>"
GROUPS = {"sex": ("female", "male"), "age": ("under 40", "40-59", "60 and over")}
LOSS = {"uniform": 0.010, "hawq": 0.007, "fairgrape": 0.006, "static": 0.003, "baq": 0.002}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run to write."""

    variant: str
    budget_bits: str
    seed: int = 0
    architecture: str = "resnet18"
    group_attribute: str = "sex"
    dataset: str = "isic2019"
    fairness_weight: str = "none"
    status: str = "FINISHED"
    key: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)


def made_up_metrics(spec: Spec) -> dict[str, float]:
    """Plausible figures, the same for the same spec."""
    text = f"{spec.variant} {spec.budget_bits} {spec.seed} {spec.architecture} {spec.group_attribute}"
    rng = np.random.default_rng(list(f"{text} {spec.fairness_weight}".encode()))
    bits = 32.0 if spec.budget_bits == names.NO_VALUE else float(spec.budget_bits)
    scale = next((v for k, v in LOSS.items() if spec.variant.startswith(k)), 0.0)
    base = {"resnet18": 0.89, "deit_tiny_patch16_224": 0.86}.get(spec.architecture, 0.88)
    overall = base - scale * 6 / bits**1.2 + rng.normal(0, 0.004)
    metrics: dict[str, float] = {}
    for split in names.SPLIT_PREFIXES:
        metrics |= _split_metrics(split, overall + rng.normal(0, 0.004), GROUPS[spec.group_attribute], rng)
    metrics["bits/mean_weight"] = bits if spec.variant.startswith(("uniform", "fp32")) else bits * 0.998
    metrics["size/packed_bytes"] = 11_180_000 * bits / 8 * 1.014 + 60_000
    metrics["ops/effective_gbops"] = 1.82 * bits * 32
    metrics["time/train_s"] = 0.0 if scale == 0 else 180 + 40 * rng.random()
    metrics["time/total_s"] = metrics["time/train_s"] + 25
    metrics |= spec.metrics
    return {key: value for key, value in metrics.items() if key not in spec.without}


def _split_metrics(
    split: str, overall: float, groups: tuple[str, ...], rng: np.random.Generator
) -> dict[str, float]:
    accuracy = {g: overall - 0.02 * i + rng.normal(0, 0.004) for i, g in enumerate(groups)}
    average, worst = float(np.mean(list(accuracy.values()))), min(accuracy.values())
    values = {m.key: 0.05 + 0.01 * rng.random() for m in names.GROUP_METRICS if m.direction == "minimize"}
    values |= {"acc_overall": overall, "acc_avg": average, "acc_worst": worst, "acc_gap": average - worst}
    values |= {"balanced_acc": overall - 0.1, "balanced_acc_worst": worst - 0.12}
    values |= {"auc_macro": overall + 0.03, "auc_worst": worst + 0.02}
    metrics = {f"{split}/{key}": value for key, value in values.items()}
    for i, group in enumerate(groups):
        metrics[f"{split}/acc_group/{group}"] = accuracy[group]
        metrics[f"{split}/count_group/{group}"] = 900.0 - 340 * i
    return metrics


def grid(
    *, seeds: Iterable[int], architectures: Iterable[str], attributes: Iterable[str], budgets: Iterable[str]
) -> Iterator[Spec]:
    """A whole sweep: fp32, two uniform rows, four methods at each budget; baq searched with two weights."""
    for architecture in architectures:
        for attribute in attributes:
            for seed in seeds:
                place = {"architecture": architecture, "group_attribute": attribute, "seed": seed}
                yield Spec(variant="fp32", budget_bits="none", **place)
                for bits in ("4", "8"):
                    yield Spec(variant=f"uniform-{bits}", budget_bits=bits, **place)
                for budget in budgets:
                    for variant in ("hawq", "fairgrape", "static"):
                        yield Spec(variant=variant, budget_bits=budget, **place)
                    for weight in ("0.1", "0.7"):
                        yield Spec(variant="baq", budget_bits=budget, fairness_weight=weight, **place)


def write_sweep(client: MlflowClient, sweep: str, specs: Iterable[Spec], *, start_ms: int = 1_000_000) -> str:
    """Write a parent run and its children; return the parent's run id."""
    found = client.get_experiment_by_name(names.DEFAULT_EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(names.DEFAULT_EXPERIMENT)
    tags = {names.TAG_KIND: names.KIND_SWEEP, names.TAG_SWEEP: sweep}
    parent = client.create_run(experiment, start_time=start_ms, tags=tags, run_name=sweep).info.run_id
    for i, spec in enumerate(specs, start=1):
        _write_run(client, experiment, parent, sweep, spec, start_ms=start_ms + i)
    client.set_terminated(parent)
    return parent


def _write_run(
    client: MlflowClient, experiment: str, parent: str, sweep: str, spec: Spec, *, start_ms: int
) -> None:
    tags = {names.TAG_PARENT: parent, names.TAG_KIND: names.KIND_TRIAL, names.TAG_SWEEP: sweep}
    run = client.create_run(experiment, start_time=start_ms, tags=tags).info.run_id
    params = dict.fromkeys(names.RUN_PARAMS, names.NO_VALUE)
    params |= {"dataset": spec.dataset, "architecture": spec.architecture, "variant": spec.variant}
    params |= {"method": spec.variant.split("-")[0], "budget_bits": spec.budget_bits, "seed": str(spec.seed)}
    params |= {"group_attribute": spec.group_attribute, "fairness_weight": spec.fairness_weight}
    client.log_batch(
        run,
        metrics=[Metric(k, v, start_ms, 0) for k, v in made_up_metrics(spec).items()],
        params=[Param(k, v) for k, v in params.items()],
        tags=[RunTag(k, v) for k, v in ({names.TAG_KEY: spec.key or f"key-{run}"} | spec.tags).items()],
    )
    client.set_terminated(run, status=spec.status)


if __name__ == "__main__":
    uri, name = sys.argv[1:]
    places = {"architectures": ("resnet18", "deit_tiny_patch16_224"), "attributes": ("sex", "age")}
    everything = list(grid(seeds=(2, 42, 107), budgets=("0.5", "1", "2", "4"), **places))
    broken = Spec(variant="static", budget_bits="1", seed=1337, metrics={"test/auc_worst": math.nan})
    failed = Spec(variant="baq", budget_bits="1", seed=1337, status="FAILED")
    Path(uri.removeprefix("sqlite:///")).unlink(missing_ok=True)
    write_sweep(MlflowClient(uri), name, [*everything, broken, failed])
    print(f"{len(everything) + 2} runs in {uri}")

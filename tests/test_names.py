"""The recorded keys: unique, complete and readable by MLflow."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from fqsweep import config
from fqsweep.fairness import FairnessReport
from fqsweep.names import (
    COST_METRICS,
    GROUP_METRICS,
    METHODS,
    RUN_PARAMS,
    group_metric_key,
    metric_keys,
    metric_of,
    part_of_key,
)

FIXED = [
    "acc_overall",
    "acc_avg",
    "acc_worst",
    "acc_gap",
    "balanced_acc",
    "balanced_acc_worst",
    "eopp0",
    "eopp1",
    "eodd",
    "dp_gap",
    "auc_macro",
    "auc_worst",
    "ece",
]


def test_the_fixed_metrics_are_recorded_for_both_splits() -> None:
    wanted = {f"{split}/{name}" for split in ("val", "test") for name in FIXED}
    wanted |= {"bits/mean_weight", "size/packed_bytes", "ops/effective_gbops", "time/train_s", "time/total_s"}
    assert set(metric_keys()) == wanted
    assert len(metric_keys()) == len(wanted)


def test_every_key_leads_to_its_metric() -> None:
    for key in metric_keys():
        assert key.endswith(metric_of(key).key)
    assert metric_of("val/acc_gap").direction == "minimize"
    assert metric_of("test/acc_worst").direction == "maximize"
    assert metric_of("size/packed_bytes").unit == "bytes"


@pytest.mark.parametrize("key", ["val/acc", "train/acc_worst", "", "bits"])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(key))):
        metric_of(key)


def test_every_metric_says_what_it_is() -> None:
    for metric in GROUP_METRICS + COST_METRICS:
        assert metric.meaning and metric.unit


def test_the_fixed_parameters_are_on_every_run_and_none_twice() -> None:
    fixed = [
        "dataset",
        "architecture",
        "method",
        "budget_bits",
        "seed",
        "group_attribute",
        "fairness_weight",
        "bitrate_weight",
        "importance",
        "reducer",
        "allocator",
        "granularity",
    ]
    assert set(fixed) <= set(RUN_PARAMS)
    assert len(set(RUN_PARAMS)) == len(RUN_PARAMS)


def test_the_method_names_are_those_that_a_file_may_give() -> None:
    union = typing.get_args(typing.get_args(config.MethodConfig)[0])
    given = [tag for model in union for tag in typing.get_args(model.model_fields["method"].annotation)]
    assert sorted(given) == sorted(METHODS)
    assert set(config.RECIPES) <= set(METHODS)


def test_the_groups_metrics_are_those_of_the_report() -> None:
    fields = {field.name for field in dataclasses.fields(FairnessReport)}
    assert set(FIXED) - fields == {"auc_macro", "auc_worst", "ece"}


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("<40", "val/acc_group/under 40"),
        ("60+", "val/acc_group/60 and over"),
        ("male x 60+ x I-III", "val/acc_group/male x 60 and over x I-III"),
        ("HIV+", "val/acc_group/HIV plus"),
        ("ER+ x <40", "val/acc_group/ER plus x under 40"),
        (">60", "val/acc_group/over 60"),
        ("40-59", "val/acc_group/40-59"),
        ("a/b%c", "val/acc_group/a_b_c"),
    ],
)
def test_a_groups_name_becomes_a_key_that_mlflow_takes(group: str, key: str) -> None:
    assert group_metric_key("val", "acc_group", group) == key
    assert re.fullmatch(r"[\w \-.:/]+", key)


def test_any_name_becomes_a_part_of_a_key() -> None:
    assert part_of_key("ward (3), A/B") == "ward _3__ A_B"
    assert part_of_key("Köln 2.1") == "Köln 2.1"

"""The reference of keys and metrics is what the records say, and says something of each."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from fqsweep.config import DatasetConfig, MethodConfig, Record
from fqsweep.names import COST_METRICS, GROUP_METRICS
from fqsweep.reference import SECTIONS, meanings_of, reference_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"


def test_the_page_is_what_the_records_say() -> None:
    command = "python -m fqsweep.reference > docs/reference.md"
    assert PAGE.read_text(encoding="utf-8") == reference_page(), f"make it anew: {command}"


def test_every_key_and_metric_has_a_row_with_its_meaning() -> None:
    def records_below(record: type[Record]) -> set[type[Record]]:
        own = {record}
        return own.union(*(records_below(below) for below in record.__subclasses__()))

    shown = {record for records in SECTIONS.values() for record in records}
    page = reference_page()
    for record in shown:
        for name in record.model_fields:
            assert f"| `{name}` |" in page or name == "kind", f"{record.__name__}.{name} has no row"
            assert meanings_of(record).get(name) or name in ("kind", "method"), (
                f"{record.__name__}.{name}: of what?"
            )
    in_files = {r for r in records_below(Record) if r.__module__.startswith("fqsweep.config")} - {Record}
    assert in_files == shown, "records that the page does not show"
    assert all(f"| `{metric.key}` |" in page for metric in (*GROUP_METRICS, *COST_METRICS))


def test_every_kind_of_data_set_and_method_has_a_table() -> None:
    shown = {record for records in SECTIONS.values() for record in records}
    assert set(get_args(get_args(DatasetConfig)[0])) <= shown
    assert set(get_args(get_args(MethodConfig)[0])) <= shown

"""Every key of a search space and every recorded metric as a page, in the words of the records themselves.

python -m fqsweep.reference > docs/reference.md
"""

from __future__ import annotations

import inspect
import re
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from fqsweep.config import (
    Allocating,
    ArchitectureConfig,
    BaqMethod,
    BitLimits,
    DatasetBase,
    FilesBase,
    Finetuning,
    Fitzpatrick17kConfig,
    Fp32Method,
    Isic2019Config,
    RecipeMethod,
    Record,
    Resources,
    SearchConfig,
    SearchSpace,
    SplitFractions,
    StaticMethod,
    SynthdermConfig,
    TableConfig,
    TrainingRecipe,
    UniformMethod,
    WeightRange,
)
from fqsweep.names import COST_METRICS, GROUP_METRICS, MORE_KEYS, TAGS, Metric

# Section -> the records that it shows.
SECTIONS: dict[str, tuple[type[Record], ...]] = {
    "The file": (SearchSpace,),
    "An entry of `datasets`": (
        DatasetBase,
        FilesBase,
        SynthdermConfig,
        Isic2019Config,
        Fitzpatrick17kConfig,
        TableConfig,
        SplitFractions,
    ),
    "An entry of `architectures`": (ArchitectureConfig,),
    "An entry of `methods`": (
        Finetuning,
        Allocating,
        Fp32Method,
        UniformMethod,
        StaticMethod,
        BaqMethod,
        RecipeMethod,
        WeightRange,
        BitLimits,
    ),
    "`recipe`": (TrainingRecipe,),
    "`search`": (SearchConfig,),
    "`resources`": (Resources,),
}
TITLES: dict[type[Record], str] = {
    DatasetBase: "Every data set",
    FilesBase: "Every data set of image files",
    Finetuning: "Every method but `fp32`",
    Allocating: "Methods that spend a budget: `static` and `baq`",
    RecipeMethod: "Published comparators",
    WeightRange: "A weight that is searched",
    BitLimits: "A value of `limits`",
    SplitFractions: "`splits`",
}
HEAD = """# Reference

Made by `python -m fqsweep.reference` out of `fqsweep/config/` and `fqsweep/names.py`. A key that a file does not give
has its default; an unknown key is refused with the nearest known one.
"""
BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)
PLAIN = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "`null`",
    "object": "mapping",
}


def reference_page() -> str:
    """The whole page in Markdown."""
    parts = [HEAD]
    for section, records in SECTIONS.items():
        parts.append(f"## {section}\n")
        parts += [_record_text(record, alone=len(records) == 1) for record in records]
    parts += ["## Metrics\n", _metrics_text(), "## Tags of runs\n", _table(("tag", "meaning"), TAGS.items())]
    return "\n".join(parts)


def _record_text(record: type[Record], *, alone: bool) -> str:
    lines = [] if alone else [f"### {TITLES.get(record) or _kind_of(record)}\n"]
    lines.append(_as_markdown((inspect.getdoc(record) or "").split("\n\n")[0]) + ".\n")
    meanings = meanings_of(record)
    schema = record.model_json_schema()
    rows = []
    for name in _own_fields(record):
        info = record.model_fields[name]
        default = "required" if info.is_required() else _default_text(info.default)
        rows.append((f"`{name}`", _takes(schema["properties"][name]), default, meanings.get(name, "")))
    if rows:
        lines.append(_table(("key", "takes", "default", "meaning"), rows))
    return "\n".join(lines)


def _kind_of(record: type[Record]) -> str:
    """``kind: synthderm``, ``method: baq``."""
    field = next(name for name in ("kind", "method") if name in record.model_fields)
    return f"`{field}: {get_args(record.model_fields[field].annotation)[0]}`"


def _own_fields(record: type[Record]) -> list[str]:
    """Fields that the record adds or changes; ``kind`` and ``method`` stand in the heading."""
    named = {"kind", "method"} if record is not RecipeMethod else set()
    return [name for name in record.__annotations__ if name in record.model_fields and name not in named]


def meanings_of(record: type[Record]) -> dict[str, str]:
    """What the docstrings of a record and its bases say of each field."""
    meanings: dict[str, str] = {}
    for base in reversed(record.__mro__):
        if not issubclass(base, Record) or base is Record:
            continue
        _, _, listed = (inspect.getdoc(base) or "").partition("Attributes:\n")
        for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", listed, flags=re.MULTILINE):
            meanings |= dict.fromkeys(re.split(r",\s*", names), _as_markdown(text))
    return meanings


def _as_markdown(text: str) -> str:
    plain = re.sub(r"\s*\n\s*", " ", text).replace("``", "`").replace("|", "\\|")
    return re.sub(r"\bNone\b", "`null`", plain).rstrip(".")


def _takes(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_takes(option) for option in schema["anyOf"]))
    if "discriminator" in schema or "$ref" in schema or "allOf" in schema:
        return "mapping"
    if schema.get("type") == "array":
        inner = schema.get("items") or {}
        return f"list of {_takes(inner)}" if inner else "list"
    text = PLAIN.get(schema.get("type", ""), "any")
    bounds = [f"{word} {schema[key]:g}" for key, word in BOUNDS if key in schema]
    return ", ".join([text, *bounds])


def _default_text(default: Any) -> str:
    if isinstance(default, Record):
        return "as below"
    if default is PydanticUndefined:  # made from other keys, or an empty mapping
        return ""
    if default is None:
        return "`null`"
    values = ", ".join(map(_yaml, default)) if isinstance(default, tuple) else _yaml(default)
    return f"`[{values}]`" if isinstance(default, tuple) else f"`{values}`"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _metrics_text() -> str:
    group = (
        "Recorded twice, as `val/...` and `test/...`; `val/...` chooses, `test/...` is read once, at the end."
    )
    cost = "Recorded once a run."
    families = ((f"`{keys.replace(', ', '`, `')}`", text) for keys, text in MORE_KEYS.items())
    more = _table(("key", "what it is"), families)
    return "\n".join(
        [
            group,
            "",
            _metric_table(GROUP_METRICS),
            cost,
            "",
            _metric_table(COST_METRICS),
            "Beside these:\n",
            more,
        ]
    )


def _metric_table(metrics: tuple[Metric, ...]) -> str:
    rows = [(f"`{m.key}`", m.unit, m.direction, _as_markdown(m.meaning)) for m in metrics]
    return _table(("key", "unit", "better", "meaning"), rows)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    print(reference_page(), end="")

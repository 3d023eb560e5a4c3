"""A search-space YAML becomes a checked record.

All problems of a file are reported at once, each with its path in the file and its line; an
unknown key names the nearest known one. Nothing is started here.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fqsweep.cells import MethodPoint, budgets_of, epochs_of, expand_cells, method_points, points_of
from fqsweep.config import Allocating, BaqMethod, SearchConfig, SearchSpace, UniformMethod, content_hash
from fqsweep.errors import InputError
from fqsweep.names import DEFAULT_SELECTION, selection_of

SHIPPED_SPACES = (
    Path(__file__).resolve().parents[1] / "search_spaces",
    Path(__file__).resolve().parent / "search_spaces",
)
# How pydantic names the branches of a weight, which is a number or a range.
NUMBER_BRANCHES = ("float", "constrained-float")
RANGE_BRANCHES = ("WeightRange", "WeightRange]")
# What pydantic puts behind a key of a mapping that is wrong itself.
KEY_MARK = "[key]"
MOST_ITEMS = 20  # that a message writes out
Location = tuple[str | int, ...]


# --- reading -------------------------------------------------------------------------------------


def find_space(name: str) -> Path:
    """The file a user means: a path, or the name of a search space that comes with fqsweep.

    Raises:
        InputError: there is no such file; names the ones that come with fqsweep.
    """
    given = Path(name).expanduser()
    candidates = [given]
    for folder in SHIPPED_SPACES:
        candidates.append(folder.parent / given)
        if len(given.parts) == 1:  # a path that is not there must not stand for a shipped space of that name
            candidates += [folder / given, folder / f"{name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({path.stem for folder in SHIPPED_SPACES for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(given.stem, shipped, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"search space {name!r}: no such file{meant} (with fqsweep come: {', '.join(shipped)})")


def load_space(path: Path) -> SearchSpace:
    """Read and check one search space.

    Raises:
        InputError: with every problem, its path in the file and its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    lines: dict[Location, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
        twice = [] if node is None else list(_index_lines(node, (), lines))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:  # lists in lists without end, or an anchor within itself
        raise InputError(f"{path}: nested too deeply for a search space") from error
    if not isinstance(content, dict) or node is None:
        raise InputError(
            f"{path}: a search space is a mapping with name, datasets, architectures, methods, seeds"
        )
    problems = [(line, f"{_dotted(loc)}: given twice") for loc, line in twice]
    space = None
    try:
        space = SearchSpace.model_validate(content)
    except ValidationError as error:
        problems += [_describe(dict(found), lines) for found in _innermost(error.errors())]
    if space is not None:
        problems += [(_line_of(loc, lines), f"{_dotted(loc)}: {text}") for loc, text in _check_whole(space)]
    if problems:
        raise InputError(_problem_page(path, problems))
    assert space is not None
    return space


def _innermost(found: list[Any]) -> list[Any]:
    """Findings that are no mere consequence of another one, nor of a branch that was not meant."""
    # A default that depends on other fields is not made where one of them is wrong.
    found = [
        one for one in found if one["type"] != "default_factory_not_called" and not _is_of_other_branch(one)
    ]
    places = [tuple(one["loc"]) for one in found]
    return [
        one
        for one, place in zip(found, places, strict=True)
        if not any(len(other) > len(place) and _within(other, place) for other in places)
    ]


def _is_of_other_branch(one: Any) -> bool:
    """Whether a weight was tried as a number where a mapping is given, or as a range where none is."""
    branch, is_mapping = str(one["loc"][-1]) if one["loc"] else "", isinstance(one["input"], dict)
    return branch in NUMBER_BRANCHES if is_mapping else branch.endswith(RANGE_BRANCHES)


def _within(inner: Location, outer: Location) -> bool:
    """Whether ``outer`` is a part of the way to ``inner``; pydantic's union branches are passed over."""
    if outer and outer[-1] in NUMBER_BRANCHES:
        outer = outer[:-1]
    return inner[: len(outer)] == outer


def _problem_page(path: Path, problems: list[tuple[int, str]]) -> str:
    head = f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}, nothing was started"
    return "\n".join([head, *(f"  {path.name}:{line}: {text}" for line, text in sorted(problems))])


def _index_lines(node: yaml.Node, loc: Location, lines: dict[Location, int]) -> Iterator[tuple[Location, int]]:
    """Note the line of every value below ``node``; yields keys that are given twice."""
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*loc, str(key.value))
            if inner in lines:
                yield inner, key.start_mark.line + 1
            lines[inner] = key.start_mark.line + 1
            yield from _index_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _index_lines(value, (*loc, index), lines)


def _line_of(loc: Location, lines: dict[Location, int]) -> int:
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc, 1)


def _dotted(loc: Location) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text or "the file"


def _describe(found: dict[str, Any], lines: dict[Location, int]) -> tuple[int, str]:
    """One finding of the records as (line, sentence)."""
    raw: Location = tuple(found["loc"])
    loc = tuple(part for i, part in enumerate(raw) if part != KEY_MARK and not _is_union_tag(raw, i, lines))
    message, kind = str(found["msg"]), found["type"]
    if kind == "value_error" and loc not in lines:  # of a whole record: the last part is its union's branch
        loc = loc[:-1]
    if kind == "extra_forbidden":
        known = _known_keys(raw)
        message = f"unknown key{_nearest(str(loc[-1]), known)}"
    elif kind == "missing":
        message = "is required"
    elif kind.startswith("union_tag"):
        context = found.get("ctx", {})
        tag = str(context.get("tag", ""))
        field = str(context.get("discriminator", "")).strip("'")
        expected = [
            text.strip(" '") for text in str(context.get("expected_tags", "")).split(",") if text.strip()
        ]
        message = f"{field} {tag!r} is not known{_nearest(tag, expected)}" if tag else f"{field} is required"
    elif kind == "literal_error" and isinstance(found.get("input"), str):
        options = re.findall(r"'([^']*)'", str(found.get("ctx", {}).get("expected", "")))
        message = f"{found['input']!r} is not known{_nearest(found['input'], options)}"
    elif kind == "string_type" and isinstance(found.get("input"), (bool, int, float)):
        message = _ask_for_quotes(found["input"])
    elif kind == "string_pattern_mismatch":
        message = (
            "must be letters, digits, dots, dashes and underscores, a letter or digit first "
            f"(given: {found['input']!r})"
        )
    elif kind in ("tuple_type", "list_type"):
        message = f"must be a list, such as [{_as_items(found.get('input'))}]"
    else:
        message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
        value = found.get("input")
        if isinstance(value, (str, int, float)) and repr(value) not in message:
            message += f" (given: {value!r})"
    return _line_of(loc, lines), f"{_dotted(loc)}: {message}"


def _as_items(value: Any) -> str:
    """What may have been meant by one value in place of a list.

    >>> _as_items("0-4"), _as_items(4)
    ('0, 1, 2, 3, 4', '4')
    """
    ends = re.fullmatch(r"(\d+) *(?:-|\.\.+|to) *(\d+)", str(value))
    numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else range(0)
    return ", ".join(map(str, numbers)) if 0 < len(numbers) <= MOST_ITEMS else str(value)


def _ask_for_quotes(value: bool | int | float) -> str:
    """What to do where YAML reads a bare word as no text."""
    if isinstance(value, bool):
        word = "yes" if value else "no"
        return f'must be text, but YAML reads yes, no, on, off as true or false: quote it, as in "{word}"'
    return f'must be text, but YAML reads {value!r} as a number: quote it, as in "{value}"'


def _is_union_tag(loc: Location, index: int, lines: dict[Location, int]) -> bool:
    """Whether a part of pydantic's location is a union's branch and not a key of the file."""
    part = loc[index]
    if not isinstance(part, str) or index == 0:
        return False
    plain = tuple(p for i, p in enumerate(loc[:index]) if not _is_union_tag(loc, i, lines))
    if (*plain, part) in lines:
        return False
    return index < len(loc) - 1 or part in (*NUMBER_BRANCHES, "bool", "str") or part.endswith(RANGE_BRANCHES)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


def _known_keys(loc: Location) -> list[str]:
    """The keys of the record that holds the last part of ``loc``."""
    models: list[type[BaseModel]] = [SearchSpace]
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        tagged = [m for m in models if _has_tag(m, part)]
        if tagged:
            models = tagged
            continue
        inner = [m for model in models for m in _models_in(_annotation(model, part))]
        models = inner or models
    return sorted({name for model in models for name in model.model_fields})


def _annotation(model: type[BaseModel], field: str) -> Any:
    info = model.model_fields.get(field)
    return info.annotation if info else None


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(tag in typing.get_args(_annotation(model, field)) for field in ("kind", "method"))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated, list, dict):
        return [m for inner in typing.get_args(annotation) for m in _models_in(inner)]
    return []


# --- checks over the whole file ------------------------------------------------------------------


def _check_whole(space: SearchSpace) -> Iterator[tuple[Location, str]]:
    yield from _check_unique(("datasets",), [d.name for d in space.datasets])
    yield from _check_distinct_datasets(space)
    yield from _check_unique(("architectures",), [a.name for a in space.architectures])
    yield from _check_unique(("seeds",), [str(s) for s in space.seeds])
    yield from _check_repeat_seeds(space)
    yield from _check_unique(("budgets_bits",), [f"{b:g}" for b in space.budgets_bits])
    yield from _check_unique(("budgets_bytes",), [str(b) for b in space.budgets_bytes])
    yield from _check_unique(("methods",), [point.variant for point in method_points(space)])
    yield from _check_unique(("search", "objectives"), list(space.search.objectives))
    yield from _check_distinct_rows(space)
    for index, method in enumerate(space.methods):
        for point in points_of(method):
            yield from _check_row(space, point, index)


def _check_row(space: SearchSpace, point: MethodPoint, index: int) -> Iterator[tuple[Location, str]]:
    """A row has epochs for the weights that it searches, and budgets that its choices can keep."""
    if point.free_weights and not epochs_of(point, space.recipe):
        free = " and ".join(point.free_weights)
        yield ("methods", index), f"{point.variant} is not fine-tuned: {free} must be a number, not a range"
    settings = point.settings
    trains = any(settings.finetune) if isinstance(settings, UniformMethod) else epochs_of(point, space.recipe)
    for name in ("fairness_weight", "distillation_weight") if not trains else ():
        if isinstance(weight := getattr(settings, name, 0.0), float | int) and weight:
            text = f"{point.variant} is not fine-tuned, so that {name} {weight:g} would change nothing"
            yield ("methods", index), f"{text}; leave it out, or have it fine-tuned"
    if isinstance(settings, UniformMethod) and settings.finetune[0] and not epochs_of(point, space.recipe):
        text = f"{point.variant} asks for fine-tuning, but finetune_epochs is 0"
        yield ("methods", index), f"{text}; raise it, or leave true out of finetune"
    if isinstance(settings, BaqMethod) and not trains:
        text = f"{point.variant} learns its bits in fine-tuning, but finetune_epochs is 0"
        yield ("methods", index), f"{text}; raise it, or use method static"
    if not isinstance(settings, Allocating):
        return
    own: Location = ("methods", index)
    yield from _check_unique((*own, "budgets_bits"), [f"{b:g}" for b in settings.budgets_bits or ()])
    yield from _check_unique((*own, "budgets_bytes"), [str(b) for b in settings.budgets_bytes or ()])
    if not budgets_of(space, point):
        yield own, f"{point.method} spends a budget: give budgets_bits or budgets_bytes"
    smallest = min(settings.choices)
    where: Location = (*own, "budgets_bits") if settings.budgets_bits else ("budgets_bits",)
    for place, (budget, _) in enumerate(budgets_of(space, point)):
        if budget is not None and budget < smallest:
            text = f"budget {budget:g} is below the smallest bit choice of {point.variant} ({smallest})"
            yield (*where, place), f"{text}; raise it, add smaller choices, or give the method budgets_bits"


def _check_repeat_seeds(space: SearchSpace) -> Iterator[tuple[Location, str]]:
    """A seed is searched or repeated, not both; and what is repeated was chosen on validation data."""
    loc = ("search", "repeat_seeds")
    repeated = space.search.repeat_seeds
    searches = any(point.free_weights for point in method_points(space))
    objectives = space.search.objectives
    if repeated and searches and selection_of(objectives) not in objectives:
        text = "they repeat the weights that are best on validation data: give search.objectives one that rises"
        yield loc, f"{text} there, such as {DEFAULT_SELECTION}"
    yield from _check_unique(loc, [str(s) for s in repeated])
    for index, seed in enumerate(repeated):
        if seed in space.seeds:
            yield (*loc, index), f"{seed} stands in seeds too, where weights are searched; leave it out of one"


def _check_distinct_datasets(space: SearchSpace) -> Iterator[tuple[Location, str]]:
    """Data sets that differ in their name alone would be the same cells under two names."""
    first: dict[str, str] = {}
    for index, dataset in enumerate(space.datasets):
        other = first.setdefault(content_hash(dataset.contents), dataset.name)
        if other != dataset.name:
            yield ("datasets", index), f"{dataset.name} is {other} under another name; leave one of them out"


def _check_distinct_rows(space: SearchSpace) -> Iterator[tuple[Location, str]]:
    """Rows that differ in their label alone would be one cell under two names."""
    first: dict[str, str] = {}
    narrow = space.model_copy(
        update={
            "datasets": space.datasets[:1],
            "architectures": space.architectures[:1],
            "seeds": space.seeds[:1],
            "search": SearchConfig(),
        }
    )
    clashes = set()
    for cell in expand_cells(narrow):
        other = first.setdefault(cell.key, cell.point.variant)
        if other != cell.point.variant:
            clashes.add((other, cell.point.variant))
    for other, variant in sorted(clashes):
        yield (
            ("methods",),
            f"{other!r} and {variant!r} are the same method with the same options; leave one out",
        )


def _check_unique(loc: Location, names: list[str]) -> Iterator[tuple[Location, str]]:
    for index, name in enumerate(names):
        if name in names[:index]:
            place = (*loc, index) if loc != ("methods",) else loc
            hint = "give one of them another label" if loc == ("methods",) else "names must differ"
            yield place, f"{name!r} stands here twice; {hint}"

"""What all records share: frozen, strict, and hashed by content."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """Base of all records: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        """Python counts true as 1: ``epochs: yes`` would train one epoch."""
        for name, value in given.items() if isinstance(given, dict) else ():
            inner = value if isinstance(value, list | tuple) else [value]
            is_truth = name in cls.model_fields and any(isinstance(item, bool) for item in inner)
            if is_truth and _takes_numbers_alone(cls.model_fields[name].annotation):
                raise ValueError(f"{name} must be a number, but YAML reads yes, no, on, off as true and false")
        return given


def _takes_numbers_alone(annotation: Any) -> bool:
    """Whether numbers belong in a field, and truth values do not."""
    inner = set(_plain_types(annotation))
    return bool(inner & {int, float}) and bool not in inner


def _plain_types(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from (type(value) for value in typing.get_args(annotation))
    elif typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            yield from _plain_types(inner)
    else:
        yield annotation


def content_hash(value: Any) -> str:
    """A 16-digit hash of a record or plain value: the same content gives the same hash on every machine."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=_as_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no content hash")


def named(key: str) -> Callable[[Any], Any]:
    """A validator that lets a bare string stand for a record of which ``key`` alone is given."""
    return lambda value: {key: value} if isinstance(value, str) else value

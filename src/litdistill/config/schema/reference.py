"""The options in order, each with its type in words and its explanation, for `--help` and docs/reference.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from litdistill.config.schema.check import annotated, nested
from litdistill.config.schema.fields import Node, Object, takes


class Row(NamedTuple):
    """An option: its dotted key, what it takes, and what it is."""

    key: str
    takes: str
    description: str


def rows(schema: type[Node], prefix: str = "") -> Iterator[Row]:
    """Yields the options of a schema in their order, those of a node after it."""
    for name, field in schema.model_fields.items():
        if field.alias == "_target_":
            continue
        key = f"{prefix}{name}"
        words = takes(annotated(field))
        inner = nested(field)
        if inner is not None and inner is not Object and list not in map(_origin, get_args(field.annotation)):
            yield Row(key, "a network" if issubclass(inner, Object) else "options", field.description or "")
            yield from rows(inner, f"{key}.")
        else:
            yield Row(key, words, field.description or "")


def _origin(annotation: object) -> object:
    return getattr(annotation, "__origin__", None)

"""The types of options: what each takes, how that is said, and the nearest sense of a value that is not taken.

An option is a pydantic field: `lr: Positive = option("initial learning rate")`. The description is the one text that says
what the option is: comments of `conf/`, `--help` and `docs/reference.md` are made of it (`scripts/reference.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import math
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class Node(BaseModel):
    """A node of the config: no other keys, and no value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Object(Node):
    """A node that describes an object: the path of its class or function, and its options."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    target: str = Field(alias="_target_", description="the class or function, by its full name")


class Said(NamedTuple):
    """Metadata of a type: what it takes, in words."""

    words: str


def option(description: str, usual: Any = None) -> Any:
    """Returns a field of this description. `usual`: a value to name where nothing is near to the one that was given.

    Whether a key must stand in the config is not the schema's to say: `conf/` has them all.
    """
    return Field(default=None, description=description, examples=None if usual is None else [usual])


Count = Annotated[int, Field(ge=1)]
CountFromZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Unit = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Text | int | float
Texts = Annotated[list[Text], Field(min_length=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), Said("auto, cpu, cuda, cuda:1 or mps")]
Nothing = Annotated[dict[str, Any], Field(max_length=0), Said("{}")]
Numbers = Annotated[list[float], Field(min_length=1)]
Deviations = Annotated[list[Positive], Field(min_length=1)]
Pixels = Annotated[list[Unit], Field(min_length=1)]


# -- what an option takes, in words ------------------------------------------------------------------------------------


def takes(annotation: Any) -> str:
    """Returns what a type takes, in words: "a whole number of 1 or more, or null", "text or a number"."""
    kinds = list(dict.fromkeys(_kinds(annotation, ())))
    if "a number" in kinds and "a whole number" in kinds:  # which is a number
        kinds.remove("a whole number")
    words = [kind for kind in kinds if isinstance(kind, str)]
    null = ["null"] if None in kinds else []
    phrases = [*(str(kind[0]) for kind in kinds if isinstance(kind, tuple)), *words, *null]
    if len(phrases) > 1 and any(" or " in phrase for phrase in words):  # one that has choices of its own
        return ", or ".join(filter(None, (", ".join(phrases[: -len(words + null)]), *words, *null)))
    return ", ".join(phrases[:-1]) + " or " * (len(phrases) > 1) + phrases[-1]


def _kinds(annotation: Any, metadata: tuple[Any, ...]) -> Iterator[str | tuple[Any] | None]:
    """Yields the parts of a type: words, choices in tuples of one, and None for null."""
    origin = get_origin(annotation)
    said = next((m.words for m in metadata if isinstance(m, Said)), None)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        yield from _kinds(base, (*metadata, *extra))
    elif said is not None:
        yield said
    elif origin in (Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _kinds(kind, metadata)
    elif origin is Literal:
        yield from ((choice,) for choice in dict.fromkeys(map(str, get_args(annotation))))
    elif annotation in (type(None), None):
        yield None
    elif origin in (list, tuple, Sequence):
        items = _plural(takes(get_args(annotation)[0]))
        count = _length(metadata)
        yield f"a list of {count}{items}" if count else f"a list of {items.removeprefix('of ')}"
    elif annotation in (int, float):
        yield ("a whole number" if annotation is int else "a number") + _range(metadata)
    elif isinstance(annotation, type) and issubclass(annotation, Object):
        yield "an object {_target_: my_package.MyClass, …}"
    else:
        words = {str: "text", Any: "anything", Path: "a path"}
        yield from (
            (("true",), ("false",)) if annotation is bool else (words.get(annotation, "a mapping {key: value, …}"),)
        )


def _plural(phrase: str) -> str:
    for one in ("text", "a whole number", "a number", "a list", "an object", "a mapping", "a class"):
        if phrase.startswith(one):
            return (
                one.removeprefix("a ").removeprefix("an ")
                + ("es" if one.endswith("s") else "s")
                + phrase.removeprefix(one)
            )
    return f"of {phrase}"


def _bounds(metadata: tuple[Any, ...]) -> dict[type, Any]:
    """Returns the bounds in the metadata of a type by their class."""
    names = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt", MinLen: "min_length", MaxLen: "max_length"}
    parts = [part for item in metadata for part in (item, *getattr(item, "metadata", ()))]
    return {kind: getattr(part, name) for part in parts for kind, name in names.items() if isinstance(part, kind)}


def _range(metadata: tuple[Any, ...]) -> str:
    bounds = _bounds(metadata)
    if bounds.get(Lt) == 2**32:  # a seed
        return f" from {bounds[Ge]} to 2³² − 1"
    if Ge in bounds and Le in bounds:
        return f" from {bounds[Ge]:g} to {bounds[Le]:g}"
    high = f"at most {bounds[Le]:g}" if Le in bounds else f"below {bounds[Lt]:g}" if Lt in bounds else ""
    if Gt in bounds:
        return " and ".join(filter(None, (f" above {bounds[Gt]:g}", high)))
    if Ge in bounds:
        return f" of at least {bounds[Ge]:g} and {high}" if high else f" of {bounds[Ge]:g} or more"
    return f" {high}".rstrip()


def _length(metadata: tuple[Any, ...]) -> str:
    bounds = _bounds(metadata)
    low = bounds.get(MinLen)
    if not low:
        return ""
    return f"{low} " if low == bounds.get(MaxLen) else f"{'one' if low == 1 else low} or more "


# -- the nearest sense of a value ----------------------------------------------------------------------------------------


def nearest(value: Any, annotation: Any) -> Any:
    """Returns the value nearest to `value` that the type takes; raises `LookupError` without one."""
    for candidate in _candidates(value, annotation):
        if fits(candidate, annotation):
            return candidate
    raise LookupError


def _candidates(value: Any, annotation: Any) -> Iterator[Any]:
    choices = list(_choices(annotation))
    if isinstance(value, str):
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "false": False,
            "no": False,
            "off": False,
            "null": None,
            "none": None,
        }
        if value.lower() in words:
            yield words[value.lower()]
        yield from difflib.get_close_matches(value.lower(), [c for c in choices if isinstance(c, str)], 1, 0.5)
        for kind in (int, float):
            try:
                yield from _numbers(kind(value))
            except ValueError:
                continue
    elif isinstance(value, bool):
        yield from ("on" if value else "off", int(value) or None)
    elif isinstance(value, (int, float)):
        if value in (0, 1):
            yield bool(value)
        yield from _numbers(value)
    elif isinstance(value, list):
        inner = next(_items(annotation), None)
        if inner is not None:
            with contextlib.suppress(LookupError):
                yield [item if fits(item, inner) else nearest(item, inner) for item in value]
        if len(value) == 1:
            yield value[0]
    if not isinstance(value, (list, dict)) and value is not None:
        yield [value]
    if value is None or value in ([], {}, "", 0, False) or (isinstance(value, float) and not math.isfinite(value)):
        yield None


def _numbers(value: float) -> Iterator[Any]:
    if not math.isfinite(value):
        return
    if value == int(value):
        yield int(value)
    yield value
    if value == 0:
        yield None
    if -1 < value < 0:
        yield -value
    yield from (round(value), math.ceil(value))


def fits(value: Any, annotation: Any) -> bool:
    """Returns whether a type takes a value."""
    own = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    try:
        TypeAdapter(annotation, config=None if own else Node.model_config).validate_python(value)
    except ValidationError:
        return False
    return True


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _choices(kind)


def _items(annotation: Any) -> Iterator[Any]:
    """Yields the types of the items of all lists that a type takes."""
    if get_origin(annotation) is list:
        yield get_args(annotation)[0]
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _items(kind)

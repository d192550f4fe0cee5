"""Checks a composed config before anything is built: a line for each fault, with what the option takes and the nearest sense.

    check(cfg, "train")         raises `UserError`, or returns nothing

`data.batch_size=32.0: a whole number of 1 or more. Did you mean 32?`
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

from litdistill.config.schema import data, library, rules, train, verbs
from litdistill.config.schema.fields import Node, Object, nearest, takes
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError

SCHEMAS: dict[str, type[Node]] = {
    "train": train.Train,
    "sweep": train.Sweep,
    "evaluate": verbs.Evaluate,
    "doctor": verbs.Doctor,
    "outputs": verbs.OutputsOfRun,
    "export": verbs.Export,
    "report": verbs.Report,
    "compare": verbs.Compare,
    "fetch": verbs.Fetch,
}
# Schemas of the objects at a key, by the last name of their `_target_`; "": of any other object.
OBJECTS: dict[str, dict[str, type[Node]]] = {
    "data": {
        "ImageData": data.ImageData,
        **dict.fromkeys(("breast_cancer", "wine", "diabetes", "multilabel"), data.Standardized),
        "table": data.Table,
        "movie_reviews": data.Tokenized,
        "texts": data.Tokenized,
        "sounds": data.Sounds,
        "spoken_digits": data.SpokenDigits,
        "docstrings": data.Sequences,
        "token_sequences": data.Sequences,
        "digit_scenes": data.Scenes,
        "digit_masks": data.Scenes,
        "masks": data.Masks,
        "bccd": data.BloodCells,
        "coco": data.Coco,
        "voc": data.Voc,
    },
    "task": {
        "Classification": library.Classification,
        "Detection": library.Detection,
        "Embedding": library.Embedding,
        "MultiLabel": library.MultiLabel,
        "Regression": library.Regression,
        "LanguageModel": library.LanguageModel,
        "Segmentation": library.Segmentation,
    },
    "balance": {"Balance": library.Balance, "Uncertainty": library.Uncertainty},
    "optimizer": {"": library.Optimizer},
    "scheduler": {"": library.Scheduler},
    "trainer": {"Trainer": library.Trainer},
    "compress": {"low_rank": library.Compression, "prune": library.Compression},
}
OURS = (
    "litdistill.",
    "torch.",
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
)  # paths of objects whose numbers are checked
SWITCHES = ("_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys of an object
MISSING = "???"


def check(cfg: DictConfig, command: str = "train", of: str = "") -> None:
    """Raises `UserError` with a line for each option of `command` that has no sense. `of`: whose it is."""
    command = "sweep" if "sweep" in cfg and command == "train" else command
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    found = list(dict.fromkeys(faults(plain, command)))
    written = [line for line in found if not _refers(cfg, line)]  # not where it only refers to another option
    if found := written or found:
        raise UserError(of + "\n".join(found))


def _refers(cfg: DictConfig, line: str) -> bool:
    """Returns whether the option that a line begins with has the value of another by an interpolation."""
    node: Any = cfg
    *parents, name = re.split(r"[= ]", line)[0].split(".")
    for parent in parents:
        if not OmegaConf.is_dict(node):
            return False
        node = node.get(parent)
    return OmegaConf.is_dict(node) and name in node and OmegaConf.is_interpolation(node, name)


def faults(plain: dict[str, Any], command: str) -> Iterator[str]:
    """Yields a line for each fault of a config in plain values; those of joined options once each option has a sense."""
    schema = SCHEMAS[command]
    lines = [*_faults_of(plain, schema, ""), *_missing(plain)]
    for key in OBJECTS.keys() & schema.model_fields.keys():
        if isinstance(node := plain.get(key), dict) and (kind := schema_of(key, node)) is not None:
            lines += _faults_of(node, kind, f"{key}.")
    lines += [line for line in _not_finite(plain) if line.split(":")[0] not in {one.split(":")[0] for one in lines}]
    yield from lines
    if not lines:
        yield from rules.broken(plain)


def schema_of(key: str, node: Mapping[str, Any]) -> type[Node] | None:
    """Returns the schema of the object at a key by its `_target_`; None for an object that is not of this project."""
    target, kinds = str(node.get("_target_")), OBJECTS[key]
    return kinds.get(target.rpartition(".")[2], kinds.get("")) if target.startswith(OURS) else None


def options_of_objects(plain: Mapping[str, Any]) -> Iterator[str]:
    """Yields every option that the objects of a config may have, as `trainer.max_steps`, whether it is written out or not."""
    for key in OBJECTS:
        if isinstance(node := plain.get(key), dict) and (kind := schema_of(key, node)) is not None:
            yield from (f"{key}.{name}" for name, field in kind.model_fields.items() if field.alias != "_target_")


def _faults_of(node: dict[str, Any], schema: type[Node], prefix: str) -> Iterator[str]:
    given = {key: value for key, value in node.items() if key not in SWITCHES}
    try:
        schema.model_validate(given)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            yield from _line(one["loc"], one["type"], given, schema, prefix)


def _line(loc: tuple[Any, ...], kind: str, node: Any, schema: type[Node], prefix: str) -> Iterator[str]:
    """Yields the line of one of pydantic's errors: of the deepest option on its way that has a name."""
    name = str(loc[0])
    key, field = f"{prefix}{name}", _field(schema, name)
    if field is None:
        yield _unknown(key, name, schema)
        return
    value = node.get(name) if isinstance(node, dict) else None
    if isinstance(value, dict) and len(loc) > 1 and (values := _values(field.annotation)) is not None:
        found = next((part for part in loc[1:] if part in value), None)
        if found is not None:  # an entry of a mapping
            yield fault(f"{key}.{found}", value[found], FieldInfo.from_annotation(values))
            return
    inner = nested(field)
    if inner is not None and isinstance(value, dict) and len(loc) > 1:
        rest = loc[1:]
        while rest and _field(inner, str(rest[0])) is None and rest[0] not in value:  # a branch of a union
            rest = rest[1:]
        if issubclass(inner, Object) and "_target_" not in value:
            yield f"{key}={literal(value)}: an object, which _target_ names in full: {{_target_: my_package.my_class}}."
        elif rest:
            yield from _line(rest, kind, value, inner, f"{key}.")
        return
    yield fault(key, value, field)


def fault(key: str, value: Any, field: FieldInfo) -> str:
    """Returns the line of an option whose value has no sense."""
    annotation = annotated(field)
    what = takes(annotation)
    hint = f" Usual is {field.examples[0]}." if field.examples else ""
    with contextlib.suppress(LookupError):
        hint = f" Did you mean {literal(nearest(value, annotation))}?"
    return f"{key}={literal(value)}: {what}.{hint}"


def typed(key: str, value: Any, annotation: Any) -> str | None:
    """Returns the line of a value that is not of a parameter's type; None where it is, or where the type is no plain one."""
    if holds_object(value):
        return None
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
        adapter.validate_json(
            json.dumps(value), strict=True
        )  # in JSON's words a list is a tuple too, and a text a path
    except (PydanticUserError, PydanticSchemaGenerationError):
        return None
    except ValidationError:
        hint = ""
        with contextlib.suppress(LookupError, PydanticUserError):
            hint = f" Did you mean {literal(nearest(value, annotation))}?"
        return f"{key}={literal(value)}: {takes(annotation)}.{hint}"
    return None


def holds_object(value: Any) -> bool:
    """Returns whether plain values hold an object, which is known only once it is made, or something that is no plain value."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(holds_object, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_object, value))
    return not isinstance(value, (str, int, float, type(None)))


def annotated(field: FieldInfo) -> Any:
    """Returns the type of a field with its bounds, which pydantic keeps beside it."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _unknown(key: str, name: str, schema: type[Node]) -> str:
    known = [key for key, field in schema.model_fields.items() if field.alias != "_target_"]
    near = difflib.get_close_matches(name, known, 2, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    if not near and len(known) > 12:
        hint = "--help lists those there are."
    return f"{key} is no option: {hint}"


def _field(schema: type[Node], name: str) -> FieldInfo | None:
    """Returns the field of an option, `_target_` being the alias of one that is called otherwise."""
    fields = schema.model_fields
    if name == "_target_":
        return next((field for field in fields.values() if field.alias == name), None)
    found = fields.get(name)
    return None if found is not None and found.alias == "_target_" else found


def nested(field: FieldInfo) -> type[Node] | None:
    """Returns the schema that a field's type has for a node; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind  # type: ignore[return-value]
    return None


def _values(annotation: Any) -> Any:
    """Returns the type of the values of a mapping; None for another type."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return None


def _missing(node: Any, key: str = "") -> Iterator[str]:
    if node == MISSING:
        yield f"{key} is to be given: {key}=…"
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _missing(value, f"{key}.{name}".lstrip("."))


def _not_finite(node: Any, key: str = "") -> Iterator[str]:
    """Yields a line for each NaN or infinite number, but of objects of the user's own."""
    if isinstance(node, float) and not math.isfinite(node):
        yield f"{key}={node}: a finite number."
        return
    if isinstance(node, dict) and not str(node.get("_target_", OURS[0])).startswith(OURS):
        return
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _not_finite(value, f"{key}.{name}".lstrip("."))

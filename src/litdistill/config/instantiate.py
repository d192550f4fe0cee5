"""Instantiates the class or function that `_target_` of a config node names, after a check of its options.

The user's own config may name anything that can be imported, since it is their code. The config of a foreign run folder is
checked beforehand by `litdistill.config.trust`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from litdistill.utils.errors import UserError

# Keys of a network's node that are not options of the network.
NETWORK_META_KEYS = (
    "checkpoint",
    "outputs",
    "head",
    "preprocess",
    "trainable",
    "statistics",
    "allow_chance",
    "recipe",
    "ensemble",
    "ensemble_weights",
    "ensemble_mean",
    "generations",
    "cache",
    "tabulate",
)

_FOLDERS: list[str] = []  # where `locate` searches packages that are not on `sys.path`


def import_classes_from(folder: str) -> None:
    """Registers `folder`, the user's working folder, for packages named in a config that are not on `sys.path`.

    The folder is appended to `sys.path` only when such a package is needed: the working folder may be a foreign run folder,
    and Hydra imports every `hydra_plugins` on the path, and libraries import optional packages from it.
    """
    _FOLDERS[:] = [folder]


def instantiate(node: Any, key: str = "", **facts: Any) -> Any:
    """Returns the object that a config node describes; `facts`: further arguments, known only at run time.

    `key`: the node's key in the config. A `UserError` of the object that begins with an argument and its value
    (`hint=-1 is …`) is raised with the key of that option in front (`method.hint=-1 is …`), any other unchanged.

    Raises `UserError` for a target that cannot be imported and for an option that is not in its signature, each with the
    nearest names, and for the few functions that Hydra itself blocks.
    """
    given = resolved(node)
    check_targets({k: v for k, v in given.items() if k not in facts} if isinstance(given, dict) else given, key)
    try:
        return hydra.utils.instantiate(node, **facts, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise with_key(error.__cause__, node, key) from None
        if error.__cause__ is None and "blocklisted" in str(error):
            raise UserError(str(error)) from error
        if isinstance(error.__cause__, ValueError) and len(facts.get("input_shape") or (0,) * 3) < 3:
            raise UserError(_takes_images(key, node, facts["input_shape"], error.__cause__)) from error
        if (said := refused_by_library(node, error.__cause__)) is not None:
            raise UserError(f"{key}: {said}") from error
        raise


def _takes_images(key: str, node: Any, shape: Sequence[int], error: ValueError) -> str:
    """Returns what to do about a network of images that was given inputs of one or two axes."""
    return (
        f"{key}: {str(node.get('_target_')).rpartition('.')[2]} does not take inputs of {'x'.join(map(str, shape))} ({error}). "
        f"Choose a network for such data: net@{key}=mlp for tables, sound_conv for sounds; `litdistill nets` lists all."
    )


def refused_by_library(node: Any, error: BaseException | None) -> str | None:
    """Returns the words in which a class of torch or Lightning refuses its options; None for another error or class."""
    target = str(node.get("_target_")) if hasattr(node, "get") else ""
    if error is None or not target.startswith(("torch.", "lightning.")):
        return None
    refusal = (
        isinstance(error, (ValueError, TypeError, RuntimeError)) or type(error).__name__ == "MisconfigurationException"
    )
    return f"{target.rpartition('.')[2]} refuses its options: {error}" if refusal else None


def with_key(error: UserError, node: Any, key: str) -> UserError:
    """Returns the error with the full config key of the option that its text begins with, if that is an option of `node`."""
    text = str(error)
    for place, value in _options(resolved(node)):
        name = place.rpartition(".")[2]
        if key and re.match(rf"{re.escape(f'{name}={value}')}(?!\w)", text):
            return UserError(f"{key}.{place.removesuffix(name)}{text}")
    return error


def _options(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys and values of all options in plain values, the outer ones first."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    yield from ((f"{prefix}{name}", value) for name, value in items)
    for name, value in items:
        yield from _options(value, f"{prefix}{name}.")


def resolved(node: Any) -> Any:
    """Returns a config as dicts and lists with interpolations resolved; other values unchanged."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        return {key: resolved(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [resolved(value) for value in node]
    return node


def check_objects(cfg: Mapping[str, Any]) -> None:
    """Raises `UserError` for an option of any object of a config that its class or function does not take.

    A value of null may be one that is known only at run time, and is not checked here.
    """
    apart = {"student": NETWORK_META_KEYS, "teacher": NETWORK_META_KEYS, "scheduler": ("interval", "monitor")}
    for key in ("data", "task", "method", "student", "teacher", "compress", "optimizer", "scheduler", "trainer"):
        node = resolved(cfg.get(key))
        if isinstance(node, dict):
            if isinstance(under := node.get("backbone"), dict):  # a network of its own
                node["backbone"] = {k: v for k, v in under.items() if k not in NETWORK_META_KEYS and v is not None}
            check_targets({k: v for k, v in node.items() if k not in apart.get(key, ()) and v is not None}, key)
    for key in ("callbacks", "logger"):
        check_targets(resolved(cfg.get(key)), key)


def check_targets(node: Any, key: str = "") -> None:
    """Raises `UserError` if a `_target_` anywhere in plain values cannot be imported or does not take its options.

    `key`: that of the node, for the message.
    """
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check_targets(value, f"{key}.{name}")
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        options = {str(k): v for k, v in node.items() if not str(k).startswith("_")}
        check_options(node["_target_"], options)
        if node["_target_"].startswith("litdistill."):
            check_types(node["_target_"], options, key)


def check_types(target: str, options: Mapping[str, Any], key: str) -> None:
    """Raises `UserError` for a plain value of another type than the parameter's annotation of a class of this project."""
    from litdistill.config.schema.check import typed  # brings pydantic, which what needs no config goes without

    found = locate(target)
    try:
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except NameError:  # a type that is imported for checkers alone
        return
    for name, value in options.items():
        if name in hints and (line := typed(f"{key}.{name}", value, hints[name])) is not None:
            raise UserError(line)


def check_options(target: str, names: Iterable[str]) -> None:
    """Raises `UserError` for a name that is no parameter of `target`, with the nearest parameters."""
    found = locate(target)
    if not callable(found):
        raise UserError(f"_target_: {target} is neither a class nor a function.")
    try:
        takes = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return  # some callables written in C have no signature
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    for name in names:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(takes)}."
            raise UserError(f"{target.rpartition('.')[2]} takes no option {name}: {hint}")


def locate(target: str) -> Any:
    """Returns the object at a dotted path, and imports its module if needed. Raises `UserError` if it does not exist."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"_target_: {target} is no dotted path of a class or function, such as my_package.nets.tiny.")
    found: Any = None
    for depth, part in enumerate(parts):
        if found is not None and hasattr(found, part):
            found = getattr(found, part)
            continue
        path = ".".join(parts[: depth + 1])
        if found is not None and not isinstance(found, ModuleType):
            raise UserError(f"_target_: {target} cannot be found: {_nearest(found, parts, depth)}")
        try:
            found = _imported(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise UserError(
                    f"_target_: {target} cannot be imported: {path} needs {error.name}, which is not installed."
                ) from error
            raise UserError(f"_target_: {target} cannot be found: {_nearest(found, parts, depth)}") from error
        except Exception as error:  # a module may raise any type
            raise UserError(
                f"_target_: {target} cannot be imported: {type(error).__name__} in {path}: {error}"
            ) from error
    return found


def _imported(path: str) -> ModuleType:
    """Returns the module of a dotted path; a package that is not on `sys.path` is searched in the user's working folder."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        more = [folder for folder in _FOLDERS if folder not in sys.path]
        if "." in path or error.name != path or not more:
            raise
    sys.path.extend(more)  # last: the user's modules shadow nothing
    importlib.invalidate_caches()
    return importlib.import_module(path)


def _nearest(inside: Any, parts: list[str], depth: int) -> str:
    """Returns the text of an error for the missing part at `depth`, with the nearest names; `inside`: its parent, or None."""
    part, place = parts[depth], ".".join(parts[:depth])
    if inside is None:
        near = difflib.get_close_matches(part, {name.split(".")[0] for name in sys.modules}, 2)
        typo = f", or did you mean {' or '.join(near)}?" if near else "."
        return f"there is no package {part}. Put the folder that holds it on PYTHONPATH, or install it{typo}"
    names = {name for name in dir(inside) if not name.startswith("_")}
    names |= {module.name for module in pkgutil.iter_modules(getattr(inside, "__path__", ()))}
    near = difflib.get_close_matches(part, names, 3)
    return f"{place} has no {part}" + (f": did you mean {' or '.join(near)}?" if near else ".")

"""From a config node to an object: whatever class or function `_target_` names, with its options checked first.

A config that the user typed, or keeps in a folder of their own, may name anything that can be imported: it is their code.
What comes with weights is checked beforehand, by `litdistill.config.trust`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from litdistill.utils.errors import UserError

_FOLDERS: list[str] = []  # which `locate` may search for packages that are nowhere on the path


def import_classes_from(folder: str) -> None:
    """Lets the classes that a config names lie in `folder`, the user's working folder, where the path has no such package.

    It joins the path when such a class is asked for, and not before: the working folder may be that of a run which somebody
    else made, and Hydra imports every `hydra_plugins` on the path, libraries whatever optional package they find there.
    """
    _FOLDERS[:] = [folder]


def instantiate(node: Any, key: str = "", **facts: Any) -> Any:
    """The object that a config names, with what is known at run time only.

    `key`: where the node stands in the config. A `UserError` in the object that begins with an argument and its value
    (`hint=-1 is …`) is raised with the key of that option in front (`method.hint=-1 is …`), any other as it is.

    Raises `UserError` for what cannot be imported, for an option that is not in its signature, each with the nearest names,
    and for the few functions that Hydra itself blocks.
    """
    check_targets(resolved(node))
    try:
        return hydra.utils.instantiate(node, **facts, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise with_key(error.__cause__, node, key) from None
        if error.__cause__ is None and "blocklisted" in str(error):
            raise UserError(str(error)) from error
        raise


def with_key(error: UserError, node: Any, key: str) -> UserError:
    """The error of an object that was made of `node`, with the key of the option that it begins with in front."""
    text = str(error)
    for place, value in _options(resolved(node)):
        name = place.rpartition(".")[2]
        if key and re.match(rf"{re.escape(f'{name}={value}')}(?!\w)", text):
            return UserError(f"{key}.{place.removesuffix(name)}{text}")
    return error


def _options(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options in plain values by their keys, joined with dots, the outer ones first."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    yield from ((f"{prefix}{name}", value) for name, value in items)
    for name, value in items:
        yield from _options(value, f"{prefix}{name}.")


def resolved(node: Any) -> Any:
    """A config as dicts and lists without interpolations; anything else as it is."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        return {key: resolved(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [resolved(value) for value in node]
    return node


def check_targets(node: Any) -> None:
    """Raises `UserError` for a `_target_` anywhere in plain values that cannot be found, or does not take its options."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        check_targets(value)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        check_options(node["_target_"], [str(k) for k in node if not str(k).startswith("_")])


def check_options(target: str, names: Iterable[str]) -> None:
    """Raises `UserError` for a name that is no parameter of `target`, with the nearest that are."""
    found = locate(target)
    if not callable(found):
        raise UserError(f"_target_: {target} is neither a class nor a function.")
    try:
        takes = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return  # some that are written in C do not tell
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    for name in names:
        if name not in takes:
            near = difflib.get_close_matches(name, takes, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(takes)}."
            raise UserError(f"{target.rpartition('.')[2]} takes no option {name}: {hint}")


def locate(target: str) -> Any:
    """What a dotted path names, imported where it is not yet. Raises `UserError` where there is no such thing."""
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
        except Exception as error:  # whatever the module raises
            raise UserError(
                f"_target_: {target} cannot be imported: {type(error).__name__} in {path}: {error}"
            ) from error
    return found


def _imported(path: str) -> ModuleType:
    """The module of a dotted path; a package that is nowhere on `sys.path` is searched in the user's working folder."""
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
    """Why the part at `depth` is missing `inside` the object before it, None for a package of its own, and what helps."""
    part, place = parts[depth], ".".join(parts[:depth])
    if inside is None:
        near = difflib.get_close_matches(part, {name.split(".")[0] for name in sys.modules}, 2)
        typo = f", or did you mean {' or '.join(near)}?" if near else "."
        return f"there is no package {part}. Put the folder that holds it on PYTHONPATH, or install it{typo}"
    names = {name for name in dir(inside) if not name.startswith("_")}
    names |= {module.name for module in pkgutil.iter_modules(getattr(inside, "__path__", ()))}
    near = difflib.get_close_matches(part, names, 3)
    return f"{place} has no {part}" + (f": did you mean {' or '.join(near)}?" if near else ".")

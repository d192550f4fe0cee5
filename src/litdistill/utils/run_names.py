"""Names of the jobs of a multirun, from what differs between them: `kd-T4-s0` for `method=kd method.temperature=4 seed=0`.

TensorBoard shows a run under its folder's name. `announce` reads once, where the command starts, which overrides have several
values; `job_name` is the resolver `${job_name:…}` of `conf/hydra/default.yaml`, in whatever process the job runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

SWEPT = "RUN_SWEPT"  # the environment variable, as RUN_STAMP inherited by ranks and workers
SHORT = {"temperature": "T", "seed": "s"}
LONGEST = 80  # characters of a name


def announce(overrides: Sequence[str]) -> None:
    """Sets the environment for `job_name`: the keys with several values, and whether jobs' names need their numbers."""
    os.environ.pop(SWEPT, None)
    try:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if not o.startswith("-")])
        swept = [o for o in parsed if o.is_sweep_override() and not o.key_or_group.startswith("hydra")]
        values = [[str(v) for v in o.sweep_string_iterator()] for o in swept]
    except (
        HydraException,
        NotImplementedError,
    ):  # interval(…), which only a sweeper expands, or what Hydra will refuse
        os.environ[SWEPT] = json.dumps({"keys": [], "numbered": True})
        return
    if not swept:
        return
    keys = [o.get_key_element() for o in swept]
    jobs = [
        [f"{k}={v}" for k, v in zip(keys, job, strict=True)]
        for job in itertools.islice(itertools.product(*values), 10_000)
    ]
    names = {name(job, keys).lower() for job in jobs}
    os.environ[SWEPT] = json.dumps({"keys": keys, "numbered": len(names) < len(jobs)})


@contextlib.contextmanager
def varying(keys: Sequence[str]) -> Iterator[None]:
    """Sets the environment for `varied` to these keys, those of a sweep's space, and back."""
    before = os.environ.get(SWEPT)
    os.environ[SWEPT] = json.dumps({"keys": list(keys), "numbered": True})
    try:
        yield
    finally:
        os.environ.pop(SWEPT)
        if before is not None:
            os.environ[SWEPT] = before


def job_name(number: int | str, overrides: Sequence[str]) -> str:
    """Returns the name of the job of that number with these overrides, which no other job of its multirun has."""
    found = json.loads(os.environ.get(SWEPT) or "{}")
    short = name(list(overrides), found.get("keys", []))
    if not short:
        return str(number)
    return f"{number}-{short}" if found.get("numbered") else short


def varied(overrides: Sequence[str]) -> dict[str, str | float]:
    """Returns those overrides of a job that differ between the jobs of its multirun or sweep; empty outside of one."""
    keys = json.loads(os.environ.get(SWEPT) or "{}").get("keys", [])
    split = (o.partition("=") for o in overrides)
    return {key.lstrip("+~"): _number(value) for key, _, value in split if key in keys}


def _number(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def name(overrides: Sequence[str], keys: Sequence[str]) -> str:
    """Returns a file name of the values of `keys` among a job's overrides, the seed last; empty without one."""
    found = {key: value for key, _, value in (o.partition("=") for o in overrides) if key in keys}
    parts = [_part(key, value) for key, value in sorted(found.items(), key=lambda item: item[0] == "seed")]
    whole = "-".join(part for part in parts if part)
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - 7].rstrip('-.')}-{hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:6]}"


def _part(key: str, value: str) -> str:
    """Returns `kd` for a group's option, and `lr0.1` for a key's value."""
    last = re.split(r"[.@/]", key.lstrip("+~"))[-1]
    text = re.sub(r"[^\w.+-]+", "-", value).strip("-.")
    is_key = "." in key or key == "seed" or bool(re.fullmatch(r"[-+\d.e]+|true|false|null", value, re.IGNORECASE))
    return f"{SHORT.get(last, last)}{text}" if is_key and "@" not in key else text


def register() -> None:
    """Makes `${job_name:…}` known to OmegaConf."""
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)

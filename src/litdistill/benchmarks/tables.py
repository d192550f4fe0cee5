"""What scripts that write tables share: options, intervals of means, the marks in a document that a table stands between.

run_script(main)                   in place of main(), under `if __name__ == "__main__":`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import t as student_t

from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings


def read_options(
    defaults: Mapping[str, Any],
    at_least: Mapping[str, int] | None = None,
    among: Mapping[str, Collection[str]] | None = None,
) -> DictConfig:
    """Returns the defaults with what the command line says in their place: `seeds=2 jobs=1`.

    `at_least`: the smallest value of options that are numbers. `among`: the values of those that are names, or lists of names.
    Raises `UserError` for an unknown option and for any other value.
    """
    found = OmegaConf.merge(dict(defaults), OmegaConf.from_cli())
    assert isinstance(found, DictConfig)
    lowest, names = at_least or {}, among or {}
    right = set(found) == set(defaults) and all(found[key] >= least for key, least in lowest.items())
    for key, values in names.items() if right else ():
        chosen = [found[key]] if isinstance(found[key], str) else list(found[key])
        right = right and set(chosen) <= set(values)
    if not right:
        given = ", ".join(f"{key}={value}" for key, value in defaults.items())
        least = ", ".join(f"{key} from {value}" for key, value in lowest.items())
        choice = "; ".join(f"{key}: {', '.join(values)}" for key, values in names.items())
        raise UserError(
            f"Give {given} or other values" + "".join(f"; {text}" for text in (least, choice) if text) + "."
        )
    return found


def between_marks(document: str, name: str, text: str) -> str:
    """Returns the document with `text` between its marks `<!-- name -->` and `<!-- end name -->`.

    Raises `UserError` where it does not have each of them once.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise UserError(
            f"The document needs {begin} and {end}, each on a line of its own, for what is written between them."
        )
    before, after = document.split(begin)[0], document.split(end)[1]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def interval(values: Sequence[float], tests: int = 1) -> tuple[float, float]:
    """Returns the 95 % interval of a mean by Student's t, corrected for a number of tests after Bonferroni."""
    half = float(student_t.ppf(1 - 0.025 / tests, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; one that its user can help ends with the error's line and status 2."""
    filter_warnings()
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

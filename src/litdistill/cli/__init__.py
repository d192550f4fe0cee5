"""The command `litdistill` with its verbs.

    litdistill                       lists the verbs
    litdistill train --help          lists all keys of one verb

`python scripts/<verb>.py` in a clone and `python -m litdistill <verb>` are equivalent. This module imports nothing heavy,
so that the overview, typos and config errors are reported at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import select
import sys
from collections.abc import Iterator
from typing import NamedTuple

from litdistill.cli import starting
from litdistill.utils.errors import UserError

TORCH = "torch and Lightning"


class Verb(NamedTuple):
    """`function`: module:name, called with the config of conf/`config`.yaml, or without one with the list of arguments.

    `loads`: the libraries that take seconds to import, named on the screen meanwhile.
    """

    function: str
    help: str
    config: str | None = None
    loads: str = ""


VERBS = {
    "train": Verb(
        "litdistill.cli.commands:train", "train a student, and its teacher where there is none yet", "train", TORCH
    ),
    "sweep": Verb("litdistill.cli.commands:sweep", "search for the best hyperparameters, with Optuna", "sweep", TORCH),
    "evaluate": Verb(
        "litdistill.cli.commands:evaluate", "measure a finished run anew from its folder", "evaluate", TORCH
    ),
    "doctor": Verb(
        "litdistill.cli.commands:doctor", "say what is wrong with a finished run, and what to try", "doctor", TORCH
    ),
    "outputs": Verb(
        "litdistill.cli.commands:outputs",
        "write a run's outputs by sample, to teach without its network",
        "outputs",
        TORCH,
    ),
    "export": Verb(
        "litdistill.cli.commands:export", "write a run's student as ONNX, .pt2 or safetensors", "export", TORCH
    ),
    "predict": Verb("litdistill.export.predict:main", "predict for images or rows of a table with an exported student"),
    "report": Verb("litdistill.cli.commands:report", "compare finished runs: a table, or a page with curves", "report"),
    "compare": Verb(
        "litdistill.cli.commands:compare", "train every technique on the same data and compare", "compare", TORCH
    ),
    "fetch": Verb("litdistill.cli.commands:fetch", "download and verify a data set ahead of time", "fetch", "torch"),
    "new": Verb("litdistill.cli.new:main", "write a research project of your own that imports litdistill"),
    "nets": Verb(
        "litdistill.cli.nets:main", "list all networks with parameters and multiply-accumulates", None, "torch"
    ),
    "reproductions": Verb("litdistill.cli.commands:reproductions", "list published figures and note what runs gave"),
}

EXAMPLES = """Examples:
  # a student of digits and its teacher, in a minute
  litdistill train
  # your photos, a folder for each class: taught by a pretrained network
  litdistill train experiment=photos/cpu data.root=<folder>
  # any option of a group, any key
  litdistill train data=mnist method=dkd net@student=mlp seed=1
  # a student to ship
  litdistill export run=runs/train/<run> precision=int8
"""


def overview() -> str:
    """Returns the text of `litdistill --help`: each verb with its description, and examples."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        (
            "Usage: litdistill <verb> [key=value ...]",
            "",
            *lines,
            "",
            "litdistill <verb> --help shows a verb's keys.",
            "",
        )
    ) + ("\n" + EXAMPLES)


@contextlib.contextmanager
def closed_pipe_ends() -> Iterator[None]:
    """Ends the process, with the status of SIGPIPE, where the reader of its output has gone: `litdistill … | head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # another pipe is broken
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(128 + 13)


@closed_pipe_ends()
def main() -> None:
    """Runs the verb in `sys.argv`; exits with status 2 for an unknown one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(overview(), end="")
    elif name == "--version":
        from litdistill import __version__

        print(f"litdistill {__version__}")
    elif name in VERBS:
        run(name, named=True)
    else:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        verb_missing = "=" in name or name.startswith("-")
        hint = f"Did you mean litdistill {near[0]}?" if near else f"The verbs are {', '.join(VERBS)}."
        if verb_missing:
            hint = f"A verb comes first: litdistill train {name}"
        print(f"litdistill: {name} is no verb. {hint}", file=sys.stderr)
        sys.exit(2)


@closed_pipe_ends()
def run(name: str, named: bool = False) -> None:
    """Runs one verb on the arguments in `sys.argv`. `named`: whether the verb itself is among them, unlike for a script."""
    verb, arguments = VERBS[name], sys.argv[2 if named else 1 :]
    module, _, function = verb.function.partition(":")
    starting.show(name, verb.loads, arguments)
    try:
        task = getattr(importlib.import_module(module), function)
        if verb.config is not None:
            from litdistill.cli.hydra_main import run_task

            run_task(task, verb.config, name if named else None)
        else:
            starting.end(loaded=bool(verb.loads))
            task(arguments)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        starting.end()
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        starting.end()

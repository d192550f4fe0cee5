"""Everything that only a GPU can show, for whoever has one for some minutes: cheapest first, and nothing in it can hang.

    python scripts/gpu.py                                                    all stages, into runs/gpu
    python scripts/gpu.py stages=equality,tests,peers,steps seconds=400      some of them, in so much time
    python scripts/gpu.py device=cpu                                         the dry form: small sizes, to see that it runs

Each stage is a process with a time limit: at the limit it is killed, and the next one begins. Each figure is printed and added
to `figures.jsonl` in `out` as soon as it is known. The same command goes on where it was stopped: what stands there is not
measured again. The table comes at the end; what is printed is in `log.txt` too. It needs no network.

equality: 20 steps as CUDA graphs and launched one by one, in float32, augmented batches likewise, and whole runs of 5 seeds.
tests: `pytest -m gpu`. peers: the loop that most code has. steps: this project's steps, a bare captured graph of the same
networks, kernels, memory, share of the peak. grid: parts of steps by network and batch, for docs/scale.md. vmap: 16 students
side by side on streams and stacked in one. compile: a student compiled within its graph: seconds to compile, and milliseconds a
step. cards: two GPUs. mnist, cells: Hinton's table, and cells of the tables on CIFAR-10, from the files in data= (data_files);
hours in all, which go on from the last epoch where they were stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SLOWER, DRY = (
    5,
    600.0,
)  # times as long a stage of the dry form may take, on a machine that does other work, and seconds at most
LEAST = 5.0  # seconds in which no stage is worth starting


class Stage(NamedTuple):
    """A process of `make gpu`: its name and how long it may take."""

    name: str
    seconds: float


STAGES = (
    Stage("equality", 150),
    Stage("tests", 90),
    Stage("peers", 60),
    Stage("steps", 150),
    Stage("grid", 120),
    Stage("vmap", 90),
    Stage("compile", 240),
    Stage("cards", 120),
    Stage("mnist", 3600),
    Stage("cells", 4 * 3600),
)
OPTIONS = {"device": "cuda", "out": "runs/gpu", "stages": "", "seconds": "", "runs": "", "data": "data_files"}


def options(arguments: Sequence[str]) -> dict[str, str]:
    """What was typed as key=value, over the defaults. Exits with the options where one is unknown."""
    found = dict(OPTIONS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in OPTIONS or not _:
            sys.exit(f"{argument} is no option. Options: {', '.join(f'{k}=' for k in OPTIONS)}.")
        found[key] = value
    found["out"] = str(Path(found["out"]).resolve())
    found["data"] = str(Path(found["data"]).resolve())
    found["runs"] = found["runs"] or str(Path(found["out"]) / "runs")
    unknown = set(filter(None, found["stages"].split(","))) - {stage.name for stage in STAGES}
    if unknown:
        sys.exit(f"No such stage: {', '.join(unknown)}. Stages: {', '.join(s.name for s in STAGES)}.")
    return found


class Figures:
    """What has been measured: lines of JSON in a file, added as soon as they are known."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All lines, without one that a kill has cut."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def add(self, stage: str, what: str, **figures: Any) -> None:
        """Prints figures and keeps them."""
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{stage}: {what}: {shown}", flush=True)
        before = self.path.read_bytes() if self.path.is_file() else b""
        with self.path.open("a") as file:
            file.write("\n" * (before[-1:] not in (b"", b"\n")))  # after a line that was cut
            file.write(json.dumps({"stage": stage, "what": what, **figures}) + "\n")

    def measure(self, stage: str, what: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Keeps what `work` gives under a name, or the error that it ends with; does nothing where the name has figures."""
        if any((f["stage"], f["what"]) == (stage, what) and "error" not in f for f in self.read()):
            return
        start = time.perf_counter()
        try:
            found = dict(work())
        except Exception as error:  # the next figure may be had nonetheless
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        self.add(stage, what, **found, took_s=round(time.perf_counter() - start, 1))


def command(stage: str, given: Mapping[str, str]) -> list[str]:
    """What runs a stage."""
    if stage in ("tests", "cards"):
        chosen = {"tests": "not two_gpus", "cards": "two_gpus"}[stage]
        tests = str(ROOT / "tests" / "test_gpu.py")
        # -s would mix the runs' lines into the report; the names of what is skipped come with -rs
        options = ["-m", "gpu", "-k", chosen, "-n0", "-p", "no:cacheprovider", "-rs", "--durations=10", "-v"]
        return [sys.executable, "-m", "pytest", "--rootdir", str(ROOT), *options, tests]
    return [sys.executable, str(ROOT / "scripts" / "gpu_stages.py"), stage, json.dumps(dict(given))]


def run(arguments: Sequence[str], seconds: float, log: Path) -> int | None:
    """Runs a command for at most so long, its output shown and added to `log`; its exit status, None where it was killed."""
    env = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **os.environ}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*arguments], cwd=ROOT, env=env, text=True, start_new_session=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def show() -> None:
        with log.open("a") as file:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                file.write(line)
                file.flush()

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    status: int | None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        end(process)
    reader.join(5)  # a child that left the group may hold the pipe
    return status


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it has started and not taken out of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that the stage that runs is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@ended_by_sigterm()
def main(arguments: Sequence[str]) -> int:
    """See the head of this file; the number of stages that ended with an error."""
    given = options(arguments)
    out = Path(given["out"])
    figures, start = Figures(out / "figures.jsonl"), time.perf_counter()
    chosen = [n for n in given["stages"].split(",") if n]
    budget = float(given["seconds"] or "inf")
    faults = 0
    for stage in STAGES:
        if chosen and stage.name not in chosen:
            continue
        if any(f["stage"] == stage.name and f["what"] == "ended" and f["status"] == 0 for f in figures.read()):
            print(f"{stage.name}: finished before", flush=True)
            continue
        left = budget - (time.perf_counter() - start)
        if left < LEAST:
            print(f"{stage.name}: not begun, no time is left", flush=True)
            continue
        limit = min(stage.seconds, left) if given["device"] != "cpu" else min(stage.seconds * SLOWER, DRY, left)
        print(f"-- {stage.name}, at most {limit:.0f} s", flush=True)
        began = time.perf_counter()
        status = run(command(stage.name, given), limit, out / "log.txt")
        said = "killed at its limit" if status is None else status
        figures.add(stage.name, "ended", status=said, seconds=round(time.perf_counter() - began, 1))
        faults += status != 0
    text = table(figures.read())
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nFigures: {figures.path}", flush=True)
    return faults


# -- the table -------------------------------------------------------------------------------------------------------

ROWS = (  # of the table of steps: the words, and the name of the figure for a pair
    ("peers' loop, float32, 8 workers", "peers", "peers"),
    ("live, captured", "steps", "live captured"),
    ("live, launched one by one", "steps", "live eager"),
    ("cached, captured", "steps", "cached captured"),
    ("cached, launched one by one", "steps", "cached eager"),
    ("labels alone, captured", "steps", "hard captured"),
    ("labels alone, launched one by one", "steps", "hard eager"),
    ("live, one bare captured graph", "steps", "live bare"),
    ("cached, one bare captured graph", "steps", "cached bare"),
)
RATIOS = (
    ("peers ÷ live", ("peers", "peers"), ("steps", "live captured")),
    ("peers ÷ cached", ("peers", "peers"), ("steps", "cached captured")),
    ("live ÷ bare graph", ("steps", "live captured"), ("steps", "live bare")),
    ("cached ÷ bare graph", ("steps", "cached captured"), ("steps", "cached bare")),
)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown: milliseconds a step and ratios by pair, then all others."""
    last = {(f["stage"], f["what"]): f for f in lines}
    pairs = list(dict.fromkeys(f["pair"] for f in lines if "pair" in f))

    def ms(pair: str, stage: str, what: str) -> float | None:
        value = last.get((stage, f"{pair} {what}"), {}).get("ms")
        return None if value is None else float(value)

    parts = []
    if pairs:
        rows = ["| milliseconds a step | " + " | ".join(pairs) + " |", "|---|" + "---:|" * len(pairs)]
        for words, stage, what in ROWS:
            rows.append(_row(words, [ms(p, stage, what) for p in pairs], "{:.3f}"))
        for words, over, under in RATIOS:
            cells = [(ms(p, *over), ms(p, *under)) for p in pairs]
            rows.append(_row(words, [a / b if a and b else None for a, b in cells], "{:.2f}"))
        parts.append("\n".join(rows))
    rows = ["| stage | what | figures |", "|---|---|---|"]
    for f in last.values():
        shown = {k: v for k, v in f.items() if k not in ("stage", "what", "pair", "took_s", "ms")}
        if not any(shown.values()) and f["what"] != "ended":
            continue
        words = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        rows.append(f"| {f['stage']} | {f['what']} | {words} |")
    return "\n\n".join([*parts, "\n".join(rows)])


def _row(words: str, values: Sequence[float | None], form: str) -> str:
    return f"| {words} | " + " | ".join("–" if v is None else form.format(v) for v in values) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Trains a student by every method of conf/method, times a step of each, and writes the table of them all.

    python scripts/methods_table.py out=docs/methods.md seeds=5
    python scripts/methods_table.py 'only=[kd,nkd]'      measures these, and keeps the other rows of the file

What stands in the file below the table stays.
Runs are those of conf/experiment/methods.yaml, in runs/methods/<method>/; what is finished there is not repeated.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from litdistill.benchmarks.tables import read_options, run_script
from litdistill.config.instantiate import instantiate
from litdistill.config.recipes import recipe_hash
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.methods import KD, NAMES, Shuffled, Sum
from litdistill.methods.base import BOXES, CATEGORICAL, Method
from litdistill.models.resnet import resnet
from litdistill.tasks import Classification, MultiLabel, Task
from litdistill.training.train import train
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.command_line import literal
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from litdistill.utils.text import markdown_table
from litdistill.utils.units import gain, spread
from litdistill.utils.versions import in_words, versions

DEFAULTS = {"out": "docs/methods.md", "seeds": 5, "rounds": 7, "runs": "runs", "only": []}
CONTROL = "supervised"
COLUMNS = ("method", "paper", "reads of the teacher", "defaults", "cost", "test accuracy %", "over the control")

# The pair whose steps are timed: ResNet-20 teaches ResNet-8, both of the published CIFAR-100 tables.
SHAPE, CLASSES, BATCH, SAMPLES = (3, 32, 32), 100, 32, 50_000
LATER = 10**6  # an epoch behind every first phase


# -- what a method is ---------------------------------------------------------------------------------------------------


def options(path: Path) -> DictConfig:
    """The method of a yaml, composed: one may be a diff on another."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(overrides=[f"+method={path.stem}"]).method
    assert isinstance(node, DictConfig)
    return node


def paper(path: Path, target: str) -> str:
    """From the head of the method's module, or where the yaml is not named after its module, from the yaml's own."""
    if path.stem == (stem := NAMES.get(target.rpartition(".")[2])):
        spec = importlib.util.find_spec(f"litdistill.methods.{stem}")
        assert spec is not None
        assert spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    else:
        lines = path.read_text().splitlines()
        comment = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        text = "\n".join(line.removeprefix("#").strip() for line in lines[:comment])
    return linked(reference(text))


def reference(text: str) -> str:
    """The first paragraph of a text, up to the sentence that names a paper on arXiv, without the last full stop."""
    sentences = re.split(r"(?<=[.:]) +(?=[A-Z])", " ".join(text.split("\n\n")[0].split()))
    named = next((i for i, s in enumerate(sentences) if "arXiv" in s), len(sentences))
    return " ".join(sentences[: named + 1]).rstrip(".:")


def linked(text: str) -> str:
    """Each arXiv number becomes a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def defaults(node: Mapping[str, Any], prefix: str = "") -> str:
    """`hard 1, hint 100` of a method's options; those of a sum with their method's name; taps are another column."""
    shown = []
    for key, value in node.items():
        if key == "methods":
            shown += [defaults(part, f"{name}.") for name, part in value.items()]
        elif key != "_target_" and not key.endswith("_taps") and value is not None:
            shown.append(f"{prefix}{key} {plain(value)}")
    return ", ".join(shown)


def plain(value: Any) -> str:
    """Numbers without needless digits, lists with spaces between."""
    if isinstance(value, (bool, str)):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, (int, float)) else " ".join(plain(v) for v in value)


def taps_of(method: Method) -> list[Taps]:
    """What a method, or each of a sum, reads, before it is resolved on networks."""
    if isinstance(method, Sum):
        return [t for part in method.parts().values() for t in taps_of(part)]
    return taps_of(method.method) if isinstance(method, Shuffled) else [method.taps()]


def reads(method: Method, uses_logits: bool) -> str:
    """In words: the teacher's logits and taps, or what a method without one reads in its place."""
    if not method.needs_teacher:
        own = [name for taps in taps_of(method) for name in words(taps.student)]
        return "no teacher" + (f"; the student's own {', '.join(own)}" if own else "")
    found = ["logits"] if uses_logits else []
    found += dict.fromkeys(name for taps in taps_of(method) for name in words(taps.teacher))
    return ", ".join(found)


def words(taps: Sequence[str] | str) -> list[str]:
    return [taps] if isinstance(taps, str) else list(taps)


# -- what a step of it costs --------------------------------------------------------------------------------------------


class Step:
    """A method on the pair of networks that is timed: forward of both, the labels' loss and the method's, backward."""

    def __init__(self, method: Method):
        torch.manual_seed(0)
        self.images, self.targets = torch.randn(BATCH, *SHAPE), torch.randint(CLASSES, (BATCH,))
        bernoulli = CATEGORICAL not in method.kinds
        targets = torch.randint(2, (BATCH, CLASSES)).float() if bernoulli else self.targets
        self.task: Task = MultiLabel() if bernoulli else Classification()
        self.batch = Batch(self.images, targets, torch.randperm(SAMPLES)[:BATCH])
        example, teacher = self.images[:2], resnet(CLASSES, SHAPE, 20).eval().requires_grad_(False)
        student = method.prepare(resnet(CLASSES, SHAPE, 8), teacher, example)
        taps = method.taps()
        self.method, self.student = method, FeatureExtractor(student, resolve_taps(student, example, taps.student))
        self.teacher = FeatureExtractor(teacher, resolve_taps(teacher, example, taps.teacher))
        student.eval()
        with torch.no_grad():
            method.build(self.student(example), self.teacher(example), torch.arange(SAMPLES) % CLASSES)
        student.train()
        self.parameters = [*student.parameters(), *method.parameters()]
        method.set_epoch(LATER)

    def outputs(self) -> tuple[Outputs, Outputs | None]:
        student = self.student(self.images)
        with torch.no_grad():
            return student, self.teacher(self.images) if self.method.needs_teacher else None

    def terms(self, student: Outputs, teacher: Outputs | None) -> dict[str, Tensor]:
        """The method's, and where it weighs it the labels' loss of the student and of what is trained beside it."""
        terms = self.method(student, teacher, self.batch)
        if hard := self.method.hard * self.method.hard_factor(LATER):
            trained = [student, *self.method.companions(student)]
            losses = [self.task.loss(self.student.net, o, self.batch)["hard"] for o in trained]
            terms = {"hard": hard * torch.stack(losses).sum(), **terms}
        return terms

    def seconds(self) -> float:
        start = time.perf_counter()
        for p in self.parameters:
            p.grad = None
        torch.stack(list(self.terms(*self.outputs()).values())).sum().backward()
        return time.perf_counter() - start

    @torch.no_grad()
    def uses_logits(self) -> bool:
        """Whether any term changes with the teacher's logits alone."""
        student, teacher = self.outputs()
        if teacher is None:
            return False
        self.method.eval()  # memories stay
        found = []
        for logits in (teacher.logits, torch.randn_like(teacher.logits)):
            torch.manual_seed(0)  # the same negatives
            found.append(self.terms(student, teacher._replace(heads={"logits": logits})))
        self.method.train()
        return any(not torch.equal(found[0][k], found[1][k]) for k in found[0])


def cost(step: Step, kd: Step, rounds: int) -> float:
    """Seconds of a step over those of KD's, the median of rounds in which either is timed right after the other."""
    for warm in (kd, step):
        warm.seconds()
    return statistics.median(step.seconds() / kd.seconds() for _ in range(rounds))


# -- what it gives ------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, runs: str) -> tuple[DictConfig, dict[str, Any]]:
    """Trains one cell unless it is there, and gives its config and its summary.

    What decides its weights is in the folder's name, so that a changed default is not answered by an old run.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train", ["experiment=methods", f"method={name}", f"seed={seed}", f"runs={literal(runs)}", "folder=''"]
        )
    if "init_epochs" in cfg.method:
        with open_dict(cfg):
            cfg.method.init_epochs = first_epochs(cfg.method.init_epochs, cfg.trainer.max_epochs)
    folder = Path(runs) / "methods" / name / f"{seed}-{recipe_hash(cfg)}"
    cfg.folder = str(folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return cfg, json.loads((folder / "summary.json").read_text())


def trains_here(method: Method) -> bool:
    """Whether it learns from one label an image, as it is."""
    return CATEGORICAL in method.kinds and not method.reads_adversarial


def first_epochs(published: int, epochs: int) -> int:
    """As large a share of a run as the published one of 240 epochs, and one epoch at least."""
    return max(1, round(published / 240 * epochs))


def accuracies(summaries: Sequence[Mapping[str, Any]]) -> list[float]:
    """In per cent, on the test set, of the weights that training ended with."""
    return [100 * s["student"]["test"]["accuracy"]["last"] for s in summaries]


def outcome(values: Sequence[float] | None, control: Sequence[float]) -> tuple[str, str]:
    """The last two cells; dashes of a method for several labels a sample, which these images do not have."""
    if values is None:
        return "–", "–"
    return spread(values), gain(dict(enumerate(values)), dict(enumerate(control)))


def head(cfg: DictConfig, summary: Mapping[str, Any], teacher: float, seeds: int, rounds: int) -> str:
    """What the table is, from the runs themselves."""
    data, student, large = summary["data"], summary["student"], summary["teacher"]
    used = in_words(versions())
    return f"""# Methods

Written by `python scripts/methods_table.py out=docs/methods.md seeds={seeds}`; not to be edited by hand.

**A sanity check, not a ranking.** Every method trains the same small student ({student["name"]}, {student["params"]:,}
parameters) on {data["train"]} labelled {data["name"]} of {"x".join(map(str, data["input_shape"]))}, {summary["steps"]} steps,
beside the same teacher ({large["name"]}, {large["params"]:,} parameters, {teacher:.2f} % on the test set). Weights and
temperatures are the published ones (`balance=none`), most of which were tuned for CIFAR-100 or ImageNet, and none was
tuned here: a method below the control may need nothing but another weight, as [`balance=auto`](balance.md), the default,
sets it. The test set ({data["test"]} images) was used to choose nothing:
the accuracy is that of the last epoch.

- **method**: the name of its file in `conf/method`, as in `method=kd`. The control is `{CONTROL}`: labels alone.
- **reads of the teacher**: its logits, as tried by changing them, and the features that are tapped by default.
- **defaults**: as in the file. `init_epochs` is cut to the same share of this short run as of the published 240 epochs.
- **cost**: time of a training step relative to `kd`, forward and backward with the teacher's forward where there is one;
  ResNet-20 teaches ResNet-8, {BATCH} images of {"x".join(map(str, SHAPE))}, {CLASSES} classes, one CPU thread; the median of
  {rounds} ratios of neighboring steps. Of methods in two phases, the second.
- **test accuracy %**, **over the control**: mean ± standard deviation over {seeds} seed(s), which draw the images, the
  first weights and the order; the difference is taken seed by seed. A method for several labels a sample has none, nor
  has one that learns at adversarial inputs ([Safe students](security.md)), whose cost here is without the attack.

Each run is `python scripts/train.py experiment=methods method=<method> seed=<seed>`, with {cfg.trainer.max_epochs} epochs.
Made with {used}.

"""


def kept(text: str) -> tuple[dict[str, str], str]:
    """The rows of a written table by method, and what stands below it, from the next heading on."""
    table, _, below = text.partition("\n## ")
    rows = {found[1]: line for line in table.splitlines() if (found := re.match(r"\| `(\w+)` \|", line))}
    return {name: re.sub(r"\| -(?=\d)", "| −", line) for name, line in rows.items()}, f"\n## {below}" if below else ""


def left_out(path: Path, kd: Sequence[float]) -> str:
    """The sentence on methods that were tried in the same way and were no better than `kd`, from their accuracies by seed."""
    if not path.is_file():
        return ""
    tried = ", ".join(f"{name} {spread(values)}" for name, values in json.loads(path.read_text()).items())
    return (
        f"\nTried in the same way with their published weights, and not kept, as their mean was not above that of `kd` "
        f"({spread(kd)}): {tried}.\n"
    )


def measured_row(path: Path, kd: Step, scores: Mapping[str, list[float]], rounds: int) -> str:
    name, node = path.stem, options(path)
    step = Step(instantiate(node))
    found = outcome(scores.get(name), scores[CONTROL]) if name != CONTROL else (spread(scores[name]), "control")
    first = (f"`{name}`", paper(path, node["_target_"]), reads(step.method, step.uses_logits()), defaults(node))
    line = markdown_table(COLUMNS, [(*first, f"{cost(step, kd, rounds):.2f}", *found)], 4).splitlines()[-1]
    print(line, flush=True)
    return line


def main() -> None:
    paths = {p.stem: p for p in sorted((CONF / "method").glob("*.yaml")) if p.stem != "pairs"}  # of no paper
    made = {name: instantiate(options(path)) for name, path in paths.items()}
    paths = {name: path for name, path in paths.items() if made[name].kinds != (BOXES,)}
    choices = read_options(DEFAULTS, {"seeds": 1, "rounds": 1}, {"only": paths})
    torch.set_num_threads(1)
    names = [n for n in paths if n in choices.only] or list(paths)
    results = {}
    for name in (n for n in dict.fromkeys([CONTROL, "kd", *names]) if trains_here(made[n])):
        results[name] = [run(name, seed, choices.runs) for seed in range(choices.seeds)]
        print(f"{name}: {spread(accuracies([s for _, s in results[name]]))} %", flush=True)

    scores = {name: accuracies([s for _, s in found]) for name, found in results.items()}
    out, kd = Path(choices.out), Step(KD())
    rows, below = kept(out.read_text()) if out.is_file() else ({}, "")
    rows = {n: line for n, line in rows.items() if n in paths and choices.only}
    rows |= {n: measured_row(paths[n], kd, scores, choices.rounds) for n in names}
    cfg, summary = results[CONTROL][0]
    teacher = 100 * summary["teacher"]["test"]["accuracy"]
    lines = [
        *markdown_table(COLUMNS, [], 4).splitlines(),
        *(rows[n] for n in sorted(rows, key=lambda n: (n != CONTROL, n))),
    ]
    text = head(cfg, summary, teacher, choices.seeds, choices.rounds) + "\n".join(lines) + "\n"
    write_text(out, text + left_out(out.with_suffix(".json"), scores["kd"]) + below)
    print(f"Written to {out}")


if __name__ == "__main__":
    run_script(main)

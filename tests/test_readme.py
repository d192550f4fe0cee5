"""Every command of the README and of the pages runs, and a network and a method are added as docs/own.md says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import litdistill.methods
import litdistill.models
from litdistill.cli import VERBS
from litdistill.data import datamodule
from litdistill.data.sources import load
from litdistill.training.train import train
from litdistill.types import Batch, Outputs
from litdistill.utils.paths import CONF
from tests.conftest import compose_config
from tests.test_configs import SHAPES, STEP, generated

ROOT = CONF.parent
PAGES = ("first_hour", "your_photos", "own", "compare_and_ship", "cluster", "logs")
README = (ROOT / "README.md").read_text()
TEXT = "\n".join([README, *((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)])
COMMANDS = list(
    dict.fromkeys(
        line.split("   #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    )
)
# Those that need processes of their own are in test_cli.py, test_ddp.py, test_scale.py, test_launch.py and test_slurm.py, and
# those that need other runs in test_techniques.py; that of a detector is in test_detection_files.py.
OTHER_LOGGERS = ("MLFlowLogger", "CometLogger")  # of packages that are not installed for tests
ELSEWHERE = (
    "resume=auto",
    "trainer=ddp",
    "trainer=fsdp",
    "hydra/launcher",
    "experiment=compare/",
    "experiment=detection ",
    *OTHER_LOGGERS,
)
TRAINS = [c for c in COMMANDS if c.startswith("litdistill train") and not any(e in c for e in ELSEWHERE)]


@pytest.fixture
def readme_files(tmp_path, monkeypatch):
    """Writes the pages' files where they say, in a folder of their own that Python and Hydra search too."""
    written = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    assert {Path(name).suffix for name, _ in written} == {".py", ".yaml"}
    for name, text in written:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in (litdistill.methods, litdistill.models):
        folder = tmp_path / "src" / package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return tmp_path


def small_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for label in ("cats", "dogs"):
            for i in range(6):
                path = root / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), (10 * i, 90 if label == "cats" else 10, len(split))).save(path)
    return root


def without_labels(folder: Path) -> Path:
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 36), (10 * i, 50, 50)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("command", TRAINS)
def test_a_training_command_of_the_readme_trains(command, tmp_path, monkeypatch, readme_files):
    real = lambda name, *a, **k: generated(name, *a, **k) if name in SHAPES else load(name, *a, **k)  # noqa: E731
    monkeypatch.setattr(datamodule, "load", real)
    places = {"<folder>": small_folder(tmp_path / "images"), "<another>": without_labels(tmp_path / "more")}
    for name, place in places.items():
        command = command.replace(name, str(place))
    arguments = shlex.split(command)[2:]
    chosen = [a for a in arguments if a != "-m"]
    chosen = [a.split(",")[0] if not {"[", "{"} & set(a) else a for a in chosen]  # the first job of a sweep
    small = [a for a in STEP if not a.startswith("+")] + ["data.epoch_size=8", "data.val_size=0.5"]
    if "data=folder" in chosen or "data.per_class=20" in chosen:
        small = [a.replace("data.val_size=0.5", "data.val_size=0.3") for a in small]
    chosen = [a for a in chosen if not a.startswith(("trainer.max_epochs", "data.per_class", "data.fraction"))]
    if "teacher=null" not in chosen:
        small += [
            "teacher.checkpoint=null",
            "teacher.allow_chance=true",
            "teacher.ensemble=null",
            "teacher.generations=1",
        ]
    searchpath = f"hydra.searchpath=[file://{readme_files}/conf]"
    if "data.root=" in command:
        small += ["data.image_size=32"]
    cfg = compose_config(tmp_path / "run", *chosen, *small, searchpath)
    for net in (cfg.student, cfg.teacher or {}):
        if net.get("weights") is not None:
            net.weights = None  # nothing is downloaded
    train(cfg)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_readmes_method_is_what_its_docstring_says(readme_files):
    from litdistill.methods.margin import Margin

    a, b, target = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    method = Margin(hard=2, soft=3)
    terms = method(Outputs.of(a), Outputs.of(b), Batch(torch.zeros(5), target))
    assert method.hard == 2  # by which the Distiller weighs the labels' loss
    assert terms.keys() == {"soft"}
    assert terms["soft"] == pytest.approx(3 * (a - b).abs().mean().item())


def test_the_readmes_lines_of_python_distil(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = (text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "distill(" in text)
    torch.manual_seed(0)
    inputs = torch.randn(2000, 4)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 2)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[-5.0, 0, 0, 0], [5.0, 0, 0, 0]]))
    names = {"student": student, "teacher": teacher}
    names |= {"train_loader": DataLoader(data, 20), "val_loader": DataLoader(data, 50)}
    before = student.weight.detach().clone()
    exec(lines, names)
    small = names["small"]
    assert not torch.equal(small.weight, before)
    assert (small(inputs).argmax(1) == data.tensors[1]).float().mean() > 0.9


def test_the_readme_names_only_what_exists():
    for command in COMMANDS:
        first = command.split()[0]
        if command.startswith("make"):
            assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif command.startswith("python -m litdistill."):
            assert (ROOT / "src" / f"{command.split()[2].replace('.', '/')}.py").is_file(), command
        elif first == "litdistill":
            assert command.split()[1] in VERBS, command
        elif first == "python":
            assert (ROOT / command.split()[1]).is_file(), command
        else:
            assert first in ("git", "tensorboard", "torchrun", "sbatch", "eval"), command
            for script in re.findall(r"scripts/[\w/.]+", command):
                assert (ROOT / script).is_file(), command
    for path in re.findall(r"`((?:conf|src|scripts|docs)/[\w/.]+\.\w+)`", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_counts_the_methods():
    assert len(README.splitlines()) <= 150
    methods = [p.stem for p in (CONF / "method").glob("*.yaml")]
    assert f"**{len(methods)} methods**" in README
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "compare_and_ship.md").read_text().split("## Methods")[1]))
    assert set(methods) <= listed, set(methods) - listed


def test_the_picture_shows_the_figures_of_the_table():
    """`make distill PICTURE=docs/digits.png` writes both; the picture's description is what it shows."""
    lines = README.split("<!-- make distill -->")[1].split("<!-- end -->")[0].strip().splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    figures = [row[head.index("test accuracy %")] for row in rows]
    with Image.open(ROOT / "docs" / "digits.png") as picture:
        (shown,) = json.loads(picture.text["Description"]).values()
    assert list(shown.values()) == figures
    assert len(figures) == 4


@pytest.mark.parametrize("name", OTHER_LOGGERS)
def test_a_command_for_another_logger_composes(name, tmp_path):
    (command,) = (c for c in COMMANDS if name in c)
    cfg = compose_config(tmp_path / "run", *shlex.split(command)[2:])
    assert any(name in node["_target_"] for node in cfg.logger.values())


def test_the_table_of_photos_is_that_of_its_page():
    (table,) = re.findall(r"<!-- photos -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    page = (ROOT / "docs" / "photos.md").read_text().splitlines()
    assert len(table.splitlines()) > 8
    assert all(line in page for line in table.splitlines())

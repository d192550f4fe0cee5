"""docs/own_task.md, followed: its files are written where it says, and its commands run in their order."""

from __future__ import annotations

import json
import re
import shlex
import sys

import pytest

from litdistill.export.predict import main as predict
from litdistill.utils.paths import CONF
from tests.conftest import drawing
from tests.forked import call

PAGE = (CONF.parent / "docs" / "own_task.md").read_text()
FILES = re.findall(r"```(?:python|yaml|csv)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("litdistill ")
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The page's files, with its folder on Python's path."""
    folder = tmp_path_factory.mktemp("grading_study")
    for name, text in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "grading"]:
        del sys.modules[name]


def test_the_page_has_every_file_that_it_draws():
    assert [name for name, _ in FILES] == [
        "grading/task.py", "grading/data.py", "grading/nets.py", "conf/task/grades.yaml", "conf/data/patients.yaml",
        "conf/net/perceptron.yaml", "conf/experiment/grades.yaml", "patients.csv",
    ]  # fmt: skip
    assert [command[1] for command in COMMANDS] == ["train", "train", "evaluate", "report", "export", "predict"]


@pytest.fixture(scope="module")
def printed(study):
    """What its commands but the last print, one after the other."""
    for _, verb, *arguments in COMMANDS[:-1]:
        more = ["threads=1", "trainer=cpu"] if verb == "train" else []
        with drawing():  # its task has a picture of its own
            status, said = call(verb, [*arguments, *more], study)
        assert status == 0, said
    return said


def test_its_commands_train_evaluate_report_export_and_predict(study, printed, capsys, monkeypatch):
    assert "reproduced to the digit" in printed
    found = {
        name: json.loads((study / "runs" / "grades" / name / "summary.json").read_text())
        for name in ("taught", "labels")
    }
    assert found["taught"]["metric"]["name"] == "mae"
    assert found["taught"]["teacher"]["test"]["mae"] < 1.1  # saying the median always has 1.2
    assert found["taught"]["student"]["agreement"] > 0.3
    assert {"mae", "exact"} <= found["labels"]["student"]["test"].keys()
    assert "test MAE" in printed
    assert "exact" in printed
    assert any(b"validation/grades" in path.read_bytes() for path in (study / "runs/grades/taught").glob("events*"))

    monkeypatch.chdir(study)
    predict(COMMANDS[-1][2:])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.count("at least") == 4 for line in lines)

    import torch
    from grading.task import Grades

    from litdistill import load_student
    from litdistill.types import Outputs

    rows = torch.tensor(
        [[float(x) for x in line.split(",")] for line in (study / "patients.csv").read_text().splitlines()]
    )
    grades = Grades().decode(Outputs.of(load_student(study / "runs/grades/taught")(rows)))["grade"].tolist()
    told = [sum(float(p) > 50 for p in re.findall(r"([\d.]+) %", line)) for line in lines]
    assert grades == told  # as the page says, the number of probabilities above one half


@pytest.mark.usefixtures("printed")
def test_what_it_says_is_refused_is_refused(study):
    status, printed = call(
        "train", ["--config-dir", "conf", "experiment=grades", "method=kd", "hydra.run.dir=runs/kd"], study
    )
    assert status != 0
    assert "KD is defined for logits that are categorical" in printed
    status, printed = call("export", ["run=runs/grades/taught", "format=safetensors"], study)
    assert status != 0
    assert "only those of litdistill.models are built" in printed

"""A network of the user's own package: trained, resumed, evaluated, exported, a teacher; a stranger's copy by leave alone."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from litdistill.config import origin
from litdistill.config.trust import check_trusted
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests.conftest import SMALL, compose_config
from tests.forked import call
from tests.test_trust import note

OWN = """
from torch import nn

def tiny(num_classes, input_shape, width=8):
    c, h, w = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, width), nn.ReLU(), nn.Linear(width, num_classes))

class Nets:
    @staticmethod
    def tiny(num_classes, input_shape):
        return tiny(num_classes, input_shape)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that lies in a folder of the user's own."""
    write_text(tmp_path / "lib" / "own_pkg" / "__init__.py", "import subprocess\nfrom torch import load\n")
    write_text(tmp_path / "lib" / "own_pkg" / "nets.py", OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    yield "own_pkg"
    for name in [name for name in sys.modules if name.split(".")[0] == "own_pkg"]:
        del sys.modules[name]


def test_a_network_of_ones_own_goes_all_the_way_and_a_copy_of_it_by_leave_alone(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [o for o in SMALL if "widths" not in o]
    tiny = [*small, "teacher=null", "method=supervised", "data.per_class=20", "logger=none", "threads=1"]
    write_text(tmp_path / "own_conf" / "net" / "own.yaml", f"_target_: {package}.nets.tiny\nwidth: 6\n")
    beside = ["--config-dir", str(tmp_path / "own_conf")]
    status, printed = call("train", [*beside, *tiny, "net@student=own", "trainer.max_epochs=1"], tmp_path)
    assert status == 0, printed
    (folder,) = (tmp_path / "runs" / "train").iterdir()
    assert origin.made_here(folder)
    (folder / "summary.json").unlink()
    status, printed = call("train", [*beside, f"resume={folder}", "trainer.max_epochs=2"], tmp_path)
    assert status == 0, printed
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2

    moved = folder.rename(tmp_path / "moved")
    assert differences(evaluate(moved), load_run(moved)[1]) == []
    assert export(moved, "torchscript")[0].is_file()
    distilled = compose_config(tmp_path / "kd", *small, "student.widths=[8]", "trainer.max_epochs=1", "logger=none")
    distilled.teacher = {"_target_": f"{package}.nets.tiny", "width": 6, "checkpoint": str(moved), "allow_chance": True}
    train(distilled)

    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    config = copy / ".hydra" / "config.yaml"
    assert differences(evaluate(copy), load_run(copy)[1]) == []  # which is still what was made here
    config.write_text(config.read_text().replace("technique: null", "technique: edited"))
    with pytest.raises(
        UserError, match=rf"^student\._target_: {package}\.nets\.tiny is refused.*add trust=\[{package}\]"
    ):
        evaluate(copy)
    assert differences(evaluate(copy, trust=[package]), load_run(copy, [package])[1]) == []
    assert export(copy, "torchscript", trust=[package])[0].is_file()
    for path in ("load", "subprocess.run", "nets.Nets.tiny", "nets.nn.Linear", "__loader__.load_module"):
        check = OmegaConf.create({"student": {"_target_": f"{package}.{path}"}})
        with pytest.raises(UserError, match="is refused"):
            check_trusted(check, copy, [package])


def test_a_foreign_run_of_ones_own_class_goes_on_by_leave_alone(package, tmp_path):
    copy = tmp_path / "copy"
    own = [f"student._target_={package}.nets.tiny", "~student.widths", "~student.global_pool"]
    small = [o for o in SMALL if "widths" not in o]
    note(copy, *small, "teacher=null", "method=supervised", *own, "logger=none", "threads=1")
    status, printed = call("train", [f"resume={copy}"], tmp_path)
    assert status == 2
    assert f"student._target_: {package}.nets.tiny is refused" in printed
    status, printed = call("train", [f"resume={copy}", f"trust=[{package}]"], tmp_path)
    assert status == 0, printed

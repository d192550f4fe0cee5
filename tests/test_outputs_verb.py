"""`litdistill outputs`: the file that a run writes teaches as its network does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from litdistill.cli.commands import outputs as outputs_verb
from litdistill.config.recipes import teacher_folder
from litdistill.distillation.outputs_tables import read_outputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.outputs import Form, record
from litdistill.tasks import Classification
from litdistill.training.train import train
from litdistill.utils.checkpoint import load_checkpoint, load_weights
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests.composed import composed
from tests.fits import same

VIEWS = ["data.augment=[{Crop:{pad:1}}]", "data.fixed_views=2", "data.view_seed=0"]


@pytest.fixture
def run(small):
    """`run(*overrides, name="a")`: a finished run's folder."""

    def make(*overrides: str, name: str) -> Path:
        cfg = small("logger=none", "teacher.allow_chance=true", *overrides, name=name)
        write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        train(cfg)
        return Path(cfg.folder)

    return make


@pytest.mark.parametrize("more", [[], VIEWS], ids=["plain", "views"])
def test_a_student_of_the_file_is_that_of_the_network_to_the_bit(run, small, tmp_path, more):
    live = run(*more, name="live")
    teacher = teacher_folder(small(*more))
    lines = record(teacher, tmp_path / "t.safetensors", form=Form(views=2 if more else 0), device="cpu")
    assert f"40 bytes {'a view' if more else 'a sample'} (10 logits, float32)" in lines[0]
    record(live, tmp_path / "of.safetensors", of="teacher", form=Form(views=2 if more else 0), device="cpu")
    one, other = (load_file(tmp_path / name) for name in ("t.safetensors", "of.safetensors"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    told = run(*more, f"teacher.outputs={tmp_path / 't.safetensors'}", name="told")
    assert same(load_weights(live), load_weights(told))
    last = [load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (live, told)]
    assert same(*last)  # the best epoch may be the first, in which each sample has its first view
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (live, told)]
    for key in ("test", "params", "macs", "bytes"):
        assert summaries[0]["teacher"][key] == summaries[1]["teacher"][key]
    assert summaries[0]["student"] == summaries[1]["student"]
    assert not differences(evaluate(told, device="cpu"), load_run(told)[1])
    if more:
        with pytest.raises(UserError, match="has 2 views of each image, and these data draw 3"):
            run(*more, "data.fixed_views=3", f"teacher.outputs={tmp_path / 't.safetensors'}", name="c")
        with pytest.raises(UserError, match=r"of another view seed .0, and now 1.*data.view_seed=0"):
            run(*more, "data.view_seed=1", f"teacher.outputs={tmp_path / 't.safetensors'}", name="d")
        with pytest.raises(UserError, match="of another augmentation"):
            run(*more, "data.augment=[Flip]", f"teacher.outputs={tmp_path / 't.safetensors'}", name="e")
        with pytest.raises(UserError, match=r"these data draw none: set data.fixed_views=2 data.view_seed=0"):
            run(*more, "data.augment=null", f"teacher.outputs={tmp_path / 't.safetensors'}", name="f")
        with pytest.raises(UserError, match=r"draw 9: set data.fixed_views=2"):
            run(*more, "data.fixed_views=null", f"teacher.outputs={tmp_path / 't.safetensors'}", name="g")
    with pytest.raises(UserError, match="outputs of other images"):
        run(*more, "data.classes=[0,1,2]", f"teacher.outputs={tmp_path / 't.safetensors'}", name="h")


@pytest.mark.parametrize("rest", ["spread", "drop"])
def test_the_top_k_keep_their_probabilities_and_the_rest_is_spread_or_dropped(run, tmp_path, rest):
    folder = run(name="a")
    record(folder, tmp_path / "all.safetensors", device="cpu")
    lines = record(folder, tmp_path / "top.safetensors", form=Form(0, "float16", 3, rest), device="cpu")
    size = 3 * 2 + 3 * 2 + 2 * (rest == "spread")
    assert f"{size} bytes a sample (the top 3 of 10 logits, float16)" in lines[0]
    from tests.fits import digits

    data = digits()
    p, q = (
        RecordedTeacher(read_outputs(tmp_path / f"{name}.safetensors"), Classification(), data)
        .of_split("test")
        .logits.double()
        .softmax(1)
        for name in ("all", "top")
    )
    top, at = p.topk(3)
    others = 1 - top.sum(1, keepdim=True)
    expected = torch.full_like(p, 0.0) if rest == "drop" else (others / 7).expand_as(p).clone()
    expected.scatter_(1, at, top)
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(q, expected, rtol=0, atol=5e-3)  # float16
    assert (q.scatter(1, at, 0.0).max() == 0) == (rest == "drop")
    shown = float(lines[1].split()[4].rstrip("%")) / 100
    assert 0 < shown < 1


def test_the_size_of_the_top_10_of_1000_classes():
    from litdistill.export.outputs import _arrays
    from litdistill.types import Outputs

    ids = {"train": torch.arange(5), "val": torch.arange(2), "test": torch.arange(2)}
    arrays = _arrays(ids, Outputs.of(torch.zeros(2, 1000)), Form(4, "float16", 10))
    parts = {
        k: math.prod(s) * d.itemsize for k, (d, s) in arrays.items() if k.startswith("train.") and k != "train.ids"
    }
    assert sum(parts.values()) / (5 * 4) == 42


def test_a_file_says_what_it_is_and_a_changed_byte_is_refused(run, small, tmp_path, capsys):
    folder, path = run(name="a"), tmp_path / "t.safetensors"
    cfg = composed("outputs", [f"run={folder}", f"to={path}", "embedding=true", "device=cpu"])
    outputs_verb(cfg)
    assert "teacher.outputs=" in capsys.readouterr().out
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["litdistill"])
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]
    assert manifest["network"]["run"] == "a"
    assert manifest["data"]["name"] == "digits"
    assert manifest["temperature"] is None
    with pytest.raises(UserError, match="is there already"):
        outputs_verb(cfg)
    taught = small(f"teacher.outputs={path}", "method=pkt", "logger=none", "teacher.allow_chance=true", name="b")
    train(taught)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: the SHA-256"):
        read_outputs(path)
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match="is damaged"):
        read_outputs(path)


def test_what_cannot_be_written_is_refused(run, tmp_path):
    folder = run("teacher=null", "method=supervised", name="a")
    for options, words in (
        ({"of": "teacher"}, "has no teacher"),
        ({"form": Form(top=10)}, "there are 10 classes"),
        ({"form": Form(views=2)}, "one view of each sample"),
        ({"to": tmp_path / "a.npy"}, "written as .safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            record(folder, **{"to": tmp_path / "t.safetensors", "device": "cpu", **options})
    assert not list(tmp_path.glob("*t.safetensors*"))

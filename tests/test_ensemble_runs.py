"""Teachers that are several networks, in whole runs: their classes, files of outputs among them, and what is reported of them.

pytest tests/test_ensemble_runs.py
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from litdistill.config.build import build_net
from litdistill.evaluation.crowd import members_figure
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.predictions import predict_split, teacher_outputs
from litdistill.export.outputs import record
from litdistill.models.ensemble import Ensemble
from litdistill.report.members import disagreement_in_words
from litdistill.training.distill import distill
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, net

SHORT = [
    *("data=digits", "trainer=cpu", "trainer.max_epochs=2", "data.per_class=12", "data.batch_size=32"),
    *("student.widths=[8,8]", "teacher.widths=[8,16]", "trainer.log_every_n_steps=2", "threads=1"),
    *(
        "+teacher.recipe.trainer.max_epochs=4",
        "+teacher.recipe.data.batch_size=32",
    ),
]
LOW = "{recipe: {data: {classes: ['0', '1', '2', '3', '4']}}}"
HIGH = "{recipe: {data: {classes: ['9', '8', '7', '6', '5', '4']}}}"


def run(folder: Path, *overrides: str, runs: Path | None = None) -> tuple[Path, dict]:
    """A finished run and its summary; `runs`: where its automatic teachers are, beside it by default."""
    cfg = compose_config(folder, *SHORT, *overrides)
    cfg.runs = str(runs or folder.parent)
    train(cfg)
    (folder / ".hydra").mkdir(exist_ok=True)  # as the command writes it
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A student of two teachers, one of which knows the classes 0 to 4, one 4 to 9."""
    place = tmp_path_factory.mktemp("parts")
    return run(place / "run", f"teacher.ensemble=[{LOW},{HIGH}]", "teacher.ensemble_weights=[1,3]")


def test_teachers_of_some_classes_are_reported_and_evaluated_again(parts):
    folder, summary = parts
    teacher = summary["teacher"]
    assert [m["classes"] for m in teacher["members"]] == [list("01234"), list("456789")]
    assert [m["weight"] for m in teacher["members"]] == [0.25, 0.75]
    assert teacher["disagreement"]["test"]["pairs"] == 0  # they share one class, among which nothing can be compared
    data, distiller = rebuild(folder)
    ensemble = distiller.teacher.net
    targets = torch.cat([b.targets for b in data.batches("test")])
    for path in (p.parent for p in (folder.parent / "teachers").glob("*/summary.json")):
        cfg, own = load_run(path)
        names = list(cfg.data.classes)
        member = next(m for m in teacher["members"] if sorted(m["classes"]) == sorted(names))
        # The accuracy of its own run, whose test set is the images of its classes.
        assert member["test"]["metrics"]["accuracy"] == pytest.approx(own["student"]["test"]["accuracy"]["best"])
        alone = build_net(cfg.student, Only(names, data), "student", path).eval()
        batch = next(data.batches("test"))
        z = alone(batch.inputs).log_softmax(1)
        found = distiller.teacher(batch).heads["members"][:, teacher["members"].index(member)]
        columns = [int(name) for name in names]
        assert torch.allclose(found[:, columns] - found[:, columns].logsumexp(1, keepdim=True), z, atol=1e-4)
    assert teacher["test"]["accuracy"] == pytest.approx(
        (predict_split(ensemble, data, "test")[0].logits.argmax(1) == targets).double().mean().item()
    )
    assert differences(evaluate(folder, device="cpu"), summary) == []


class Only:
    """What `build_net` asks of data that have these classes of others."""

    def __init__(self, names, data):
        self.class_names, self.num_classes, self.input_shape = tuple(names), len(names), data.input_shape
        self.mean, self.std, self.name = data.mean, data.std, data.name


def test_their_figure_has_all_of_them(parts):
    _, distiller = rebuild(parts[0])
    data, _ = rebuild(parts[0])
    outputs = teacher_outputs(distiller.teacher.net, data, distiller.task, "val", "cpu", None)
    targets = torch.cat([b.targets for b in data.batches("val")])
    figure = members_figure(distiller.task, distiller.teacher.net, outputs.heads["members"], targets)
    bars, matrix = figure.axes
    assert len(bars.patches) == 2
    assert [text.get_text() for text in matrix.texts] == ["0", "–", "–", "0"]


def test_a_file_of_outputs_is_a_member_as_its_network_is(tmp_path, parts):
    """The same weights come out of the network and of the file of its outputs."""
    members = [p.parent for p in (parts[0].parent / "teachers").glob("*/summary.json")]
    checkpoint = {str(load_run(p)[0].data.classes): p for p in members}
    low, high = checkpoint["['0', '1', '2', '3', '4']"], checkpoint["['9', '8', '7', '6', '5', '4']"]
    live, first = run(tmp_path / "a", f"teacher.ensemble=[{{checkpoint: {low}}},{{checkpoint: {high}}}]")
    data, distiller = rebuild(live)
    member = distiller.teacher.net.parts()["0"]
    ids = {"train": torch.arange(len(data.train_targets)), "test": data.test_ids}
    table = {}
    for split, index in ids.items():
        batches = [member(data.get_batch(split, part).inputs) for part in index.split(32)]
        table[f"{split}.logits"] = torch.cat(batches).detach()
        table[f"{split}.ids"] = index
    path = tmp_path / "low.safetensors"
    save_file(table, path, {"classes": json.dumps(list("01234"))})
    filed, second = run(tmp_path / "b", f"teacher.ensemble=[{{outputs: {path}}},{{checkpoint: {high}}}]")
    a, b = (load_file(folder / "student.safetensors") for folder in (live, filed))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a)
    for one, other in zip(first["teacher"]["members"], second["teacher"]["members"], strict=True):
        assert one["classes"] == other["classes"]
        assert one["test"]["metrics"]["accuracy"] == other["test"]["metrics"]["accuracy"]
    assert differences(evaluate(filed, device="cpu"), second) == []
    assert len(second["teacher"]["outputs"]) == 1
    assert second["teacher"]["macs"] is None
    for folder in (live, filed):  # neither has one distribution of all classes for each sample
        with pytest.raises(UserError, match=r"of=teacher.*(other classes than its own|a file of outputs)"):
            record(folder, tmp_path / "again.safetensors", of="teacher")
    with pytest.raises(UserError, match="member 0 of the teacher is a file of outputs, which has no features to tap"):
        run(tmp_path / "c", f"teacher.ensemble=[{{outputs: {path}}},{{checkpoint: {high}}}]", "method=fitnet",
            "method.teacher_taps=0.last")  # fmt: skip


def test_networks_that_know_the_same_classes_disagree_in_some_measure(teachers, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    members = "[{recipe: {seed: 0}}, {recipe: {seed: 1}, widths: [6], preprocess: {size: 12}}]"
    features = ["method=fitnet", "method.teacher_taps=1.last", "method.student_taps=last"]
    _, summary = run(
        tmp_path / "run", f"teacher.ensemble={members}", *features, "teacher.allow_chance=true", runs=teachers
    )
    found = summary["teacher"]["disagreement"]["test"]
    assert found["pairs"] == 1
    assert 0 < found["decisions"] < 1
    assert 0 < found["js"] < 0.7
    assert found["by_pair"] == [[0, found["decisions"]], [found["decisions"], 0]]
    assert "disagree on" in disagreement_in_words(found)
    assert [m["name"] for m in summary["teacher"]["members"]] == ["conv4-8x16", "conv4-6"]
    assert "its teacher sees 8x8 and 12x12." in caplog.text


def test_a_member_at_chance_is_refused_by_its_number(teachers, tmp_path):
    members = "[{recipe: {seed: 0}}, {checkpoint: null}]"
    with pytest.raises(UserError, match=r"^Member 1 of the teacher \(conv4-8x16\) is at chance level: its accuracy"):
        run(tmp_path / "run", f"teacher.ensemble={members}", runs=teachers)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "teacher.ensemble_weights=[1]"], "which has 2"),
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "teacher.ensemble_weights=[1,0]"], "numbers above 0"),
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "teacher.ensemble_weights=[1,-2]"], "numbers above 0"),
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "teacher.ensemble_mean=median"], "logits or probabilities"),
        (["teacher.ensemble_weights=[1,2]"], "which has 0"),
        (["teacher.ensemble=[{},{ensemble: [{recipe: {seed: 1}}]}]"], "each of its members is one teacher"),
        (["teacher.ensemble=[{},{recipe: {seed: 1, trainer: {max_epoch: 3}}}]"], "max_epoch"),
        (["teacher.ensemble=[{outputs: x.npy}]", "teacher.outputs=x.npy"], "stands in the list"),
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "method=fitnet"], "the teacher is 2 networks"),
        ([f"teacher.ensemble=[{LOW},{HIGH}]", "method=dkd"], "DKD needs a teacher of all classes"),
        (["teacher.ensemble=[{},{recipe: {seed: 1}}]", "student.checkpoint=teacher"], "several networks"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(teachers, tmp_path, overrides, line):
    with pytest.raises(UserError) as refused:
        run(tmp_path / "run", *overrides, runs=teachers)
    assert line in str(refused.value)


def test_a_teacher_without_a_common_class_is_refused(tmp_path):
    three = "{recipe: {data: {classes: ['0', '1', '2']}}}"
    with pytest.raises(UserError, match=r"only there 0, 1, 2, only here 5, 6"):
        run(tmp_path / "run", f"teacher.ensemble=[{three}, {HIGH}]", "data.classes=['5','6']")


def test_an_ensemble_of_python_is_checked_too():
    nets = [net(4, seed) for seed in range(2)]
    with pytest.raises(UserError, match="Member 0 of the teacher"):
        distill(
            net(4, 3),
            Ensemble(nets),
            digits(per_class=20),
            max_epochs=1,
            out="/tmp/unused",
            trainer={"logger": False, "accelerator": "cpu"},
        )

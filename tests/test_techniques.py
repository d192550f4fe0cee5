"""The techniques that are compared: each trains, is rebuilt to the digit, and is what its name says."""

import itertools
import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from litdistill.compress.quantize import Int8
from litdistill.compress.structure import structure_of
from litdistill.config.build import build_data, build_net
from litdistill.config.recipes import OWN_FILES, recipe_hash, student_config, student_folder, teacher_folder
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.predictions import collect
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.methods.shuffled import Shuffled, same_class_partners
from litdistill.models.finetune import freeze, with_own_head
from litdistill.models.preprocess import bare
from litdistill.training import prerequisites
from litdistill.training import train as train_module
from litdistill.training.train import train
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from tests.conftest import SMALL, compose_config

NAMES = sorted(p.stem for p in (CONF / "experiment" / "compare").glob("*.yaml"))
TECHNIQUES = [name for name in NAMES if not name.startswith("_")]
TINY = [
    *("logger=none", "trainer=cpu", "trainer.log_every_n_steps=1", "data.epoch_size=64", "data.batch_size=32"),
    *("+teacher.recipe.student.widths=[8,16]", "teacher.widths=[8,16]", "teacher.recipe.trainer.max_epochs=2"),
]
CHAIN = pytest.param("distilled_pruned_int8", marks=pytest.mark.slow)  # three runs in a row
NEEDS = {"int8": "torchao", "pruned": "torch_pruning"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where this module's teachers and starting points are kept, so that each is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny(runs):
    """`tiny(technique, *overrides)`: the folder of a finished run of one epoch."""

    def run(technique: str, *overrides: str, callbacks: Sequence[Callback] = ()) -> Path:
        for part, package in NEEDS.items():
            if part in technique:
                pytest.importorskip(package)
        folder = runs / "compare" / re.sub(r"[^\w.]", "_", " ".join([technique, *overrides]))
        cfg = compose_config(folder, f"experiment=compare/{technique}", *TINY, *overrides)
        cfg.runs = str(runs)
        own = "teacher" if cfg.student.checkpoint == "teacher" else None
        cfg.student.widths = [8, 16] if own else [4, 8]
        if own:
            cfg.compress.budget = 0.5
        asked = any(o.startswith("trainer.max_epochs=") for o in overrides)
        node, epochs = cfg, cfg.trainer.max_epochs if asked else min(cfg.trainer.max_epochs, 1)
        while node is not None:
            OmegaConf.update(node, "trainer.max_epochs", epochs, force_add=True)
            node, epochs = OmegaConf.select(node, "student.recipe"), 1
        write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
        train(cfg, callbacks)
        return folder

    return run


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# -- all of them -------------------------------------------------------------------------------------------------------


def test_all_share_data_teacher_epochs_and_images(tmp_path):
    shared = None
    for name in NAMES:
        cfg = compose_config(tmp_path / "run", f"experiment=compare/{name}")
        OmegaConf.to_container(cfg, resolve=True)
        assert cfg.technique == (None if name == "_base" else name)
        assert cfg.name == "compare"
        what = (teacher_folder(cfg), OmegaConf.to_container(cfg.data), cfg.trainer.max_epochs or 20, cfg.seed)
        shared = shared or what
        assert what == shared, name
        text = (CONF / "experiment" / "compare" / f"{name}.yaml").read_text()
        assert f"experiment=compare/{name}" in text


@pytest.mark.parametrize("technique", [CHAIN if name == "distilled_pruned_int8" else name for name in TECHNIQUES])
def test_every_technique_trains_and_is_rebuilt_to_the_digit(tiny, technique):
    folder = tiny(technique)
    found = summary(folder)
    assert found["technique"] == technique
    assert differences(evaluate(folder), found) == []
    source = load_run(folder)[0].student.checkpoint
    assert (found["start"] is not None) == (source is not None)
    if source is not None:  # which is trained on all images, of five classes or ten, or on the few of the run itself
        assert found["start"]["from"] == ("teacher" if source == "teacher" else "network")
        few = found["data"]["train"]
        assert (found["start"]["images"] > few) == (source == "teacher" or technique.startswith("transfer"))
        assert ("run" in found["start"]) == (source == "auto")
    _, distiller = rebuild(folder)
    assert sum(p.numel() for p in distiller.deployed_student.parameters()) == found["student"]["params"]


@pytest.mark.parametrize("technique", ["scratch", "low_rank", "pruned", "int8", "int8_aware", CHAIN])
def test_every_kind_of_student_is_exported(tiny, technique):
    folder = tiny(technique)
    _, distiller = rebuild(folder)
    data, _ = build_data(load_run(folder)[0])
    precision = "int8" if isinstance(bare(distiller.deployed_student), Int8) else "fp32"
    path, check = export(folder, "onnx", precision)
    expected, _ = collect(distiller.deployed_student, data, "test")
    logits = load(path).run(torch.cat([batch.inputs for batch in data.batches("test")]).numpy())
    bound = 1e-4 if precision == "fp32" else 0.1
    assert np.abs(logits - expected.numpy()).max() <= bound * expected.abs().max()
    assert check["agreement"] > 0.98


@pytest.mark.parametrize("technique", ["int8", "int8_aware", CHAIN])
def test_an_int8_run_leaves_its_file_and_says_its_size(tiny, technique):
    folder = tiny(technique)
    entry = json.loads((folder / "export" / "manifest.json").read_text())["files"]["student-int8.onnx"]
    found = summary(folder)["student"]
    assert found["precision"] == "int8"
    assert found["bytes"] == entry["bytes"] == (folder / "export" / "student-int8.onnx").stat().st_size
    assert entry["check"]["student"] == found["test"]["accuracy"]["best"]
    for format, precision in (("onnx", "fp32"), ("pt2", "fp32"), ("safetensors", "fp16")):
        with pytest.raises(UserError, match="format=onnx precision=int8"):
            export(folder, format, precision)


def test_the_file_of_an_int8_student_holds_int8_weights(tiny):
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(tiny("int8_aware") / "export" / "student-int8.onnx")
    weights = {
        tuple(t.dims) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    }
    assert weights == {(4, 1, 3, 3), (8, 4, 3, 3), (10, 8)}
    big = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 3]
    assert big == []


def test_a_compressed_student_is_a_starting_point_and_a_teacher(tiny, runs):
    start = tiny("pruned")
    folder, teacher = runs / "again", summary(start)["start"]
    cfg = compose_config(folder, "experiment=compare/distilled", *TINY, "student.widths=[8,16]", "trainer.max_epochs=1")
    cfg.student.checkpoint = cfg.teacher.checkpoint = str(start)
    cfg.teacher.allow_chance, cfg.optimizer.lr = True, 1e-30
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    assert summary(folder)["student"]["params"] == summary(start)["student"]["params"]
    begun = {"from": "network", "images": teacher["images"], "method": "kd"}  # which the teacher had seen before it
    assert summary(folder)["start"] == begun
    assert summary(folder)["teacher"]["sha256"] == summary(start)["student"]["sha256"]
    _, distiller = rebuild(folder)
    assert structure_of(distiller.deployed_student) == structure_of(rebuild(start)[1].deployed_student)
    assert differences(evaluate(folder), summary(folder)) == []


# -- the steps before and after ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_not_trained_is_what_it_started_from(tiny, runs):
    cfg, found = load_run(tiny("distilled_pruned_int8"))
    pruned = student_folder(cfg)
    distilled = student_folder(student_config(cfg))
    assert [s["kind"] for s in structure_of(rebuild(Path(cfg.folder))[1].deployed_student)] == ["prune", "int8"]
    assert summary(pruned)["student"]["params"] <= 0.5 * summary(distilled)["student"]["params"]
    assert found["epochs"] == found["steps"] == 0
    assert found["start"]["epochs"] == 2  # one of either
    assert found["start"]["total_s"] == pytest.approx(sum(summary(f)["time"]["total_s"] for f in (pruned, distilled)))


def test_a_starting_point_is_trained_once(tiny, runs):
    a, b = (load_run(tiny(name))[0] for name in ("transfer_all", "transfer_last"))
    assert student_folder(a) == student_folder(b)
    assert recipe_hash(student_config(a)) in student_folder(a).name
    assert summary(student_folder(a))["data"]["classes"] == 5
    assert summary(student_folder(a))["teacher"] is None


def test_the_time_of_a_teacher_that_is_trained_first_is_not_the_runs(tmp_path, monkeypatch):
    ticks = itertools.count()
    for module in (train_module, prerequisites):
        monkeypatch.setattr(
            module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)), process_time=float)
        )

    def slow(cfg, **options):
        nonlocal ticks
        train(cfg, **options)
        ticks = itertools.count(1000)

    monkeypatch.setattr(train_module, "train", slow)  # which trains the teacher
    train(compose_config(tmp_path / "run", *SMALL))  # in whose runs there is no teacher yet
    assert 0 < summary(tmp_path / "run")["time"]["total_s"] < 20  # readings of the clock


def test_compress_null_changes_no_recipe(tmp_path):
    cfg = compose_config(tmp_path / "run")
    with_key = cfg.copy()
    OmegaConf.set_struct(with_key, False)
    with_key.compress = None
    assert recipe_hash(cfg) == recipe_hash(with_key)
    with_key.compress = {"_target_": "litdistill.compress.low_rank.low_rank", "budget": 0.5}
    assert recipe_hash(cfg) != recipe_hash(with_key)


@pytest.mark.parametrize("technique", ["pruned", "int8_aware", "transfer_last"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tiny, technique):
    """Compressing is done anew, and what was trained since is loaded into its result."""
    last = lambda folder: torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # noqa: E731
    whole = last(tiny(technique))
    with pytest.raises(Stopped):
        tiny(technique, "technique=stopped", callbacks=[StopAt()])
    parts = last(tiny(technique, "technique=stopped"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[k], whole[k]) for k in whole)


class StopAt(Callback):
    """A Ctrl-C in the first step."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 0:
            signal.raise_signal(signal.SIGINT)


# -- transfer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("technique", "frozen"),
    [
        ("transfer_all", ()),
        ("transfer_last", ("layer1",)),
        ("transfer_head", ("layer1", "layer2")),
    ],
)
def test_frozen_layers_do_not_move_and_the_others_do(tiny, technique, frozen):
    folder = tiny(technique, "trainer.max_epochs=2")  # with a validation in between
    start = load_file(student_folder(load_run(folder)[0]) / "student.safetensors")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    end = {k.removeprefix("student."): v for k, v in last.items()}
    assert any("running_mean" in k for k in end)
    for key, value in end.items():
        if key.startswith("fc"):
            assert start[key].shape[0] == 5
            assert value.shape[0] == 10
        else:
            assert torch.equal(start[key], value) == key.startswith(frozen), key
    assert end.keys() == start.keys()


class Watched(Callback):
    """Keeps which parts of the student are in train mode at the start of each epoch, and the student."""

    def __init__(self):
        self.modes, self.net = [], None

    def on_train_epoch_start(self, trainer, module):
        self.net = net = bare(module.student)
        self.modes.append((net.layer1.training, net.layer1[1].training, net.layer2.training, net.fc.training))


def test_a_frozen_part_is_in_eval_mode_after_a_validation_too(tiny):
    watched = Watched()
    tiny("transfer_last", "trainer.max_epochs=2", "technique=watched", callbacks=[watched])
    assert watched.modes == 2 * [(False, False, True, True)]
    net = watched.net
    assert [k for k, p in net.named_parameters() if p.requires_grad] == [
        *("layer2.0.weight", "layer2.1.weight", "layer2.1.bias", "fc.weight", "fc.bias")
    ]


def test_parts_are_named_by_module_too(tmp_path):
    data, _ = build_data(compose_config(tmp_path / "run"))
    net = build_net(OmegaConf.create({"_target_": "litdistill.models.resnet.resnet", "depth": 8}), data, "student")
    example = torch.zeros(2, 1, 8, 8)
    freeze(net, ["layer2.0.conv1", "head"], example)
    trained = {k for k, p in net.named_parameters() if p.requires_grad}
    assert trained == {"layer2.0.conv1.weight", "fc.weight", "fc.bias"}
    with pytest.raises(UserError, match="No tap 'layer9'"):
        freeze(net, ["layer9"], example)
    with pytest.raises(UserError, match="names nothing"):
        freeze(net, [], example)


def test_a_new_head_keeps_its_own_weights_and_takes_all_others():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    other = {k: v + 1 for k, v in net.state_dict().items()}
    state = with_own_head(net, other, torch.zeros(2, 1, 2, 2))
    assert torch.equal(state["3.weight"], net[3].weight)
    assert torch.equal(state["1.weight"], net[1].weight + 1)


def test_another_classifier_is_refused_unless_it_is_asked_for(tiny, runs, tmp_path):
    source = student_folder(load_run(tiny("transfer_all"))[0])
    cfg = compose_config(tmp_path / "run", "student.widths=[4,8]", f"student.checkpoint={source}", "teacher=null")
    data, _ = build_data(cfg)
    with pytest.raises(UserError, match=r"trained on other classes.*student\.head=new"):
        build_net(cfg.student, data, "student")
    cfg.student.head = "old"
    with pytest.raises(UserError, match="set it to new"):
        build_net(cfg.student, data, "student")
    cfg.student.head = "new"
    net = build_net(cfg.student, data, "student")
    assert torch.equal(bare(net).layer1[0].weight, load_file(source / "student.safetensors")["layer1.0.weight"])


def test_a_start_from_a_teacher_that_is_not_there_is_refused(tmp_path):
    cfg = compose_config(tmp_path / "run", "teacher=null", "method=supervised", "student.checkpoint=teacher", *TINY[:3])
    with pytest.raises(UserError, match="there is no teacher"):
        train(cfg)


# -- the control -------------------------------------------------------------------------------------------------------


def outputs(seed: int) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    return Outputs.of(torch.randn(6, 4, generator=draw), {"layer1": torch.randn(6, 3, 2, 2, generator=draw)})


def test_a_shuffled_teacher_gives_each_sample_the_next_of_its_class_and_labels_stay():
    student, teacher, target = outputs(0), outputs(1), torch.tensor([0, 1, 0, 3, 1, 0])
    batch = Batch(None, target)
    other = [2, 4, 5, 3, 1, 0]  # the only 3 keeps its own
    assert same_class_partners(target).tolist() == other
    assert same_class_partners(torch.nn.functional.one_hot(target).float()).tolist() == other
    method = KD(hard=0.3, soft=0.7)
    expected = method(student, Outputs.of(teacher.logits[other]), batch)
    found = Shuffled(method)(student, teacher, batch)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert Shuffled(method).hard == 0.3  # what the labels count
    assert found["soft"] != method(student, teacher, batch)["soft"]


def test_features_are_shuffled_alike():
    student, teacher, target = outputs(0), outputs(1), torch.tensor([0, 1, 0, 3, 1, 0])
    torch.manual_seed(0)
    plain = FitNet()
    plain.build(student, teacher, target)
    batch = Batch(None, target)
    other = Outputs.of(teacher.logits, {"layer1": teacher.features["layer1"][[2, 4, 5, 3, 1, 0]]})
    found = Shuffled(plain)(student, teacher, batch)
    assert found["hint"].item() == plain(student, other, batch)["hint"].item()
    assert Shuffled(plain).taps() == plain.taps() != Taps()


def test_any_method_is_shuffled_by_an_override(tmp_path):
    cfg = compose_config(tmp_path / "run", "experiment=compare/shuffled_teacher", "method@method.method=dkd")
    assert cfg.method.method["_target_"].endswith("DKD")
    assert "hard" not in cfg.method
    with pytest.raises(ConfigCompositionException):
        compose_config(tmp_path / "run", "experiment=compare/shuffled")


@pytest.mark.parametrize("name", sorted(OWN_FILES))
def test_a_teacher_of_files_of_ones_own_is_another_where_they_change(name, tmp_path):
    (tmp_path / "own").mkdir()
    hashes = []
    for content in ("one", "two and more"):
        (tmp_path / "own" / "file").write_text(content)
        hashes.append(recipe_hash(compose_config(tmp_path / "run", f"data={name}", f"data.root={tmp_path / 'own'}")))
    assert hashes[0] != hashes[1]


def test_data_of_ones_own_are_all_known_by_their_files():
    own = {p.stem for p in (CONF / "data").glob("*.yaml") if "your own" in p.read_text().splitlines()[0].lower()}
    assert own < OWN_FILES.keys()

"""Several labels and numbers, from the command's config to the files that are shipped: with every method, or a refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from litdistill import load_student
from litdistill.config.build import build_data, build_net, build_task
from litdistill.config.instantiate import instantiate
from litdistill.data import tables
from litdistill.data.protocol import as_indexed, split_ids
from litdistill.data.tensors import TensorData
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export import readers
from litdistill.export.export import export, verify
from litdistill.export.predict import load, main, predict
from litdistill.models.small import mlp
from litdistill.training.train import train
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from tests.conftest import compose_config
from tests.test_cli import call

TASKS = {"multilabel": "multilabel", "regression": "diabetes"}
SHORT = [
    "trainer=cpu",
    "trainer.max_epochs=2",
    "data.epoch_size=64",
    "teacher.recipe.trainer.max_epochs=4",
    "logger=none",
]
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))


def finished(folder: Path, *overrides: str, runs: Path) -> Path:
    cfg = compose_config(folder, *overrides)
    cfg.runs = str(runs)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Path]:
    """A finished run of each task, with its teacher."""
    place = tmp_path_factory.mktemp("tasks")
    return {
        name: finished(place / name, f"experiment=tasks/{name}", *SHORT, "data.epoch_size=null", runs=place)
        for name in TASKS
    }


@pytest.fixture
def data(request) -> TensorData:
    found = getattr(tables, request.param)()
    found.setup()
    return found


# -- the data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", TASKS.values(), indirect=True)
def test_every_sample_is_in_one_split_alone_and_fewer_are_trained_on_with_the_same_held_out(data):
    assert as_indexed(data) is data
    trained, held = data.train_ids, data.val_ids
    assert sorted([*trained.tolist(), *held.tolist()]) == list(range(len(data.train_targets)))
    few = getattr(tables, data.name)(fraction=0.1, seed=3)
    few.setup()
    assert torch.equal(few.val_ids, held)
    assert len(few.train_ids) == round(0.1 * len(trained))
    assert set(few.train_ids.tolist()) < set(trained.tolist())
    assert (few.mean, few.std) == (data.mean, data.std)
    whole = torch.cat([part.inputs for part in (data.source.train, data.source.test)])
    assert len(whole.unique(dim=0)) == len(whole)


@pytest.mark.parametrize("data", TASKS.values(), indirect=True)
def test_batches_by_split_and_by_id_are_the_same_samples(data):
    for split in ("train", "val", "test"):
        batches = list(data.batches(split))
        ids = split_ids(data, split)
        again = data.get_batch(split, ids)
        assert torch.equal(torch.cat([b.ids for b in batches]), ids)
        assert torch.equal(torch.cat([b.inputs for b in batches]), again.inputs)
        assert torch.equal(torch.cat([b.targets for b in batches]), again.targets)
    assert not torch.equal(
        data.get_batch("val", data.val_ids[:1]).inputs, data.get_batch("test", data.val_ids[:1]).inputs
    )


@pytest.mark.parametrize("data", TASKS.values(), indirect=True)
def test_the_network_standardizes_and_its_inputs_are_as_they_were_read(data):
    cfg = OmegaConf.create({"_target_": "litdistill.models.small.mlp", "widths": [4]})
    net = build_net(cfg, data, "student")
    inputs = data.get_batch("train", data.train_ids).inputs
    seen = net.preprocess(inputs)
    torch.testing.assert_close(seen.mean(0), torch.zeros(inputs.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(inputs.shape[1]), rtol=0, atol=1e-4)
    assert inputs.abs().max() > 5
    torch.manual_seed(0)
    assert build_net(cfg, data, "student")(inputs).shape == (len(inputs), data.num_classes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fraction": 1.5}, "fraction=1.5 must be above 0"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"val_size": 400}, "leaves -46 to train on"),
    ],
)
def test_wrong_options_of_the_data_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        tables.diabetes(**options).setup()


def test_data_for_another_task_are_refused(tmp_path):
    with pytest.raises(UserError, match="These data are for task=regression, and the config has classification"):
        build_data(compose_config(tmp_path, "data=diabetes"))


def test_teacher_and_student_standardize_targets_alike_whatever_share_each_is_trained_on(tmp_path):
    node = compose_config(tmp_path, "data=diabetes", "task=regression").task
    units = []
    for fraction in (None, 0.1):
        data = tables.diabetes(fraction=fraction)
        data.setup()
        units.append(build_task(node, data).units())
    assert units[0] == units[1]
    rest = tables.diabetes()
    rest.setup()
    targets = rest.train_targets[rest.train_ids].double()
    assert units[0]["mean"][0] == pytest.approx(targets.mean().item())
    assert units[0]["std"][0] == pytest.approx(targets.std().item())


def test_a_teacher_in_other_units_is_refused(run, tmp_path):
    teacher = next((run["regression"].parent / "teachers").glob("mlp*diabetes*"))
    asked = ["experiment=tasks/regression", *SHORT, f"teacher.checkpoint={teacher}", "method=supervised"]
    with pytest.raises(UserError, match=r"in other units.*set task\.mean=\[.*task\.std=\["):
        finished(tmp_path / "a", *asked, "task.mean=[100]", "task.std=[50]", runs=tmp_path)
    finished(tmp_path / "b", *asked, runs=tmp_path)


def method_node(name: str) -> DictConfig:
    """The options of `conf/method/<name>.yaml`, with those of the file that it is a diff on."""
    node = OmegaConf.load(CONF / "method" / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    for base in node.pop("defaults", ()):
        if base != "_self_":
            node = OmegaConf.merge(method_node(base), node)
    return node


# -- every method with every task ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["classification", *TASKS])
def test_a_method_trains_perceptrons_for_an_epoch_or_says_in_a_line_what_else_would(name, method):
    torch.manual_seed(0)
    data = getattr(tables, TASKS.get(name, "diabetes"))(batch_size=32, fraction=0.1 if name in TASKS else 1.0)
    data.setup()
    outputs = data.num_classes if name in TASKS else 3
    batches = [data.make_batch(rows) for rows in data.train_loader()]
    if name == "classification":
        batches = [b._replace(targets=(b.targets[:, 0] / 120).long().clamp(max=2)) for b in batches]
    labels = torch.randint(3, (len(data.train_targets),)) if name == "classification" else None
    student, teacher = mlp(outputs, data.input_shape, [8]), mlp(outputs, data.input_shape, [16, 16])
    before = [p.clone() for p in student.parameters()]
    try:
        distiller = Distiller(
            student, instantiate(method_node(method)), teacher, batches[0], name, train_targets=labels
        )
    except UserError as error:
        refusal = str(error)
    else:
        distiller.on_train_epoch_start()
        optimizer = distiller.configure_optimizers()
        for batch in batches:
            optimizer.zero_grad()
            distiller.loss(batch).backward()
            optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
        return
    assert "\n" not in refusal
    assert re.search("use a method|Use a method|name its taps|Name its taps|name a tap|adversarial=pgd", refusal)


@pytest.mark.parametrize(
    ("name", "method"),
    [("multilabel", m) for m in ("supervised", "binary_kd", "logit_mse", "pkt", "rkd", "sp", "cc")]
    + [("regression", m) for m in ("supervised", "logit_mse", "pkt", "rkd", "sp", "cc")],
)
def test_these_methods_are_defined_for_it(name, method):
    data = getattr(tables, TASKS[name])()
    data.setup()
    nets = [mlp(data.num_classes, data.input_shape, [8]) for _ in range(2)]
    Distiller(nets[0], instantiate(method_node(method)), nets[1], data.get_batch("train", data.train_ids[:4]), name)


@pytest.mark.parametrize("name", TASKS)
def test_a_method_of_another_kind_is_refused_before_its_teacher_is_trained(name, tmp_path):
    with pytest.raises(UserError, match="KD is defined for logits that are categorical"):
        finished(tmp_path / "run", f"experiment=tasks/{name}", *SHORT, "method=kd", runs=tmp_path)
    assert not (tmp_path / "teachers").exists()


@pytest.mark.parametrize("name", ["classification", *TASKS])
def test_a_teacher_that_guesses_is_refused(name, tmp_path):
    keys = (
        [f"experiment=tasks/{name}"]
        if name in TASKS
        else ["data.per_class=12", "student.widths=[8]", "teacher.widths=[8]"]
    )
    short = [k for k in SHORT if name in TASKS or "recipe" not in k]
    with pytest.raises(UserError, match="teacher is at chance level") as caught:
        finished(tmp_path / "run", *keys, *short, "teacher.checkpoint=null", runs=tmp_path)
    assert {"classification": "accuracy", "multilabel": "mAP", "regression": "RMSE"}[name] in str(caught.value)
    finished(tmp_path / "b", *keys, *short, "teacher.checkpoint=null", "teacher.allow_chance=true", runs=tmp_path)


# -- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_run_is_measured_again_to_the_digit(run, name):
    _, summary = load_run(run[name])
    assert differences(evaluate(run[name], device="cpu"), summary) == []
    metric = {"multilabel": "map", "regression": "rmse"}[name]
    direction = {"multilabel": "max", "regression": "min"}[name]
    assert summary["metric"] == {"name": metric, "direction": direction}
    assert summary["student"]["test"][metric].keys() == {"best", "last"}
    assert set(summary["teacher"]["test"]) == set(summary["student"]["test"])
    best = torch.load(run[name] / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    (kept,) = [v for v in best.values() if v.get("monitor") == f"val/{metric}"]
    assert kept["best_model_score"].item() == pytest.approx(summary["val"]["best"])


def table(name: str, path: Path, count: int = 5) -> tuple[TensorData, np.ndarray]:
    """Test samples, written to `path`."""
    data = getattr(tables, TASKS[name])()
    data.setup()
    inputs = data.source.test.inputs[:count].numpy()
    if path.suffix == ".npy":
        np.save(path, inputs)
    else:
        names = ",".join(column["name"] for column in data.modality.options["columns"])
        np.savetxt(path, inputs, delimiter=",", header=names, comments="", fmt="%.9g")
    return data, inputs


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("format", "precision", "preprocessing"),
    [("onnx", "fp32", True), ("onnx", "fp32", False), ("onnx", "int8", True), ("onnx", "fp16", True),
     ("safetensors", "fp32", True), ("pt2", "fp32", True)],
)  # fmt: skip
def test_exported_files_take_rows_as_they_are_and_give_what_the_student_gives(
    run, name, format, precision, preprocessing, tmp_path
):
    path, found = export(run[name], format, precision, preprocessing)
    assert found["metric"] == {"multilabel": "map", "regression": "rmse"}[name]
    data, inputs = table(name, tmp_path / "rows.npy")
    model, student = load(path, trust=True), load_student(run[name])
    wanted = student(torch.from_numpy(inputs)).detach()
    atol = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.5}[precision] * wanted.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(model.run(inputs)), wanted, rtol=0, atol=atol)
    assert model.facts.classes == list(data.class_names)
    assert model.facts.input_shape == list(data.input_shape)
    if format == "safetensors":
        assert torch.equal(load_student(path)(torch.from_numpy(inputs)), student(torch.from_numpy(inputs)))


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
@pytest.mark.parametrize("name", TASKS)
def test_predict_reads_tables_and_says_what_the_task_decodes(run, name, suffix, tmp_path, capsys):
    path, _ = export(run[name])
    file = tmp_path / f"rows{suffix}"
    _, inputs = table(name, file)
    found = predict(load(path), [file], top=3)
    assert [one["row"] for one in found] == [f"{file}:{i}" for i in range(5)]
    cfg, _ = load_run(run[name])
    task = build_data(cfg)[1]
    decoded = task.decode(Outputs.of(load_student(run[name])(torch.from_numpy(inputs))))
    for i, one in enumerate(found):
        if name == "regression":
            assert one["values"] == {"disease progression": pytest.approx(decoded["values"][i].item(), rel=1e-4)}
        else:
            top = decoded["probabilities"][i].topk(3)
            assert [c["index"] for c in one["top"]] == top.indices.tolist()
            assert [c["probability"] for c in one["top"]] == pytest.approx(top.values.tolist(), rel=1e-3)
            assert one["top"][0]["class"] == f"label {top.indices[0]}"
    main([str(path), str(file), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"{file}:0: " + ("disease progression " if name == "regression" else "label "))
    main([str(path), str(file), "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 5


def test_tables_of_many_rows_are_cut_into_batches(run, tmp_path, monkeypatch):
    path, _ = export(run["regression"])
    table("regression", tmp_path / "rows.npy", 11)
    whole = predict(load(path), [tmp_path / "rows.npy"])
    monkeypatch.setattr(readers, "BATCH", 4)
    cut = predict(load(path), [tmp_path / "rows.npy"])
    assert [one["row"] for one in cut] == [one["row"] for one in whole]
    values = [[one["values"]["disease progression"] for one in found] for found in (cut, whole)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.csv", "1,2,3\n", "takes rows of 10 numbers"),
        ("rows.csv", "a,b\nc,d\n", "lacks 10 columns of 10: age, sex, .* It has a, b besides"),
        ("rows.csv", ",".join(["1"] * 9 + ["nan"]) + "\n", "row 0 .* no finite number"),
        ("rows.csv", "", "is empty"),
        ("image.png", "", "a table is a .csv, .tsv or .parquet file"),
        ("rows.npy", "no array", "cannot be read as a table of numbers"),
        ("gone.csv", None, "there is no such file"),
    ],
)
def test_files_that_are_no_tables_of_the_student_are_refused(run, tmp_path, name, text, says):
    path, _ = export(run["regression"])
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        predict(load(path), [tmp_path / name])


def test_a_pickle_in_a_table_is_not_opened(run, tmp_path):
    path, _ = export(run["regression"])
    np.save(tmp_path / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        predict(load(path), [tmp_path / "rows.npy"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "poisson"), ("kind", None), ("units", {"mean": [1.0]}), ("units", {"mean": [1.0, 2.0], "std": [1.0, 2.0]}),
     ("units", [1.0]), ("mean", [1.0] * 9), ("input_shape", [11])],
)  # fmt: skip
def test_what_a_manifest_says_of_tables_is_checked(run, key, value):
    path, _ = export(run["regression"])
    manifest = path.parent / "manifest.json"
    before = manifest.read_text()
    found = json.loads(before)
    found["files"][path.name][key] = value
    try:
        manifest.write_text(json.dumps(found))
        with pytest.raises(UserError, match="is invalid"):
            load(path)
    finally:
        manifest.write_text(before)


@pytest.mark.parametrize("name", TASKS)
def test_exported_files_are_verified_by_the_tasks_metric(run, name):
    export(run[name])
    assert {check["metric"] for check in verify(run[name], allow_code=True).values()} <= {"map", "rmse"}


# -- several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", TASKS)
def test_two_processes_find_what_one_finds(name, tmp_path):
    """Neither the 160 or 35 samples of validation nor the test set are a multiple of two ranks' batches."""
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.eval_batch_size=9"]
    keys = [k for k in SHORT if k != "trainer=cpu"]
    done = call("train", f"experiment=tasks/{name}", *keys, *two, "name=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    _, summary = load_run(folder)
    assert summary["device"]["world_size"] == 2
    assert differences(evaluate(folder, device="cpu"), summary) == []
    cfg, _ = load_run(folder)
    data, task = build_data(cfg)
    student, metric = load_student(folder), task.metrics()
    for batch in data.batches("val"):
        metric.update(task.forward(student, batch, False), batch.targets)
    assert summary["val"]["best"] == pytest.approx(float(metric.compute()[task.monitor[0]]), rel=1e-6)

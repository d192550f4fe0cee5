"""A whole run: what it leaves, that it is the same twice, found again, resumed and reproduced."""

import json
import pickle
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litdistill.config.recipes import recipe_hash, teacher_config, teacher_folder
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.training import train as train_module
from litdistill.training.callbacks import EpochLogger
from litdistill.training.resume import NEEDED
from litdistill.training.train import train
from litdistill.utils.errors import Stopped, UserError
from litdistill.utils.files import write_text
from tests.conftest import SMALL, compose_config, drawing


def run(cfg, *callbacks: Callback) -> Path:
    """Trains, and leaves the config where Hydra would."""
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg, callbacks)
    return folder


@pytest.fixture(scope="module")
def finished(teachers, tmp_path_factory):
    """The folder of one finished distillation."""
    cfg = compose_config(tmp_path_factory.mktemp("finished") / "run", *SMALL)
    cfg.runs = str(teachers)
    with drawing():
        return run(cfg)


def test_a_run_leaves_all_there_is_to_know(finished):
    left = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert {
        "summary.json",
        "student.safetensors",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        ".hydra/config.yaml",
    } <= left
    assert any(f.startswith("events.out.tfevents") for f in left)
    s = json.loads((finished / "summary.json").read_text())
    assert {"experiment", "seed", "teacher", "student", "time", "versions", "git", "command"} <= s.keys()
    assert {"name", "sha256", "params", "test"} <= s["teacher"].keys()
    assert {"name", "params", "macs", "bytes", "test", "agreement", "kl"} <= s["student"].keys()
    assert {"accuracy", "nll", "ece", "brier"} == s["student"]["test"].keys()
    assert {"best", "last"} == s["student"]["test"]["accuracy"].keys()
    assert {"fit_s", "teacher_s", "samples_per_s"} <= s["time"].keys()
    assert s["teacher"]["test"]["accuracy"] > 0.5
    assert s["student"]["params"] == sum(
        v.numel()
        for k, v in load_file(finished / "student.safetensors").items()
        if "running" not in k and "num_batches" not in k
    )
    assert s["command"].startswith("python ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+method.temprature=2", "KD takes no option temprature: did you mean temperature?"),
        ("+student.widht=[8]", "conv4 takes no option widht: did you mean widths?"),
        ("student.widths=[]", "conv4 needs the channels of one block at least"),
        ("+optimizer.momentun=1", "Adam takes no option momentun: it takes params, lr, betas"),
        ("optimizer.lr=abc", "optimizer.lr=abc: a number of 0 or more"),
        ("+trainer.max_epoch=3", "trainer.max_epoch is no option: did you mean max_epochs"),
        ("+data.batchsize=3", "data.batchsize is no option: did you mean batch_size"),
    ],
)
def test_a_wrong_option_is_known_before_a_teacher_is_trained(small, tmp_path, override, words):
    cfg = small(override)
    cfg.runs = str(tmp_path)
    with pytest.raises(UserError) as refused:
        train(cfg)
    assert str(refused.value).startswith(words)
    assert not (tmp_path / "teachers").exists()


@pytest.mark.parametrize("name", ["ab", "fsp", "ft"])
def test_a_run_that_ends_within_its_methods_first_phase_is_refused_before_a_teacher_is_trained(small, tmp_path, name):
    for epochs, refused in ((2, True), (3, False)):
        later = f"trainer.check_val_every_n_epoch={epochs + 1}"  # what comes next: no epoch would be validated
        cfg = small(f"method={name}", "method.init_epochs=2", f"trainer.max_epochs={epochs}", later)
        cfg.runs = str(tmp_path / "new")
        words = r"trainer\.max_epochs=2 .*method\.init_epochs=2" if refused else "No epoch would be validated"
        with pytest.raises(UserError, match=words):
            train(cfg)
    assert not (tmp_path / "new").exists()


def test_checkpoints_hold_tensors_and_plain_values_and_no_teacher(finished):
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(finished / "checkpoints" / name, weights_only=True)
        assert {k.split(".")[0] for k in saved["state_dict"]} == {"student"}


def test_tensorboard_shows_every_term_both_models_and_the_best_metric(finished):
    events = EventAccumulator(str(finished), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss/total", "loss/hard", "loss/soft", "accuracy/training", "teacher/agreement_training"} <= scalars
    assert {
        "accuracy/validation",
        "accuracy/teacher",
        "teacher/agreement_validation",
        "teacher/kl_validation",
    } <= scalars
    assert {"validation/ece", "validation/nll", "validation/brier"} <= scalars
    assert {"speed/samples_per_s", "speed/teacher_share", "rate/Adam"} <= scalars
    groups = sorted({name.partition("/")[0] for name in scalars})
    assert groups == ["accuracy", "loss", "rate", "speed", "teacher", "test", "validation"]  # as TensorBoard sorts them
    assert all(len(events.Scalars(name)) > 1 for name in scalars)  # no card with a dot
    assert {"validation/worst mistakes", "validation/confusion", "validation/reliability"} == set(
        events.Tags()["images"]
    )
    texts = set(events.Tags()["tensors"])
    assert {"config/text_summary", "custom_scalars__config__"} <= texts
    summary = json.loads((finished / "summary.json").read_text())
    assert max(e.value for e in events.Scalars("accuracy/validation")) == pytest.approx(summary["val"]["best"])
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"method" in start
    assert b"train/batch_size" not in start  # what varies alone
    results = {name: events.Scalars(f"test/{name}")[-1].value for name in ("accuracy", "megabytes", "milliseconds")}
    assert results["accuracy"] == pytest.approx(summary["student"]["test"]["accuracy"]["best"])
    assert results["megabytes"] == pytest.approx(summary["student"]["bytes"] / 1e6)
    assert results["milliseconds"] > 0


def test_evaluate_reproduces_the_summary_to_the_digit(finished):
    assert differences(evaluate(finished), load_run(finished)[1]) == []


def test_evaluate_notices_other_weights(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    state = load_file(copy / "student.safetensors")
    save_file({k: v + 0.1 if v.is_floating_point() else v for k, v in state.items()}, copy / "student.safetensors")
    with pytest.raises(UserError, match="not the student of this run: the SHA-256"):
        evaluate(copy)


def test_evaluate_notices_another_measurement(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    summary = load_run(copy)[1]
    summary["student"]["test"]["nll"] += 1e-9
    assert [line.split(":")[0] for line in differences(evaluate(copy), summary)] == ["nll"]


def test_evaluate_refuses_an_exported_file_that_was_changed(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    path, _ = export(copy, "onnx")
    export(copy, "safetensors")
    summary = load_run(copy)[1]
    assert differences(evaluate(copy), summary) == []
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"student\.onnx is not the file that was exported: its SHA-256"):
        evaluate(copy)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_seed_0_is_a_seed_and_two_runs_are_equal_to_the_bit(small):
    first = weights(run(small("seed=0", name="a")))
    torch.manual_seed(99)  # whatever happened before
    assert equal(first, weights(run(small("seed=0", name="b"))))
    assert not equal(first, weights(run(small("seed=1", name="c"))))


def test_a_finished_run_is_not_repeated(small, monkeypatch):
    folder = run(small(name="a"))
    before = (folder / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr(train_module, "build_trainer", lambda *_, **__: pytest.fail("trained again"))
    assert train(small(name="a")) == json.loads((folder / "summary.json").read_text())["val"]["best"]
    assert (folder / "summary.json").stat().st_mtime_ns == before


def test_an_automatic_teacher_is_trained_once_and_shared_by_seeds_and_methods(small, teachers):
    run(small(name="a"))
    folder = teacher_folder(small())
    before = (folder / "student.safetensors").stat().st_mtime_ns
    cfg = small("seed=7", "method=supervised", "data.per_class=5", name="b")
    assert teacher_folder(cfg) == folder
    b = json.loads((run(cfg) / "summary.json").read_text())
    assert (folder / "student.safetensors").stat().st_mtime_ns == before
    assert b["teacher"]["sha256"] == json.loads((folder / "summary.json").read_text())["student"]["sha256"]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("data.root=elsewhere", True),
        ("trainer.accelerator=auto", True),
        ("seed=3", True),
        ("method.temperature=9", True),
        ("teacher.recipe.seed=1", False),
        ("teacher.widths=[16,17]", False),
        ("data.subset_seed=3", True),  # it is trained on all of it
        ("data.classes=[0,1]", False),
        ("optimizer.lr=0.01", False),
        ("teacher.recipe.trainer.max_epochs=4", False),
    ],
)
def test_a_teacher_is_known_by_what_decides_its_weights(small, override, same):
    assert (recipe_hash(teacher_config(small())) == recipe_hash(teacher_config(small(override)))) is same


def test_a_teacher_of_other_images_is_not_taken_for_theirs(small, tmp_path):
    """Two folders with the same options: the teacher of the one was found for the other. A copy of a folder is the same."""
    for name, size in (("a", 8), ("b", 9)):
        for kind in ("cat", "dog"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(size):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / kind / f"{i}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")

    def found(folder):
        return teacher_folder(small("data=folder", f"data.root={tmp_path / folder}")).name

    first = found("a")
    assert found("copy") == first
    assert found("b") != first
    (tmp_path / "a" / "cat" / "new.png").write_bytes((tmp_path / "a" / "cat" / "0.png").read_bytes())
    assert found("a") != first


def test_a_teacher_sees_all_labels_where_its_student_sees_few(small):
    cfg = teacher_config(small())
    assert cfg.data.per_class is None
    assert cfg.teacher is None
    assert cfg.student.widths == [16, 16]
    assert cfg.seed == 0
    assert cfg.data.seed == 0


def test_a_finished_run_is_a_teacher_and_a_starting_point(small):
    a = run(small("method=supervised", name="a"))
    cfg = small(
        f"teacher.checkpoint={a}",
        f"student.checkpoint={a}/checkpoints/best.ckpt",
        "teacher.widths=[8,8]",
        "optimizer.lr=1.0e-30",
        "teacher.allow_chance=true",
        name="b",
    )
    b = json.loads((run(cfg) / "summary.json").read_text())
    assert b["teacher"]["sha256"] == json.loads((a / "summary.json").read_text())["student"]["sha256"]
    start, end = load_file(a / "student.safetensors"), load_file(Path(cfg.folder) / "student.safetensors")
    assert all(torch.equal(start[k], end[k]) for k in start if "running" not in k and "num_batches" not in k)


class StopAt(Callback):
    """What a user's Ctrl-C does in the middle of an epoch. Each step is one minibatch then, as it acts on batches."""

    def __init__(self, step: int):
        self.step, self.stopped = step, False

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= self.step and not self.stopped:
            self.stopped = True
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    """`whole(*overrides)`: the weights of a run that nothing stops, trained once."""

    @cache
    def make(*overrides):
        cfg = compose_config(tmp_path_factory.mktemp("whole") / "run", *SMALL, *overrides)
        cfg.runs = str(teachers)
        return weights(run(cfg))

    return make


# Four steps an epoch: in the middle, at the last, at the first; and in groups, which end at each second one.
@pytest.mark.parametrize(("step", "grouped"), [(1, False), (3, False), (4, False), (6, False), (1, True), (4, True)])
@pytest.mark.parametrize(
    "extra",
    [
        ("data.augment=[{_target_: litdistill.data.augment.Crop, pad: 1}]",),
        ("method=fitnet", "ema=0.9", "scheduler=cosine", "data.epoch_size=100"),
        ("trainer.max_epochs=3", "+optimizer.amsgrad=true"),
    ],
    ids=["live teacher", "features, average, schedule", "teacher's table"],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(small, whole, monkeypatch, step, grouped, extra):
    expected = whole(*extra)  # first, so that the teacher is there: it would be stopped, too
    handler, stop = signal.getsignal(signal.SIGINT), StopAt(step)
    if grouped:  # from within a callback that groups are known to be fine with
        monkeypatch.setattr(EpochLogger, "on_train_batch_start", lambda self, *args: stop.on_train_batch_start(*args))
    with pytest.raises(Stopped) as stopped:
        run(small(*extra, name="parts"), *([] if grouped else [stop]))
    assert stopped.value.status == 130
    saved = torch.load(Path(small(name="parts").folder) / "checkpoints" / "last.ckpt", weights_only=True)
    # Not a step is lost, in the middle of an epoch either.
    assert saved["global_step"] == ({1: 4, 4: 6}[step] if grouped else step + 1)
    assert signal.getsignal(signal.SIGINT) is handler
    assert equal(expected, weights(run(small(*extra, name="parts"))))


def test_a_run_is_not_resumed_for_fewer_epochs_than_it_has(small):
    folder = run(small(name="long"))
    (folder / "summary.json").unlink()  # as if it had been stopped at its very end
    with pytest.raises(UserError, match="start a new run"):
        run(small("trainer.max_epochs=1", name="long"))


def test_that_a_run_was_stopped_is_told_from_one_process_to_another():
    stop = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, "step 3")))
    assert (type(stop), stop.status) == (Stopped, 143)
    assert str(stop).startswith("Stopped by SIGTERM at step 3; the state is saved.")


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(small, monkeypatch, caplog):
    cfg = small("trainer.max_epochs=3", name="a")
    folder = run(cfg)
    (folder / "summary.json").unlink()
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    run(small("trainer.max_epochs=3", name="a"))
    assert "Trying the one before" in caplog.text
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(1000)])
def test_a_last_checkpoint_that_is_none_falls_back_to_the_one_before(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    assert train_module.last_state(tmp_path) == (None, None, None)
    torch.save({"epoch": 0}, tmp_path / "best.ckpt")  # of no training, or of an old version of Lightning
    assert train_module.last_state(tmp_path) == (None, None, None)
    torch.save({"epoch": 0, **dict.fromkeys(NEEDED)}, tmp_path / "best.ckpt")
    assert train_module.last_state(tmp_path) == (tmp_path / "best.ckpt", None, None)


def test_a_student_that_starts_from_one_of_other_classes_is_refused(small):
    a = run(small("method=supervised", "teacher=null", name="a"))
    start = [f"student.checkpoint={a}", "student.widths=[8,8]"]
    with pytest.raises(
        UserError, match="trained on other classes than these data have: only there 2, 3, 4, 5, 6, 7, 8, 9"
    ):
        run(small("method=supervised", "teacher=null", *start, "data.classes=[0,1]", name="b"))


def test_a_wrong_method_option_is_known_before_a_teacher_is_trained(small, monkeypatch):
    monkeypatch.setattr(train_module, "build_teacher", lambda *_: pytest.fail("too late"))
    for override in ("method.temperature=0", "method.temperature=-1", "method.soft=-0.1", "method.hard=-1"):
        with pytest.raises(UserError) as refused:
            run(small(override, name="a"))
        assert str(refused.value).startswith(f"{override} ")  # by the key that the user typed


def test_a_method_without_its_teacher_is_refused(small):
    with pytest.raises(UserError, match=r"learns from a teacher.*net@teacher"):
        run(small("teacher=null", name="a"))


def test_a_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = small(name="a")
    cfg.folder = str(tmp_path / "file" / "run")
    with pytest.raises((UserError, OSError), match=r"cannot be written|Not a directory"):
        train(cfg)


def test_what_was_added_for_a_student_trains_no_teacher(small):
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy}"
    plain, added = (teacher_config(small(*more)) for more in ([], [stop]))
    assert recipe_hash(plain) == recipe_hash(added)
    assert "stop" not in added.callbacks
    own = teacher_config(small(stop.replace("+callbacks", "+teacher.recipe.callbacks")))
    assert ("stop" in own.callbacks, recipe_hash(own) != recipe_hash(plain)) == (True, True)


def test_a_precision_that_is_not_offered_is_refused(small):
    with pytest.raises(UserError, match="bf16-mixed"):
        train(small("trainer.precision=bf16-true"))
    with pytest.raises(UserError, match="group=0: auto, or a whole number of 1 or more"):
        train(small("group=0"))

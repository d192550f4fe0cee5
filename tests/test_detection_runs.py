"""Methods of detectors in whole runs on scenes of which few have labels: terms, resumes, the cache, what is shipped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from litdistill.config.build import build_data, build_net
from litdistill.distillation.checks import check_pairing
from litdistill.evaluation.evaluate import load_run
from litdistill.methods import Supervised
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.task import Detection
from litdistill.utils.errors import Stopped, UserError
from tests.conftest import compose_config
from tests.test_zoo import StopAt, equal, logged, run, weights

STEPS = 8
RUN = [
    *("data=digit_scenes", "task=detection", "net@student=fcos_slim", "net@teacher=fcos_slim", "trainer=cpu"),
    *("data.count=96", "data.val_size=32", "data.labels=16", "data.batch_size=8", "data.eval_batch_size=32"),
    *("student.width=4", "student.fpn=32", "student.convs=1", "teacher.width=4", "teacher.fpn=64", "teacher.convs=1"),
    *("trainer.max_epochs=2", "trainer.log_every_n_steps=4", "teacher.allow_chance=true"),
    "++teacher.recipe.trainer.max_epochs=1",
]
LABELS = {"cls", "box", "centerness"}
DENSE = {"soft", "soft_box", "soft_centerness"}
TERMS = {
    "dense_kd": LABELS | DENSE,
    "crosskd": LABELS | DENSE,
    "pseudo_boxes": LABELS,
    "ld": LABELS | {"dfl", "soft", "valuable"},
}
OWN = {"pseudo_boxes": ["method.threshold=0.02"], "ld": ["method.near=0", "method.least=0.01", "method.valuable=1"]}
BINS = ["student.bins=8", "teacher.bins=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def config(runs, folder, name, *more):
    extra = OWN.get(name, ["method.least=0"]) + (BINS if name == "ld" else [])
    cfg = compose_config(folder, *RUN, f"method={name}", *extra, *more)
    cfg.runs = str(runs)
    return cfg


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_run_logs_its_terms_goes_on_to_the_bit_and_ships_the_student(runs, tmp_path, name):
    folder = run(config(runs, tmp_path / "whole", name, "teacher.cache.mode=disk"))
    assert set(logged(folder)) - {"total"} == TERMS[name]
    state = weights(folder)
    assert {k.split(".")[0] for k in state} <= {"student", "method"}
    assert {k.split(".")[1] for k in state if k.startswith("method.")} <= {"projectors"}
    cfg, _summary = load_run(folder)
    data, _ = build_data(cfg)
    plain = build_net(cfg.student, data, "student").state_dict()
    assert {k: v.shape for k, v in load_file(folder / "student.safetensors").items()} == {
        k: v.shape for k, v in plain.items()
    }

    # Stopped in the middle of an epoch, and continued, it ends where it would have ended.
    with pytest.raises(Stopped):
        run(config(runs, tmp_path / "parts", name), StopAt(STEPS + 2))
    assert equal(state, weights(run(config(runs, tmp_path / "parts", name))))


@pytest.mark.usefixtures("drawn")
def test_the_share_of_pseudo_boxes_and_the_pictures_are_in_tensorboard(runs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(config(runs, tmp_path / "run", "pseudo_boxes"))
    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent)).Reload()
    tags = [t for t in events.Tags()["scalars"] if t.endswith("pseudo_share")]
    assert len(tags) == 1
    values = [e.value for e in events.Scalars(tags[0])]
    assert {"validation/worst misses", "validation/precision and recall"} <= set(events.Tags()["images"])
    assert 0 < min(values) <= max(values) <= 1
    assert torch.tensor(values).isfinite().all()


def test_several_detectors_as_one_teacher_are_refused_before_any_is_trained(runs, tmp_path):
    with pytest.raises(UserError, match="Detection takes one teacher, and there are 2"):
        run(config(runs, tmp_path, "dense_kd", "teacher.ensemble=[{recipe: {seed: 0}},{recipe: {seed: 1}}]"))
    nets = [fcos_slim(3, (3, 64, 64), width=4, fpn=32) for _ in range(3)]
    with pytest.raises(UserError, match="Detection takes one teacher, and there are 2"):
        check_pairing(Supervised(), nets[0], Ensemble(nets[1:]), Detection(), None)

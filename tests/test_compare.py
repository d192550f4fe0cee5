"""The comparison of techniques: which runs it is made of, that none is repeated, and that a page comes out."""

import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from litdistill.benchmarks import compare
from litdistill.config.recipes import teacher_folder
from litdistill.models.profile import count_parameters
from litdistill.models.small import conv4
from litdistill.report.sections import scores
from litdistill.tasks.detection.backbones import fcos_on
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.composed import composed
from tests.conftest import compose_config
from tests.pages import group

torch.set_num_threads(1)
TINY = [
    *("trainer.max_epochs=1", "teacher.recipe.trainer.max_epochs=3", "teacher.widths=[16,16]", "student.widths=[8,8]"),
    *("data.epoch_size=256", "trainer.accelerator=cpu", "teacher.recipe.data.epoch_size=1024"),
]


def config(tmp_path, *overrides: str) -> DictConfig:
    return composed("compare", [f"runs={tmp_path}/runs", "jobs=1", *overrides])


def test_every_technique_is_run_with_every_seed(tmp_path):
    found = compare.jobs(config(tmp_path, "dataset=mnist", "seeds=2"))
    files = {p.stem for p in (CONF / "experiment" / "compare").glob("*.yaml")} - {"_base"}
    assert {j.technique for j in found} == files
    family = {j.variant for j in found if j.technique == "family"}
    assert len(family) == 5
    assert "4x8x16" in family
    assert len(found) == 2 * (len(files) - 1 + len(family)) == len(set(found))
    assert {j.seed for j in found} == {0, 1}
    assert all("data=mnist" in j.overrides for j in found)
    assert all(f"experiment=compare/{j.technique}" in j.overrides for j in found)


def test_data_with_boxes_have_techniques_of_their_own(tmp_path):
    found = compare.jobs(config(tmp_path, "dataset=digit_scenes", "seeds=2", "backbone=null"))
    files = {p.stem for p in (CONF / "experiment" / "compare" / "detection").glob("[!_]*.yaml")}
    assert {j.technique for j in found} == files - {"fine_tuned"}
    assert len(found) == 2 * (len(files) - 1) == len(set(found))
    assert all(f"experiment=compare/detection/{j.technique}" in j.overrides for j in found)
    assert compare.left_out(config(tmp_path)) is None
    assert "fine_tuned is left out" in compare.left_out(config(tmp_path, "dataset=digit_scenes", "backbone=null"))
    named = config(tmp_path, "dataset=voc", "backbone=runs/train/a", "techniques=[fine_tuned]", "seeds=1")
    assert compare.left_out(named) is None
    assert compare.with_backbone(named) == named
    assert "student.backbone=runs/train/a" in compare.jobs(named)[0].overrides


def test_a_folder_may_have_any_name(tmp_path):
    runs = f"{tmp_path}/a b=[c],d"
    (found,) = compare.jobs(config(tmp_path, f"runs={literal(runs)}", "techniques=[scratch]", "seeds=1"))
    assert compare.config_of(found).runs == runs


def test_the_network_that_a_detector_is_fine_tuned_from_is_trained_once_where_its_objects_are_images(
    tmp_path, monkeypatch
):
    trained = []
    monkeypatch.setattr(compare, "run_all", lambda jobs, at_once: trained.extend(jobs) or [tmp_path / "made"])
    made = compare.with_backbone(config(tmp_path, "dataset=digit_scenes", "seeds=2"))
    assert [j.overrides[:2] for j in trained] == [("experiment=compare/detection/_backbone", "seed=0")]
    tuned = [j for j in compare.jobs(made) if j.technique == "fine_tuned"]
    assert [f"student.backbone={literal(str(tmp_path / 'made'))}" in j.overrides for j in tuned] == [True, True]
    assert compare.left_out(made) is None
    for none in (("dataset=voc",), ("dataset=digit_scenes", "techniques=[scratch]"), ("dataset=digits",)):
        assert compare.with_backbone(config(tmp_path, *none)).backbone is None
    assert "fine_tuned is left out" in compare.left_out(compare.with_backbone(config(tmp_path, "dataset=voc")))
    assert len(trained) == 1


def test_the_network_that_is_fine_tuned_has_the_maps_of_the_other_students(tmp_path):
    """Strides and channels of the pyramid's maps, and nearly as many parameters."""
    recipe, tuned, other = (
        compose_config(tmp_path / "run", f"experiment=compare/detection/{name}").student
        for name in ("_backbone", "fine_tuned", "distilled")
    )
    inside = conv4(10, (3, 32, 32), recipe.widths)
    net = fcos_on(10, (3, 64, 64), inside, fpn=tuned.fpn, convs=tuned.convs, levels=tuned.levels)
    slim = fcos_slim(10, (3, 64, 64), other.width, other.depth, other.fpn, other.convs, list(other.strides))
    images = torch.zeros(1, 3, 64, 64)
    mine, others = (n.eval().backbone(images).values() for n in (net, slim))
    assert [m.shape for m in mine] == [m.shape for m in others]
    assert 1 < count_parameters(net) / count_parameters(slim) < 1.1


def test_detectors_share_data_and_teacher_and_the_small_ones_a_network(tmp_path):
    teachers, networks = set(), []
    for path in sorted((CONF / "experiment" / "compare" / "detection").glob("*.yaml")):
        if path.stem == "_backbone":
            continue
        cfg = compose_config(tmp_path / "run", f"experiment=compare/detection/{path.stem}")
        OmegaConf.to_container(cfg, resolve=True)
        assert cfg.technique == (None if path.stem == "_base" else path.stem)
        assert f"experiment=compare/detection/{path.stem}" in path.read_text()
        assert (cfg.name, cfg.trainer.max_epochs, cfg.data.labels) == ("compare", 10, 250)
        teachers.add(str(teacher_folder(cfg)))
        if path.stem in ("scratch", "distilled", "pseudo_boxes"):
            networks.append(OmegaConf.to_container(cfg.student))
    assert len(teachers) == 1
    assert networks[0] == networks[1] == networks[2]


@pytest.mark.parametrize(
    "wrong",
    [
        "techniques=[scratsh]",
        "seeds=0",
        "jobs=0",
        "dataset=digit_scenes_masks",
        "dataset=digit_scenes techniques=[fine_tuned] backbone=null",
    ],
)
def test_what_cannot_be_run_is_told_before_anything_runs(tmp_path, wrong):
    with pytest.raises(UserError):
        compare.jobs(config(tmp_path, *wrong.split()))


def test_a_run_is_not_repeated_and_a_changed_one_has_a_folder_of_its_own(tmp_path, monkeypatch):
    trained = []

    def train(cfg):
        trained.append(cfg.folder)
        folder = tmp_path.joinpath(cfg.folder)
        made = {"metric": {"name": "accuracy"}, "student": {"test": {"accuracy": {"best": 0.5}}}}
        (folder / "summary.json").write_text(json.dumps(made))

    monkeypatch.setattr(compare, "train", train)
    todo = compare.jobs(config(tmp_path, "techniques=[scratch]", "seeds=2"))
    first = compare.run_all(todo, 1)
    assert first == compare.run_all(todo, 1)
    assert len(set(first)) == 2
    changed = [j._replace(overrides=(*j.overrides, "optimizer.lr=0.5")) for j in todo]
    assert not set(compare.run_all(changed, 1)) & set(first)
    assert len(set(trained)) == 4  # train() itself passes over what is finished
    assert (first[1] / ".hydra" / "overrides.yaml").read_text().startswith("- experiment=compare/scratch\n")


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for a process in /proc")
def test_a_worker_ends_when_its_parent_is_gone(tmp_path):
    """A child whose parent ends at once is told so by a signal that it can answer, and ends by the next one."""
    # The function alone: what its module imports takes longer than all the rest.
    child = f"""
import pathlib, signal, threading, time, os
{inspect.getsource(compare.end_with)}
def first(number, frame):
    pathlib.Path({str(tmp_path / "saved")!r}).write_text("")
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGTERM, first)
threading.Thread(target=end_with, args=(os.getppid(), 0.2), daemon=True).start()
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(500)
"""
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    waits = f"import pathlib\nwhile not pathlib.Path({str(tmp_path / 'pid')!r}).is_file(): time.sleep(0.1)"
    subprocess.run([sys.executable, "-c", code + waits], check=True, timeout=300)
    pid, deadline = int((tmp_path / "pid").read_text() or 0), time.monotonic() + 60
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(pid)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_comparison_ends_in_a_page_and_a_picture(tmp_path):
    """With two processes, as `make compare` does it, but for sizes."""
    tiny = ",".join(f"'{o}'" for o in TINY)
    chosen = ["techniques=[scratch,distilled]", "seeds=1", "jobs=2", "robustness=10", "rounds=2", "epsilons=[8]"]
    cfg = config(tmp_path, *chosen, f"overrides=[{tiny}]", f"picture={tmp_path}/main.png")
    (made,) = compare.compare(cfg)
    assert [r.label for r in made.rows] == ["teacher", "distilled", "scratch"]
    assert made.problems == []
    text = (tmp_path / "runs" / "report" / "index.html").read_text()
    for row in made.rows[1:]:
        summary = json.loads((row.seeds[0].folder / "summary.json").read_text())
        assert f"{100 * summary['student']['test']['accuracy']['best']:.2f}" in text
        assert re.search(rf"python scripts/train.py experiment=compare/{row.label} data=digits seed=0", text)
    assert (tmp_path / "main.png").read_bytes().startswith(b"\x89PNG")


def test_the_main_picture_marks_every_model(tmp_path):
    made = group(rows=12)
    compare.draw(made, tmp_path / "docs" / "main.png")
    from PIL import Image

    with Image.open(tmp_path / "docs" / "main.png") as image:
        width, height = image.size
        colors = {c for _, c in image.convert("RGB").getcolors(1 << 24)}
    assert height > width > 900  # one panel below the other: legible on a narrow screen
    wanted = [(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7), (0xE6, 0x9F, 0x00)]
    assert set(wanted) <= colors
    assert all(len(scores(r)) == len(r.seeds) for r in made.rows)

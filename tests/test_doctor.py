"""The doctor: silent on a healthy run, and right about each run that was broken in one way."""

import pytest
import torch
from omegaconf import OmegaConf

from litdistill.distillation.batch_statistics import has_lag
from litdistill.evaluation import doctor
from litdistill.evaluation.doctor import Finding, diagnose, examined, judged, lines
from litdistill.evaluation.evaluate import load_run, rebuild
from litdistill.training.train import train
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from tests.conftest import compose_config

QUICK = (
    *(
        "data.batch_size=64",
        "student.widths=[16,32]",
        "teacher.widths=[24,48]",
        "trainer=cpu",
        "logger=none",
        "optimizer.lr=0.01",
    ),
    *("trainer.max_epochs=6", "teacher.cache.mode=off", "threads=1"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def trained(runs, name, *overrides):
    cfg = compose_config(runs / name, *QUICK, *overrides)
    write_text(runs / name / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return runs / name


@pytest.fixture(scope="module")
def healthy(runs):
    return trained(runs, "healthy", "method=kd")


@pytest.fixture
def case(healthy):
    """What the doctor sees of it, rebuilt for each test to break."""
    cfg, summary = load_run(healthy)
    data, distiller = rebuild(healthy)
    return examined(cfg, data, distiller, summary, 5)


def names(found):
    return [finding.name for finding in found]


def test_a_healthy_run_has_no_finding(healthy):
    assert diagnose(healthy) == []
    assert lines([]) == [
        "Nothing found: teacher, preprocessing, statistics, weights of terms, fit, schedule and labels look right."
    ]


def test_the_gradient_of_a_hint_is_found_and_balanced_it_is_not(runs, healthy):
    (first, *_) = found = [f for f in diagnose(trained(runs, "at", "method=at")) if f.name == "share of a term"]
    assert len(found) == 1
    assert "gradient of hint at the student is" in first.said
    assert first.change == "balance=auto"
    assert "share of a term" not in names(diagnose(trained(runs, "balanced", "method=at", "balance=auto")))


def test_a_schedule_that_is_too_short_is_told_from_a_net_that_cannot_follow(runs, healthy):
    short = trained(runs, "short", "method=kd", "optimizer.lr=1e-4", "trainer.max_epochs=2",
                    "++teacher.recipe.trainer.max_epochs=6",
                    "++teacher.recipe.optimizer.lr=0.01")  # fmt: skip
    (found,) = [f for f in diagnose(short) if f.name in ("short schedule", "capacity")]
    assert (found.name, found.change) == ("short schedule", "trainer.max_epochs=4")
    assert "the best epoch was the last, 2 of 2" in found.said
    cfg, summary = load_run(short)
    data, distiller = rebuild(short)
    stopped = judged(examined(cfg, data, distiller, {**summary, "epochs": 40}, 12))
    assert "capacity" in names(stopped)
    assert "short schedule" not in names(stopped)


def test_a_teacher_at_chance_comes_first(case):
    torch.manual_seed(0)
    noise = case.teacher._replace(heads={"logits": torch.randn_like(case.teacher.logits)})
    first = judged(case._replace(teacher=noise))[0]
    assert (first.name, first.weight) == ("teacher at chance", 1.0)


def test_a_teacher_that_is_too_sure_is_found_with_the_temperature_that_calibrates_it(case):
    heads = {"logits": 30 * case.teacher.logits}
    (found,) = [
        f for f in judged(case._replace(teacher=case.teacher._replace(heads=heads))) if f.name.startswith("over")
    ]
    assert found.name == "overconfident teacher"
    right = doctor.fit_temperature(heads["logits"], case.targets)
    assert found.change == f"method.temperature={right:.2g}"
    assert right > 6


def test_a_teacher_of_which_predictions_alone_are_kept_is_not_calibrated(case):
    kept = case.teacher._replace(heads={"label": case.teacher.logits.argmax(1)})
    assert doctor.overconfident(case._replace(teacher=kept)) is None


def test_statistics_that_lag_are_found_and_the_network_is_left_as_it_was(case):
    norms = [m for m in case.distiller.evaluated.modules() if has_lag(m)]
    with torch.no_grad():
        for norm in norms:
            norm.running_var.fill_(30.0)
            norm.running_mean.zero_()
    outputs, _ = doctor.predict_split(case.distiller.deployed_student, case.data, "val", "cpu", case.task)
    (found,) = [f for f in judged(case._replace(student=outputs)) if "statistics" in f.name]
    assert "They lag behind the weights" in found.said
    assert all(bool((norm.running_var == 30).all()) for norm in norms)


def test_a_student_that_knows_its_samples_by_heart_is_found(case):
    torch.manual_seed(0)
    guesses = case.student._replace(heads={"logits": torch.randn_like(case.student.logits)})
    assert "overfitting" in names(judged(case._replace(student=guesses)))


def test_other_preprocessing_of_a_teacher_that_is_worse_for_it_is_found(case, monkeypatch):
    monkeypatch.setattr(
        doctor, "preprocessing", lambda net: [{"mean": [0.3 if net is case.distiller.teacher.net else 0.5]}]
    )
    assert "preprocessing" not in names(judged(case)) or not case.task.better(
        case.value(case.teacher), case.value(case.student)
    )
    torch.manual_seed(0)
    worse = case.teacher._replace(heads={"logits": torch.randn_like(case.teacher.logits)})
    assert "preprocessing" in names(judged(case._replace(teacher=worse)))


def test_labels_that_the_teacher_contradicts_are_listed(case):
    ids = case.data.train_ids.sort().values[:40]
    before = case.data.train_targets[ids].clone()
    case.data.train_targets[ids] = (before + 1) % 10
    try:
        (found,) = [f for f in judged(case) if f.name == "labels"]
    finally:
        case.data.train_targets[ids] = before
    count = int(found.said.split()[3])
    assert 15 <= count <= 45
    assert f"and {count - 10} more" in found.said
    assert "labels" not in names(judged(case))


def test_findings_are_printed_in_order_of_weight_with_one_change_each(case, monkeypatch):
    rules = (
        lambda _: Finding(0.2, "b", "Second.", "x=1"),
        lambda _: None,
        lambda _: Finding(0.9, "a", "First.", "y=2"),
    )
    monkeypatch.setattr(doctor, "RULES", rules)
    assert lines(judged(case)) == ["1. a: First.\n   Try: y=2", "2. b: Second.\n   Try: x=1"]


def test_a_task_without_labels_is_refused_by_words(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "ForeignData", object)
    with pytest.raises(UserError, match="The doctor reads runs whose samples have ids and labels"):
        diagnose(healthy)

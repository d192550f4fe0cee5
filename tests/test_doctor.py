"""The doctor: silent on a healthy run, and right about each run that was broken in one way."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from litdistill.config.recipes import teacher_folder
from litdistill.distillation.batch_statistics import has_lag
from litdistill.evaluation import doctor
from litdistill.evaluation.doctor import Diagnosis, diagnose, examined, fit, gradients, judged, lines, teacher
from litdistill.evaluation.doctor.case import Finding
from litdistill.evaluation.doctor.gradients import Term, gradients_at_start
from litdistill.evaluation.evaluate import load_run, rebuild
from litdistill.training.train import train
from litdistill.utils.checkpoint import STUDENT
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
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


@pytest.fixture(scope="module")
def known(healthy):
    """The folder of the healthy run's teacher."""
    return teacher_folder(load_run(healthy)[0])


def test_a_healthy_run_has_no_finding(healthy):
    found = diagnose(healthy)
    assert found.findings == []
    assert [term.name for term in found.terms] == ["soft"]
    none, measured = lines(found)
    assert none == (
        "Nothing found: teacher, classes, preprocessing, views, statistics, weights of terms, fit, schedule and labels look "
        "right."
    )
    assert measured.startswith("Gradients of 4 minibatches at the start, relative to that of the labels' loss: soft ")


def test_the_gradient_of_a_hint_is_found_and_balanced_it_is_not(runs, healthy):
    found = [
        f for f in diagnose(trained(runs, "at", "method=at", "balance=none")).findings if f.name == "share of a term"
    ]
    assert len(found) == 1
    assert "gradient of hint at the student is" in found[0].said
    assert found[0].change == "balance=auto 'balance.terms={hint: 0.1}'"
    balanced = diagnose(trained(runs, "balanced", "method=at"))
    assert "share of a term" not in names(balanced.findings)
    assert 0.03 < balanced.terms[0].share < 0.3  # balance.ratio=0.1, of other minibatches
    by_value = trained(runs, "by_value", "method=at", "balance=uncertainty")
    diagnosis = diagnose(by_value)
    said = json.loads((by_value / "summary.json").read_text())["balance"]["hint"]["gradient"]
    assert diagnosis.terms[0].share == pytest.approx(said, rel=0.5)
    [found] = [f for f in diagnosis.findings if f.name == "share of a term"]
    assert found.change == "balance=auto 'balance.terms={hint: 0.1}'"  # balance.terms alone would set values


def test_classes_in_another_order_than_the_data_have_are_found_and_named(runs, known):
    weights = load_file(known / STUDENT)
    for value in weights.values():
        if value.shape[:1] == (10,):  # the classifier's
            value[[2, 5, 7]] = value[[5, 7, 2]].clone()
    save_file(weights, runs / "renamed.safetensors")  # a file that names no classes
    found = diagnose(
        trained(runs, "renamed", "method=kd", f"teacher.checkpoint={runs / 'renamed.safetensors'}")
    ).findings
    assert found[0].name == "classes"
    for words in ("its 2 were 5", "its 5 were 7", "its 7 were 2"):
        assert words in found[0].said
    assert "its 3 were" not in found[0].said
    assert names(found)[:2] == ["classes", "labels"]  # which it contradicts, too


def test_classes_that_the_teacher_does_not_know_are_named(case):
    logits = case.teacher.logits.clone()
    logits[:, [1, 4]] = -torch.inf
    found = teacher.other_classes(case._replace(teacher=case.teacher._replace(heads={"logits": logits})))
    assert "does not know 2 classes of the data's 10: 1, 4." in found.said
    assert teacher.other_classes(case) is None


def test_another_preprocessing_of_the_teacher_is_found_by_trying_the_students(runs, known):
    broken = trained(
        runs, "inverted", "method=kd", f"teacher.checkpoint={known}", "++teacher.preprocess={mean:[0.6],std:[0.6]}"
    )
    (found,) = [f for f in diagnose(broken).findings if f.name == "preprocessing"]
    assert "'mean': [0.6" in found.said
    assert "as the student does" in found.said


def test_views_in_which_the_teacher_is_lost_are_found(runs, known):
    crop = "data.augment=[{_target_:litdistill.data.augment.Crop,pad:%d}]"
    lost = diagnose(trained(runs, "views", "method=kd", f"teacher.checkpoint={known}", crop % 4)).findings
    (found,) = [f for f in lost if f.name == "views"]
    assert "The teacher is lost in the views that the student sees" in found.said
    assert "views" not in names(diagnose(trained(runs, "mild", "method=kd", crop % 1)).findings)


def test_a_teacher_that_pulls_against_the_labels_is_found(case):
    facts = (case.cfg, case.data, case.task, case.teacher_net, "cpu", {})
    healthy, layer = gradients_at_start(*facts), case.teacher_net.get_submodule("fc")
    for parameter in layer.parameters():
        parameter.data.neg_()  # the most probable class becomes the least
    against = gradients_at_start(*facts)
    assert against.agreement < 0 < 0.5 < healthy.agreement
    assert fit.against_the_labels(case) is None
    assert fit.against_the_labels(case._replace(gradients=against)).name == "teacher against labels"


def test_figures_of_gradients_are_those_of_plain_vectors():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    other = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))  # which the value does not depend on
    found = gradients.gradient((weight**3).sum(), [weight, other])
    assert found.tolist() == [3.0, 12.0, 0.0, 0.0, 0.0]
    assert gradients.said([Term("hint", 12.3456, 1.0, -0.25, True)]) == (
        "Gradients of 4 minibatches at the start, relative to that of the labels' loss: hint 12.3 times (cosine -0.25)."
    )


def test_the_temperature_of_a_contrast_is_none_of_logits(case):
    heads = {"logits": 30 * case.teacher.logits}
    cfg = OmegaConf.merge(case.cfg, {"method": {"_target_": "litdistill.methods.CRD", "temperature": 0.07}})
    assert teacher.overconfident(case._replace(cfg=cfg, teacher=case.teacher._replace(heads=heads))) is None


def test_a_schedule_that_is_too_short_is_told_from_a_net_that_cannot_follow(runs, healthy):
    short = trained(runs, "short", "method=kd", "optimizer.lr=1e-4", "trainer.max_epochs=2",
                    "++teacher.recipe.trainer.max_epochs=6",
                    "++teacher.recipe.optimizer.lr=0.01")  # fmt: skip
    (found,) = [f for f in diagnose(short).findings if f.name in ("short schedule", "capacity")]
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
    right = teacher.fit_temperature(heads["logits"], case.targets)
    assert found.change == f"method.temperature={right:.2g}"
    assert right > 6


def test_a_teacher_of_which_predictions_alone_are_kept_is_not_calibrated(case):
    kept = case.teacher._replace(heads={"label": case.teacher.logits.argmax(1)})
    assert teacher.overconfident(case._replace(teacher=kept)) is None


def test_statistics_that_lag_are_found_and_the_network_is_left_as_it_was(case):
    norms = [m for m in case.distiller.evaluated.modules() if has_lag(m)]
    with torch.no_grad():
        for norm in norms:
            norm.running_var.fill_(30.0)
            norm.running_mean.zero_()
    outputs = case.validated(case.distiller.deployed_student)
    (found,) = [f for f in judged(case._replace(student=outputs)) if "statistics" in f.name]
    assert "They lag behind the weights" in found.said
    assert all(bool((norm.running_var == 30).all()) for norm in norms)


def test_a_student_that_knows_its_samples_by_heart_is_found(case):
    torch.manual_seed(0)
    guesses = case.student._replace(heads={"logits": torch.randn_like(case.student.logits)})
    assert "overfitting" in names(judged(case._replace(student=guesses)))


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


def test_labels_are_listed_by_their_files_where_data_have_some(case, monkeypatch):
    monkeypatch.setattr(type(case.data), "sample_names", lambda self, split: [f"{split}/{i}.png" for i in range(5000)])
    ids = case.data.train_ids.sort().values[:40]
    before = case.data.train_targets[ids].clone()
    case.data.train_targets[ids] = (before + 1) % 10
    try:
        said = teacher.contradicted_labels(case).said
    finally:
        case.data.train_targets[ids] = before
    named = said.partition("samples ")[2].split(", ")[0]
    index = int(named.partition("/")[2].partition(".")[0])
    assert named.startswith("train/")
    assert index in ids


def test_findings_are_printed_in_order_of_weight_with_one_change_each(case, monkeypatch):
    rules = (
        lambda _: Finding(0.2, "b", "Second.", "x=1"),
        lambda _: None,
        lambda _: Finding(0.9, "a", "First.", "y=2"),
    )
    monkeypatch.setattr(doctor, "RULES", rules)
    assert lines(Diagnosis(judged(case), [])) == ["1. a: First.\n   Try: y=2", "2. b: Second.\n   Try: x=1"]


def test_a_task_without_labels_is_refused_by_words(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "ForeignData", object)
    with pytest.raises(UserError, match="The doctor reads runs whose samples have ids and labels"):
        diagnose(healthy)

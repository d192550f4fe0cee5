"""The guarantees of `Distiller`, each broken by the fault it is there for."""

import copy
import functools
import math

import pytest
import torch

from litdistill.config.schema import rules
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.examine import check_teacher
from litdistill.distillation.schedules import interpolate
from litdistill.methods.at import AT
from litdistill.methods.base import WEIGHTS, Method
from litdistill.methods.crd import CRD
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.methods.pairs import Pair, Pairs
from litdistill.methods.shuffled import Shuffled
from litdistill.methods.simkd import SimKD
from litdistill.methods.sum import Sum
from litdistill.methods.supervised import Supervised
from litdistill.models.preprocess import bare
from litdistill.tasks.classification import Classification
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256
from tests.fits import digits, example, fit, net, same


def test_the_teacher_is_bit_identical_after_a_fit(tmp_path):
    data, teacher = digits(), net(16, seed=1)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = Distiller(net(), KD(), teacher, example(data), allow_chance=True)
    distiller.train()
    frozen = distiller.teacher
    assert not any(m.training for m in frozen.modules())
    frozen.train()  # what any other code might call
    assert not any(m.training for m in frozen.modules())
    student = {k: v.clone() for k, v in distiller.student.state_dict().items()}
    fit(distiller, data, tmp_path)
    assert same(before, teacher)  # BatchNorm's averages too
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not same(student, distiller.student)


def test_no_checkpoint_and_no_optimizer_holds_the_teacher(tmp_path):
    distiller = Distiller(net(), KD(), net(16, seed=1), allow_chance=True)
    trainer = fit(distiller, digits(), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)  # tensors and plain values only
    assert {k.split(".")[0] for k in saved["state_dict"]} == {"student"}
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in distiller.student.parameters()}
    assert not [n for n, _ in distiller.named_modules() if "teacher" in n]


def test_kd_without_its_soft_term_is_supervised_to_the_bit(tmp_path):
    students = []
    for method, teacher in ((KD(hard=1, soft=0), net(16, seed=1)), (Supervised(), None)):
        distiller = Distiller(net(), method, teacher, allow_chance=True)
        fit(distiller, digits(), tmp_path)
        students.append(weights_sha256(distiller.student.state_dict()))
    assert students[0] == students[1]


def test_the_student_learns_in_train_mode_and_is_validated_in_eval_mode(tmp_path):
    modes = {"training_step": set(), "validation_step": set()}

    class Spy(Distiller):
        def training_step(self, *a):
            modes["training_step"].add(self.student.training)
            return super().training_step(*a)

        def validation_step(self, *a):
            modes["validation_step"].add(self.student.training)
            return super().validation_step(*a)

    fit(Spy(net(), KD(), net(16, seed=1), allow_chance=True), digits(), tmp_path, max_epochs=3)
    assert modes == {"training_step": {True}, "validation_step": {False}}


PAIRS = functools.partial(Pairs, [Pair("stages", "stages", projector="norm"), Pair("logits", "layer1", "angles")])


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("method", [KD, FitNet, CRD, functools.partial(FitNet, stage=0), PAIRS])
def test_everything_is_there_once_it_is_constructed(tmp_path, method, ema):
    data = digits()
    distiller = Distiller(
        net(),
        method(),
        net(16, 1),
        example(data),
        allow_chance=True,
        ema=ema,
        train_targets=data.train_targets,
        data=data,
    )
    before, modes = list(distiller.state_dict()), [m.training for m in distiller.modules()]
    assert all(modes[:1])
    fit(distiller, data, tmp_path, max_epochs=1)
    assert list(distiller.state_dict()) == before
    assert [m.training for m in distiller.modules()] == modes


def test_constructing_leaves_networks_as_they_were():
    data, student, teacher = digits(), net(), net(16, 1)
    state, student.training = torch.get_rng_state(), True
    students, teachers = (copy.deepcopy(n.state_dict()) for n in (student, teacher))
    Distiller(student, KD(), teacher, example(data))
    assert same(students, student)
    assert same(teachers, teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert student.training


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KD, FitNet, PAIRS])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_distiller_is_loaded_from_its_checkpoint_without_an_example(tmp_path, method, ema):
    data = digits()
    distiller = Distiller(net(), method(), net(16, 1), example(data), allow_chance=True, ema=ema, seed=3)
    fit(distiller, data, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    facts = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert all(type(v) in (str, int, float) for v in facts.values())
    again = Distiller.load_from_checkpoint(
        tmp_path / "a.ckpt", student=net(seed=5), method=method(), teacher=net(16, 1)
    )
    assert same(distiller, again)
    assert again.seed == 3
    assert (method is FitNet) == any(k.startswith("method.regressor") for k in again.state_dict())
    assert (method is PAIRS) == any(
        k.startswith("method.comparisons.mse_stages.0.projector") for k in again.state_dict()
    )
    batch = next(data.batches("val"))
    again.eval(), distiller.eval()
    assert torch.equal(again(batch.inputs).logits, distiller(batch.inputs).logits)


def test_a_method_that_reads_logits_needs_no_example_to_be_loaded_either(tmp_path):
    distiller = Distiller(net(), KD(), net(16, 1), allow_chance=True, ema=0.5)
    fit(distiller, digits(), tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    again = Distiller.load_from_checkpoint(tmp_path / "a.ckpt", student=net(), method=KD(), teacher=net(16, 1))
    assert same(distiller, again)


# -- what is refused, and when a training stops ----------------------------------------------------------------------


def test_images_that_a_network_does_not_take_are_refused_with_both_remedies():
    images = torch.randn(4, 1, 8, 8)  # normalized already
    batch = (images, torch.arange(4))
    for student, teacher in ((net(), bare(net(16, 1))), (bare(net()), net(16, 1))):
        with pytest.raises(UserError, match=r"values from -.*without normalization.*preprocess\.bare\(net\)"):
            Distiller(student, KD(), teacher, batch)
    # The first remedy: images from 0 to 1. The second: networks without their preprocessing.
    Distiller(net(), KD(), net(16, 1), (images.sigmoid(), torch.arange(4)))
    Distiller(bare(net()), KD(), bare(net(16, 1)), batch)
    with pytest.raises(UserError, match="values from 0 to 255"):
        Distiller(net(), Supervised(), None, (torch.linspace(0, 255, 64).view(1, 1, 8, 8), torch.zeros(1)))


def test_a_method_that_needs_an_example_says_so():
    with pytest.raises(UserError, match=r"FitNet reads features.*example=…"):
        Distiller(net(), FitNet(), net(16, 1))


def test_terms_are_scaled_between_the_points_of_their_schedule(tmp_path):
    assert [interpolate([(0, 0), (20, 1)], x) for x in (0, 1, 10, 20, 300)] == [0, 0.05, 0.5, 1, 1]
    assert interpolate([(1, 1), (2, 3), (4, 0)], 3) == 1.5

    class Constant(Method):
        needs_teacher = False

        def hard_factor(self, epoch):
            return 0.0

        def forward(self, student, teacher, batch):
            return {"hard": student.logits.sum() * 0 + 1, "soft": student.logits.sum() * 0 + 10}

    logged = []

    class Spy(Distiller):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            logged.append(
                (float(self.trainer.callback_metrics["train/soft"]), float(self.trainer.callback_metrics["train/loss"]))
            )

    fit(Spy(net(), Constant(), schedule={"soft": [(0, 0), (4, 1)]}), digits(), tmp_path, max_epochs=3)
    assert logged == [(2.5, 3.5), (5.0, 6.0), (7.5, 8.5)]


def test_the_labels_loss_is_weighted_by_the_method_and_by_its_factor_of_the_epoch(tmp_path):
    class Late(Method):
        needs_teacher = False

        def hard_factor(self, epoch):
            return (0.0, 0.25, 1.0)[epoch]

        def forward(self, student, teacher, batch):
            return {"hint": student.logits.sum() * 0 + 3}

    data, shares = digits(), []
    batch = example(data)

    class Spy(Distiller):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.student.eval()
            with torch.no_grad():
                labels = torch.nn.functional.cross_entropy(self.student(batch.inputs), batch.targets)
                shares.append(float((self.loss(batch) - 3) / labels))
            self.student.train()

    fit(Spy(net(), Late(hard=0.8)), data, tmp_path, max_epochs=3)
    assert shares == pytest.approx([0.0, 0.2, 0.8], abs=1e-5)


def test_the_labels_loss_of_companions_is_added():
    class Paired(Method):
        needs_teacher = False

        def companions(self, student):
            return [Outputs.of(3 * student.logits), Outputs.of(-student.logits)]

        def forward(self, student, teacher, batch):
            return {}

    batch, distiller = example(digits()), Distiller(net(), Paired(hard=0.5))
    logits = distiller.eval().student(batch.inputs)
    expected = sum(torch.nn.functional.cross_entropy(k * logits, batch.targets) for k in (1, 3, -1)) / 2
    assert torch.allclose(distiller.loss(batch), expected)


def test_a_schedule_of_a_term_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="schedule names sof, but the terms of this method are hard"):
        fit(Distiller(net(), Supervised(), schedule={"sof": [(0, 0), (4, 1)]}), digits(), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path):
    class Explodes(Method):
        needs_teacher = False

        def forward(self, student, teacher, batch):
            return {"soft": student.logits.mean() * (math.inf if self.epoch == 1 else 1)}

    with pytest.raises(UserError, match=r"not finite.*soft = (nan|inf|-inf)"):
        fit(Distiller(net(), Explodes()), digits(), tmp_path, max_epochs=3, log_every_n_steps=1000)
    kept = list(tmp_path.rglob("*.ckpt"))
    assert len(kept) == 1  # of epoch 0, written before the loss exploded
    state = torch.load(kept[0], weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() for v in state.values())


def test_a_student_that_overflows_in_its_last_step_stops_the_run_and_no_checkpoint_is_written(tmp_path):
    class Spoils(Distiller):
        def on_train_batch_end(self, *a):
            super().on_train_batch_end(*a)
            if self.trainer.is_last_batch:
                next(self.student.parameters()).data.fill_(math.inf)

    with pytest.raises(UserError, match=r"not finite.*weights.*smaller learning rate"):
        fit(Spoils(net(), Supervised()), digits(), tmp_path, max_epochs=1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_teacher_at_chance_level_is_refused_before_the_first_step(tmp_path):
    distiller = Distiller(net(), KD(), net(16, seed=1))
    before = weights_sha256(distiller.student.state_dict())
    with pytest.raises(UserError, match=r"chance level.*allow_chance"):
        fit(distiller, digits(), tmp_path)
    assert weights_sha256(distiller.student.state_dict()) == before


def test_chance_is_the_most_frequent_label():
    task = Classification()
    targets = torch.tensor([0] * 90 + [1] * 10)
    with pytest.raises(UserError, match="chance"):
        check_teacher(task, {"accuracy": 0.9}, targets)
    check_teacher(task, {"accuracy": 0.9}, targets, allow_chance=True)
    check_teacher(task, {"accuracy": 0.9 + 3.1 * math.sqrt(0.9 * 0.1 / 100)}, targets)
    check_teacher(task, {"accuracy": 1.0}, targets)
    for few in (torch.tensor([0, 1] * 4), torch.tensor([0] * 95 + [1] * 5)):  # no number could exceed it by three sigma
        check_teacher(task, {"accuracy": 1.0}, few)
    with pytest.raises(UserError, match="not a number"):
        check_teacher(task, {"accuracy": math.nan}, targets)


def test_a_teacher_is_not_refused_on_too_few_images(caplog):
    """Five of seven right: a teacher that is right nine times in ten has that or less in every sixth validation set."""
    task, seven = Classification(), torch.tensor([0] * 4 + [1] * 3)
    check_teacher(task, {"accuracy": 5 / 7}, seven)
    assert "cannot be judged on 7 samples for validation: its accuracy is 71.43 %, guessing gives up to" in caplog.text
    with pytest.raises(UserError, match="chance"):  # a hundred times as many tell
        check_teacher(task, {"accuracy": 5 / 7 - 0.15}, seven.repeat(100))
    with pytest.raises(UserError, match="chance"):  # and so do seven, where fewer are right than by chance
        check_teacher(task, {"accuracy": 1 / 7}, seven)


@pytest.mark.parametrize(("right", "count"), [(5, 7), (81, 100), (0, 10), (90, 100), (7, 10)])
def test_the_interval_is_wilsons(right, count):
    """Its upper end p solves (p - x)² = z² p (1 - p) / n, here with z = 2, by a solver of equations."""
    from scipy.optimize import brentq

    x = right / count
    found = brentq(lambda p: (p - x) ** 2 - 4 * p * (1 - p) / count, x + 1e-9, 1)
    for share in (0.5, 0.8, 0.9):
        frequent = round(1000 * share)
        targets = torch.tensor([0] * frequent + [1] * (1000 - frequent))[torch.linspace(0, 999, count).long()]
        actual = (torch.bincount(targets).max() / count).item()
        assert Classification().can_judge(x, targets) == (found < (1 + actual) / 2)


def test_a_method_that_needs_a_teacher_says_so():
    with pytest.raises(UserError, match="learns from a teacher"):
        Distiller(net(), KD())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (KD(hard=0, soft=0), r"KD\(hard=0, soft=0\): nothing is learned"),
        (SimKD(hard=0, hint=0), r"SimKD\(hard=0, hint=0\)"),
        (Sum({"kd": KD(hard=0, soft=0), "at": AT(hard=0, hint=0)}), r"Sum\(hard=0, soft=0, hint=0\)"),
        (Shuffled(KD(hard=0, soft=0)), r"Shuffled\(hard=0, soft=0\)"),
    ],
)
def test_a_method_without_any_weight_is_refused(method, said):
    with pytest.raises(UserError, match=said):
        Distiller(net(), method, net(16), example(digits()))


def test_the_weights_that_the_config_knows_are_those_of_the_methods():
    assert set(rules.WEIGHTS) == {"hard", *WEIGHTS}


@pytest.mark.parametrize(
    "kept", [KD(hard=0), KD(soft=0), Sum({"kd": KD(hard=0, soft=0), "at": AT(hard=0)}), Supervised()]
)
def test_one_weight_is_enough(kept):
    Distiller(net(), kept, net(16), example(digits()))


def test_a_loss_without_terms_is_no_loss():
    distiller = Distiller(net(), Supervised(hard=0))
    with pytest.raises(UserError, match="Supervised has no term with a weight above 0"):
        distiller.loss(example(digits()))


def test_a_teacher_is_known_by_the_hash_of_its_weights():
    a, b = net(seed=1), net(seed=1)
    assert weights_sha256(a.state_dict()) == weights_sha256(b.state_dict())
    assert weights_sha256(dict(reversed(a.state_dict().items()))) == weights_sha256(a.state_dict())
    next(iter(b.state_dict().values())).view(-1)[0] += 1e-3
    assert weights_sha256(a.state_dict()) != weights_sha256(b.state_dict())


def test_a_teacher_that_was_left_on_another_device_joins_the_student():
    moved = []

    class Moved(torch.nn.Linear):
        def to(self, *args, **kwargs):
            moved.extend(args)
            return super().to(*args, **kwargs)

    Distiller(torch.nn.Linear(4, 3), KD(), Moved(4, 3), Batch(torch.randn(2, 4), torch.tensor([0, 1])))
    assert torch.device("cpu") in moved

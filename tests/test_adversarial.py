"""Adversarial training: the attack against one in numpy, ARD and RSLAD against their formulas, the same run however divided."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import SGD

from litdistill.config.recipes import recipe, recipe_hash, teacher_config
from litdistill.distillation.adversarial import PGD, ascend, attacked_batch
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.step import outputs_of_both
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods import ARD, KD, RSLAD, Shuffled, Sum, Supervised
from litdistill.training.grouping import GroupedData, Layout
from litdistill.training.pack import together
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, fit, net, same

EPS = 0.1


def distiller(method, teacher=None, data=None, **options):
    """A student of digits under a short attack."""
    options = {"adversarial": PGD(EPS, steps=3), "optimizer": functools.partial(SGD, lr=0.05), "seed": 0, **options}
    given = example(data or digits())
    return Distiller(net(), method, teacher, given, data=data, **options)


def minibatch(n=12):
    data = digits()
    return data.get_batch("train", data.train_ids[:n])


# -- the attack --------------------------------------------------------------------------------------------------------


def test_the_ascent_ends_where_one_in_numpy_ends():
    """Of a linear classifier the gradient of the cross-entropy is (softmax - onehot) @ weights."""
    rng = np.random.default_rng(0)
    weights, x, y = rng.normal(size=(3, 16)), rng.random((5, 1, 4, 4)), np.array([0, 1, 2, 0, 1])
    start = x + rng.uniform(-EPS, EPS, x.shape)

    def gradient(images):
        images = images.detach().requires_grad_()
        loss = F.cross_entropy(images.flatten(1) @ torch.from_numpy(weights.T), torch.from_numpy(y), reduction="sum")
        return torch.autograd.grad(loss, images)[0]

    found = ascend(gradient, torch.from_numpy(x), torch.from_numpy(start), EPS, 0.03, 7).numpy()
    v, low, high = np.clip(start, 0, 1), np.maximum(x - EPS, 0), np.minimum(x + EPS, 1)
    v = np.clip(v, low, high)
    for _ in range(7):
        logits = v.reshape(5, -1) @ weights.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        v = np.clip(v + 0.03 * np.sign((p - np.eye(3)[y]) @ weights).reshape(x.shape), low, high)
    assert np.abs(found - v).max() < 1e-12


def test_the_step_reaches_any_point_of_the_ball_by_default():
    assert PGD(0.2, steps=5).step == pytest.approx(0.1)
    assert PGD(0.2, 0.01).step == 0.01


@pytest.mark.parametrize("method", [Supervised(), KD()], ids=["labels", "kd"])
def test_a_student_is_trained_at_inputs_in_the_ball_where_its_loss_is_higher(method):
    teacher, batch = net(12, seed=1), minibatch()
    made = distiller(method, teacher)
    torch.manual_seed(0)
    attacked = attacked_batch(made, batch, None)
    difference = (attacked.inputs - batch.inputs.float() / 255).abs()
    assert 0.9 * EPS < difference.max() <= EPS + 1e-6
    assert attacked.inputs.min() >= 0
    assert attacked.inputs.max() <= 1
    torch.manual_seed(0)
    student, taught, kept = outputs_of_both(made, batch, None)
    assert kept is batch
    made.student.eval()
    loss = lambda x: F.cross_entropy(made.student(x), batch.targets).item()  # noqa: E731
    assert loss(attacked.inputs) > loss(batch.inputs) + 0.01
    expected = net().train()(attacked.inputs)
    assert torch.equal(student.logits, expected)
    if taught is not None:  # at the inputs as they are
        assert torch.equal(taught.logits, made.teacher(batch).logits)


def test_the_attack_changes_no_statistics_no_weight_and_no_mode():
    made = distiller(Supervised())
    next(m for m in made.student.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # a frozen layer stays frozen
    before = {k: v.clone() for k, v in made.student.state_dict().items()}
    modes = [m.training for m in made.student.modules()]
    attacked_batch(made, minibatch(), None)
    assert same(before, made.student.state_dict())
    assert modes == [m.training for m in made.student.modules()]
    assert all(p.grad is None for p in made.student.parameters())


# -- methods -----------------------------------------------------------------------------------------------------------


def drawn(seed):
    torch.manual_seed(seed)
    draw = functools.partial(torch.randn, 6, 4, dtype=torch.float64)
    clean, adversarial, teacher = draw().requires_grad_(), draw().requires_grad_(), draw()
    student = Outputs({"logits": clean, "adversarial": adversarial})
    return student, Outputs.of(teacher), Batch(None, torch.arange(6) % 4)


def divergence(p, q):
    """KL(p ‖ q) in numpy, the mean over samples."""
    soft = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    p, q = soft(p), soft(q)
    return (p * np.log(p / q)).sum(1).mean(), (q - p) / len(p)  # its value, and the gradient at the logits of q


@pytest.mark.parametrize("seed", range(3))
def test_ard_is_its_formula_in_float64_with_its_gradient(seed):
    student, teacher, batch = drawn(seed)
    clean, adversarial = student.heads["logits"], student.heads["adversarial"]
    terms = ARD(soft=0.7, temperature=5.0)(student, teacher, batch)
    value, gradient = divergence(teacher.logits.numpy() / 5, adversarial.detach().numpy() / 5)
    assert terms.keys() == {"soft"}
    assert terms["soft"].item() == pytest.approx(0.7 * 25 * value, rel=1e-12)
    found = torch.autograd.grad(terms["soft"], [adversarial, clean], allow_unused=True)
    assert np.allclose(found[0].numpy(), 0.7 * 25 * gradient / 5, rtol=1e-10, atol=1e-14)
    assert found[1] is None  # the labels' loss alone is at the inputs as they are
    assert ARD(soft=0.0, hard=1.0)(student, teacher, batch) == {}


@pytest.mark.parametrize("seed", range(3))
def test_rslad_is_its_formula_in_float64_with_its_gradients(seed):
    student, teacher, batch = drawn(seed)
    heads = [student.heads["adversarial"], student.heads["logits"]]
    terms = RSLAD()(student, teacher, batch)
    found = torch.autograd.grad(terms["adversarial"] + terms["soft"], heads)
    for name, weight, head, gradient in zip(("adversarial", "soft"), (5 / 6, 1 / 6), heads, found, strict=True):
        value, expected = divergence(teacher.logits.numpy(), head.detach().numpy())
        assert terms[name].item() == pytest.approx(weight * value, rel=1e-12)
        assert np.allclose(gradient.numpy(), weight * expected, rtol=1e-10, atol=1e-14)
    at = Outputs.of(heads[0].detach().requires_grad_())
    assert RSLAD().attacked_loss(at, teacher, batch).item() == pytest.approx(6 / 5 * terms["adversarial"].item())


def test_rslad_reads_no_label_and_its_attack_leads_away_from_the_teacher():
    """The paper: the labels' place is taken by the teacher's probabilities in the attack, too."""
    teacher, batch = net(12, seed=1), minibatch()
    unlabelled = batch._replace(targets=torch.full_like(batch.targets, -1))
    losses = []
    for given in (batch, unlabelled):
        torch.manual_seed(0)
        made = distiller(RSLAD(), teacher, labels="none" if given is unlabelled else "all")
        torch.manual_seed(0)
        losses.append(made.loss(given))
    assert torch.equal(*losses)
    soft = made.teacher(batch)
    attacked = attacked_batch(made, batch, soft)
    made.student.eval()
    kl = lambda x: RSLAD().attacked_loss(Outputs.of(made.student(x)), soft, batch).item()  # noqa: E731
    assert kl(attacked.inputs) > kl(batch.inputs)


def test_of_a_method_that_reads_both_the_labels_count_at_the_inputs_as_they_are():
    teacher, batch = net(12, seed=1), minibatch()
    made = distiller(ARD(hard=1.0), teacher)
    torch.manual_seed(0)
    student, _, _ = outputs_of_both(made, batch, None)
    assert torch.equal(student.logits, net().train()(batch.inputs))
    other = distiller(ARD(hard=1.0), teacher)
    torch.manual_seed(0)
    attacked = attacked_batch(other, batch, None)
    again = net().train()
    again(batch.inputs)  # its statistics, which the outputs in train mode do not depend on
    assert torch.equal(student.heads["adversarial"], again(attacked.inputs))


def test_sums_and_shuffled_methods_attack_as_their_parts_do():
    student, teacher, batch = drawn(0)
    batch = batch._replace(targets=torch.tensor([0, 0, 1, 1, 2, 2]))
    summed = Sum({"rslad": RSLAD(), "ard": ARD()})
    assert summed.reads_adversarial
    assert torch.equal(summed.attacked_loss(student, teacher, batch), RSLAD().attacked_loss(student, teacher, batch))
    assert Sum({"kd": KD()}).attacked_loss(student, teacher, batch) is None
    other = teacher._replace(heads={"logits": teacher.logits[[1, 0, 3, 2, 5, 4]]})
    found = Shuffled(RSLAD()).attacked_loss(student, teacher, batch)
    assert torch.equal(found, RSLAD().attacked_loss(student, other, batch))
    assert Shuffled(RSLAD()).reads_adversarial


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"eps": 0.0}, "eps=0.0 must be above 0"),
    ({"eps": 1.5}, "at most 1"),
    ({"step": 0.0}, "step=0.0 must be above 0"),
    ({"steps": 0}, "steps=0 must be 1 or more"),
])  # fmt: skip
def test_an_attack_without_sense_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        PGD(**options)


def test_where_an_attack_makes_no_sense_is_said_in_one_line():
    teacher = net(12, seed=1)
    with pytest.raises(UserError, match=r"ARD learns at adversarial inputs, and there are none: adversarial=pgd"):
        distiller(ARD(), teacher, adversarial=None)
    with pytest.raises(UserError, match=r"all samples have no label: use method=rslad"):
        distiller(KD(), teacher, labels="none")
    with pytest.raises(UserError, match=r"some samples have no label"):
        distiller(ARD(), teacher, labels="some")
    distiller(RSLAD(), teacher, labels="none")
    table = nn.Linear(5, 3)
    with pytest.raises(UserError, match=r"changes pixels of images \(N, C, H, W\), and these inputs are \(4, 5\)"):
        Distiller(table, Supervised(), None, (torch.rand(4, 5), torch.arange(4) % 3), adversarial=PGD())
    plain, normalized = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.randn(4, 1, 8, 8)
    with pytest.raises(UserError, match=r"changes pixels from 0 to 1, and these go from -"):
        Distiller(plain, Supervised(), None, (normalized, torch.arange(4)), adversarial=PGD())
    with pytest.raises(UserError, match=r"needs Distiller\(example=…\)"):
        Distiller(plain, Supervised(), None, None, adversarial=PGD())

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x):
            return self.net((x.detach() * 255).round() / 255)

    with pytest.raises(UserError, match=r"this student has none there"):
        Distiller(Rounds(), Supervised(), None, (normalized.sigmoid(), torch.arange(4)), adversarial=PGD())


# -- runs --------------------------------------------------------------------------------------------------------------


def run(folder, method, group=0, ckpt=None, cache=None, member=None, eps=EPS, **options):
    data = digits()
    made = distiller(method, None if not method.needs_teacher else net(12, seed=1), data, group=group, seed=0,
                     allow_chance=True, cache=CacheOptions(cache or "off", folder / "cache"),
                     adversarial=PGD(eps, steps=3))  # fmt: skip
    return made, fit(made, GroupedData(data, Layout(group, 0), member), folder, ckpt, **options)


class SaveAt(Callback):
    def __init__(self, folder: Path, step: int):
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "at.ckpt")


@pytest.mark.parametrize(("method", "group"), [(Supervised, 0), (ARD, 0), (RSLAD, 2)])
def test_a_stopped_run_goes_on_to_the_bit_and_groups_change_nothing(tmp_path, method, group):
    whole, _ = run(tmp_path / "a", method(), group, callbacks=[SaveAt(tmp_path, 5)])
    other, _ = run(tmp_path / "b", method(), 3 - group)
    assert same(whole.student, other.student)
    resumed, trainer = run(tmp_path / "c", method(), group, tmp_path / "at.ckpt")
    assert trainer.global_step == 6
    assert same(whole.student, resumed.student)


@pytest.mark.parametrize("method", [ARD, RSLAD])
def test_the_teachers_outputs_at_the_inputs_as_they_are_come_from_the_cache(tmp_path, method):
    live, _ = run(tmp_path / "a", method())
    cached, _ = run(tmp_path / "b", method(), cache="memory")
    assert cached.cache is not None
    assert cached.cache.computed < cached.cache.requested  # the second epoch's are known, whatever the attack changes
    assert same(live.student, cached.student)


def test_side_by_side_each_is_equal_to_the_bit_to_one_alone(tmp_path):
    """The random starts of one are not those that another has left behind."""
    trials = [(ARD, EPS), (RSLAD, 0.3)]
    jobs = [
        functools.partial(run, tmp_path / f"{i}", method(), 3, eps=eps, max_epochs=1)
        for i, (method, eps) in enumerate(trials)
    ]
    packed = together([lambda member, job=job: job(member=member) for job in jobs])
    for i, ((method, eps), (one, _)) in enumerate(zip(trials, packed, strict=True)):
        assert same(one.student, run(tmp_path / f"alone{i}", method(), 3, eps=eps, max_epochs=1)[0].student)


def test_under_ddp_one_process_trains_as_without(tmp_path):
    """Several forwards of the student a step, and a gradient at the inputs inside of DDP's forward."""
    alone, _ = run(tmp_path / "a", ARD(hard=0.5))
    wrapped, _ = run(tmp_path / "b", ARD(hard=0.5), strategy=DDPStrategy(process_group_backend="gloo"), devices=1)
    for a, b in zip(alone.student.parameters(), wrapped.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_attack_belongs_to_the_recipe_and_a_teachers_is_its_own(tmp_path):
    plain, robust = (compose_config(tmp_path, f"adversarial={name}") for name in ("none", "pgd"))
    assert "adversarial" not in recipe(plain)  # so that the hashes of runs without are as ever
    assert recipe_hash(plain) != recipe_hash(robust)
    assert not teacher_config(robust).adversarial
    both = compose_config(
        tmp_path, "adversarial=pgd", "+adversarial@teacher.recipe.adversarial=pgd", "adversarial.eps=0.2"
    )
    assert teacher_config(both).adversarial == {"eps": 0.1, "step": None, "steps": 10}

"""The switches of KD, DKD and MLKD: standardized logits, and temperatures that are learnt against the student.

References are in float64: standardized logits by hand, temperatures by θ of the paper's T = 1 + 20 · sigmoid(θ).
"""

from __future__ import annotations

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from litdistill.distillation.distiller import Distiller
from litdistill.methods import DKD, KD, MLKD
from litdistill.methods.base import Method
from litdistill.methods.softening import Softening
from litdistill.models.small import conv4
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.methods.contract import batch

METHODS = {"kd": KD, "dkd": DKD, "mlkd": MLKD}


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(6, 5, generator=g, dtype=torch.float64) * 3 for _ in range(2)]
    return logits[0].requires_grad_(), logits[1], torch.randint(5, (6,), generator=g)


def terms(method: Method, s: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    return method(Outputs.of(s), Outputs.of(t), batch(y))


def standardized(z: Tensor) -> Tensor:
    mean = z.sum(1, keepdim=True) / z.shape[1]
    return (z - mean) / (1e-7 + ((z - mean).square().sum(1, keepdim=True) / (z.shape[1] - 1)).sqrt())


@pytest.mark.parametrize("name", METHODS)
def test_standardized_is_the_method_of_standardized_logits_with_its_gradients(name):
    s, t, y = draw()
    got = terms(METHODS[name](standardized=True), s, t, y)
    want = terms(METHODS[name](), standardized(s), standardized(t), y)
    if name == "mlkd":  # of the instance level alone, as in the authors' code
        want = {**terms(MLKD(), s, t, y), "instance": want["instance"]}
    assert got.keys() == want.keys()
    for key in got:
        torch.testing.assert_close(got[key].double(), want[key].double(), rtol=1e-5, atol=1e-7)
        grads = [torch.autograd.grad(x[key], s, retain_graph=True)[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_logit_std_is_kd_of_standardized_logits_with_the_published_weights():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        method = instantiate(compose(overrides=["+method=logit_std"]).method, _convert_="all")
    assert isinstance(method, KD)
    assert (method.hard, method.soft, method.temperature, method.softening.standardized) == (0.1, 9.0, 2.0, True)
    assert (method.fewest_classes, KD().fewest_classes) == (3, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("epoch", [0, 4, 9, 30])
def test_a_learnt_temperature_climbs_the_loss_that_the_student_descends(name, epoch):
    s, t, y = draw()
    method = METHODS[name](learnt=10)
    method.set_epoch(epoch)
    got = sum(terms(method, s, t, y).values())
    theta = method.softening.theta.detach().double().requires_grad_()
    temperatures = 1 + 20 * theta.sigmoid()
    plain = METHODS[name]()
    plain.softening.fixed = tuple(temperatures)  # tensors, so that there is a gradient
    want = sum(terms(plain, s, t, y).values())
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (grad_s, grad_theta) = torch.autograd.grad(got, [s, method.softening.theta])
    (want_s, want_theta) = torch.autograd.grad(want, [s, theta])
    torch.testing.assert_close(grad_s, want_s, rtol=1e-4, atol=1e-6)
    rise = (1 - math.cos(math.pi * min(epoch + 1, 10) / 10)) / 2
    torch.testing.assert_close(grad_theta.double(), -rise * want_theta, rtol=2e-4, atol=1e-6)
    assert want_theta.abs().max() > 1e-3


def test_temperatures_start_where_they_are_given_and_stay_between_1_and_21():
    for given in ([4.0], [2.0, 6.0], [1.01], [20.9]):
        assert Softening(given, learnt=3).temperatures(0).tolist() == pytest.approx(given, rel=1e-3)
    paper = Softening([15.62], learnt=10)
    assert paper.theta.item() == pytest.approx(1.0, abs=1e-3)  # the authors' start
    with torch.no_grad():
        paper.theta.fill_(50.0)
    assert paper.temperatures(3).item() == pytest.approx(21)


def test_one_step_raises_the_loss_if_the_student_stands_still():
    s, t, y = draw(3)
    method = KD(learnt=1)
    before = terms(method, s, t, y)["soft"]
    (grad,) = torch.autograd.grad(before, [method.softening.theta])
    with torch.no_grad():
        method.softening.theta -= 0.05 * grad
    assert terms(method, s, t, y)["soft"] > before


@pytest.mark.parametrize("name", METHODS)
def test_without_the_switches_there_is_nothing_to_train_and_nothing_to_watch(name):
    method = METHODS[name]()
    assert list(method.parameters()) == []
    assert method.watched() == {}
    assert not method.by_epoch
    zero = {k: 0.0 for k in ("soft", "tckd", "nckd", "instance", "batch", "classes") if hasattr(method, k)}
    assert list(METHODS[name](**zero, learnt=10).parameters()) == []  # an unused parameter would stop DDP


def test_what_is_watched_is_the_temperature():
    assert KD(learnt=10, temperature=3.0).watched()["temperature"].item() == pytest.approx(3.0, rel=1e-5)
    assert MLKD(learnt=10, temperatures=[2.0, 3.0]).watched().keys() == {"temperature_0", "temperature_1"}
    assert KD(learnt=10).by_epoch


def test_the_temperature_is_trained_beside_the_student_and_is_not_deployed():
    torch.manual_seed(0)
    nets = [conv4(3, (1, 8, 8), widths=[4]) for _ in range(2)]
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    module = Distiller(nets[0], KD(learnt=1), nets[1], optimizer=lambda p: torch.optim.SGD(p, lr=100.0))
    theta = module.method.softening.theta
    held = theta.detach().clone()
    optimizer = module.configure_optimizers()
    module.loss(module.task.batch((images, labels))).backward()
    optimizer.step()
    assert not torch.equal(theta, held)
    assert not any("theta" in name for name in module.deployed_student.state_dict())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KD(temperature=0.5, learnt=10), "between 1 and 21"),
        (lambda: MLKD(temperatures=[2.0, 30.0], learnt=10), "between 1 and 21"),
        (lambda: KD(learnt=-1), "number of epochs"),
        (lambda: DKD(temperature=0.0), "above 0"),
        (lambda: MLKD(temperatures=[]), "temperatures is empty"),
    ],
)
def test_what_cannot_be_learnt_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_standardized_logits_of_a_teacher_of_some_classes_are_refused():
    s, t, y = draw()
    teacher = Outputs({"logits": t, "members": t[:, None].log_softmax(2)}, {})
    with pytest.raises(UserError, match="some of the classes"):
        KD(standardized=True)(Outputs.of(s), teacher, batch(y))
    assert KD(learnt=10)(Outputs.of(s), teacher, batch(y))["soft"].requires_grad

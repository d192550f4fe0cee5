"""SimKD and SRRL, which reuse the teacher's classifier: their networks, and their losses written out in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litdistill.methods.simkd import ReusedHead, SimKD
from litdistill.methods.srrl import SRRL
from litdistill.models.mobilenet import mobilenet_v2
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4, mlp
from litdistill.models.vgg import vgg
from litdistill.models.wrn import wrn
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import Reader, batch

SHAPE = (3, 32, 32)
STUDENTS = {
    "conv4": lambda: conv4(5, SHAPE, (4, 6, 7)),
    "resnet": lambda: resnet(5, SHAPE, 8, (4, 4, 6, 7)),
    "wrn": lambda: wrn(5, SHAPE, 10, 1),
    "vgg": lambda: vgg(5, SHAPE, 8),
    "mobilenet": lambda: mobilenet_v2(5, SHAPE),
    "large maps": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 9),
        nn.ReLU(),
        nn.Linear(9, 5),
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(net):
    """Running statistics other than a fresh network's, as a real teacher has."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    return net.eval()


def teacher_net():
    return trained(resnet(5, SHAPE, 8, (4, 5, 8, 9)))


def read(method, student, teacher, images):
    """What the distiller does: features of both networks by the method's taps."""
    taps = method.taps()
    readers = Reader(student, images, taps.student), Reader(teacher, images, taps.teacher)
    with torch.no_grad():
        wanted = readers[1](images)
    return readers[0](images), wanted


@pytest.mark.parametrize("name", STUDENTS)
def test_simkds_network_trains_everything_but_the_reused_classifier(name):
    teacher, images, labels = teacher_net(), torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
    student = STUDENTS[name]()
    state = {k: v.clone() for k, v in student.state_dict().items()}
    method = SimKD(hard=1.0)
    net = method.prepare(student, teacher, images[:2])
    left = net.backbone.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in left.items())  # nothing trained, no statistic moved
    assert not any(isinstance(m, nn.Linear) for m in net.backbone.modules())  # its own head is gone
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.equal(before["classifier.weight"], teacher.fc.weight)
    net.train()
    method.build(*read(method, net, teacher, images), torch.zeros(9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    student, wanted = read(method, net, teacher, images)
    terms = method(student, wanted, batch(labels))
    assert list(terms) == ["hint"]
    (terms["hint"] + F.cross_entropy(student.logits, labels)).backward()
    assert {k for k, p in net.named_parameters() if p.grad is None} == {"classifier.weight", "classifier.bias"}
    optimizer.step()
    after = net.state_dict()
    assert {k for k, v in after.items() if torch.equal(v, before[k])} >= {"classifier.weight", "classifier.bias"}
    assert not torch.equal(after["projector.0.weight"], before["projector.0.weight"])
    # what is shipped stands alone: a second one, made anew from other weights, takes its state dict and is it
    other = SimKD().prepare(STUDENTS[name](), teacher_net(), images[:2])
    other.load_state_dict(after)
    assert torch.equal(other.eval()(images), net.eval()(images))
    assert net._storage.map is None


@pytest.mark.parametrize("name", ["resnet", "large maps"])
def test_simkds_network_exports_and_copies(name):
    images = torch.randn(2, *SHAPE)
    net = SimKD().prepare(STUDENTS[name](), teacher_net(), images).eval()
    exported = torch.export.export(net, (images,)).module()
    other = torch.randn(2, *SHAPE)
    logits = net(other)
    torch.testing.assert_close(exported(other), logits, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    assert torch.equal(twin(other), logits)
    assert not torch.allclose(net(other), logits)


@pytest.mark.parametrize("tap", ["layer3", "pool:in"])
def test_equal_maps_give_the_teachers_own_logits(tap):
    """The paper's argument for reusing the classifier: a student whose map is the teacher's is the teacher."""
    teacher, images = teacher_net(), torch.randn(3, *SHAPE)
    net = ReusedHead(copy.deepcopy(teacher), tap, nn.Identity(), teacher.fc, (8, 8))
    torch.testing.assert_close(net(images), teacher(images), rtol=1e-5, atol=1e-6)


def test_an_activation_in_place_behind_the_tap_does_not_reach_the_map():
    """Read through the taps or not: what is trained is what is shipped."""
    images = torch.randn(3, *SHAPE)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True))
    student = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net = SimKD(student_taps="0.0").prepare(student, teacher_net(), images).eval()
    expected = net.classifier(net.projector(F.adaptive_avg_pool2d(features[0](images), 8)).mean((2, 3)))
    torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("size", [32, 24])
def test_simkd_loss(size):
    """Mean squared error of the projector's output, its three convolutions and BatchNorms written out in float64."""
    teacher, images = teacher_net(), torch.randn(3, 3, size, size)
    method = SimKD(hint=0.5)
    net = method.prepare(STUDENTS["large maps"](), teacher, images).train()
    student, wanted = read(method, net, teacher, images)
    terms = method(student, wanted, batch(torch.zeros(3, dtype=torch.int64)))
    t = wanted.features["layer3"].double()
    x = F.relu(F.conv2d(images.double(), *(p.double() for p in net.backbone[0].parameters())))
    x = F.adaptive_avg_pool2d(x, t.shape[2:])
    for i in (0, 3, 6):
        x = F.conv2d(x, net.projector[i].weight.double(), padding=int(i == 3))
        x = x - x.mean((0, 2, 3), keepdim=True)
        x = (x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).clamp(min=0)
    assert net.projector[0].out_channels == t.shape[1] // 2
    assert list(terms) == ["hint"]
    assert terms["hint"].item() == pytest.approx(0.5 * (x - t).square().mean().item(), rel=1e-5)
    logits = x.mean((2, 3)) @ teacher.fc.weight.double().T + teacher.fc.bias.double()
    torch.testing.assert_close(student.logits.double(), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_srrl_loss_and_gradient(n):
    teacher, images = teacher_net(), torch.randn(n, *SHAPE)
    method, student = SRRL(hard=0, hint=0.5, soft=2), STUDENTS["conv4"]()
    assert method.prepare(student, teacher, torch.randn(2, *SHAPE)) is student
    s, t = read(method, student.eval(), teacher, images)
    method.build(s, t, torch.zeros(9))
    (name, feature), (wanted,) = *s.features.items(), t.features.values()
    leaf = feature.detach().requires_grad_()
    target = batch(torch.zeros(n, dtype=torch.int64))
    terms = method(s._replace(features={name: leaf}), t, target)
    double = leaf.detach().double().requires_grad_()
    x = torch.einsum("oc,nchw->nohw", method.connector[0][0].weight.detach().double()[:, :, 0, 0], double)
    x = x - x.mean((0, 2, 3), keepdim=True)
    x = (x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).clamp(min=0).mean((2, 3))
    logits = x @ teacher.fc.weight.detach().double().T + teacher.fc.bias.detach().double()
    hint = 0.5 * (x - wanted.double().mean((2, 3))).square().mean()
    soft = 2 * (logits - t.logits.double()).square().mean()
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {"hint": hint.item(), "soft": soft.item()}, rel=1e-4
    )
    sum(terms.values()).backward()
    (expected,) = torch.autograd.grad(hint + soft, double)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert all(p.grad.any() for p in method.parameters())
    assert {"weight", "bias"} <= method.state_dict().keys()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = method(s._replace(features={name: feature.detach().bfloat16()}), t, target)
    assert {k: v.item() for k, v in low.items()} == pytest.approx({k: v.item() for k, v in terms.items()}, rel=0.03)
    assert all(v.dtype == torch.float32 for v in low.values())


def test_srrl_parts_can_be_left_out():
    teacher, images = teacher_net(), torch.randn(2, *SHAPE)
    method, student = SRRL(soft=0), STUDENTS["conv4"]()
    method.prepare(student, teacher, images)
    s, t = read(method, student, teacher, images)
    method.build(s, t, torch.zeros(9))
    assert list(method(s, t, batch(torch.tensor([0, 1])))) == ["hint"]
    assert "weight" not in method.state_dict()
    off = SRRL(hint=0, soft=0)
    off.build(s, t, torch.zeros(9))
    assert off.taps() == ((), ())
    assert not list(off.parameters())


def two_layers():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 5)
    )


@pytest.mark.parametrize("method", [SimKD, SRRL])
def test_a_teacher_whose_classifier_does_not_read_the_pooled_map_is_refused(method):
    """Its last layer fits by size (4 channels, 4 inputs), but reads something else."""
    images = torch.randn(2, *SHAPE)
    with pytest.raises(UserError, match="teacher_taps"):
        method().prepare(STUDENTS["conv4"](), two_layers(), images)
    with pytest.raises(UserError, match="spatial maps"):
        method().prepare(STUDENTS["conv4"](), mlp(5, SHAPE), images)


def test_simkd_refuses_a_student_without_maps():
    images = torch.randn(2, *SHAPE)
    with pytest.raises(UserError, match="spatial maps"):
        SimKD().prepare(mlp(5, SHAPE), teacher_net(), images)
    with pytest.raises(UserError, match="factor"):
        SimKD(factor=0)
    vectors = Outputs.of(torch.zeros(2, 5), {"pooled": torch.zeros(2, 7)})
    with pytest.raises(UserError, match="spatial maps"):
        SRRL().build(vectors, vectors, torch.zeros(9))

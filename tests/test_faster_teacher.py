"""Faster forms of a frozen network give what the network gives."""

import copy

import pytest
import torch
from torch import nn

from litdistill.distillation.inference import ConvAsLinear, fuse_batchnorm, prepack
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.models.preprocess import bare
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4
from litdistill.types import Batch
from litdistill.utils.hashing import weights_sha256
from tests.fits import net


def test_folding_is_exact_in_float64_and_leaves_the_teacher_itself_alone():
    teacher = bare(net(16, seed=1)).double().eval()
    for m in teacher.modules():
        if isinstance(m, nn.BatchNorm2d):  # as trained, not as made
            m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2), m.weight.data.uniform_(0.5, 2)
    before = weights_sha256(teacher.state_dict())
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    fast = fuse_batchnorm(teacher, images)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(images), teacher(images), rtol=1e-12, atol=1e-12)
    frozen = FrozenTeacher(teacher, example=Batch(images, None))
    assert frozen.run is not teacher
    torch.testing.assert_close(frozen(Batch(images, None)).logits, teacher(images), rtol=1e-12, atol=1e-12)
    assert weights_sha256(teacher.state_dict()) == before
    assert FrozenTeacher(teacher, taps=["layer1"], example=Batch(images, None))(Batch(images, None)).features[
        "layer1"
    ].shape == (5, 16, 8, 8)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_faster_forms_say_the_same_of_any_batch_and_the_default_one_to_the_bit_wherever_an_image_stands(shape):
    torch.manual_seed(0)
    for teacher in (conv4(10, shape, widths=[16, 32, 64]), resnet(10, shape, 20, [16, 16, 32, 64])):
        frozen = FrozenTeacher(teacher, example=Batch(torch.randn(2, *shape), None))
        images, order = torch.randn(64, *shape), torch.randperm(64)
        logits = frozen(Batch(images, None)).logits
        assert torch.equal(frozen(Batch(images[order], None)).logits, logits[order])
        with torch.no_grad():
            expected = copy.deepcopy(teacher).double()(images.double())
        assert torch.allclose(logits.double(), expected, atol=1e-4)

        frozen = FrozenTeacher(teacher, example=Batch(torch.randn(2, *shape), None), compile="prepacked")
        calls = [frozen(Batch(images, None)).logits for _ in range(4)]
        assert isinstance(frozen._packed[0], torch.jit.ScriptModule)
        assert torch.allclose(calls[0].double(), expected, atol=1e-4)
        assert all(torch.equal(calls[0], again) for again in calls)
        assert torch.allclose(
            torch.cat([frozen(Batch(chunk, None)).logits for chunk in images.split(23)]), calls[0], atol=1e-5
        )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (1, 1, 0, (1, 1)),
        (1, 2, 0, (2, 2)),
        (3, 1, 1, (1, 1)),
        (3, 2, 1, (2, 2)),
        (3, 2, 1, (2, 1)),
        (3, 1, 0, (3, 3)),
        (5, 7, 2, (4, 3)),
    ],
)
def test_a_convolution_to_one_pixel_is_a_matrix_product(kernel, stride, padding, size):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, bias=padding != 1).double()
    maps = torch.randn(5, 4, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert conv(maps).shape == (5, 6, 1, 1)
    torch.testing.assert_close(ConvAsLinear(conv, *size)(maps), conv(maps), rtol=1e-12, atol=1e-12)


def test_a_teacher_whose_course_depends_on_its_images_is_not_written_down():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bare(net())

        def forward(self, x):
            return self.net(x) * (2 if len(x) > 1 else 1)

    odd = Odd().eval()
    images = torch.randn(4, 1, 8, 8)
    assert prepack(odd, images) is odd
    frozen = FrozenTeacher(odd, example=Batch(images[:2], None))
    assert torch.equal(frozen(Batch(images[:1], None)).logits, odd(images[:1]).detach())
    assert torch.equal(frozen(Batch(images, None)).logits, odd(images).detach())


def test_a_network_that_cannot_be_traced_or_folded_exactly_is_run_as_it_is():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bare(net(4))

        def forward(self, images):
            return self.net(images) if images.sum() > 0 else self.net(-images)

    odd = Branches().eval()
    assert fuse_batchnorm(odd, torch.randn(2, 1, 8, 8)) is odd
    shared = nn.Sequential(conv := nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), conv, nn.Flatten()).eval()
    shared[1].running_var.fill_(9.0)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        FrozenTeacher(shared, example=Batch(images, None))(Batch(images, None)).logits, shared(images)
    )

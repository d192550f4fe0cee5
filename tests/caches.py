"""Small networks, data and runs with a cache of the teacher, shared by the tests of caches."""

import functools

import torch

from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import (
    CacheOptions,
)
from litdistill.methods.kd import KD
from litdistill.methods.pairs import Pair, Pairs
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.tasks.classification import Classification
from tests.fits import example, fit, grouped


class Dim:
    """An augmentation with no end of views: each image darker by some shade."""

    views = None

    def draw(self, bits):
        return bits

    def apply(self, images, code):
        return (images * (0.5 + 0.5 * (code % 2**20) / 2**20)[:, None, None, None]).to(torch.uint8)


CPU = torch.device("cpu")


TASK = Classification()
PAIRS = functools.partial(
    Pairs, [Pair("layer1", "layer2", "attention", 9.0), Pair("stages", "stages"), Pair("logits", "logits", "kl")]
)


def net(width: int = 8, seed: int = 0, mean: float = 0.3):
    torch.manual_seed(seed)
    return Preprocessed(conv4(10, (1, 8, 8), widths=[width, width]), Preprocess([mean], [0.35]))


def frozen(taps=(), seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(net(16, seed), taps=taps)


def digits(seed: int = 0, augment=(), **options) -> ImageData:
    data = ImageData("digits", per_class=12, subset_seed=0, batch_size=40, augment=augment, seed=seed, **options)
    data.setup()
    return data


def run(
    tmp_path, cache: CacheOptions, augment=(), method=None, epochs: int = 4, seed: int = 0, group: int = 4, **of_data
):
    """The losses of a short fit, how many images the teacher saw in it, and the student's weights."""
    losses, seen = [], []

    class Spy(Distiller):
        def loss(self, *a):
            loss = super().loss(*a)
            losses.append(loss.item())
            return loss

    data = digits(seed, augment, **of_data)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05)
    distiller = Spy(
        net(), method or KD(), net(16, seed=1), example(data), optimizer=optimizer, allow_chance=True, data=data, cache=cache,
        group=group,
    )  # fmt: skip
    count = lambda module, args, output: seen.append(len(args[0].inputs))  # noqa: E731
    distiller.teacher.register_forward_hook(count)
    fit(distiller, grouped(data, group), tmp_path, max_epochs=epochs, enable_checkpointing=False, limit_val_batches=0)
    return losses, sum(seen), distiller.student.state_dict(), distiller

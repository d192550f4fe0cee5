"""Adversarial training: the student sees each minibatch at inputs that an attack has changed within a ball of radius eps.

    litdistill train method=supervised teacher=null adversarial=pgd adversarial.eps=0.1
    litdistill train method=rslad adversarial=pgd

The attack is projected gradient ascent (PGD; Madry et al. 2018, arXiv 1706.06083, section 2.1), on the device. It ascends the
labels' loss, or what the method names in its place (`Method.attacked_loss`). The teacher sees the inputs as they are, so that
its outputs are cached as ever.

While the attack runs, the student is in eval mode, as in the code of RSLAD (Zi et al. 2021): what is attacked is the network
that is deployed, a sample's attack does not depend on its batch, and running statistics of batch normalization are unaffected.
The code of ARD (Goldblum et al. 2020) attacks in train mode instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from litdistill.methods.base import BOXES, Method
from litdistill.models.preprocess import SLACK
from litdistill.tasks.base import Task, has_places
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller


class PGD:
    """Projected gradient ascent from a uniformly random point of the ball.

    Args:
        eps: the largest change of any pixel, on the scale 0 to 1. Published for images of CIFAR-10: 8/255.
        step: the size of a step, on the same scale; None: 2.5 eps / steps, so that any point of the ball can be reached.
        steps: how many.

    Raises `UserError` for a size that is not above 0, for `eps` above 1, and for no step.
    """

    def __init__(self, eps: float = 0.1, step: float | None = None, steps: int = 10):
        if not 0 < eps <= 1:
            raise UserError(f"adversarial: eps={eps} must be above 0 and at most 1: a change of pixels from 0 to 1.")
        if step is not None and not 0 < step < math.inf:
            raise UserError(f"adversarial: step={step} must be above 0, or null for 2.5 eps / steps.")
        if steps < 1:
            raise UserError(f"adversarial: steps={steps} must be 1 or more.")
        self.eps, self.steps = eps, steps
        self.step = 2.5 * eps / steps if step is None else step


Gradient = Callable[[Tensor], Tensor]  # images (N, C, H, W) from 0 to 1 -> the gradient there, of the same shape


def ascend(gradient: Gradient, images: Tensor, start: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """Returns where `steps` steps along the sign of `gradient` lead from `start`, projected on the ball around `images`.

    All are (N, C, H, W) from 0 to 1; the ball has the radius `eps` in the maximum norm.
    """
    low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    x = start.clamp(low, high)
    for _ in range(steps):
        x = (x + step * gradient(x).sign()).clamp(low, high)
    return x


def unit_images(inputs: Tensor) -> Tensor:
    """Returns images as floats from 0 to 1; of uint8, from 0 to 255, as a 255th."""
    return inputs if inputs.is_floating_point() else inputs.float() / 255


def images_to_attack(inputs: Tensor, option: str) -> Tensor:
    """Returns `unit_images` of inputs. Raises `UserError`, in the name of the option that attacks them, for other pixels."""
    images = unit_images(inputs)
    low, high = images.aminmax()
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise UserError(
            f"{option} changes pixels from 0 to 1, and these go from {low:.3g} to {high:.3g}: let the network normalize them "
            "itself (litdistill.models.preprocess.Preprocess)."
        )
    return images


def attacked_batch(distiller: Distiller, batch: Batch, teacher: Outputs | None) -> Batch:
    """Returns the batch with the inputs that the attack finds for the student.

    `teacher`: its outputs at the batch's inputs. The random start is drawn on the inputs' device, by the generator that
    `seed_step` has seeded for the minibatch.
    """
    pgd, task, net = distiller.adversarial, distiller.task, distiller.student
    assert pgd is not None
    images = unit_images(batch.inputs)

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            changed = batch._replace(inputs=x)
            outputs = task.forward(net, changed, True)
            loss = distiller.method.attacked_loss(outputs, teacher, batch)
            if loss is None:
                loss = torch.stack(list(task.loss(net, outputs, changed).values())).sum()
            return torch.autograd.grad(loss * len(x), x)[0]  # of the sum: a mean's may underflow in half precision

    start = images + pgd.eps * (2 * torch.rand_like(images) - 1)
    _share_statistics(net)
    with eval_mode(net):
        return batch._replace(inputs=ascend(gradient, images, start, pgd.eps, pgd.step, pgd.steps))


def _share_statistics(net: nn.Module) -> None:
    """Gives every process the first one's buffers, which are deployed and kept in checkpoints, and which the attack reads.

    DDP leaves each process its own running statistics of batch normalization. With them a resumed run would go another way.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for buffer in net.buffers():
            distributed.broadcast(buffer, 0)


def check_adversarial(
    pgd: PGD | None, method: Method, task: Task, student: nn.Module, batch: Batch | None, labels: str
) -> None:
    """Raises `UserError` where adversarial training is missing or makes no sense.

    `batch`: the example, None without one. `labels`: which samples have one, "all", "some" or "none".
    """
    name = type(method).__name__
    if pgd is None:
        if method.reads_adversarial:
            raise UserError(
                f"{name} learns at adversarial inputs, and there are none: adversarial=pgd, in Python "
                "Distiller(adversarial=PGD(eps=0.1))."
            )
        return
    if task.kind == BOXES or has_places(task):
        raise UserError(f"adversarial=pgd is for tasks with one prediction an image, and not {type(task).__name__}.")
    if batch is None:
        raise UserError("adversarial=pgd needs Distiller(example=…): a batch of a few samples as the loader yields it.")
    inputs = batch.inputs
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        what = f"{tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UserError(
            f"adversarial=pgd changes pixels of images (N, C, H, W), and these inputs are {what}: use adversarial=none."
        )
    images_to_attack(inputs, "adversarial=pgd")
    if labels != "all" and type(method).attacked_loss is Method.attacked_loss:
        raise UserError(
            f"adversarial=pgd ascends the labels' loss, and {'some' if labels == 'some' else 'all'} samples have no label: use "
            "method=rslad, whose attack needs none, or train on labelled samples alone."
        )
    _check_differentiable(task, student, batch)


def _check_differentiable(task: Task, student: nn.Module, batch: Batch) -> None:
    """Raises `UserError` for a student without a gradient at its inputs, as one whose preprocessing rounds."""
    images = unit_images(batch.inputs).requires_grad_()
    with eval_mode(student), torch.enable_grad():
        main = task.forward(student, batch._replace(inputs=images), False).main
        (found,) = torch.autograd.grad(main.sum(), images, allow_unused=True) if main.requires_grad else (None,)
    if found is None:
        raise UserError("adversarial=pgd follows the gradient at the inputs, and this student has none there.")

"""Contrastive representation distillation (CRD). Tian, Krishnan & Isola 2020 (arXiv 1910.10699), section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.base import CATEGORICAL, VectorMethod
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

NO_IDS = "crd needs the id of every training sample, and the batches of this data module have none."


def contrast(log_ratio: Tensor, samples: int) -> Tensor:
    """Noise-contrastive loss of each row, `(N,)` (equation 18), in log space.

    `log_ratio`: (N, 1 + K), log of the critic's unnormalized score over Z, the positive first, then K negatives drawn
    uniformly from `samples`: −log h(positive) − Σ log(1 − h(negative)) with h(r) = r / (r + K / samples + 10⁻⁷).
    """
    noise = (log_ratio.shape[1] - 1) / samples
    log_sum = torch.logaddexp(log_ratio, torch.full_like(log_ratio, math.log(noise + 1e-7)))
    return (log_sum[:, 0] - log_ratio[:, 0]) + (log_sum[:, 1:] - math.log(noise)).sum(dim=1)


class CRD(VectorMethod):
    """`hard` · labels' loss + `hint` · (contrast of student and teacher memory + contrast of teacher and student memory).

    The memories hold one embedding of unit length for every training sample; the positive is the sample's own, the
    negatives belong to samples of other labels (the authors' mode "exact"). Negatives are drawn independently, so with
    replacement, as the loss's derivation assumes; the authors' loader draws without replacement where a class has enough
    negatives, which changes no expectation. The draws use torch's generator of the device (`torch.manual_seed`).

    After each training step the memory of each of its samples moves by 1 − `momentum` towards the new embedding. Z is
    estimated on the first training batch and then fixed. Samples without an id (−1, or no ids at all outside training)
    have no positive: they contribute no loss and change no memory.

    Memories and both Z are buffers: 8 · `width` bytes per training sample, float32, with equal initial values in every
    process. Under DDP each process updates the memories of its own samples; DDP must not broadcast buffers
    (`broadcast_buffers=False`), which would overwrite them with the first process's.
    """

    reads_targets = True
    kinds = (CATEGORICAL,)

    memory_student: Tensor
    memory_teacher: Tensor
    z_student: Tensor
    z_teacher: Tensor
    labels: Tensor
    by_label: Tensor
    first: Tensor
    count: Tensor

    def __init__(
        self,
        hard: float = 1.0,
        hint: float = 0.8,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        student_taps: Sequence[str] | str = "pooled",
        teacher_taps: Sequence[str] | str = "pooled",
    ):
        super().__init__(hard, hint, student_taps, teacher_taps)
        if not temperature > 0:
            raise UserError(f"temperature={temperature} must be above 0. The paper's is 0.07.")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum} must be at least 0 and below 1. The paper's is 0.5.")
        if negatives < 1:
            raise UserError(f"negatives={negatives} must be at least 1. The paper's is 16384.")
        self.width, self.negatives, self.temperature, self.momentum = width, negatives, temperature, momentum

    def build(self, student: Outputs, teacher: Outputs, targets: Tensor | None) -> None:
        """Creates embeddings and memories. Raises `UserError` without ids, or where all labels are of one class."""
        if not self.hint:
            return
        if targets is None:
            raise UserError(NO_IDS)
        s, t = self.pairs(student, teacher)[-1]
        self.embed_student = nn.Linear(s.shape[1], self.width, device=s.device)
        self.embed_teacher = nn.Linear(t.shape[1], self.width, device=s.device)

        targets = targets.to(s.device)
        trained = (targets >= 0).nonzero().squeeze(1)  # memories of the other samples are never updated and stay noise
        count = torch.bincount(targets[trained])
        if int((count > 0).sum()) < 2:
            raise UserError("crd contrasts samples of different labels, and the training set has one label only.")
        self.register_buffer("labels", torch.cat([targets, targets[:1]]).clamp(min=0))
        self.register_buffer("by_label", trained[targets[trained].argsort(stable=True)])
        self.register_buffer("first", count.cumsum(0) - count)
        self.register_buffer("count", count)
        # One row more than samples: it receives the updates of samples without an id.
        bound = 1 / math.sqrt(self.width / 3)
        generator = torch.Generator().manual_seed(0)
        for name in ("memory_student", "memory_teacher"):
            memory = torch.rand(len(targets) + 1, self.width, generator=generator) * 2 * bound - bound
            self.register_buffer(name, memory.to(s.device))
        for name in ("z_student", "z_teacher"):
            self.register_buffer(name, torch.full((), -1.0, device=s.device))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        if not self.hint:
            return {}
        if batch.ids is None:
            if self.training:
                raise UserError(NO_IDS)
            return {}
        with torch.autocast(student.main.device.type, enabled=False):
            return {"hint": self.hint * self._contrastive(*self.pairs(student, teacher)[-1], batch.ids)}

    def _contrastive(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        s = F.normalize(self.embed_student(student), dim=1)
        t = F.normalize(self.embed_teacher(teacher), dim=1)
        has_id = ids >= 0
        rows = torch.where(has_id, ids, len(self.labels) - 1)
        candidates = torch.cat([rows[:, None], self._draw(self.labels[rows])], dim=1)

        # Scores of the whole memory are cheaper than a copy of 16,385 of its rows for every sample.
        # Clones, since the update below would change in place what backward reads.
        log_s = (s @ self.memory_teacher.clone().T).gather(1, candidates) / self.temperature
        log_t = (t @ self.memory_student.clone().T).gather(1, candidates) / self.temperature
        z_s, z_t = self._normalizer(self.z_student, log_s), self._normalizer(self.z_teacher, log_t)
        n = len(self.by_label)
        loss = contrast(log_s - z_s.log(), n) + contrast(log_t - z_t.log(), n)
        if self.training:
            self._update_memories(rows, s.detach(), t.detach(), z_s, z_t)
        return (loss * has_id).sum() / has_id.sum().clamp(min=1)

    def _draw(self, labels: Tensor) -> Tensor:
        """Draws K negatives per sample: labels (N,) -> ids (N, K) of samples with other labels, uniform and independent."""
        others = (len(self.by_label) - self.count[labels])[:, None]
        rank = torch.randint(1 << 48, (len(labels), self.negatives), device=labels.device) % others
        return self.by_label[rank + self.count[labels][:, None] * (rank >= self.first[labels][:, None])]

    @torch.no_grad()
    def _normalizer(self, z: Tensor, log_score: Tensor) -> Tensor:
        """Returns the stored Z, or before the first estimate the mean score times the number of samples."""
        return torch.where(z > 0, z, log_score.exp().mean() * len(self.by_label))

    @torch.no_grad()
    def _update_memories(self, rows: Tensor, s: Tensor, t: Tensor, z_s: Tensor, z_t: Tensor) -> None:
        self.z_student.copy_(z_s)
        self.z_teacher.copy_(z_t)
        for memory, new in ((self.memory_student, s), (self.memory_teacher, t)):
            memory[rows] = F.normalize(memory[rows] * self.momentum + new * (1 - self.momentum), dim=1)

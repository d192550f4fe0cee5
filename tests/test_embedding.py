"""Backbones without classes as teachers: the task `embedding`, its metrics against scipy, and runs of both kinds of tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.distillation.checks import check_pairing
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.examine import check_teacher
from litdistill.distillation.inference import fuse_batchnorm
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.export.export import export_student
from litdistill.export.predict import load
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.features.outputs import run_network
from litdistill.methods import KD, PKT, RKD, SRD, Cosine, LogitMSE, Supervised
from litdistill.methods.base import REAL
from litdistill.models.backbone import cut
from litdistill.models.preprocess import Preprocess, wrap
from litdistill.models.small import conv4
from litdistill.tasks import Classification, Embedding, named_task
from litdistill.tasks.base import Samples
from litdistill.tasks.embedding import average_ranks, spearman_of_similarities
from litdistill.tasks.findings import judge
from litdistill.training.distill import distill
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality
from tests.methods.contract import batch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(x: Tensor) -> Outputs:
    return Outputs({"embedding": x})


def backbone(width: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cut(conv4(5, (1, 8, 8), widths=[4, 6, width]), torch.zeros(2, 1, 8, 8)).eval()


# -- metrics -----------------------------------------------------------------------------------------------------------


def pairs_of(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.array([unit[i] @ unit[j] for i in range(len(x)) for j in range(i + 1, len(x))])


@pytest.mark.parametrize("levels", [None, 2])
def test_spearman_is_scipys_of_all_pairs(levels):
    a, b = draw(40, 3), draw(40, 7, seed=1)
    b[:, :3] += a
    if levels:  # many equal similarities
        a, b = (x.clamp(-1, 1).round() + 2 for x in (a, b))
    wanted = spearmanr(*(np.round(pairs_of(x.double().numpy()), 12) for x in (a, b))).statistic
    assert spearman_of_similarities(a, b) == pytest.approx(wanted, abs=1e-6 if levels is None else 0.02)
    assert wanted > 0.2


def test_ranks_are_scipys_with_ties():
    x = torch.tensor([3.0, 1, 2, 2, 5, 1, 1])
    assert average_ranks(x).tolist() == rankdata(x.numpy()).tolist()


def test_of_many_samples_the_same_are_taken_in_any_order():
    a, b = draw(300, 4), draw(300, 4, seed=1)
    b += a
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    some = spearman_of_similarities(a, b, most=50)
    assert spearman_of_similarities(a[order], b[order], most=50) == pytest.approx(some, abs=1e-12)
    assert some == pytest.approx(spearman_of_similarities(a, b), abs=0.1)
    assert some != spearman_of_similarities(a, b)


def test_a_collapsed_student_has_no_correlation_and_is_called_a_constant():
    task, teacher = Embedding(), draw(30, 4)
    student = torch.ones(30, 4)
    quality = task.quality(student, teacher)
    assert quality["spearman"] == 0
    assert "the same vector for all samples" in judge(task, of(student), teacher, 0.0)["constant"]
    assert judge(task, of(teacher), teacher, 1.0) == {}


def test_metrics_compare_with_the_teacher_in_any_batches():
    task = Embedding()
    student, teacher = draw(50, 4), draw(50, 4, seed=1)
    metric = task.metrics()
    for s, t in zip(student.split(7), teacher.split(7), strict=True):
        metric.update(of(s), task.truth(torch.zeros(len(s)), of(t)))
    found = {k: float(v) for k, v in metric.compute().items()}
    assert found == pytest.approx(task.quality(student, teacher))
    wanted = (F.normalize(student.double()) * F.normalize(teacher.double())).sum(1)
    assert found["cosine"] == pytest.approx(wanted.mean().item())
    torch.testing.assert_close(task.agreement(of(student), of(teacher))["cosine"], wanted)


def test_other_widths_have_a_correlation_and_no_cosine():
    task = Embedding()
    assert task.quality(draw(9, 3), draw(9, 5)).keys() == {"spearman"}
    assert task.agreement(of(draw(9, 3)), of(draw(9, 5))) == {}


def test_a_student_is_measured_by_its_teacher_alone():
    with pytest.raises(UserError, match="there is no teacher"):
        Embedding().truth(torch.zeros(3), None)
    assert named_task("embedding").reads_labels is False
    assert Embedding().loss(nn.Identity(), of(draw(2, 3)), Batch(None, None)) == {}


@pytest.mark.parametrize("width", [0, 1, 1.5, "wide"])
def test_a_width_is_a_number(width):
    with pytest.raises(UserError, match=r"task\.width"):
        Embedding(width)


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((3,), (6,)), ((4,), (4,)), ((3, 5, 4), (2, 2, 2)), ((5, 4), (7,))], ids=str)
def test_cosine_is_its_formula_with_gradients(shapes):
    method, n = Cosine(hard=0, hint=0.3), 6
    s, t = (Outputs({"logits": draw(n, 5)}, {"last": draw(n, *shape, seed=i)}) for i, shape in enumerate(shapes))
    method.build(s, t, None)
    s.features["last"].requires_grad_()
    found = method(s, t, batch(torch.zeros(n)))
    f, g = (x.features["last"].detach().double() for x in (s, t))
    f.requires_grad_()
    a, b = (x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x for x in (f, g))
    own = [p for _, p in method.named_parameters()]
    assert len(own) == (a.shape[1] != b.shape[1])
    weight = own[0].detach().double().requires_grad_() if own else None
    a = a if weight is None else torch.einsum("ni,oi->no", a, weight)
    norm = lambda x: (x * x).sum(1) ** 0.5  # noqa: E731
    wanted = 0.3 * sum(1 - (a[i] @ b[i]) / (norm(a)[i] * norm(b)[i]) for i in range(n)) / n
    assert found["hint"].item() == pytest.approx(wanted.item(), rel=1e-5)
    leaves, doubles = [s.features["last"], *own], [f, *([] if weight is None else [weight])]
    for x, y in zip(torch.autograd.grad(found["hint"], leaves), torch.autograd.grad(wanted, doubles), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


def test_cosine_reads_the_embeddings_of_both():
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    teacher = backbone(8)
    data = DataLoader(TensorDataset(draw(8, 1, 8, 8).sigmoid()), 4)
    module = Distiller(student, Cosine(), teacher, next(iter(data)), Embedding())
    assert module.extractor.names == module.teacher.taps == (":embedding",)
    assert not list(module.method.parameters())
    first = draw(4, 1, 8, 8).sigmoid()
    with torch.no_grad():
        want = 1 - F.cosine_similarity(student(first), teacher(first)["embedding"]).mean()
    assert module.loss(Batch(first, torch.zeros(4))).item() == pytest.approx(want.item(), rel=1e-5)


# -- backbones ---------------------------------------------------------------------------------------------------------


def test_a_network_is_cut_at_its_classifier():
    torch.manual_seed(0)
    net, images = conv4(5, (1, 8, 8), widths=[4, 6, 7]).eval(), draw(3, 1, 8, 8)
    names, state = {n for n, _ in net.named_modules()}, set(net.state_dict())
    pooled = FeatureExtractor(net, resolve_taps(net, images, "pooled"))(images).features
    found = cut(net, images)
    torch.testing.assert_close(run_network(found, images).heads["embedding"], next(iter(pooled.values())))
    assert {n for n, _ in found.named_modules()} == names
    assert state - set(found.state_dict()) == {"fc.weight", "fc.bias"}
    assert cut(found, images) is found


@pytest.mark.parametrize("taps", ["stages", "last"])
def test_stages_of_a_backbone_are_those_of_the_network(taps):
    """Width 6 is that of a convolution too, which must not be taken for a classifier."""
    net, images = conv4(5, (1, 8, 8), widths=[4, 6, 6]), draw(2, 1, 8, 8)
    wanted = resolve_taps(net, images, taps)
    assert resolve_taps(cut(net, images), images, taps) == wanted


def test_a_faster_form_of_a_backbone_is_a_backbone():
    net = wrap(backbone(), Preprocess([0.5], [0.5]))
    images = draw(2, 1, 8, 8).sigmoid()
    fast = fuse_batchnorm(net, images)
    assert fast is not net
    torch.testing.assert_close(fast(images)["embedding"], net(images)["embedding"], rtol=1e-3, atol=1e-4)
    assert "embedding" in FrozenTeacher(net, Classification(), (), Batch(images, None))(Batch(images, None)).heads


def test_a_network_without_a_classifier_cannot_be_cut():
    with pytest.raises(UserError, match="classifier"):
        cut(nn.Sequential(nn.Flatten()), torch.zeros(2, 1, 8, 8))


# -- what can be learned from it ---------------------------------------------------------------------------------------


def test_methods_of_logits_are_refused_with_a_backbone():
    example = Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    for method in (KD(), LogitMSE(), SRD()):
        with pytest.raises(UserError, match=r"needed here.*embedding alone.*method=cosine"):
            Distiller(conv4(5, (1, 8, 8), widths=[4, 4, 4]), method, backbone(), example)


def test_methods_of_labels_are_refused_by_a_task_without():
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    with pytest.raises(UserError, match="Supervised learns from labels, and Embedding has none"):
        check_pairing(Supervised(), student, teacher, Embedding(), Batch(draw(2, 3), None))
    assert Embedding().kind == REAL


@pytest.mark.parametrize("method", [Cosine(), SRD(soft=0), RKD(), PKT()], ids=lambda m: type(m).__name__)
def test_a_student_learns_classes_and_a_backbones_features(method, tmp_path, caplog):
    caplog.set_level("INFO")
    images, labels = draw(24, 1, 8, 8).sigmoid(), torch.arange(24) % 5
    loader = DataLoader(TensorDataset(images, labels), 8)
    student = conv4(5, (1, 8, 8), widths=[4, 4, 4])
    done = distill(student, backbone(), loader, loader, method, max_epochs=1, out=tmp_path)
    assert {"val/accuracy", "train/hard"} <= set(done.trainer.callback_metrics)
    assert not {"val/teacher_accuracy", "val/agreement", "train/agreement"} & set(done.trainer.callback_metrics)
    assert caplog.text.count("The teacher has no classes: it is not judged") == 1


@pytest.mark.parametrize("method", [Cosine(), SRD(soft=0), RKD(), PKT()], ids=lambda m: type(m).__name__)
def test_a_student_learns_an_embedding_of_unlabelled_samples(method, tmp_path):
    images = draw(32, 1, 8, 8).sigmoid()
    loader = DataLoader(TensorDataset(images), 8)
    student = conv4(8, (1, 8, 8), widths=[4, 4, 4])
    before = [p.clone() for p in student.parameters()]
    done = distill(student, backbone(), loader, loader, method, "embedding", max_epochs=2, out=tmp_path)
    assert {"val/spearman", "val/cosine", "val/teacher_spearman"} <= set(done.trainer.callback_metrics)
    assert float(done.trainer.callback_metrics["val/teacher_spearman"]) == pytest.approx(1)
    assert all(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert done.predict_step(images[:3], 0)["embedding"].shape == (3, 8)


def test_the_guard_refuses_a_backbone_of_nan_and_judges_no_other():
    check_teacher(Embedding(), {"spearman": 0.1}, torch.zeros(4))
    with pytest.raises(UserError, match="not finite"):
        Embedding().quality(draw(4, 3), torch.full((4, 3), float("nan")))


class TokenBag(nn.Module):
    """The mean of the vectors of tokens, as an embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.words(ids).mean(1))


def test_a_network_of_token_embeddings_is_written_as_onnx(tmp_path):
    """Its lookup of tokens is a node that torch calls embedding: the output has another name."""
    pytest.importorskip("onnxruntime")
    split = TensorSplit(
        torch.randint(0, 20, (40, 6), generator=torch.Generator().manual_seed(0)), torch.full((40,), -1)
    )
    source = TensorSource(split, split, (), Modality("text"))
    data = TensorData(lambda: source, "ids", "embedding", val_size=8)
    data.setup()
    net = TokenBag().eval()
    path, entry = export_student(tmp_path, net, data, task=Embedding())
    assert entry["check"]["agreement"] == 1
    with torch.no_grad():
        expected = net(split.inputs).numpy()
    np.testing.assert_allclose(load(path).run(split.inputs.numpy()), expected, atol=1e-5)


def test_the_figure_shows_the_similarities_of_all_pairs():
    a = draw(12, 5)
    samples = Samples(lambda i: None, torch.full((12,), -1), (), of(a), of(a))
    (figure,) = Embedding().figures(samples).values()
    drawn = figure.axes[0].collections[0].get_array()
    assert float(np.ma.sum(drawn)) == 12 * 11 / 2
    bins = np.ma.filled(drawn.reshape(60, 60), 0)
    assert bins.sum() == np.trace(bins)  # equal embeddings lie on the diagonal
    assert Embedding().figures(Samples(lambda i: None, torch.zeros(12), (), of(a), None)) == {}

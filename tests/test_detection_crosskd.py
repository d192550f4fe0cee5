"""Cross-head distillation: its predictions by hand in float64, layer by layer; the teacher's head is in no checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

from litdistill import Distiller
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.crosskd import CrossKD
from litdistill.tasks.detection.detector import Detector
from litdistill.tasks.detection.fcos import Pyramid, SlimBody, fcos_slim
from litdistill.tasks.detection.task import Detection
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests import test_detection_dense as dense

CLASSES = 3


def slim(seed: int, fpn: int = 32, convs: int = 2) -> Detector:
    """A detector whose last layers are not the small ones of a new network."""
    torch.manual_seed(seed)
    net = fcos_slim(CLASSES, (3, 32, 32), width=4, fpn=fpn, convs=convs, strides=[8, 16])
    for layer in net.head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.2)
    nn.init.ones_(net.head.regression_head.bbox_reg.bias)  # boxes have an area
    return net.double()


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def labels(n: int = 2) -> Tensor:
    return padded([torch.tensor([[2.0, 3, 20, 22, 1, 0], [10, 12, 30, 31, 0, 0]])] * n)


def run(student: nn.Module, teacher: nn.Module, method: CrossKD) -> tuple[Outputs, Outputs]:
    """The outputs of both, the student's in training mode with what the method reads."""
    method.prepare(student, teacher, images())
    extractor = FeatureExtractor(student, method.taps().student)
    teacher.eval()
    with torch.no_grad():
        given = Outputs(teacher(images()))
        method.build(extractor(images()), given, None)
    method.double()
    student.train()
    return extractor(images()), given


def trunk(layers: nn.Sequential, x: Tensor) -> Tensor:
    """FCOS's convolutions, group normalizations and ReLUs by functions."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, nn.GroupNorm):
            x = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
        else:
            x = x.clamp(min=0)
    return x


def last(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """(N, H · W, outputs) of a last layer."""
    return F.conv2d(x, layer.weight, layer.bias, padding=1).flatten(2).transpose(1, 2)


def by_hand(student: Detector, teacher: Detector, method: CrossKD, own: int, passed: int) -> dict[str, Tensor]:
    """Cross-head predictions: the student's first `own` convolutions, and the teacher's last `passed`."""
    found: dict[str, list[Tensor]] = {"logits": [], "boxes": [], "centerness": []}
    for stride, x in zip((8, 16), student.backbone(images()).values(), strict=True):
        y, x_cls = [], x
        for branch in ("classification_head", "regression_head"):
            s, t = student.head.get_submodule(branch), teacher.head.get_submodule(branch)
            inside = trunk(s.conv[: 3 * own], x_cls)
            if branch in method.projectors:
                p = method.projectors[branch]
                inside = torch.einsum("oi,nihw->nohw", p.weight[:, :, 0, 0], inside) + p.bias[:, None, None]
            y.append(trunk(t.conv[len(t.conv) - 3 * passed :], inside))
        t = teacher.head
        found["logits"].append(last(y[0], t.classification_head.cls_logits))
        found["centerness"].append(last(y[1], t.regression_head.bbox_ctrness)[..., 0])
        sides = last(y[1], t.regression_head.bbox_reg).clamp(min=0) * stride
        h, w = x.shape[2:]
        # torchvision's anchors are centered on the corners of the grid, at multiples of the stride.
        ys, xs = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        center = torch.stack([xs.flatten(), ys.flatten()], 1).double()
        found["boxes"].append(torch.cat([center - sides[..., :2], center + sides[..., 2:]], 2))
    return {name: torch.cat(levels, 1) for name, levels in found.items()}


@pytest.mark.parametrize(
    ("convs", "fpn", "remaining", "own", "passed"),
    [
        ((2, 2), (32, 32), 1, 1, 1),  # (student, teacher)
        ((1, 3), (32, 64), 1, 0, 1),  # the student's features are its pyramid
        ((3, 2), (64, 32), 0, 3, 0),  # only the last layer is the teacher's
        ((1, 2), (32, 32), 5, 0, 2),  # all of the teacher's head
    ],
)
def test_terms_and_gradients_are_those_of_layers_by_hand_in_float64(convs, fpn, remaining, own, passed):
    student, teacher = (slim(seed, f, c) for seed, f, c in zip((1, 2), fpn, convs, strict=True))
    method = CrossKD(soft=0.5, box=2.0, centerness=3.0, remaining=remaining, least=0.3)
    s, t = run(student, teacher, method)
    assert len(method.projectors) == (2 if fpn[0] != fpn[1] else 0)
    got = method(s, t, Batch(images(), None))
    student.train()
    cross = by_hand(student, teacher, method, own, passed)
    heads = Outputs(cross), t
    weights = {"soft": 0.5, "soft_box": 2.0, "soft_centerness": 3.0}
    assert got.keys() == weights.keys()
    weight = dense.losses.above(dense.losses.confidence(t.logits), 0.3)
    wanted = {
        "soft": dense.losses.quality_focal(*(h.logits for h in heads)),
        "soft_box": dense.losses.weighted_giou(*(h.heads["boxes"] for h in heads), weight),
        "soft_centerness": dense.losses.weighted_entropy(*(h.heads["centerness"] for h in heads), weight),
    }
    weight_of_first = student.backbone.fpn.inner_blocks[0][0].weight
    for name, factor in weights.items():
        dense.compare(got[name], factor * wanted[name], weight_of_first)


def test_the_student_learns_before_the_crossing_and_neither_head_behind_it():
    student, teacher = slim(1), slim(2)
    method = CrossKD()
    s, t = run(student, teacher, method)
    before = copy.deepcopy(teacher.state_dict())
    sum(method(s, t, Batch(images(), None)).values()).backward()
    for branch, layer in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg")):
        head = student.head.get_submodule(branch)
        assert float(head.conv[0].weight.grad.abs().sum()) > 0
        assert head.conv[3].weight.grad is None
        assert getattr(head, layer).weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_student_that_is_its_teacher_has_no_loss():
    teacher = slim(2)
    student = copy.deepcopy(teacher)
    for norm in student.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0
    method = CrossKD()
    s, t = run(student, teacher, method)
    student.eval()
    extractor = FeatureExtractor(student, method.taps().student)
    s = extractor(images())._replace(heads=s.heads)
    assert all(float(v.detach()) < 1e-6 for v in method(s, t, Batch(images(), None)).values())


def distiller(student: nn.Module, teacher: nn.Module, method: CrossKD, **options: object) -> Distiller:
    batch = Batch(images().float(), labels())
    return Distiller(student.float(), method, teacher.float(), batch, Detection(), **options)


def test_the_teachers_head_is_in_no_checkpoint_optimizer_or_average():
    method = CrossKD()
    module = distiller(slim(1), slim(2, 64), method, ema=0.9)
    own = {f"student.{k}" for k in slim(1).state_dict()}
    projectors = {f"method.projectors.{b}.{p}" for b in method.projectors for p in ("weight", "bias")}
    assert len(projectors) == 4
    keys = set(module.state_dict())
    assert {k for k in keys if not k.startswith("average.")} == own | projectors
    trained = {id(p) for p in module.student.parameters()} | {id(p) for p in method.parameters()}
    optimizer = module.configure_optimizers()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trained
    kept = {id(p) for branch in method.rest.branches.values() for p in branch.parameters()}
    assert kept
    assert not kept & trained
    assert not kept & {
        id(p) for p in module.teacher.net.parameters()
    }  # a copy: nothing that runs the teacher changes it
    assert copy.deepcopy(method).rest is method.rest
    loss = module.loss(Batch(images().float(), labels()))
    loss.backward()
    assert all(p.grad is not None for p in method.parameters())
    assert all(not p.requires_grad for branch in method.rest.branches.values() for p in branch.parameters())


def test_projectors_are_made_only_for_branches_that_are_compared():
    for options, branch in (({"soft": 0}, "regression_head"), ({"box": 0, "centerness": 0}, "classification_head")):
        method = CrossKD(**options)
        module = distiller(slim(1), slim(2, 64), method)
        assert list(method.projectors) == [branch]
        assert {n.split(".")[1] for n in method.taps().student} == {branch}
        module.loss(Batch(images().float(), labels())).backward()


def test_boxes_of_resized_images_are_compared_in_pixels_of_the_images():
    student, teacher = (
        Preprocessed(slim(seed).float(), Preprocess([0.0] * 3, [1.0] * 3, size=(32, 32))) for seed in (1, 2)
    )
    method = CrossKD(least=0)
    x = torch.rand(2, 3, 64, 48)
    method.prepare(student, teacher, x)
    extractor = FeatureExtractor(student, resolve_taps(student, x, method.taps().student))
    student.train()
    s = extractor(x)
    method.build(s, Outputs(teacher.eval()(x)), None)
    cross = method.cross(s)["boxes"]
    plain = method.cross(s._replace(heads={"anchors": s.heads["anchors"]}))["boxes"]
    torch.testing.assert_close(cross, plain * torch.tensor([48 / 32, 64 / 32] * 2))


def retinanet(seed: int) -> Detector:
    torch.manual_seed(seed)
    body = SlimBody(3, 4, 1, [8, 16, 32])
    anchors = AnchorGenerator(((8, 12), (16, 24), (32, 48)), ((0.5, 1.0, 2.0),) * 3)
    backbone = Pyramid(body, body.channels, 32)
    return Detector(RetinaNet(backbone, CLASSES, anchor_generator=anchors, head=RetinaNetHead(32, 6, CLASSES)))


def test_heads_of_retinanet_are_crossed_too():
    student, teacher = retinanet(1), retinanet(2)
    method = CrossKD(least=0)
    module = distiller(student, teacher, method)
    assert method.taps().student[0] == "head.classification_head.conv.3:in@0"
    terms = method(*run_modules(module), Batch(images().float(), labels()))
    assert set(terms) == {"soft", "soft_box"}
    assert all(float(v.detach()) > 0 for v in terms.values())


def run_modules(module: Distiller) -> tuple[Outputs, Outputs]:
    batch = Batch(images().float(), labels())
    module.student.train()
    return module.extractor.run(lambda net: module.task.forward(net, batch, True)), module.teacher(batch)


def test_what_cannot_be_crossed_is_refused_in_one_line():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    headless = slim(2)
    headless.head.classification_head = nn.Identity()
    for teacher, words in ((plain, "is no one-stage detector"), (headless, "FCOSHead: use dense_kd")):
        with pytest.raises(UserError, match=words) as caught:
            CrossKD().prepare(slim(1), teacher, images())
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="remaining=-1"):
        CrossKD(remaining=-1)


class Thrice(nn.Module):
    """One layer on three maps, as heads are called for each level."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(2 * x) + self.layer(3 * x)


def test_a_tap_names_one_of_several_calls():
    net, x = Thrice(), torch.randn(4, 2)
    names = resolve_taps(net, x, ["layer:in@0", "layer@1", "layer:in", "layer:pool@2"])
    extractor = FeatureExtractor(net, names)
    for scale in (1, 2):  # the count starts again with each forward
        got = extractor(scale * x).features
        torch.testing.assert_close(got["layer:in@0"], scale * x)
        torch.testing.assert_close(got["layer@1"], net.layer(2 * scale * x))
        torch.testing.assert_close(got["layer:in"], 3 * scale * x)
        torch.testing.assert_close(got["layer:pool@2"], 3 * scale * x)
    with pytest.raises(UserError, match="not reached"):
        FeatureExtractor(net, ["layer@3"])(x)
    for wrong in ("layer@", "layer@x", "layer:@1", "other@1"):
        with pytest.raises(UserError, match="No tap"):
            resolve_taps(net, x, wrong)

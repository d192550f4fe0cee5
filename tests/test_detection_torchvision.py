"""Detectors of torchvision by name: published weights load from a local file, and their classes are found by name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model, get_model_weights

from litdistill.features.outputs import run_network
from litdistill.models.adaptations import adaptations_of
from litdistill.models.classes import with_columns
from litdistill.models.ensemble import UNKNOWN
from litdistill.models.finetune import fix_statistics
from litdistill.models.preprocess import Preprocessed, bare
from litdistill.tasks.detection.boxes import padded
from litdistill.tasks.detection.detector import Detector, detector_of
from litdistill.tasks.detection.torchvision import torchvision_detector
from litdistill.tasks.detection.two_stage import TwoStage
from litdistill.utils.checkpoint import load_state_dict_checked, load_weights
from litdistill.utils.errors import UserError

LITE, RETINA, FASTER = (
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
PETS = ("dog", "cat", "person")


def categories(name):
    return get_model_weights(name)["COCO_V1"].meta["categories"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of downloaded weights, random ones; `torch.hub` reads them as if they were published."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "checkpoints").mkdir()
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    generator = torch.Generator().manual_seed(0)
    for name in (LITE, RETINA, FASTER):
        model = get_model(name, weights=None, weights_backbone=None, num_classes=91)
        state = {}
        for key, value in model.state_dict().items():
            if key.endswith("num_batches_tracked") and name != LITE:
                continue  # published from networks whose batch normalization does not count
            if "running_var" in key:
                value = torch.rand(value.shape, generator=generator) + 0.5
            elif "head" in key or "running_mean" in key or "roi" in key or "rpn" in key:
                value = torch.randn(value.shape, generator=generator) * 0.02
            state[key] = value
        torch.save(state, folder / "checkpoints" / get_model_weights(name)["COCO_V1"].url.rsplit("/", 1)[-1])
    yield folder
    torch.hub.set_dir(before)


@pytest.mark.parametrize("name", [LITE, RETINA])
def test_published_weights_give_what_torchvision_gives(hub, name):
    """In evaluation mode, for the classes of the data by their names, with torchvision's own normalization and resizing."""
    theirs = get_model(name, weights="COCO_V1").eval()
    theirs.score_thresh, theirs.nms_thresh = -1.0, 1.0
    theirs.topk_candidates = theirs.detections_per_img = 10**6
    size = 320 if name == LITE else 64
    if name != LITE:
        theirs.transform.min_size, theirs.transform.max_size = (size,), 1000
    net = torchvision_detector(3, (3, size, size), name, "DEFAULT", size=size, class_names=PETS)
    assert fix_statistics(net) > 0
    assert isinstance(net, Preprocessed)
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        heads, found = net.eval()(images), theirs(list(images))[0]
    assert heads["logits"].shape[2] == 3
    for i, pet in enumerate(PETS):
        at = found["labels"] == categories(name).index(pet)
        score = heads["logits"][0, :, i].sigmoid().sort(descending=True)[0]
        torch.testing.assert_close(score, found["scores"][at].sort(descending=True)[0], rtol=1e-4, atol=1e-6)
        best = found["boxes"][at][found["scores"][at].argmax()]
        assert (heads["boxes"][0].clamp(0, size) - best).abs().amax(1).min() < 1e-2


def test_classes_are_kept_by_name_and_others_begin_anew(hub):
    full = bare(torchvision_detector(91, (3, 64, 64), RETINA, "DEFAULT", size=64, class_names=categories(RETINA)))
    part = torchvision_detector(3, (3, 64, 64), RETINA, "DEFAULT", size=64, class_names=("dog", "elk", "person"))
    assert "of its 80 classes the data's 2 are kept, new are elk" in adaptations_of(part)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        all_, few = full.eval()(x)["logits"], bare(part).eval()(x)["logits"]
    torch.testing.assert_close(few[..., 0], all_[..., categories(RETINA).index("dog")])
    torch.testing.assert_close(few[..., 2], all_[..., 1])
    assert not torch.isclose(few[..., 1, None], all_).all(1).any()
    new = torchvision_detector(2, (3, 64, 64), RETINA, "DEFAULT", size=64, class_names=("red cell", "white cell"))
    assert "head new, 80 to 2 classes" in adaptations_of(new)
    assert torch.allclose(bare(new).head.classification_head.cls_logits.bias.sigmoid(), torch.tensor(0.01))
    with pytest.raises(UserError, match="upper and lower case"):
        torchvision_detector(2, (3, 64, 64), RETINA, "DEFAULT", class_names=("Dog", "cat"))


def test_images_are_resized_as_the_weights_say(hub):
    lite = torchvision_detector(2, (1, 60, 80), LITE, "DEFAULT", class_names=("dog", "cat"), fetch=False)
    assert lite.preprocess.facts() == {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [320, 320]}
    retina = torchvision_detector(2, (3, 96, 128), RETINA, "DEFAULT", class_names=("dog", "cat"), fetch=False)
    assert retina.preprocess.size == (800, 1066)
    assert "images resized from 96x128 to 800x1066" in adaptations_of(retina)
    again = torchvision_detector(2, (3, 96, 128), LITE)
    assert set(bare(lite).state_dict()) == {*again.state_dict(), "columns"}  # which of its softmax are the data's


def test_a_two_stage_network_gives_detections_and_is_not_trained(hub):
    theirs = get_model(FASTER, weights="COCO_V1", box_score_thresh=0.0).eval()
    theirs.transform.min_size, theirs.transform.max_size = (64,), 1000
    images = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = theirs(list(images))
    seen = set(found[0]["labels"].tolist()) & set(found[1]["labels"].tolist())
    pets = [categories(FASTER)[c] for c in sorted(seen, reverse=True) if categories(FASTER)[c] != "N/A"][:3]
    net = torchvision_detector(len(pets), (3, 64, 80), FASTER, "DEFAULT", size=(64, 80), class_names=pets)
    bare(net).roi_heads.score_thresh = 0.0
    with torch.no_grad():
        outputs = run_network(net, images)
    assert set(outputs.heads) == {"detections"}
    rows = outputs.heads["detections"]
    assert rows.shape == (2, 100, 6)
    place = {categories(FASTER).index(pet): i for i, pet in enumerate(pets)}
    for one, expected in zip(rows, found, strict=True):
        at = torch.tensor([int(c) in place for c in expected["labels"]])
        count = int(at.sum())
        assert count > 0
        torch.testing.assert_close(one[:count, 4], expected["scores"][at], rtol=1e-3, atol=1e-5)
        labels = torch.tensor([place[int(c)] for c in expected["labels"][at]])
        assert one[:count, 5].long().bincount().tolist() == labels.bincount().tolist()
        for box, label in zip(expected["boxes"][at], labels, strict=True):  # scores may be equal
            assert (one[:count, :4] - box).abs().amax(1)[one[:count, 5] == label].min() < 1e-2
        assert (one[count:, 5] == -1).all()
        assert (one[count:, 4] == 0).all()
    with pytest.raises(UserError, match="teacher only"):
        net.train()
    resized = torchvision_detector(3, (3, 32, 32), FASTER, "DEFAULT", size=(64, 96), class_names=PETS)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        inside, outside = bare(resized)(resized.preprocess(x)), resized(x)
    factor = torch.tensor([3.0, 2.0, 3.0, 2.0, 1.0, 1.0])
    torch.testing.assert_close(outside["detections"] * factor, inside["detections"])
    with pytest.raises(UserError, match="none of the data's classes"):
        torchvision_detector(2, (3, 64, 64), FASTER, "DEFAULT", class_names=("red cell", "white cell"))
    own = torchvision_detector(2, (3, 64, 64), FASTER)
    assert isinstance(bare(own), TwoStage)
    assert own.preprocess.facts()["size"] == [320, 320]  # nobody has trained one here on the data's own mean and size
    assert bare(own).place.tolist() == [-1.0, 0.0, 1.0]


def saved(folder, name, classes, names=None):
    """The path of a file of random weights of torchvision's own network, as its user saves them, and the network."""
    torch.manual_seed(1)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=classes).eval()
    state = {k: v for k, v in model.state_dict().items() if names or not k.endswith("num_batches_tracked")}
    path = folder / ("mine.safetensors" if names else "mine.pth")
    save_file(state, path, {"classes": json.dumps(names)}) if names else torch.save({"model": state}, path)
    return str(path), model


def test_a_file_of_weights_is_read_as_torchvision_reads_it(tmp_path):
    path, model = saved(tmp_path, FASTER, 4)
    model.transform.min_size, model.transform.max_size = (64,), 1000
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    net = torchvision_detector(3, (3, 64, 64), FASTER, path, size=64, class_names=("a", "b", "c"))
    with torch.no_grad():
        found, rows = model(list(images))[0], net(images)["detections"][0]
    assert len(found["scores"]) > 1
    assert "its classes are taken to be the data's, in their order" in adaptations_of(net)
    torch.testing.assert_close(rows[: len(found["scores"]), 4], found["scores"], rtol=1e-4, atol=1e-6)
    # A checkpoint of the node gives the same network: no two-stage network is trained here on the data's own mean.
    built = torchvision_detector(3, (3, 64, 64), FASTER, size=64)
    load_state_dict_checked(bare(built), load_weights(path, bare(built).state_dict()), path, "teacher")
    with torch.no_grad():
        torch.testing.assert_close(built(images)["detections"][0], rows)
    with pytest.raises(UserError, match="of 3 classes without names, and the data have 2"):
        torchvision_detector(2, (3, 64, 64), FASTER, path, class_names=("a", "b"))


def test_classes_of_a_file_are_found_by_their_names(tmp_path):
    path, model = saved(tmp_path, FASTER, 4, ["c", "a", "z"])
    net = torchvision_detector(3, (3, 64, 64), FASTER, path, class_names=("a", "b", "c"))
    assert bare(net).place.tolist() == [-1.0, 2.0, 0.0, -1.0]
    assert "of its 3 classes the data's 2 are kept, not detected are b" in adaptations_of(net)
    path, model = saved(tmp_path, LITE, 91)  # all of COCO's, as torchvision's own file has them
    lite = torchvision_detector(3, (3, 64, 64), LITE, path, class_names=PETS)
    assert bare(lite).columns.tolist() == [categories(LITE).index(pet) - 1 for pet in PETS]
    path, model = saved(tmp_path, LITE, 5)
    new = torchvision_detector(2, (3, 64, 64), LITE, path, class_names=("a", "b"))
    assert "head new, 4 to 2 classes" in adaptations_of(new)
    torch.testing.assert_close(bare(new).backbone.state_dict(), model.backbone.state_dict())
    assert lite.preprocess.facts()["size"] == [320, 320]
    # Rebuilt from a run's folder, where the file is gone.
    assert bare(torchvision_detector(3, (3, 64, 64), LITE, "gone.pth", fetch=False)).state_dict()


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", LITE])
def test_students_of_either_kind_of_head_learn(name):
    net = torchvision_detector(3, (3, 64, 64), name).train()
    targets = padded([torch.tensor([[4.0, 4.0, 40.0, 44.0, 2.0, 0.0]]), torch.zeros(0, 6)])
    losses = net.compute_loss(net(torch.rand(2, 3, 64, 64)), targets)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert net.head.classification_head.get_submodule("conv" if name != LITE else "module_list") is not None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.backbone.parameters())


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", LITE])
def test_classes_in_another_order_are_put_in_order(name):
    """The weights carry the order: a network that is built anew takes it from them."""
    net = torchvision_detector(3, (3, 64, 64), name).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)["logits"]
        assert with_columns(net, [2, 0], x)
        torch.testing.assert_close(net(x)["logits"], before[..., [2, 0]])
        assert with_columns(net, [1, 0], x)
        torch.testing.assert_close(net(x)["logits"], before[..., [0, 2]])
        again = torchvision_detector(3, (3, 64, 64), name).eval()
        again.keep_classes([1, 0])
        again.load_state_dict(net.state_dict())
        torch.testing.assert_close(again(x)["logits"], before[..., [0, 2]])
        whole = torchvision_detector(3, (3, 64, 64), name).eval()
        expected = whole(x)["logits"][..., [2, 0, 1]]
        whole.keep_classes([2, 0, 1])
        torch.testing.assert_close(whole(x)["logits"], expected)
        again = torchvision_detector(3, (3, 64, 64), name).eval()
        again.load_state_dict(whole.state_dict())
        torch.testing.assert_close(again(x)["logits"], expected)
    targets = padded([torch.tensor([[4.0, 4.0, 40.0, 44.0, 1.0, 0.0]])] * 2)
    net.train()
    assert sum(net.compute_loss(net(x), targets).values()).isfinite()
    with pytest.raises(UserError, match="no such objects"):
        with_columns(net, [0, UNKNOWN], x)
    assert isinstance(detector_of(net), Detector)


def test_what_cannot_be_had_is_said_in_a_line(hub, monkeypatch):
    def said(*args, **options):
        with pytest.raises(UserError) as refusal:
            torchvision_detector(*args, **options)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    assert "Did you mean fcos_resnet50_fpn" in said(2, (3, 64, 64), "fcos_resnet50")
    assert "offers COCO_V1, DEFAULT" in said(2, (3, 64, 64), LITE, "IMAGENET")
    assert "ssd300_vgg16 cannot take images of 3x128x128" in said(2, (3, 128, 128), "ssd300_vgg16")
    file = hub / "checkpoints" / get_model_weights(LITE)["COCO_V1"].url.rsplit("/", 1)[-1]
    good = file.read_bytes()
    try:
        file.write_bytes(pickle.dumps({"a": print}))
        assert "does not hold the plain weights" in said(2, (3, 64, 64), LITE, "COCO_V1")
        torch.save({"backbone.weight": torch.zeros(2)}, file)
        assert "does not hold the weights" in said(2, (3, 64, 64), LITE, "COCO_V1")
    finally:
        file.write_bytes(good)

    def no_network(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    assert "is there a network?" in said(2, (3, 64, 64), "fcos_resnet50_fpn", "COCO_V1")

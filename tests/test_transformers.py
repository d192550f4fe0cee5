"""Models of transformers from folders: small random ones that are saved on disk, as teachers and as students."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from omegaconf import OmegaConf

from litdistill.config.build import build_net
from litdistill.config.recipes import net_name
from litdistill.data.datamodule import ImageData
from litdistill.export.writers import ExportWrapper, _write_onnx
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.features.outputs import run_network
from litdistill.models.adaptations import adaptations_of, published_classes
from litdistill.models.preprocess import preprocess_of
from litdistill.models.transformers import HuggingFace, transformers_model
from litdistill.utils.errors import UserError
from tests.transformer_folders import (  # noqa: F401
    NAMES,
    PROCESSOR,
    SIZES,
    auto_of,
    folder_fixture,
    folders_fixture,
    made,
    own_inputs,
    sample,
    text_of,
)

transformers = pytest.importorskip("transformers")


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet", "bert", "distilbert"])
def test_a_classifier_gives_the_models_own_logits(folders, name):
    classes = {"vit": 4, "convnext": 4, "resnet": 2}.get(name, 3)
    net = made(folders / name, classes, tuple(NAMES.values()) if name == "vit" else ())
    with torch.no_grad():
        wanted = auto_of(name).from_pretrained(folders / name).eval()(**own_inputs(name, folders / name)).logits
        found = run_network(net, sample(name)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.std() > 1e-3
    assert published_classes(net) == (tuple(NAMES.values()) if name == "vit" else ())


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("vit_backbone", "first"),
        ("vit_pooler", "first"),
        ("dinov2", "pooler"),
        ("convnext_backbone", "pooler"),
        ("bert_backbone", "mean"),
    ],
)
def test_a_backbone_gives_an_embedding(folders, name, pooling):
    net, inputs = made(folders / name), own_inputs(name, folders / name)
    with torch.no_grad():
        out = transformers.AutoModel.from_pretrained(folders / name).eval()(**inputs)
        found = run_network(net, sample(name)).heads
    x = out.last_hidden_state
    if pooling == "mean":
        rows = [row[: int(m.sum())].mean(0) for row, m in zip(x, inputs["attention_mask"], strict=True)]
        wanted = torch.stack(rows)
    else:
        wanted = x[:, 0] if pooling == "first" else out.pooler_output.flatten(1)
    assert found.keys() == {"embedding"}
    torch.testing.assert_close(found["embedding"], wanted, rtol=1e-4, atol=1e-5)
    assert f"no classes, pooling={pooling}" in adaptations_of(net)
    assert not any("pooler" in key for key in net.state_dict())


def test_padding_changes_nothing(folders):
    for name in ("bert", "bert_backbone", "distilbert"):
        net, ids = made(folders / name), sample(name)
        longer = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
        with torch.no_grad():
            a, b = run_network(net, ids).main, run_network(net, longer).main
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            c = run_network(net, longer.masked_fill(longer == 0, 7)).main
        assert (a - c).abs().max() > 1e-3
        other = made(folders / name, padding=59)
        with torch.no_grad():
            d = run_network(other, longer).main
        assert (a - d).abs().max() > 1e-3


def test_names_are_those_of_the_model(folders):
    for name in ("vit", "bert", "resnet"):
        auto = (
            transformers.AutoModelForSequenceClassification
            if text_of(name)
            else transformers.AutoModelForImageClassification
        )
        own = auto.from_pretrained(folders / name)
        net = made(folders / name, {"vit": 4, "resnet": 2}.get(name, 3), tuple(NAMES.values()))
        state = net.state_dict()
        assert state.keys() == own.state_dict().keys()
        assert {n for n, _ in own.named_modules()} <= {n for n, _ in net.named_modules()}
        other = made(folders / name, {"vit": 4, "resnet": 2}.get(name, 3), tuple(NAMES.values()), fetch=False)
        other.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize(
    ("name", "tap", "shape"),
    [
        ("vit", "vit.layers.1", (3, 5, 16)),
        ("dinov2", "encoder.layer.0.attention:in", (3, 5, 16)),
        ("bert", "bert.encoder.layer.0", (3, 9, 16)),
        ("distilbert", "distilbert.transformer.layer.1:pool", (3, 16)),
        ("resnet", "resnet.encoder.stages.2", (3, 10, 2, 2)),
    ],
)
def test_features_are_taken_by_the_names_of_the_model(folders, name, tap, shape):
    net, x = made(folders / name), sample(name)
    assert tuple(FeatureExtractor(net, resolve_taps(net, x, tap))(x).features[tap].shape) == shape
    last = FeatureExtractor(net, resolve_taps(net, x, "last"))(x).features
    assert next(iter(last.values())).ndim == (4 if name == "resnet" else 3)
    pooled = FeatureExtractor(net, resolve_taps(net, x, "pooled"))(x).features
    assert next(iter(pooled.values())).ndim == 2


# -- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({}, ([0.5, 0.4, 0.3], [0.25, 0.5, 0.2], (32, 32))),
        ({"rescale_factor": 1 / 127.5}, ([0.25, 0.2, 0.15], [0.125, 0.25, 0.1], (32, 32))),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, ([0.5] * 3, [0.2] * 3, (32, 32))),
        ({"do_normalize": False}, ([0.0] * 3, [1.0] * 3, (32, 32))),
        ({"do_center_crop": False, "size": 40}, ([0.5, 0.4, 0.3], [0.25, 0.5, 0.2], (40, 40))),
        ({"do_center_crop": False, "size": {"height": 48, "width": 40}}, ([0.5, 0.4, 0.3], [0.25, 0.5, 0.2], (48, 40))),
    ],
)
def test_preprocessing_is_that_of_its_file(folder, facts, wanted):
    path = folder("resnet")
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | facts))
    found = preprocess_of(made(path, 2))
    assert list(found.mean) == pytest.approx(wanted[0])
    assert list(found.std) == pytest.approx(wanted[1])
    assert found.size == wanted[2]


def test_what_is_left_out_of_preprocessing_is_said(folders):
    said = adaptations_of(made(folders / "resnet", 2))
    assert "images resized from 20x20 to 32x32" in said
    assert "bicubic resizing (bilinear here), center crop of 0.889" in said


def test_without_a_file_of_preprocessing_images_are_normalized_as_the_data(folder):
    path = folder("resnet")
    (path / "preprocessor_config.json").unlink()
    net = made(path, 2, shape=(3, 32, 32))
    assert preprocess_of(net) is None
    assert "no preprocessor_config.json, so normalized as the data are" in adaptations_of(net)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "kept"), [(("dog", "cat"), True), (("dog", "fish", "cow"), False), ((), False)])
def test_its_own_classes_are_kept_where_the_data_have_two_of_them(folders, names, kept):
    net = made(folders / "vit", len(names) or 3, names)
    logits = run_network(net, sample("vit")).logits
    assert logits.shape[1] == (4 if kept else len(names) or 3)
    assert published_classes(net) == (tuple(NAMES.values()) if kept else ())
    assert (float(logits.detach().abs().max()) == 0) is not kept
    assert ("head new and zero, 4 to" in adaptations_of(net)) is not kept


def test_a_teacher_is_mapped_by_the_names_of_its_classes(folder, caplog):
    caplog.set_level(logging.INFO)
    path = folder("vit")
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = {"0": "7", "1": "1", "2": "unicorn", "3": "4"}
    (path / "config.json").write_text(json.dumps(config))
    data = ImageData("digits", classes=[1, 4, 7], batch_size=8)
    data.prepare_data()
    data.setup("fit")
    node = OmegaConf.create({"_target_": "litdistill.models.transformers.transformers_model", "path": str(path)})
    net = build_net(node, data, "teacher").eval()
    images = data.get_batch("train", data.train_ids[:5]).inputs
    with torch.no_grad():
        found = run_network(net, images).logits
        whole = run_network(made(path, 3, ("1", "4", "7"), shape=(1, 8, 8)), images).logits
    torch.testing.assert_close(found, whole[:, [1, 3, 0]], rtol=1e-4, atol=1e-5)
    assert "unicorn, which the data do not have, are left out" in caplog.text
    with pytest.raises(UserError, match=r"student\.classifier=new"):
        build_net(node, data, "student")


def test_a_new_classifier_of_a_backbone_is_said_loudly(folders, caplog):
    net = made(folders / "dinov2", 3, classifier="new")
    assert run_network(net, sample("dinov2")).logits.abs().max() == 0
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "NOT among its weights, and untrained: classifier.bias (zero), classifier.weight (zero)" in line.getMessage()
    caplog.clear()
    made(folders / "bert_backbone", 3, classifier="new")
    assert "classifier.weight (zero)" in caplog.text
    caplog.clear()
    made(folders / "vit", 4, tuple(NAMES.values()))
    assert caplog.text == ""


# -- as a student ------------------------------------------------------------------------------------------------------


def test_a_student_is_made_of_a_config_alone():
    torch.manual_seed(3)
    net = transformers_model(5, (1, 8, 8), config={"model_type": "vit", **SIZES, "patch_size": 4})
    assert isinstance(net, HuggingFace)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    assert adaptations_of(net) == ""
    torch.manual_seed(3)
    again = transformers_model(5, (1, 8, 8), config={"model_type": "vit", **SIZES, "patch_size": 4})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    text = transformers_model(4, (9,), config={"model_type": "bert", **SIZES}, vocab_size=33, padding=1)
    assert text.net.config.vocab_size == 33
    assert text(torch.randint(0, 33, (2, 9))).shape == (2, 4)


def test_a_student_of_a_folders_architecture_starts_from_nothing(folders):
    torch.manual_seed(0)
    net = made(folders / "vit", 3, pretrained=False, config={"num_hidden_layers": 1, "patch_size": 5})
    kept = made(folders / "vit", 4, tuple(NAMES.values()))
    assert net(torch.rand(2, 3, 20, 20)).shape == (2, 3)
    assert len(net.state_dict()) < len(kept.state_dict())
    assert preprocess_of(net) is None


def test_a_run_is_called_by_the_models_folder():
    node = {"_target_": "litdistill.models.transformers.transformers_model", "path": "models/dinov2-small/"}
    assert net_name(OmegaConf.create(node)) == "dinov2-small"
    assert net_name(OmegaConf.create(node | {"path": None})) == "transformers_model"


def test_a_student_is_exported_as_onnx_with_its_preprocessing(folders, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name, classes in (("vit", 4), ("resnet", 2), ("dinov2", 3)):
        net = made(folders / name, classes, tuple(NAMES.values()))
        model, x = ExportWrapper(net, traced=True).eval(), sample(name)
        path = tmp_path / f"{name}.onnx"
        _write_onnx(model, x[:2], path, {})
        found = onnxruntime.InferenceSession(path).run(None, {"images": x.numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), run_network(net, x).main, rtol=1e-3, atol=1e-4)

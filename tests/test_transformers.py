"""Models of transformers from folders: small random ones that are saved on disk, as teachers and as students."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

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

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "max_position_embeddings": 20}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
STAGES = {"hidden_sizes": [6, 8, 10, 12], "depths": [1, 1, 1, 1]}
NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "ape"}
MODELS = {
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=8, id2label=NAMES)),
    "vit_backbone": lambda t: t.ViTModel(t.ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False),
    "vit_pooler": lambda t: t.ViTModel(t.ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**SIZES, image_size=28, patch_size=14)),
    "convnext": lambda t: t.ConvNextForImageClassification(t.ConvNextConfig(**STAGES, num_labels=4)),
    "convnext_backbone": lambda t: t.ConvNextModel(t.ConvNextConfig(**STAGES)),
    "resnet": lambda t: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=6, **STAGES, layer_type="basic")),
    "bert": lambda t: t.BertForSequenceClassification(t.BertConfig(**SIZES, **TEXT, num_labels=3)),
    "bert_backbone": lambda t: t.BertModel(t.BertConfig(**SIZES, **TEXT)),
    "distilbert": lambda t: t.DistilBertForSequenceClassification(t.DistilBertConfig(**DISTIL, **TEXT, num_labels=3)),
}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.2],
    "resample": 3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        net = make(transformers)
        for p in net.parameters():  # so that no bias is zero
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        net.save_pretrained(root / name)
        if hasattr(net.config, "num_channels"):
            facts = PROCESSOR | ({} if "net" in name or "next" in name else {"do_center_crop": False, "size": 16})
            facts |= {"size": 28, "do_center_crop": False} if name == "dinov2" else {}
            (root / name / "preprocessor_config.json").write_text(json.dumps(facts))
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of one of them, to be damaged."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def text_of(name: str) -> bool:
    return "bert" in name


def auto_of(name: str):
    text = text_of(name)
    return transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification


def sample(name: str) -> Tensor:
    g = torch.Generator().manual_seed(2)
    if text_of(name):
        ids = torch.randint(1, 60, (3, 9), generator=g)
        ids[0, 5:] = ids[1, 7:] = 0
        return ids
    return torch.randint(0, 256, (3, 3, 20, 20), generator=g, dtype=torch.uint8)


def made(path: Path, classes: int = 3, names=(), shape=None, **options):
    shape = shape or ((9,) if text_of(path.name) else (3, 20, 20))
    return transformers_model(classes, shape, str(path), class_names=names, **options).eval()


def own_inputs(name: str, path: Path) -> dict[str, Tensor]:
    """Inputs of the model as transformers prepares them, computed here by hand; resizing is ours."""
    x = sample(name)
    if text_of(name):
        return {"input_ids": x, "attention_mask": (x != 0).long()}
    size = {"dinov2": 28}.get(name, 16 if "vit" in name else 32)
    y = torch.nn.functional.interpolate(x.float(), (size, size), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(PROCESSOR[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    return {"pixel_values": (y - mean) / std}


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


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(match: str, path, classes: int = 3, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        made(Path(path), classes, **options)
    assert "\n" not in str(error.value)


def test_a_path_that_is_no_folder(tmp_path, folders):
    refused(r"there is no such folder.*hub: true", tmp_path / "nowhere")
    refused("is a file: name the folder that holds it", folders / "vit" / "model.safetensors")
    refused(r"has no config\.json \(it is empty\)", tmp_path)
    with pytest.raises(UserError, match="needs a folder"):
        transformers_model(3, (1, 8, 8))


def test_a_pickle_is_refused_unopened(folder):
    path = folder("vit")
    (path / "model.safetensors").unlink()
    refused(r"has no weights.*pretrained=false", path)
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(r"has pytorch_model\.bin and no model\.safetensors: a pickle may run code.*save_pretrained", path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "vitt"}, r"model_type=vitt is not known to the installed transformers; is it .*vit"),
        ({"model_type": None}, "model_type=None is not known"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "holds quantized weights"),
        ({"hidden_size": "wide"}, "is no valid configuration of vit"),
    ],
)
def test_a_config_that_is_none(folder, change, match):
    path = folder("vit")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    refused(match, path)


def test_code_of_a_folder_is_never_run(folder):
    path = folder("vit")
    config = json.loads((path / "config.json").read_text())
    (path / "evil.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    code = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    (path / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    made(path, 4, tuple(NAMES.values()))
    (path / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "evil"}))
    refused("Code of the folder is not run", path)
    assert not (path / "ran").exists()


def test_damaged_files_are_named(folder):
    path = folder("vit")
    (path / "preprocessor_config.json").write_text("{")
    refused(r"preprocessor_config\.json is damaged", path)
    path = folder("resnet")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("ResNet|resnet", path)
    (path / "config.json").write_text("[1]")
    refused(r"config\.json is damaged: it holds no mapping", path)


def test_weights_that_lack_tensors_are_refused(folder):
    from safetensors.torch import load_file, save_file

    path = folder("vit")
    state = load_file(path / "model.safetensors")
    gone = [k for k in state if "layers.1." in k or "layer.1." in k]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, path / "model.safetensors", {"format": "pt"})
    refused(rf"lack {len(gone)} of {len(state)} tensors of ViTForImageClassification.*would be random", path)
    save_file({k: v for k, v in state.items() if "classifier" not in k}, path / "model.safetensors", {"format": "pt"})
    refused(r"lack 2 of .*classifier\.bias first.*classifier: new", path, 4, names=tuple(NAMES.values()))


def test_data_that_do_not_fit(folders):
    refused("takes images of 3 channels, and these have 2", folders / "vit", shape=(2, 20, 20))
    refused("is a model of images", folders / "vit", shape=(20,))
    refused("is a model of texts", folders / "bert", shape=(3, 20, 20))
    refused(
        r"reads texts of at most 20 tokens, and these are of 21: set data\.length=20", folders / "bert", shape=(21,)
    )
    refused("knows 60 tokens, and the data's tokenizer has 61", folders / "bert", vocab_size=61)
    refused(r"cannot take samples of 3x24x24.*give it images of 16", folders / "vit", size=24)
    refused("classifier is new or null", folders / "vit", classifier="old")
    refused("pooling=pooler: of texts choose mean or first", folders / "bert_backbone", pooling="pooler")


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

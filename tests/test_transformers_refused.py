"""Folders of Transformers models that are refused in a line, and run no code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from litdistill.models.transformers import transformers_model
from litdistill.utils.errors import UserError
from tests.transformer_folders import NAMES, folder_fixture, folders_fixture, made  # noqa: F401

transformers = pytest.importorskip("transformers")


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

"""A language model from the command's config to the files that are shipped, and what `predict` says of a text."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from litdistill import load_student
from litdistill.data.text.tokenizing import opened
from litdistill.data.text.windows import END_ID
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export, verify
from litdistill.export.predict import load, main, predict
from litdistill.tasks.base import Samples
from litdistill.tasks.sequence import LanguageModel
from litdistill.tasks.text_figures import COLUMNS, surprise
from litdistill.training.train import train
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.modality import PADDING
from tests.conftest import compose_config

LENGTH = 12
TEXT = "\n".join(
    f"The {a} {b} sees the {c} of the {d}."
    for a in ("old", "new", "red") for b in ("cat", "dog", "cow") for c in ("bird", "fish", "tree", "sea")
    for d in ("north", "south", "king", "queen")
)  # fmt: skip
SMALL = [
    *("experiment=tasks/tokens", "data=token_sequences", "data.vocab_size=280", f"data.length={LENGTH}"),
    *("data.fraction=null", "data.epoch_size=64", "student.layers=1", "student.width=8", "student.heads=2"),
    *("teacher.layers=2", "teacher.width=16", "teacher.heads=2", "teacher.recipe.data.epoch_size=256"),
    *("teacher.recipe.trainer.max_epochs=5", "trainer=cpu", "trainer.max_epochs=3", "optimizer.lr=0.01", "logger=none"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokens")
    (place / "text.txt").write_text(TEXT)
    cfg = compose_config(place / "run", *SMALL, f"data.root={place / 'text.txt'}")
    cfg.runs = str(place)
    write_text(place / "run" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return place / "run"


def test_a_run_is_measured_again_to_the_digit_by_perplexity(run):
    _, summary = load_run(run)
    found = evaluate(run, device="cpu")
    assert differences(found, summary) == []
    assert summary["metric"] == {"name": "perplexity", "direction": "min"}
    assert summary["data"]["kind"] == "tokens"
    assert summary["student"]["macs"] > 0
    assert summary["teacher"]["test"]["perplexity"] < found["chance"]
    assert 0 <= summary["student"]["agreement"] <= 1


@pytest.mark.parametrize(("format", "precision"), [("onnx", "fp32"), ("onnx", "fp16"), ("safetensors", "fp32")])
def test_an_exported_file_gives_what_the_student_gives_at_each_place(run, format, precision):
    path, found = export(run, format, precision, limits=(None, 0.9))  # it has hardly learned: many are near ties
    assert found["metric"] == "perplexity"
    assert found["exported"] == pytest.approx(found["student"], rel=1e-5 if precision == "fp32" else 1e-2)
    tokens = np.random.default_rng(0).integers(0, 280, (3, LENGTH))
    wanted = load_student(run)(torch.from_numpy(tokens)).detach()
    given = torch.from_numpy(load(path).run(tokens))
    torch.testing.assert_close(
        given, wanted, rtol=0, atol={"fp32": 1e-5, "fp16": 2e-2}[precision] * float(wanted.abs().max())
    )
    assert (path.parent / "tokenizer.json").is_file()
    assert path.name in verify(run)


def surprise_by_hand(net, ids: list[int]) -> list[float]:
    """−log p of each token but the first, in pieces of `LENGTH` that know nothing of what came before."""
    found = []
    for start in range(0, len(ids) - 1, LENGTH):
        piece = ids[start : start + LENGTH + 1]
        log_p = net(torch.tensor([piece[:-1]]))[0].double().log_softmax(1)
        found += [-log_p[i, token].item() for i, token in enumerate(piece[1:])]
    return found


@torch.no_grad()
def test_predict_prints_the_perplexity_of_a_text_the_next_tokens_and_a_continuation(run, tmp_path, capsys):
    path, _ = export(run)
    net, tokenizer = load_student(run).eval(), opened((path.parent / "tokenizer.json").read_bytes())
    for name, text in (("short", "The"), ("long", "The old cat sees the bird of the king. The new dog sees 日本.")):
        file = tmp_path / f"{name}.txt"
        file.write_text(text + "\n")
        ids = [END_ID, *tokenizer.encode(text).ids]
        (found,) = predict(load(path), [file], top=3, more=5)
        nll = surprise_by_hand(net, ids)
        assert found["tokens"] == len(nll) == len(ids) - 1
        assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
        said, last = [], ids
        for i in range(5):
            p = net(torch.tensor([last[-LENGTH:]]))[0, -1].softmax(0)
            if i == 0:
                assert [one["index"] for one in found["top"]] == p.topk(3).indices.tolist()
                assert found["top"][0]["probability"] == pytest.approx(p.max().item(), rel=1e-4)
            if int(p.argmax()) == END_ID:
                break
            said.append(int(p.argmax()))
            last = [*last, said[-1]]
        assert found["continuation"] == tokenizer.decode(said)
    main([str(path), str(tmp_path / "short.txt"), "--top", "2", "--continue", "3"])
    out = capsys.readouterr().out
    assert "short.txt: perplexity " in out
    assert "; next: '" in out
    assert "\n… " in out


def test_bad_texts_are_refused_by_predict_in_a_line(run, tmp_path):
    path, _ = export(run)
    files = {"empty.txt": b" \n", "latin.txt": b"na\xefve", "a.png": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, said in (("empty.txt", "is empty"), ("latin.txt", "line 1 is not utf-8"), ("a.png", "reads .txt files")):
        with pytest.raises(UserError, match=said):
            predict(load(path), [tmp_path / name])
    shutil.copytree(path.parent, tmp_path / "export")
    other = tmp_path / "export" / "tokenizer.json"
    other.write_bytes(other.read_bytes() + b" ")
    with pytest.raises(UserError, match="not the file that was exported"):
        predict(load(tmp_path / "export" / "student.onnx"), [run.parent / "text.txt"])
    other.unlink()
    with pytest.raises(UserError, match=r"There is no .*tokenizer\.json"):
        predict(load(tmp_path / "export" / "student.onnx"), [run.parent / "text.txt"])


def test_the_manifest_says_what_goes_in_and_comes_out(run):
    path, _ = export(run)
    entry = json.loads((path.parent / "manifest.json").read_text())["files"]["student.onnx"]
    assert entry["modality"]["kind"] == "tokens"
    assert entry["input"] == f"int64 (N, {LENGTH})"
    assert "(N, T, tokens)" in entry["output"]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_figures_show_the_surprise_of_each_token_and_the_loss_at_each_position():
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (6, 9), generator=g)
    targets[torch.arange(9) >= torch.tensor([9, 3, 9, 1, 5, 9])[:, None]] = PADDING
    both = [Outputs.of(torch.randn(6, 9, 5, generator=g)) for _ in range(2)]
    nll = surprise(both[0], targets)
    assert nll[1, 2].item() == pytest.approx(-both[0].logits[1, 2].double().log_softmax(0)[targets[1, 2]].item())
    assert torch.equal(nll.isnan(), targets == PADDING)
    samples = Samples(lambda i: None, targets, ("<|endoftext|>", " the", "\\n", "naïve" * 30, "$x"), *both)
    figures = LanguageModel().figures(samples)
    assert figures.keys() == {"surprise", "loss by position"}
    curves = figures["loss by position"].axes[0].lines
    assert [line.get_label() for line in curves] == ["student", "teacher"]
    np.testing.assert_allclose(curves[0].get_ydata(), nll.nanmean(0).numpy())
    student, teacher = figures["surprise"].axes
    assert "student: " in student.get_title()
    assert len(student.patches) == len(teacher.patches) > 3
    assert max(patch.get_width() for patch in student.patches) > COLUMNS  # a token wider than a line has one of its own

"""A run on a table of texts, its export and its predictions."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from litdistill.config.recipes import teacher_config
from litdistill.data.text import tokenizing
from litdistill.export import predict
from litdistill.export.export import export
from litdistill.training.train import train
from litdistill.utils.files import write_text
from tests.conftest import compose_config, drawing
from tests.texts import (
    GOOD,
    said_fixture,  # noqa: F401
    table,
)

pytest.importorskip("tokenizers")


# -- a run, its export and its predictions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a small run on a table of texts, and its exported student."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("texts")
    good, bad = ("fine", "joy", "moving"), ("dull", "awful", "slow")
    rows = [(f"a {w} film {i}", label) for i in range(12) for label, ws in (("good", good), ("bad", bad)) for w in ws]
    root = table(folder / "a.tsv", [*rows, ("who knows", ""), ("so so", "")])
    (folder / "more.txt").write_text("a fine thing\na slow thing\n")
    options = ("data=texts", f"data.root={root}", f"data.unlabelled={folder / 'more.txt'}", "data.length=8")
    options += ("net@student=embedding_bag", "student.width=8", "net@teacher=text_cnn", "teacher.width=8")
    options += ("++teacher.recipe.trainer.max_epochs=4", "++teacher.recipe.optimizer.lr=0.02")
    options += ("optimizer.lr=0.05", "data.batch_size=8")
    cfg = compose_config(folder / "run", *options, "trainer.max_epochs=8", f"runs={folder}", "logger=tensorboard")
    write_text(folder / "run" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    with drawing():
        train(cfg)
    path, _ = export(folder / "run")
    return folder, path, cfg


def test_a_teacher_is_trained_on_labels_alone_with_the_tokenizer_of_its_student(exported):
    folder, path, cfg = exported
    recipe = teacher_config(cfg)
    assert (recipe.data.only_labelled, recipe.data.unlabelled) == (True, str(folder / "more.txt"))
    assert len(list((folder / "teachers").glob("*/summary.json"))) == 1
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["student"]["test"]["accuracy"]["best"] > 0.9
    assert (path.parent / "tokenizer.json").is_file()


def test_an_exported_student_predicts_texts_of_files_of_each_kind(exported, tmp_path, capsys):
    path = exported[1]
    (tmp_path / "a.txt").write_text("a fine film\n\na dull film\n")
    table(tmp_path / "b.tsv", [("1", "a fine film"), ("2", "a dull film")], header=("id", "text"))
    table(tmp_path / "c.csv", [("a fine film",), ("a dull film",)], ",", header=("text",))
    (tmp_path / "d.jsonl").write_text('{"text": "a fine film"}\n{"text": "a dull film"}\n')
    files = [str(tmp_path / name) for name in ("a.txt", "b.tsv", "c.csv", "d.jsonl")]
    predict.main([str(path), *files, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["text"].rsplit("/", 1)[-1] for one in found][:3] == ["a.txt:1", "a.txt:3", "b.tsv:2"]
    assert [one["top"][0]["class"] for one in found] == ["good", "bad"] * 4
    predict.main([str(path), "--text", "a fine film"])
    said = capsys.readouterr().out
    assert said.startswith("a fine film: good ")
    assert f"{100 * found[0]['top'][0]['probability']:.1f} %" in said


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.txt",
            "café".encode("cp1252"),
            [],
            "line 1 is not utf-8, in which it is read: say which it is by --encoding",
        ),
        ("a.tsv", b"words\na fine film\n", [], "has no 'text'; it has words. Name it by --column=<column>."),
        ("a.tsv", b"text\tid\nfine\t1\n\t2\n", [], "a.tsv:3 is an empty text, of which nothing can be predicted"),
        ("a.txt", b"\n\n", [], "a.txt holds no text."),
        (
            "a.png",
            b"x",
            [],
            "texts are read from .tsv, .csv and .jsonl files, and from .txt files with one text a line.",
        ),
        ("a.txt", None, [], "a.txt cannot be read: No such file or directory."),
        ("a.txt", b"fine\n", ["--text", " "], "--text is empty"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_a_line(exported, tmp_path, capsys, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        predict.main([str(exported[1]), str(tmp_path / name), *options])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_an_encoding_and_a_column_may_be_said(exported, tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes("words\na fine café\n".encode("cp1252"))
    predict.main([str(exported[1]), str(tmp_path / "a.csv"), "--encoding", "cp1252", "--column", "words"])
    predict.main([str(exported[1]), "--text", "a fine café"])
    of_file, of_words = capsys.readouterr().out.splitlines()
    assert of_file.endswith("a.csv:2" + of_words.removeprefix("a fine café"))


def test_without_its_tokenizer_or_with_another_nothing_is_predicted(exported, tmp_path, capsys):
    place = tmp_path / "export"
    shutil.copytree(exported[1].parent, place)
    for change, message in (("other", "is not the file that was exported"), ("none", "copy tokenizer.json from where")):
        if change == "other":
            (place / "tokenizer.json").write_bytes(tokenizing.trained(GOOD, 50))
        else:
            (place / "tokenizer.json").unlink()
        with pytest.raises(SystemExit):
            predict.main([str(place / exported[1].name), "--text", "a fine film"])
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_the_worst_mistakes_are_shown_in_words(exported):
    content = b"".join(path.read_bytes() for path in (exported[0] / "run").rglob("events.out.tfevents*"))
    assert b"worst mistakes" in content
    assert b"confusion" in content

"""Texts of one's own and movie reviews: what is read, what is skipped and said, what is refused, and how they become ids."""

import json
import subprocess
import sys

import pytest
import torch

from litdistill.data.text import sets, tokenizing
from litdistill.data.text.reading import read_file
from litdistill.utils.errors import UserError
from tests.texts import (
    BAD,
    GOOD,
    data,
    labelled,
    said_fixture,  # noqa: F401
    table,
    words_of,
)

pytest.importorskip("tokenizers")


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_tsv_a_csv_and_a_jsonl_give_the_same_texts(tmp_path):
    quoted = [(f'"{words}, ""again"""', label) for words, label in labelled()]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"id": 1, "text": f'{w}, "again"', "label": c}) for w, c in labelled()) + "\n\n"
    )
    found = [
        read_file(table(tmp_path / "a.tsv", [(f'{w}, "again"', c) for w, c in labelled()])),
        read_file(table(tmp_path / "a.csv", quoted, ",")),
        read_file(tmp_path / "a.jsonl"),
    ]
    assert [one.words for one in found[0]] == [f'{w}, "again"' for w, _ in labelled()]
    for other in found[1:]:
        assert [one[:2] for one in other] == [one[:2] for one in found[0]]
    assert [f.place.rpartition(":")[2] for f in found[0][:2]] == ["2", "3"]


def test_other_columns_numbers_as_labels_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfreview,stars\r\n" + b"\r\n".join(b"words %d,%d" % (i, i % 2) for i in range(12)))
    found = read_file(path, "review", "stars")
    assert (found[3].words, found[3].label, len(found)) == ("words 3", "1", 12)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 10}\n{"text": "b", "label": null}\n')
    assert [one.label for one in read_file(tmp_path / "b.jsonl")] == ["10", None]


def test_a_text_file_holds_one_text_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert [(t.words, t.place[-2:]) for t in read_file(tmp_path / "a.txt", label=None)] == [
        ("one", ":1"),
        ("two", ":3"),
    ]


@pytest.mark.parametrize(
    ("encoding", "hint"), [("cp1252", "cp1252 is common on Windows"), ("utf-16", "it begins as utf-16 does")]
)
def test_a_file_in_another_encoding_is_named_with_its_line_and_read_when_it_is_said(tmp_path, encoding, hint):
    path = tmp_path / "a.tsv"
    rows = [("text", "label"), ("plain", "good"), ("a café", "bad")]
    path.write_bytes("\n".join("\t".join(row) for row in rows).encode(encoding))
    with pytest.raises(UserError, match=r"data\.encoding=<its encoding>") as refusal:
        read_file(path)
    line = 3 if encoding == "cp1252" else 1
    assert f"a.tsv, line {line} is not utf-8, in which it is read" in str(refusal.value)
    assert hint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert read_file(path, encoding=encoding)[1].words == "a café"
    with pytest.raises(UserError, match="Did you mean utf-8"):
        read_file(path, encoding="utf8x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "text\tlabels\na\tb\n",
            r"a.tsv has no 'label'; it has text, labels. Did you mean data.label=labels?",
        ),
        ("a.tsv", "words\tlabel\na\tb\n", r"a.tsv has no 'text'; it has words, label. Name it by data.text=<column>."),
        ("a.tsv", "text\tlabel\na\tb\nc\n", r"line 3 has 1 fields, and the first line names 2 columns"),
        ("a.csv", 'text,label\n"a""b\n', r"a.csv, line 2 is not as a .csv file should be"),
        ("a.csv", "", r"a.csv is empty: its first line should name the columns."),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', r"a.jsonl, line 2 has no 'label'"),
        ("a.jsonl", "text,label\n", r"a.jsonl, line 1 is no JSON: each line should hold one object."),
        ("a.jsonl", '["a", "b"]\n', r"line 1 holds no object with keys"),
        ("a.jsonl", '{"text": 3, "label": "b"}\n', r"line 1: text is 3 and no text."),
        ("a.txt", "a\n", r"texts with labels are read from .tsv, .csv and .jsonl files."),
        ("a.pdf", "a\n", r"texts with labels are read from .tsv, .csv and .jsonl files."),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refusal:
        read_file(tmp_path / name)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_a_table_is_split_without_a_test_file_by_the_words(tmp_path, said):
    module = data(table(tmp_path / "a.tsv", labelled()))
    assert module.class_names == ("bad", "good")
    assert (len(module.train_ids), len(module.val_ids), len(module.test_ids)) == (8, 2, 2)
    parts = [words_of(module, s, i) for s, i in (("train", module.train_ids), ("train", module.val_ids))]
    parts.append(words_of(module, "test", module.test_ids))
    assert set.union(*parts) == set(GOOD + BAD)
    assert sum(map(len, parts)) == 12
    again = data(table(tmp_path / "b.tsv", labelled()[::-1]))
    assert words_of(again, "test", again.test_ids) == parts[2]  # whatever the order of the file
    assert "Read " in said.text
    assert "12 texts, 2 classes: bad 6, good 6." in said.text
    assert (
        "10 to train on and validate (data.val_size), 2 to test (a fifth of each class: there is no data.test)"
        in said.text
    )


def test_texts_without_a_label_are_trained_on_and_those_of_other_files(tmp_path, said):
    rows = [*labelled(), ("neither nor", ""), ("who knows", " ")]
    (tmp_path / "more.txt").write_text("some words\n\nother words\n")
    module = data(table(tmp_path / "a.tsv", rows), unlabelled=str(tmp_path / "more.txt"))
    targets = module.train_targets[module.train_ids]
    unknown = words_of(module, "train", module.train_ids[targets < 0])
    assert unknown == {"neither nor", "who knows", "some words", "other words"}
    assert module.train_labels == "some"
    assert "4 without a label" in said.text
    alone = data(tmp_path / "a.tsv", unlabelled=str(tmp_path / "more.txt"), only_labelled=True)
    assert alone.train_labels == "all"


def test_empty_texts_and_copies_are_skipped_and_said(tmp_path, said):
    rows = [*labelled(), ("  ", "bad"), ("", "good"), ("awful", "bad"), ("so so", "bad"), ("so so", "good")]
    module = data(table(tmp_path / "a.tsv", rows))
    every = words_of(module, "train", [*module.train_ids, *module.val_ids]) | words_of(module, "test", module.test_ids)
    assert every == set(GOOD + BAD)
    assert "5 texts are skipped: 2 empty (the first " in said.text
    assert "a.tsv:14), 1 copies of other texts (" in said.text
    assert "2 that stand under two labels (the first " in said.text


def test_a_label_outside_of_the_list_is_refused_with_its_line(tmp_path):
    train, test = table(tmp_path / "a.tsv", labelled()), table(tmp_path / "t.tsv", [("x", "good"), ("y", "goood")])
    with pytest.raises(
        UserError, match=r"t.tsv:3 has the label 'goood', which is none of the classes bad, good. Did you"
    ):
        data(train, test=str(test))
    with pytest.raises(UserError, match=r"has no text labelled fair; it has bad, good"):
        data(train, classes=["good", "fair"])
    table(tmp_path / "b.tsv", [*labelled(), ("z", "neutral"), ("zz", "neutral")])
    with pytest.raises(UserError, match=r"b.tsv:14 has the label 'neutral'.*, and so have 1 more texts"):
        data(tmp_path / "b.tsv", classes=["good", "bad"])
    assert data(train, classes=["good", "bad"]).class_names == ("good", "bad")
    with pytest.raises(UserError, match=r"t.tsv:2 has no label: texts to test and validate on need one"):
        data(train, test=str(table(tmp_path / "t.tsv", [("x", "")])))


def test_labels_that_are_no_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has the label 'good' alone in 'label'"):
        data(table(tmp_path / "a.tsv", [(w, "good") for w in GOOD]))
    with pytest.raises(UserError, match="is that the column of the class"):
        data(table(tmp_path / "b.tsv", [(f"words {i}", f"{i}.5") for i in range(90)]))
    with pytest.raises(UserError, match=r"has 0 texts of the class 'rare' to train on"):
        data(table(tmp_path / "c.tsv", [*labelled(), ("x", "rare")]))


def test_numbers_as_labels_are_in_their_order(tmp_path):
    rows = [(f"words {i} {c}", str(c)) for c in (2, 10, 1) for i in range(4)]
    assert data(table(tmp_path / "a.tsv", rows)).class_names == ("1", "2", "10")


def test_texts_of_the_test_file_are_not_trained_on(tmp_path, said):
    train = table(tmp_path / "a.tsv", labelled())
    module = data(train, test=str(table(tmp_path / "t.tsv", [("awful", "bad"), ("new words", "good")])))
    assert "awful" not in words_of(module, "train", [*module.train_ids, *module.val_ids])
    assert "1 text of data.test in data.root too: left out of training." in said.text
    with pytest.raises(UserError, match="no more than memory"):
        data(train, test=str(table(tmp_path / "t.tsv", labelled()[:3])))


def test_a_folder_of_class_folders_is_read_as_one_of_images_is(tmp_path, said):
    for split, some in (("train", slice(0, 5)), ("test", slice(5, 6))):
        for name, words in (("good", GOOD), ("bad", BAD)):
            (tmp_path / split / name).mkdir(parents=True)
            for i, one in enumerate(words[some]):
                (tmp_path / split / name / f"{i}.txt").write_text(one + "\n")
    (tmp_path / "train" / "good" / "empty.txt").write_text("\n")
    (tmp_path / "train" / "good" / "notes.md").write_text("no text")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("without a label\nof two lines")
    module = data(tmp_path, unlabelled=str(tmp_path / "more"))
    assert module.class_names == ("bad", "good")
    assert words_of(module, "test", module.test_ids) == {GOOD[5], BAD[5]}
    assert "1 text is skipped: 1 empty (" in said.text
    assert "1 .md (convert them to .txt)" in said.text
    assert "without a label?of two lines" in words_of(module, "train", module.train_ids)
    (tmp_path / "train" / "bad" / "0.txt").write_bytes("café".encode("cp1252"))
    with pytest.raises(UserError, match=r"0.txt, line 1 is not utf-8"):
        data(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match=r"data=texts needs texts: data.root="):
        sets.texts().setup()
    with pytest.raises(UserError, match=r"There is no .*nowhere"):
        data(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs at least 3 tokens"):
        data(table(tmp_path / "a.tsv", labelled()), length=2)
    with pytest.raises(UserError, match=r"there is no such file. Give the path of a tokenizer.json, or choose minilm"):
        data(tmp_path / "a.tsv", tokenizer="minilmm")


def test_without_the_package_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'litdistill\[text\]'"):
        data(table(tmp_path / "a.tsv", labelled()))


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_and_counted_and_zero_is_padding(tmp_path, said):
    rows = [*labelled(), ("fine " * 30 + "film", "good")]
    module = data(table(tmp_path / "a.tsv", rows), length=6, vocab_size=200)
    inputs = module.source.train.inputs
    assert inputs.dtype == torch.int64
    assert module.input_shape == (6,)
    assert int((inputs != 0).sum(1).max()) == 6
    assert module.facts["vocab_size"] > int(inputs.max())
    assert "1 of 13 are cut to 6 (data.length)" in said.text
    tokenizer = tokenizing.opened(module.modality.files["tokenizer.json"])
    ids, lengths = tokenizing.encode(tokenizer, ["fine film", ""], 6)
    assert lengths.tolist() == [2, 0]
    assert [tokenizer.id_to_token(i) for i in ids[0]] == ["fine", "film", "[PAD]", "[PAD]", "[PAD]", "[PAD]"]


SCRIPT = """
import hashlib, sys
from litdistill.data.text.tokenizing import trained
texts = [f"word{i % 17} other{i % 5} some{i % 3}thing" for i in range(200)]
print(hashlib.sha256(trained(texts, 90)).hexdigest())
assert "torch" not in sys.modules
"""


def test_a_trained_tokenizer_is_the_same_in_every_process_and_needs_no_torch():
    found = {subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


def test_a_trained_tokenizer_splits_words_that_it_has_not_seen(tmp_path):
    module = data(table(tmp_path / "a.tsv", labelled()))
    tokenizer = tokenizing.opened(module.modality.files["tokenizer.json"])
    ids, _ = tokenizing.encode(tokenizer, ["filmed"], 8)
    assert int((ids != 0).sum()) > 1
    assert ids.max() < module.facts["vocab_size"] <= 60


def test_a_tokenizer_of_ones_own_is_read_and_one_without_padding_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(tokenizing.trained(GOOD, 50))
    module = data(table(tmp_path / "a.tsv", labelled()), tokenizer=str(path))
    assert module.modality.files["tokenizer.json"] == path.read_bytes()
    other = json.loads(path.read_bytes())
    other["added_tokens"][0]["content"] = "<s>"
    other["model"]["vocab"] = {"<s>" if k == "[PAD]" else k: v for k, v in other["model"]["vocab"].items()}
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"its token 0 is '<s>', and here 0 is padding"):
        data(tmp_path / "a.tsv", tokenizer=str(path))
    path.write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer of the library tokenizers"):
        data(tmp_path / "a.tsv", tokenizer=str(path))

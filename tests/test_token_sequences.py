"""Texts as token sequences: windows, the tokenizer, docstrings, texts of one's own, and the weights of processes."""

from __future__ import annotations

import json
import platform
import random

import numpy as np
import pytest
import torch

from litdistill.data.loading import IndexLoader, Rows
from litdistill.data.text import docstrings, sequences
from litdistill.data.text.tokenizing import opened
from litdistill.data.text.windows import END_ID, byte_tokenizer, ids_of, names_of, windows
from litdistill.tasks.sequence import LanguageModel
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modality import PADDING

SENTENCES = [
    f"The {a} {b} sees a {c}.\n" for a in ("old", "new") for b in ("cat", "dog") for c in ("bird", "fish", "tree")
]


# -- windows and the tokenizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 8])
def test_each_token_of_a_text_but_the_first_is_a_target_once_behind_the_token_before_it(length):
    draw = random.Random(0)
    texts = [np.array([draw.randrange(1, 99) for _ in range(n)]) for n in (2, 3, 6, 9, 17, 1, 40)]
    inputs, targets = windows(texts, length)
    assert inputs.shape == targets.shape == (sum(-(-(len(t) - 1) // length) for t in texts), length)
    found = [(int(i), int(t)) for i, t in zip(inputs.ravel(), targets.ravel(), strict=True) if t != PADDING]
    assert found == [(int(a), int(b)) for text in texts for a, b in zip(text, text[1:])]  # noqa: B905, RUF007
    there = targets != PADDING
    assert (inputs[~there] == 0).all()
    assert (np.diff(there.astype(int), axis=1) <= 0).all()  # padding is behind


def test_any_text_comes_back_from_its_tokens():
    tokenizer = opened(byte_tokenizer(SENTENCES, 300))
    for text in ("The old cat", " naïve — 日本語 \t\n\n", "\x00\x07", "🙂 x" * 3):
        (ids,) = ids_of(tokenizer, [text])
        assert ids[0] == ids[-1] == END_ID
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text


def test_the_same_texts_give_the_same_tokenizer_and_names_are_readable():
    content = byte_tokenizer(SENTENCES, 300)
    assert content == byte_tokenizer(SENTENCES, 300)
    names = names_of(opened(content))
    assert 258 < len(names) == len(set(names)) <= 300
    assert {" sees", " the", "\\n", "\\x00", "\\xe2", "e", "<|endoftext|>"} - set(names) == {" the"}


# -- docstrings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    """A library of three modules, with a test, a broken file and a docstring that is twice there."""
    files = {
        "a.py": '"""Of a.\n\n    Indented.\n    """\ndef f():\n    """Of f."""\n    class C:\n        """Of C."""\n',
        "b/__init__.py": '"""Of a.\n\nIndented."""\nasync def g():\n    """   """\n',
        "b/c.py": '"""Of c."""\n"""Another string."""\ndef f():\n    """Of f."""\n',
        "b/test/d.py": '"""Of a test."""',
        "broken.py": '"""Of broken."""\nif',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_each_docstring_is_read_once_in_order_without_its_indentation(library):
    assert [*docstrings.collect(library)] == [
        ("a", "Of a.\n\nIndented."),
        ("a", "Of f."),
        ("a", "Of C."),
        ("b", "Of c."),
    ]


def test_they_are_read_once_for_a_version_of_python_and_anew_where_the_file_is_damaged(library, tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    root = tmp_path / "root"
    first = docstrings.read(root)
    (file,) = (root / "docstrings").iterdir()
    assert platform.python_version() in file.name
    monkeypatch.setattr(docstrings, "collect", lambda _: pytest.fail("read again"))
    assert docstrings.read(root) == first
    monkeypatch.undo()
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    file.write_text("[[1")
    assert docstrings.read(root) == first


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"no sources of its standard library.*data=token_sequences"):
        docstrings.read(tmp_path / "root")


@pytest.fixture
def of_modules(tmp_path):
    """Docstrings of 60 made-up modules, kept as those of this Python."""
    found = [(f"module{i}", f"Text {i}: {' '.join(SENTENCES[i % 12 :])}") for i in range(60)]
    path = tmp_path / "docstrings" / f"{platform.python_implementation().lower()}-{platform.python_version()}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    return found


def test_no_module_is_in_two_splits_and_the_tokenizer_knows_those_to_train_on_alone(of_modules, tmp_path):
    data = sequences.docstrings(str(tmp_path), vocab_size=300, length=16)
    data.setup()
    parts = {part: {d.text for d in docstrings.read(tmp_path) if d.part == part} for part in ("train", "val", "test")}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == 60
    content = data.modality.files["tokenizer.json"]
    assert content == byte_tokenizer([t for _, t in of_modules if t in parts["train"]], 300)
    for split, ids in (("train", data.train_ids), ("val", data.val_ids), ("test", data.test_ids)):
        batch = data.get_batch(split, ids)
        starts = batch.inputs[:, 0] == END_ID
        assert int(starts.sum()) == len(parts[split])
        name = "test" if split == "test" else "train"
        assert all(data.show(name, int(i))[:7] in {t[:7] for t in parts[split]} for i in ids[starts])
    other = sequences.docstrings(str(tmp_path), vocab_size=280, length=16)
    assert data.identity("train") != other.identity("train")
    assert data.identity("train") == sequences.docstrings(str(tmp_path), vocab_size=300, length=16).identity("train")


# -- texts of one's own ------------------------------------------------------------------------------------------------


def test_a_text_is_cut_in_order_at_white_space_and_nothing_is_lost():
    texts = ["one two three four ", "five six seven eight nine ten"]
    parts = sequences.cut(texts, [0.5, 0.8])
    assert "".join("".join(part) for part in parts) == "".join(texts)
    assert parts == [["one two three four ", "five "], ["six seven eight "], ["nine ten"]]


def write(folder, **files: bytes | str):
    for name, content in files.items():
        path = folder / f"{name}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def test_a_folder_is_read_in_the_order_of_names_with_copies_once_and_empty_files_named(tmp_path, caplog):
    root = write(tmp_path, b="second", a="first", c="first", d="  \n")
    assert sequences.read_texts(root, "utf-8") == ["first", "second"]
    assert "1 text is empty, and left out" in caplog.text
    assert "d.txt" in caplog.text


def test_texts_to_test_on_are_none_that_are_trained_on(tmp_path):
    (tmp_path / "test").mkdir()
    text = "".join(SENTENCES) * 20
    root = write(tmp_path, a=text)
    test = write(tmp_path / "test", a=text, b="A new fish.")
    data = sequences.token_sequences(str(tmp_path / "a.txt"), test, vocab_size=300, length=16)
    data.setup()
    assert [data.show("test", i) for i in range(len(data.test_ids))] == ["A new fish."]
    with pytest.raises(UserError, match="nothing but texts that are trained on"):
        sequences.token_sequences(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), length=16).setup()
    assert root


def test_held_out_is_a_limit(tmp_path):
    root = write(tmp_path, a="".join(SENTENCES) * 40)
    counts = []
    for held_out in (3, 10_000):
        data = sequences.token_sequences(root, vocab_size=300, length=16, held_out=held_out)
        data.setup()
        counts.append((len(data.val_ids), len(data.test_ids), len(data.train_ids)))
    assert counts[0] == (3, 3, counts[1][2])
    assert min(counts[1][:2]) > 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": ""}, "holds no text: it is empty"),
        ({}, r"holds no text \(\*.txt\)"),
        ({"a": "naïve".encode("latin-1")}, r"a.txt, line 1 is not utf-8.*data.encoding="),
        ({"a": "One"}, "holds 3 characters, too few"),
    ],
)
def test_bad_texts_are_refused_with_their_remedy(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        sequences.token_sequences(write(tmp_path, **content)).setup()


def test_bad_options_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    for options, said in (
        ({"root": None}, "data.root=<a .txt file"),
        ({"root": "x", "vocab_size": 100}, "258 tokens at least"),
        ({"root": str(tmp_path / "no.txt")}, "not there"),
        ({"root": str(tmp_path / "a.pdf")}, "is no .txt file"),
    ):
        with pytest.raises(UserError, match=said):
            sequences.token_sequences(**options).setup()


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_over_tokens_is_that_of_one_process_for_any_number(world_size):
    """The weighted losses of all processes have the mean and the gradient of the whole batch's mean over tokens."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 1, 2, 5, 3, 1, 4, 6, 1, 1])
    targets = torch.randint(0, 5, (10, 6), generator=g)
    targets[torch.arange(6) >= lengths[:, None]] = PADDING
    logits = torch.randn(10, 6, 5, generator=g, requires_grad=True)
    task = LanguageModel()
    loss = lambda ids: task.loss(None, Outputs.of(logits[ids]), Batch(None, targets[ids]))["hard"]  # noqa: E731
    order = torch.randperm(10, generator=g)
    whole = {"count": 10, "pad": True}
    ranks = [
        [
            *IndexLoader(
                lambda _: Rows("train", order), batch_size=2, rank=r, world_size=world_size, places=lengths, **whole
            )
        ]
        for r in range(world_size)
    ]
    size = 2 * world_size
    for i, parts in enumerate(zip(*ranks, strict=True)):
        ours = torch.stack([part.weights[0] * loss(part.ids) for part in parts]).mean()
        expected = loss(order[i * size : (i + 1) * size])
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
        for a, b in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True):
            torch.testing.assert_close(a, b)


def test_data_of_tokens_weigh_them(tmp_path):
    root = write(tmp_path, **{f"text{i}": " ".join(SENTENCES[: i % 7 + 1]) + str(i) for i in range(30)})
    data = sequences.token_sequences(root, vocab_size=300, length=16, batch_size=2)
    data.setup()
    weights = [loader.weights[0] for loader in data.train_loader(0, 2)]
    assert min(weights) < 1 - 1e-6  # the last sequence of a text is shorter
    assert all(loader.weights == (1.0,) for loader in data.train_loader())

"""Small tables of texts, shared by the tests of texts."""

import pytest

from litdistill.data import folder
from litdistill.data.text import sets

pytest.importorskip("tokenizers")


GOOD = ["a fine film", "fine and moving", "a joy to see", "wonderful", "what a delight", "moving and fine"]
BAD = ["a dull film", "dull and slow", "a pain to see", "awful", "what a bore", "slow and dull"]


@pytest.fixture(autouse=True, name="said")
def said_fixture(monkeypatch, caplog):
    """Lines are logged once in a process: each test starts anew."""
    monkeypatch.setattr(folder, "_SAID", set())
    caplog.set_level("INFO", "litdistill")
    return caplog


def table(path, rows, separator="\t", header=("text", "label")):
    path.write_text("\n".join(separator.join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


def labelled():
    return [(w, "good") for w in GOOD] + [(w, "bad") for w in BAD]


def data(path, **options):
    options = {"vocab_size": 60, "length": 8, "val_size": 0.25, **options}
    module = sets.texts(root=str(path), **options)
    module.setup()
    return module


def words_of(module, split, ids):
    return {module.show(split, int(i)) for i in ids}

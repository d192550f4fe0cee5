"""Tables of one's own: what is read, how columns become features, what is said, and what is refused."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine

from litdistill.data import encoding as enc
from litdistill.data import folder, own_table, tables
from litdistill.data.columns import read_table
from litdistill.data.own_table import table
from litdistill.export.readers import table as read_rows
from litdistill.models.tabular import embedding_mlp
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import ExportMetadata

COUNT = 60


@pytest.fixture(autouse=True)
def log_level(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(folder, "_SAID", set())
    monkeypatch.setattr(own_table, "_WARNED", set())


def rows(count: int = COUNT) -> list[list]:
    rng = np.random.default_rng(0)
    return [
        [f"P{i}", int(20 + i), round(float(rng.normal(27, 5)), 3), "fm"[i % 2], ["ill", "well"][(i // 2) % 2], i / 4]
        for i in range(count)
    ]


HEAD = ["id", "age", "bmi", "sex", "outcome", "score"]
LEFT_OUT = {"target": "outcome", "ignore": ["id", "score"]}


def write(path: Path, lines: list[list], head: list[str] = HEAD, separator: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([head, *lines])
    return path


def read(path: Path, **options):
    module = table(path, **{**LEFT_OUT, **options})
    module.setup()
    return module


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(row: int, column: str, value: object) -> list[list]:
    found = rows()
    found[row][HEAD.index(column)] = value
    return found


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# -- what is read ------------------------------------------------------------------------------------------------------


def test_numbers_and_categories_are_features_and_all_is_said(tmp_path, caplog):
    path = write(tmp_path / "t.csv", rows())
    data = read(path)
    assert (data.task, data.class_names, data.input_shape) == ("classification", ("ill", "well"), (4,))
    assert data.modality.options["columns"] == [
        {"name": "age"},
        {"name": "bmi"},
        {"name": "sex", "categories": ["f", "m"]},
    ]
    whole = {r[1]: r for r in rows()}
    for split, count in (("train", 48), ("test", 12)):
        inputs, targets = data.source.test if split == "test" else data.source.train
        assert len(inputs) == count
        for (age, bmi, f, m), target in zip(inputs.tolist(), targets.tolist(), strict=True):
            row = whole[int(age)]
            assert (bmi, f, m) == (pytest.approx(row[2]), float(row[3] == "f"), float(row[3] == "m"))
            assert target == ["ill", "well"].index(row[4])
    assert torch.bincount(data.source.test.targets).tolist() == [6, 6]
    assert said(caplog) == [
        f"Read {path}: 60 rows of 2 numbers and 1 category (sex 2), onehot.",
        "Left out: id, score (data.ignore).",
        "Target outcome: one class a row, task=classification.",
        "2 classes: ill 30, well 30.",
        "Splits: 48 to train on and validate (data.val_size), 12 to test (the test set is a fifth, drawn at random; "
        "data.test or data.split name another).",
    ]
    again = read(path, seed=5)
    assert torch.equal(again.source.test.inputs, data.source.test.inputs)
    assert data.show("test", 0).startswith(f"line {int(data.source.test.inputs[0, 0]) - 18}: ")


def test_every_separator_encoding_and_parquet_give_the_same_rows(tmp_path):
    expected = read(write(tmp_path / "a.csv", rows()))
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "b.csv").write_text(text.replace(",", ";").replace(".", ","))
    (tmp_path / "c.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "d.csv").write_bytes(text.encode("utf-16"))
    (tmp_path / "e.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = ["b.csv", "c.tsv", "d.csv", "e.csv"]
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = {name: [row[i] for row in rows()] for i, name in enumerate(HEAD)}
    pyarrow.parquet.write_table(arrow.table(columns), tmp_path / "f.parquet")
    for name in [*found, "f.parquet"]:
        data = read(tmp_path / name)
        assert torch.equal(data.source.train.inputs, expected.source.train.inputs), name
        assert torch.equal(data.source.test.targets, expected.source.test.targets), name


def test_the_task_is_found_from_the_target(tmp_path):
    lines = [[*row, i % 2, (i // 3) % 2, i % 7] for i, row in enumerate(rows())]
    path = write(tmp_path / "t.csv", lines, [*HEAD, "a", "b", "week"])
    kinds = {
        "score": ("regression", ("score",), (1,)),
        "a": ("classification", ("0", "1"), ()),
        "week": ("classification", tuple("0123456"), ()),
    }
    for target, expected in kinds.items():
        data = read(path, target=target, ignore=["id"])
        assert (data.task, data.class_names, tuple(data.train_targets.shape[1:])) == expected
    assert read(path, target="week", ignore=["id"], task="regression").task == "regression"
    data = read(path, target=["a", "b"], ignore=["id"])
    assert (data.task, data.class_names) == ("multilabel", ("a", "b"))
    assert read(path, target=["a", "week"], ignore=["id"]).task == "regression"
    assert "needs columns of 0 and 1" in refusal(path, target=["a", "week"], task="multilabel", ignore=["id"])
    assert "outcome holds texts" in refusal(path, target=["a", "outcome"], ignore=["id"])


def test_missing_values_get_the_mean_of_the_training_rows_or_go(tmp_path, caplog):
    lines = changed(7, "bmi", "")
    lines[30][HEAD.index("sex")] = "NA"
    path = write(tmp_path / "t.csv", lines)
    data = read(path, missing="mean")
    ages = data.source.train.inputs[:, 0].tolist()
    known = [row[2] for row in rows() if row[1] in ages and row[1] != 27]
    fill = data.modality.options["columns"][1]["fill"]
    assert fill == pytest.approx(np.mean(known))
    both = torch.cat([data.source.train.inputs, data.source.test.inputs])
    assert both[both[:, 0] == 27][0, 1] == pytest.approx(fill)
    assert "Missing values that get the training rows' mean, or most frequent category: bmi 1, sex 1." in said(caplog)
    caplog.clear()
    dropped = read(path, missing="drop")
    assert len(dropped.source.train.inputs) + len(dropped.source.test.inputs) == COUNT - 2
    assert "2 rows with a missing value are left out (data.missing=drop)." in said(caplog)


def test_a_test_file_or_a_column_says_the_splits(tmp_path):
    path = write(tmp_path / "t.csv", rows())
    other = write(
        tmp_path / "test.csv", [[row[5], row[4], row[3], row[2], row[1] + 500] for row in rows(8)], HEAD[:0:-1]
    )
    data = read(path, test=other, target="outcome", ignore=["id", "score"])
    assert (len(data.source.train.inputs), len(data.source.test.inputs)) == (COUNT, 8)
    assert data.source.test.inputs[:, 0].tolist() == [520.0 + i for i in range(8)]
    parts = ["train"] * 40 + ["valid"] * 8 + ["Test"] * 12
    marked = write(tmp_path / "m.csv", [[*row, part] for row, part in zip(rows(), parts, strict=True)], [*HEAD, "part"])
    data = read(marked, split="part")
    assert data.source.train.inputs[data.val_ids, 0].tolist() == [60.0 + i for i in range(8)]
    assert data.source.train.inputs[data.train_ids, 0].tolist() == [20.0 + i for i in range(40)]
    assert data.source.test.inputs[:, 0].tolist() == [68.0 + i for i in range(12)]


def test_rows_without_a_class_are_trained_on_without_a_label(tmp_path, caplog):
    path = write(tmp_path / "t.csv", changed(3, "outcome", ""))
    data = read(path)
    assert data.train_labels == "some"
    assert (data.train_targets < 0).sum() == 1
    assert "1 training row without a class: only the teacher says what they are (data.only_labelled)." in said(caplog)
    assert read(path, only_labelled=True).train_labels == "all"
    assert refusal(path, test=path).startswith(f"{path}: 1 value of column outcome is missing, first in line 5.")


def test_what_teaches_nothing_and_what_leaks_is_said(tmp_path, caplog):
    lines = [[i + 1, *row[1:], "x", 3] for i, row in enumerate(rows())]
    path = write(tmp_path / "t.csv", lines, [*HEAD, "kind", "site"])
    other = write(
        tmp_path / "test.csv", [lines[4], lines[9], [99, 1, 2, "f", "ill", 0, "x", 3]], [*HEAD, "kind", "site"]
    )
    read(path, test=other, ignore=["score"])
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        "Of one value in every training row, and so without use: kind=x, site. data.ignore=[…] leaves columns out.",
        "id has another whole number in every row, as an id has: data.ignore=[id].",
        f"2 of 3 test rows have the same features as a training row, such as {other}, line 2, and {path}, line 6. What is "
        "measured on them is too good to be true: remove them from one of the two.",
    ]


def test_categories_are_embedded_and_no_code_is_standardized(tmp_path):
    data = read(write(tmp_path / "t.csv", rows()), encode="ordinal")
    assert data.facts == {"categories": [0, 0, 2]}
    assert set(data.source.train.inputs[:, 2].tolist()) == {0.0, 1.0}
    assert (data.mean[2], data.std[2]) == (0.0, 1.0)
    assert data.mean[0] > 20
    net = embedding_mlp(2, (3,), [5], size=4, categories=data.facts["categories"])
    inputs = data.source.train.inputs[:6]
    vectors = net[0](inputs)
    assert vectors.shape == (6, 6)
    assert torch.equal(vectors[:, :2], inputs[:, :2])
    assert torch.equal(vectors[:, 2:], net[0].tables[0].weight[inputs[:, 2].long()])
    assert torch.equal(net[0](torch.tensor([[1.0, 2.0, 2.0]]))[0, 2:], torch.zeros(4))
    net(inputs).sum().backward()
    assert (net[0].tables[0].weight.grad[:2] != 0).any()


@pytest.mark.parametrize(("function", "load"), [(tables.breast_cancer, load_breast_cancer), (tables.wine, load_wine)])
def test_bundled_tables_are_those_of_scikit_learn(function, load):
    data, published = function(), load()
    data.setup()
    assert data.class_names == tuple(published.target_names)
    assert [column["name"] for column in data.modality.options["columns"]] == list(published.feature_names)
    assert len(data.source.train.inputs) + len(data.source.test.inputs) == len(published.target)
    known = {
        tuple(row): y for row, y in zip(torch.tensor(published.data).float().tolist(), published.target, strict=True)
    }
    for split in (data.source.train, data.source.test):
        assert [known[tuple(row)] for row in split.inputs.tolist()] == split.targets.tolist()
    assert "σ" in data.show("train", 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "options", "expected"),
    [
        (changed(4, "bmi", ""), {}, "1 value of column bmi is missing, first in line 6. Fill them, or set data.missing=mean"),
        (changed(4, "bmi", "inf"), {}, "line 6: bmi is inf, and no finite number."),
        (changed(4, "bmi", "1e39"), {}, "line 6: bmi is beyond the numbers of float32. Mend it."),
        (changed(4, "bmi", "NaN"), {}, "1 value of column bmi is missing"),
        (changed(4, "bmi", "heavy"), {}, "line 6: bmi is 'heavy', and 59 of its 60 values are numbers (1 are not). Mend it,"),
        (rows(), {"target": "Outcom"}, "data.target=Outcom: {path} has no such column; did you mean outcome?"),
        (rows(), {"ignore": ["ident"]}, "data.ignore=ident: {path} has no such column; there are id, age,"),
        (rows(), {"split": "sexx"}, "data.split=sexx: {path} has no such column; did you mean sex?"),
        (rows(), {"split": "sex"}, "line 2: sex is 'f', and must be train, val or test."),
        (rows(), {"ignore": ["score"]}, "column id has 48 different texts in 48 rows, as a name or an id has."),
        (
            changed(9, "outcome", "wel"),
            {"classes": ["well", "ill"]},
            "line 11: outcome is 'wel', which is none of the classes well, ill (1 of 60 rows are of none); did you mean well?",
        ),
        ([[*row[:4], "ill", 1] for row in rows()], {}, "every row's outcome is 'ill', and a classifier needs two classes."),
        (rows(), {"target": "score", "task": "classify"}, "data.task=classify: one of classification, multilabel, regression."),
        (rows(), {"task": "regression"}, "data.task=regression needs numbers, and outcome holds texts."),
        ([], {}, "has no row of values."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_a_remedy(tmp_path, lines, options, expected):
    path = write(tmp_path / "t.csv", lines)
    assert expected.format(path=path) in refusal(path, **options)


def test_files_that_are_no_tables_are_refused(tmp_path):
    def of(content: bytes, name: str = "t.csv") -> str:
        (tmp_path / name).write_bytes(content)
        return refusal(tmp_path / name)

    assert of(b"").endswith("t.csv is empty. Fill it, or name another file.")
    assert "starts with numbers: its first line must hold the names of the columns" in of(b"1,2\n3,4\n")
    assert "line 3: 3 values for 2 columns, separated by commas. Mend that line" in of(b"a,outcome\n1,x\n2,y,z\n")
    assert "has 2 columns called 'a'. Rename them." in of(b"a,a,outcome\n1,2,x\n")
    assert "line 2: byte 0xfc is no UTF-8. Save it as UTF-8; from Windows, iconv" in of(
        "a;outcome\n1;für\n".encode("cp1252")
    )
    assert "a table is a .csv, .tsv or .parquet file" in of(b"x", "t.xlsx")
    pytest.importorskip("pyarrow")
    assert "is damaged, or no Parquet file" in of(b"PAR1", "t.parquet")
    assert (
        refusal(tmp_path / "u.csv")
        == f"data.root={tmp_path}/u.csv: there is no such file. Did you mean {tmp_path}/t.csv?"
    )
    with pytest.raises(UserError, match=r"data.root=<table.csv> data.target=<column>"):
        table(None, None)


# -- predict -----------------------------------------------------------------------------------------------------------


def facts(data) -> ExportMetadata:
    modality = {"kind": "table", **data.modality.options, "files": {}}
    return ExportMetadata(
        "onnx", True, list(data.class_names), [], [], None, list(data.input_shape), {}, modality=modality
    )


def test_predict_finds_columns_by_name_in_any_order(tmp_path, caplog):
    data = read(write(tmp_path / "t.csv", rows()))
    fresh = write(
        tmp_path / "new.csv",
        [["m", 30.5, "?", 41], ["f", 22, "?", 50], ["x", 1, "?", 2]],
        ["Sex", "bmi", "note", "age"],
    )
    ((names, found),) = read_rows([fresh], facts(data), tmp_path)
    assert found.tolist() == [[41, 30.5, 0, 1], [50, 22, 1, 0], [2, 1, 0, 0]]
    assert [name["row"] for name in names] == [f"{fresh}:{i}" for i in range(3)]
    assert "1 row with a sex that no training row has (x; first line 4)" in caplog.text
    np.save(tmp_path / "new.npy", found)
    ((_, same),) = read_rows([tmp_path / "new.npy"], facts(data), tmp_path)
    assert np.array_equal(same, found)


def test_predict_says_which_columns_are_missing_and_which_values(tmp_path):
    data = read(write(tmp_path / "t.csv", rows()))
    filled = read(write(tmp_path / "f.csv", changed(5, "bmi", "")), missing="mean")

    def failure(lines, head) -> str:
        with pytest.raises(UserError) as caught:
            list(read_rows([write(tmp_path / "new.csv", lines, head)], facts(data), tmp_path))
        return str(caught.value)

    assert failure([["m", 3]], ["sex", "bmo"]).endswith("lacks 2 columns of 3: age, bmi. It has bmo besides.")
    assert "1 value of column age is missing, first in line 2. Fill them" in failure(
        [["m", 3, ""]], ["sex", "bmi", "age"]
    )
    assert "line 3: age is 'old', and must be a number." in failure(
        [["m", 3, 4], ["m", 3, "old"], ["m", 3, "older"]], ["sex", "bmi", "age"]
    )
    new = write(tmp_path / "new.csv", [["m", "", 4]], ["sex", "bmi", "age"])
    ((_, found),) = read_rows([new], facts(filled), tmp_path)
    assert found[0, 1] == pytest.approx(filled.modality.options["columns"][1]["fill"])


def test_the_encoding_survives_its_plain_values_and_refuses_others(tmp_path):
    path = write(tmp_path / "t.csv", rows())
    for ordinal in (False, True):
        made = enc.fit(read_table(path), ["age", "sex"], ["age"], True, ordinal)
        assert enc.from_options(made.options()) == made
    for wrong in (
        {},
        {"columns": 3, "encode": "onehot"},
        {"columns": [{"name": "a", "fill": "x"}], "encode": "onehot"},
    ):
        with pytest.raises(UserError, match="describes no table"):
            enc.from_options(wrong)

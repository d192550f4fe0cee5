"""Tables, the page and sweeps of runs that are no classification: the metric's name and direction are the task's."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from litdistill.report import of_task, plots, points, sections
from litdistill.report import tables as report
from litdistill.report.build import build
from litdistill.report.collect import Group, Row, Seed, Settings
from litdistill.report.picture import draw
from litdistill.tasks import MultiLabel, Regression
from litdistill.training.train import train
from litdistill.types import Outputs
from litdistill.utils.files import write_text
from litdistill.utils.units import quantity, shown, shown_mean
from tests.conftest import compose_config
from tests.pages import group, summary

torch.set_num_threads(1)
SMALL = (
    *("net@student=mlp", "net@teacher=mlp", "student.widths=[8]", "teacher.widths=[32]", "trainer=cpu"),
    *("trainer.max_epochs=3", "++teacher.recipe.trainer.max_epochs=30", "optimizer.lr=0.01"),
)


class Pairs(LightningDataModule):
    """Two numbers a sample in a dict, labelled by which is larger; nothing else is known of it."""

    def __init__(self):
        super().__init__()
        drawn = torch.rand(120, 2, generator=torch.Generator().manual_seed(0))
        self.samples = [{"a": x[0:1], "b": x[1:2], "labels": (x[0] > x[1]).long()} for x in drawn]

    def train_dataloader(self):
        return DataLoader(self.samples[:80], batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.samples[80:100], batch_size=16)

    def test_dataloader(self):
        return DataLoader(self.samples[100:], batch_size=16)


class Compared(nn.Module):
    """A network of two arguments."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, a, b):
        return self.layers(torch.cat([a, b], 1))


def leave_run(folder: Path, runs: Path, *overrides: str) -> dict:
    """Trains a small run into `folder`, and gives its summary."""
    cfg = compose_config(folder, *SMALL, *overrides)
    cfg.runs = str(runs)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def made(teachers, tmp_path_factory):
    """Two seeds of a regression and a run with several labels, and their summaries."""
    folder = tmp_path_factory.mktemp("tasks")
    regression = ("data=diabetes", "task=regression", "method=logit_mse", "method.hard=1")
    found = [leave_run(folder / f"r{seed}", teachers, *regression, f"seed={seed}") for seed in (0, 1)]
    labels = ("data=multilabel", "task=multilabel", "method=binary_kd")
    return folder, found, leave_run(folder / "m0", teachers, *labels)


def test_each_metric_has_a_table_with_its_own_columns(made):
    folder, regression, labels = made
    first, second = sorted(report.by_data(report.summaries([folder])), key=lambda runs: len(runs))
    (teacher, row) = report.rows(second)
    tests = [run["student"]["test"] for run in regression]
    rmse = [test["rmse"]["best"] for test in tests]
    decimals = 3 - len(str(int(statistics.mean(rmse)))) + 1
    assert row["test RMSE"] == f"{statistics.mean(rmse):.{decimals}f} ± {statistics.stdev(rmse):.{decimals}f}"
    assert row["R²"].startswith(f"{statistics.mean(test['r2'] for test in tests):.3f} ±")
    assert row["deviation"] == shown_mean("deviation", [run["student"]["deviation"] for run in regression])
    assert teacher["test RMSE"] == f"{regression[0]['teacher']['test']['rmse']:.{decimals}f}"
    assert not {"NLL", "ECE", "agreement %", "test accuracy %"} & set(row)
    (_, row) = report.rows(first)
    assert row["test mAP %"] == f"{100 * labels['student']['test']['map']['best']:.2f}"
    assert row["F1 %"] == f"{100 * labels['student']['test']['f1']:.2f}"
    assert "ECE" not in row


def test_a_picture_has_a_panel_for_each_data_set(made):
    _, regression, labels = made
    panels = draw([regression, [labels]]).axes
    assert [axes.get_title("left") for axes in panels] == ["diabetes", "multilabel"]
    assert "test RMSE, less is better" in panels[0].get_xlabel()
    assert "test mAP (%)" in panels[1].get_xlabel()


def test_a_page_holds_what_its_data_have(made, tmp_path):
    found = build([made[0]], tmp_path, "Students", Settings(rounds=1, robustness=10, device="cpu"))
    assert [problem for one in found for problem in one.problems] == []
    text = (tmp_path / "report.md").read_text()
    assert text.count("## ") == 2 * 8
    assert text.count("## Average precision of each label") == text.count("## Predicted and true values") == 1
    assert not re.search(r"[Cc]alibration|ECE|Robustness|worst class|images", text)
    for one, metric in zip(sorted(found, key=lambda g: g.name), ("rmse", "map"), strict=True):
        for row in one.rows[1:]:
            for seed in row.seeds:  # measured anew, and the same as when the run ended
                assert seed.quality[metric] == seed.summary["student"]["test"][metric]["best"]
            assert row.timing["cpu"][1]["p50_ms"] > 0
            shown_here = shown_mean(metric, [s.summary["student"]["test"][metric]["best"] for s in row.seeds])
            assert f" {shown_here} |" in text
    assert "Of RMSE less is better." in text
    assert "validation RMSE" in (tmp_path / "index.html").read_text()


def of_one_row(task, logits, targets, classes):
    """A group of one model that gave these outputs for these targets."""
    about = {"name": "mlp", "params": 1, "macs": 1}
    row = Row(
        "a $model$ <b>",
        about,
        [Seed(summary(0), Path("/nowhere"), task, test=Outputs.of(logits), test_targets=targets)],
    )
    return Group("d", {"metric": {"name": task.monitor[0], "direction": task.monitor[1]}}, [row], None, classes)


def test_each_label_has_its_average_precision():
    logits, targets = torch.tensor([[3.0, 1, 0], [2, 2, 0], [1, 3, 0]]), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    (section,) = of_task.of_task(of_one_row(MultiLabel(), logits, targets, ("a$b_{\\frac$", "日本", "never")), "")
    table, _, picture = section.blocks
    assert table.rows == [
        ["1 a $model$ <b>", "a$b_{\\frac$", "50.0", "100.0", ""]
    ]  # second of its ranking; first; in no sample
    assert ">日本</text>" in picture.svg
    assert "nan" not in picture.svg.lower()


def test_errors_of_a_regression_are_in_the_units_of_the_targets():
    targets = torch.linspace(0, 100, 101)
    task = Regression(mean=[50.0], std=[10.0])
    logits = ((targets - 2 - 50) / 10)[:, None]  # each prediction is too small by 2
    logits[7] = 1e6  # but one
    (section,) = of_task.of_task(of_one_row(task, logits, targets, ("progress",)), "d1-")
    table, _, grid = section.blocks
    assert table.rows == [["1 a $model$ <b>", *["−2"] * 5]]
    over, spread = grid.pictures
    assert over.svg.count("<use") >= 101  # a mark a sample, the one beyond the axes too
    assert "median is -2" in spread.alt
    assert not of_task.of_task(group(rows=1), "")


def test_a_page_of_data_that_say_nothing_of_themselves_has_no_times(teachers, tmp_path):
    cfg = compose_config(tmp_path / "run", "trainer=cpu", "trainer.max_epochs=2", "method=supervised")
    cfg.data = OmegaConf.create({"_target_": f"{__name__}.Pairs"})
    cfg.student = OmegaConf.create({"_target_": f"{__name__}.Compared", "checkpoint": None})
    cfg.teacher, cfg.runs = None, str(teachers)
    write_text(tmp_path / "run" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (row,) = report.rows([summary])
    assert row["trained on"] == "80"
    (made,) = build([tmp_path / "run"], tmp_path / "page", "Pairs", Settings(device="cpu", trust=("tests",)))
    assert made.rows[0].seeds[0].quality["accuracy"] == summary["student"]["test"]["accuracy"]["best"]
    text = (tmp_path / "page" / "report.md").read_text()
    assert "# Pairs: trained on 80 samples, tested on 20\n" in text
    assert "Not timed" in text
    assert "Accuracy of each class" in text


def test_where_less_is_better_the_front_holds_the_least():
    made = group(rows=3, seeds=1)
    made.facts["metric"] = {"name": "accuracy", "direction": "min"}
    scores = [row.seeds[0].score for row in made.rows]
    costs = [row.timing["bytes"] for row in made.rows]
    pairs = list(zip(costs, scores, strict=True))
    beaten = [
        any(c <= costs[i] and s <= scores[i] and (c, s) != (costs[i], scores[i]) for c, s in pairs) for i in range(4)
    ]
    names = [look.name for look in sections.looks(made)]
    alt = sections.tradeoffs(made, "").blocks[0].pictures[0].alt
    assert set(alt.rstrip(".").split("front: ")[1].split("; ")) == {
        n for n, b in zip(names, beaten, strict=True) if not b
    }


def test_a_value_that_is_far_off_stands_at_the_edge_with_its_value():
    looks, costs = plots.styles(list("abcd"), [False] * 4), [1.0, 2.0, 3.0, 4.0]
    values = [[1.0], [1.2], [1.3], [90.0]]
    assert ">4 at 90<" in points.over_cost(points.Plane(looks, costs, values, True), "kB", "RMSE")
    values = [[50.0], [48.0], [45.0], [1.0]]
    svg = points.over_cost(points.Plane(looks, costs, values), "kB", "accuracy")
    assert ">4 at 1<" in svg


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.91266, "91.27 %"),
        ("map", 0.5, "50.00 %"),
        ("f1", 1.0, "100.00 %"),
        ("rmse", 54.2149, "54.21"),
        ("mae", 0.00123456, "0.001235"),
    ],
)
def test_shares_are_in_per_cent_and_other_metrics_have_four_digits(name, value, text):
    assert shown(name, value) == text
    assert shown_mean(name, [value]) == text.removesuffix(" %")


def test_a_sweep_goes_down_on_an_error_and_up_on_a_precision(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from litdistill.sweep import trial as sweep_trial
    from tests.sweeps import start

    def stand_in(cfg, callbacks=(), **_):
        assert callbacks[0].monitor == ("val/rmse" if cfg.data._target_.endswith("diabetes") else "val/map")
        val = {"val": {"best": cfg.optimizer.lr}}
        Path(cfg.folder, "summary.json").write_text(json.dumps(val))

    monkeypatch.setattr(sweep_trial, "train", stand_in)
    space = {"optimizer.lr": [0.1, 0.2, 0.3]}
    common = ("sweep=grid", "net@student=mlp", "net@teacher=mlp")
    for data, method, metric, way, best in (
        ("diabetes", "logit_mse", "rmse", "minimize", 0.1),
        ("multilabel", "binary_kd", "map", "maximize", 0.3),
    ):
        task = "regression" if data == "diabetes" else data
        options = (*common, f"data={data}", f"task={task}", f"method={method}")
        study = start(tmp_path / data, *options, space=space)
        assert study.best_value == best
        assert f"val/{metric} ({way})" in (tmp_path / data / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(1, "output", "1 output"), (10, "class", "10 classes"), (1200, "run", "1,200 runs")]
)
def test_a_count_agrees_with_its_noun(number, noun, text):
    assert quantity(number, noun) == text

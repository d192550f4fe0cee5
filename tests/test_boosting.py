"""Gradient boosting as a teacher: fitted to training labels alone, each predicted by models of other folds, never unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from litdistill.data.datamodule import ImageData
from litdistill.data.tables import breast_cancer, diabetes, multilabel, wine
from litdistill.distillation.boosting import boosted_outputs
from litdistill.distillation.outputs_tables import read_outputs
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.tasks import Classification, MultiLabel, Regression
from litdistill.utils.errors import UserError


def ready(function, **options):
    data = function(**options)
    data.setup()
    return data


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def test_the_model_of_all_training_rows_judges_and_models_of_other_folds_teach(tmp_path):
    data = ready(wine)
    found = arrays(boosted_outputs("boosting", data, "categorical", tmp_path))
    whole = arrays(boosted_outputs("boosting_in_sample", data, "categorical", tmp_path))
    train, ids, targets = data.source.train, data.train_ids.numpy(), data.train_targets.numpy()
    fitted = HistGradientBoostingClassifier(random_state=0, early_stopping=False)
    fitted.fit(train.inputs[ids].numpy(), targets[ids])
    expected = fitted.predict_proba(train.inputs.numpy())
    np.testing.assert_allclose(whole["probabilities"], expected)
    np.testing.assert_allclose(found["test.probabilities"], fitted.predict_proba(data.source.test.inputs.numpy()))
    held = data.val_ids.numpy()
    np.testing.assert_allclose(found["probabilities"][held], expected[held])
    sure = lambda p: p[ids, targets[ids]].mean()  # noqa: E731
    assert sure(found["probabilities"]) < sure(whole["probabilities"]) - 0.01


def test_the_label_of_a_row_has_no_part_in_its_own_output(tmp_path):
    data = ready(wine)
    before = arrays(boosted_outputs("boosting", data, "categorical", tmp_path))["probabilities"]
    row = int(data.train_ids[5])
    changed = ready(wine)
    changed.train_targets[row] = (int(changed.train_targets[row]) + 1) % 3
    path = boosted_outputs("boosting", changed, "categorical", tmp_path)
    after = arrays(path)["probabilities"]
    np.testing.assert_allclose(after[row], before[row])
    assert np.abs(after - before).max() > 1e-3  # of rows in other folds
    assert len(list(tmp_path.iterdir())) == 2
    time = path.stat().st_mtime_ns
    assert boosted_outputs("boosting", changed, "categorical", tmp_path) == path
    assert path.stat().st_mtime_ns == time  # found again


def test_hidden_labels_are_not_fitted(tmp_path):
    data = ready(breast_cancer, labels=80)
    found = arrays(boosted_outputs("boosting_in_sample", data, "categorical", tmp_path))["probabilities"]
    known = (data.train_targets >= 0).numpy() & np.isin(np.arange(len(data.train_targets)), data.train_ids.numpy())
    assert known.sum() == 80
    model = HistGradientBoostingClassifier(random_state=0, early_stopping=False)
    model.fit(data.source.train.inputs.numpy()[known], data.source.train.targets.numpy()[known])
    np.testing.assert_allclose(found, model.predict_proba(data.source.train.inputs.numpy()))


@pytest.mark.parametrize(
    ("function", "task"), [(breast_cancer, Classification()), (multilabel, MultiLabel()), (diabetes, None)]
)
def test_its_file_is_a_teacher_of_every_task(tmp_path, function, task):
    data = ready(function)
    targets = data.train_targets[data.train_ids]
    task = task or Regression(targets.mean(0).tolist(), targets.std(0).tolist())
    path = boosted_outputs("boosting", data, task.kind, tmp_path)
    teacher = RecordedTeacher(read_outputs(path), task, data)
    batch = data.get_batch("test", data.test_ids)
    metric = task.metrics()
    metric.update(teacher.outputs(batch, "test"), batch.targets)
    value = float(metric.compute()[task.monitor[0]])
    chance = task.chance(batch.targets)
    assert chance is None or task.better(value, chance)
    assert torch.isfinite(teacher.outputs(data.get_batch("train", data.train_ids)).logits).all()


def test_it_teaches_tables_alone(tmp_path):
    images = ImageData("digits")
    images.setup()
    with pytest.raises(UserError, match="gradient boosting learns from tables, and digits is none: name a network"):
        boosted_outputs("boosting", images, "categorical", tmp_path)

"""Options of this project's classes are held against their signatures, and what a library refuses is a line."""

import pytest

from litdistill.training import train as train_module
from litdistill.training.train import train
from litdistill.utils.errors import UserError


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.temperature='4'", "method.temperature='4': a number. Did you mean 4?"),
        ("method.hard=true", "method.hard=true: a number. Did you mean 1?"),
        ("student.widths=8", "student.widths=8: a list of whole numbers. Did you mean [8]?"),
        ("student.widths=[8.5,3]", "student.widths=[8.5,3]: a list of whole numbers."),
        ("student.global_pool=1", "student.global_pool=1: true or false. Did you mean true?"),
        ("teacher.widths='[8]'", "teacher.widths='[8]': a list of whole numbers."),
        ("data.mix={_target_:litdistill.data.mixing.Mixup,alpha:a}", "data.mix.alpha=a: a number."),
        ("+method.temprature=3", "KD takes no option temprature: did you mean temperature?"),
        ("+optimizer.mine=3", "Adam takes no option mine: it takes params, lr"),
        ("+optimizer.betas=[2,2]", "optimizer.betas=[2,2]: a list of 2 numbers of at least 0 and below 1."),
        (
            "+teacher.recipe.trainer.max_epochs=1.5",
            "In the teacher's training (teacher.recipe):\ntrainer.max_epochs=1.5: a",
        ),
    ],
)
def test_an_option_of_another_type_is_refused_before_anything_is_built(small, monkeypatch, override, line):
    monkeypatch.setattr(train_module, "build_data", lambda *_: pytest.fail("the data are read"))
    cfg = small() if "recipe" in override else small(override)
    if "recipe" in override:
        cfg.teacher.recipe.trainer.max_epochs = 1.5
    with pytest.raises(UserError) as error:
        train(cfg)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("+trainer.profiler=fast", "trainer: Trainer refuses its options: "),
        ("trainer.accelerator=abacus", "trainer: Trainer refuses its options: "),
        (
            "trainer.limit_train_batches=0.001",
            "trainer.limit_train_batches=0.001 of 4 batches is none: give 0.25 or more, or",
        ),
        (
            "+data.mean=[0.5,0.5,0.5] +data.std=[1,1,1]",
            "data.mean=[0.5, 0.5, 0.5] and data.std=[1, 1, 1]: these images have 1 channel",
        ),
    ],
)
def test_what_only_the_data_or_a_library_know_is_a_line_too(small, monkeypatch, override, line):
    monkeypatch.setattr(train_module, "fit", lambda *_: pytest.fail("it is trained"))
    with pytest.raises(UserError) as error:
        train(small("teacher=null", "method=supervised", "logger=none", *override.split()))
    assert str(error.value).startswith(line)

"""docs/in_words.md: what an introduction to distillation speaks of is a command that composes to what the row says,
with the figure of its file."""

from __future__ import annotations

import re
import shlex

import pytest
from omegaconf import OmegaConf
from torch import nn

from litdistill.config.instantiate import NETWORK_META_KEYS, instantiate
from litdistill.config.recipes import teacher_config
from litdistill.utils.paths import CONF
from tests.conftest import compose_config

PAGE = (CONF.parent / "docs" / "in_words.md").read_text()
ROWS = {
    row[0]: row[1:] for row in re.findall(r"^\| ([^|]+) \| `(litdistill [^`]+)` \| ([^|]+) \|$", PAGE, re.MULTILINE)
}


def composed(words: str, folder):
    return compose_config(folder, *shlex.split(ROWS[words][0])[2:])


def network(node, classes: int, shape) -> nn.Module:
    options = {k: v for k, v in node.items() if k not in NETWORK_META_KEYS}
    return instantiate(OmegaConf.create(options), "net", num_classes=classes, input_shape=shape)


def layers(net: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())


def test_the_page_has_every_word():
    assert len(ROWS) == 12


@pytest.mark.parametrize("words", [w for w in ROWS if ROWS[w][0].startswith("litdistill train")])
def test_a_row_composes_and_has_a_figure_of_its_experiments_file(words, tmp_path):
    command, figure = ROWS[words]
    composed(words, tmp_path / "run")
    name = (re.search(r"experiment=(\S+)", command) or ["", "mnist_resnet50"])[1]
    heads = [
        line for line in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines() if line.startswith("# Gave")
    ]
    assert any(figure in line for line in heads)


def test_the_teacher_is_resnet50_from_its_definition_by_the_recipe_of_the_experiment(tmp_path):
    words = "a teacher: ResNet-50 from its definition, on 28x28 images"
    alone, wanted = composed(words, tmp_path / "run"), composed("few data: a tenth of the images", tmp_path / "other")
    recipe = teacher_config(wanted)
    for key in ("data", "optimizer", "scheduler"):
        assert alone[key] == recipe[key]
    assert alone.trainer.max_epochs == recipe.trainer.max_epochs
    assert {k: v for k, v in alone.student.items() if v is not None} == {
        k: v for k, v in recipe.student.items() if v is not None
    }
    assert alone.student.weights is None
    convolutions = [m for m in network(alone.student, 10, (1, 28, 28)).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 49 + 4  # 49 of ResNet-50's 50 layers, and its four shortcuts


def test_the_student_has_at_most_five_layers_and_adam_at_1e3_for_ten_epochs_on_mnist(tmp_path):
    for words in ("a student of at most five layers, trained on the teacher", "Adam at 1e-3 for ten epochs on MNIST"):
        cfg = composed(words, tmp_path / "run")
        assert layers(network(cfg.student, 10, (1, 28, 28))) <= 5
        assert (cfg.optimizer._target_, cfg.optimizer.lr) == ("torch.optim.Adam", 1e-3)
        assert (cfg.data.name, cfg.trainer.max_epochs) == ("mnist", 10)


def test_the_network_of_a_hundred_layers_has_as_many_and_two_classes(tmp_path):
    cfg = composed("a network of 100 layers on 28x28 images with two classes", tmp_path / "run")
    assert len(cfg.data.classes) == 2
    net = network(cfg.teacher, 2, (1, 28, 28))
    shortcuts = sum(isinstance(m, nn.Conv2d) for n, m in net.named_modules() if "downsample" in n)
    assert layers(net) - shortcuts == 101  # 100 convolutions and the classifier
    assert layers(network(cfg.student, 2, (1, 28, 28))) <= 5


def test_few_data_are_a_tenth_with_and_without_the_teacher(tmp_path):
    taught, alone = (composed(w, tmp_path / "run") for w in ROWS if w.startswith("few data"))
    assert (taught.data.fraction, alone.data.fraction) == (0.1, 0.1)
    assert (taught.method._target_.rpartition(".")[2], alone.method._target_.rpartition(".")[2]) == ("KD", "Supervised")


def test_the_comparisons_are_what_their_words_say(tmp_path):
    head = composed("beside transfer learning: a new head on frozen features", tmp_path / "run")
    assert (list(head.student.trainable), head.student.head) == (["head"], "new")
    assert composed("beside transfer learning: fine-tuned whole", tmp_path / "run").student.trainable is None
    assert composed("beside quantization to int8", tmp_path / "run").compress._target_.endswith("nt8")
    assert "low_rank" in composed("beside a low-dimensional model (SVD)", tmp_path / "run").compress._target_

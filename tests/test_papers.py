"""The experiments of published tables: complete, by the published recipe, and able to take a step; what MNIST's need."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from litdistill.benchmarks import published_tables as papers
from litdistill.config.recipes import recipe_hash, teacher_config
from litdistill.data import datamodule
from litdistill.data.datamodule import ImageData
from litdistill.evaluation.evaluate import differences, evaluate
from litdistill.models.small import mlp
from litdistill.training.callbacks import best_shift
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.composed import by_hydra
from tests.conftest import compose_config
from tests.test_configs import STEP, generated

ALL = papers.experiments()
SHORT = [a.replace("+data.epoch_size", "data.epoch_size") for a in STEP]


# -- the tables ---------------------------------------------------------------------------------------------------------


def test_the_tables_hold_as_many_cells_as_the_published_ones():
    # 13 pairs and 13 methods and the student alone, FSP on 6 pairs; DKD 12, DIST 6, KD+LS, MLKD, OFD and SimKD 10, SRRL 2,
    # NKD 6, CTKD, CTKD+LS, DKD+LS and MLKD+LS 10.
    assert len(papers.cells(papers.CRD)) == 14 * 13 + 6 + 12 + 6 + 4 * 10 + 2 + 6 + 4 * 10
    assert len(papers.cells(papers.IMAGENET)) == 2 * 12 + 1
    assert papers.published()["crd/wrn_40_2_shufflenet_v1/reviewkd"] == (
        77.14,
        papers.CRD.source,
        "best_on_test",
        False,
    )
    assert papers.published()["imagenet/resnet34_resnet18/simkd"].value == 71.59
    assert len(papers.cells(papers.ZAGORUYKO)) == 3 * 4
    assert len(ALL) == sum(len(papers.cells(t)) for t in papers.TABLES.values())
    assert papers.published()["crd/wrn_40_2_shufflenet_v1/crd"].value == 76.05
    assert papers.published()["crd/resnet32x4_shufflenet_v2/dist"].value == 77.35
    assert "crd/wrn_40_2_wrn_40_1/fsp" not in ALL


def check(name: str, cfg) -> None:
    """One composed cell against what the protocols say of it."""
    paper, pair, method = name.split("/")
    options = lambda p: OmegaConf.to_container(OmegaConf.load(CONF / "net" / f"{p}.yaml"))  # noqa: E731
    assert any(
        f"{t}_{s}" == pair and options(s).items() <= dict(cfg.student).items()
        for t, s in papers.TABLES[paper].pairs.values()
    )
    assert (cfg.teacher is None) == (method == "student")
    schedule = (cfg.data.batch_size, cfg.optimizer.lr, cfg.scheduler.gamma, cfg.trainer.max_epochs)
    if paper.startswith("crd"):
        small = pair.endswith(("mobilenet_v2", "shufflenet_v1", "shufflenet_v2"))
        lr, epochs = (0.025, 480) if method.startswith("mlkd") else (0.01 if small else 0.05, 240)
        if method in ("ab", "ft", "fsp"):
            assert cfg.method.init_epochs == 30
            assert list(cfg.scheduler.milestones) == [180, 210, 240]
            epochs = 270
        assert schedule == (64, lr, 0.1, epochs)
        assert (cfg.optimizer.weight_decay, cfg.optimizer.nesterov) == (5e-4, False)
        if cfg.teacher is not None:  # whatever becomes of the student, its teacher is trained as the protocol says
            recipe = teacher_config(cfg)
            assert (recipe.optimizer.lr, recipe.trainer.max_epochs) == (0.05, 240)
            assert list(recipe.scheduler.milestones) == [150, 180, 210]
    elif paper.startswith("zagoruyko2017"):
        epochs = 6 if paper.endswith("_short") else 200
        assert schedule == (128, 0.1, 0.2, epochs)
        assert list(cfg.scheduler.milestones) == [round(epochs * share) for share in (0.3, 0.6, 0.8)]
        assert cfg.optimizer.nesterov
    elif paper == "imagenet":
        assert schedule == (256, 0.1, 0.1, 100)
        assert (cfg.data.image_size, cfg.optimizer.weight_decay) == (224, 1e-4)
        assert cfg.teacher is None or cfg.teacher.weights == "IMAGENET1K_V1"
    else:
        assert schedule == (128, 0.1, 0.1, 200)
        assert cfg.optimizer.weight_decay == 1e-4


def composed(names):
    for name in names:
        yield name, by_hydra("train", ["runs=runs", "folder=runs/x", f"experiment={name}"])


def test_a_cell_of_each_method_and_of_each_pair_follows_the_protocol():
    of_each = {name.split("/")[2]: name for name in ALL} | {name.split("/")[1]: name for name in reversed(ALL)}
    for name, cfg in composed(sorted({*of_each.values(), "zagoruyko2017_short/wrn_16_2_wrn_16_1/at"})):
        check(name, cfg)


@pytest.mark.slow
def test_every_cell_follows_the_protocol():
    for name, cfg in composed(ALL):
        check(name, cfg)


def test_decoupled_distillation_has_its_weight_for_each_pair():
    beta = lambda name: next(composed([name]))[1].method.nckd  # noqa: E731
    assert beta("crd/resnet32x4_resnet8x4/dkd") == 8
    assert beta("crd/resnet56_resnet20/dkd") == 2
    assert beta("crd/vgg13_vgg8/dkd") == 6
    assert beta("crd/resnet56_resnet20/dkd_std") == 18
    assert beta("imagenet/resnet34_resnet18/dkd") == 0.5


def test_rows_of_switches_are_their_method_with_the_published_numbers():
    method = lambda name: next(composed([name]))[1].method  # noqa: E731
    ctkd, both, dkd, mlkd = (method(f"crd/vgg13_vgg8/{row}") for row in ("ctkd", "ctkd_std", "dkd_std", "mlkd_std"))
    assert (ctkd.hard, ctkd.soft, ctkd.learnt, ctkd.temperature, ctkd.standardized) == (0.1, 0.9, 10, 15.62, False)
    assert (both.hard, both.soft, both.learnt, both.temperature, both.standardized) == (0.1, 9.0, 10, 15.62, True)
    assert (dkd.hard, dkd.tckd, dkd.nckd, dkd.temperature, dkd.standardized) == (1.0, 9.0, 54.0, 2.0, True)
    assert (mlkd.instance, mlkd.batch, mlkd.classes, mlkd.standardized) == (13.5, 4.5, 4.5, True)
    assert list(mlkd.temperatures) == [2, 2, 3, 5, 6]


def test_knowledge_review_has_its_weight_for_each_pair():
    hint = lambda pair: next(composed([f"crd/{pair}/reviewkd"]))[1].method.hint  # noqa: E731
    assert [hint(pair) for pair in ("resnet56_resnet20", "resnet110_resnet32", "wrn_40_2_wrn_16_2")] == [0.6, 1.0, 5.0]


@pytest.mark.parametrize(
    "name",
    [
        "crd/resnet32x4_resnet8x4/dkd",
        "crd/wrn_40_2_wrn_16_2/fsp",
        "crd/vgg13_vgg8/mlkd",
        "crd_cifar10/resnet32x4_resnet8x4/student",
        "zagoruyko2017/wrn_16_2_wrn_16_1/kd_at",
        pytest.param("aberhu/resnet110_resnet20/rkd", marks=pytest.mark.slow),
        pytest.param("crd/resnet32x4_shufflenet_v1/rkd", marks=pytest.mark.slow),
        pytest.param("crd/vgg13_mobilenet_v2/vid", marks=pytest.mark.slow),
        pytest.param("crd/resnet50_cifar_vgg8/crd", marks=pytest.mark.slow),
        *(
            pytest.param(f"crd/resnet56_resnet20/{m}", marks=pytest.mark.slow)
            for m in ("ab", "ft", "cc", "nst", "pkt", "ofd", "reviewkd", "simkd")
        ),
        pytest.param("crd/wrn_40_2_wrn_40_1/srrl", marks=pytest.mark.slow),
    ],
)
def test_a_cell_trains_a_step(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datamodule, "load", generated)
    # A rate at which no student overflows in a step from where it starts, with a teacher that knows nothing.
    cfg = compose_config(tmp_path / "run", f"experiment={name}", *SHORT, "optimizer.lr=1e-5")
    if cfg.teacher is not None:
        cfg.teacher.allow_chance, cfg.teacher.checkpoint = True, None
    train(cfg)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_teacher_of_the_mnist_students_is_the_one_of_its_own_experiment(tmp_path):
    own = compose_config(tmp_path / "run", "experiment=hinton2015/teacher")
    for cell in (
        "distilled",
        "distilled_jittered",
        "no_threes",
        "no_threes_bias",
        "only_7_8",
        "only_7_8_bias",
        "thirty_units",
    ):
        taught = teacher_config(compose_config(tmp_path / "run", f"experiment=hinton2015/{cell}"))
        taught.method = own.method  # it is written there with its defaults
        taught.balance = own.balance  # without a hint nothing is balanced
        assert recipe_hash(taught) == recipe_hash(own)


# -- what the MNIST experiments need ------------------------------------------------------------------------------------


def test_a_class_that_is_omitted_is_missing_from_training_alone():
    whole, part = ImageData("digits"), ImageData("digits", omit=[3, 8])
    whole.setup()
    part.setup()
    assert part.num_classes == 10
    assert part.mean == whole.mean
    assert torch.equal(part.val_ids, whole.val_ids)
    assert torch.equal(part.test_ids, whole.test_ids)
    targets = whole.train_targets
    assert part.train_ids.tolist() == [i for i in whole.train_ids.tolist() if targets[i] not in (3, 8)]
    few = ImageData("digits", omit=[3], per_class=5)
    few.setup()
    assert torch.bincount(targets[few.train_ids], minlength=10).tolist() == [5, 5, 5, 0, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("omit", [[10], list(range(10)), [-1]])
def test_what_cannot_be_omitted_is_refused(omit):
    with pytest.raises(UserError, match=r"data\.omit"):
        ImageData("digits", omit=omit).setup()


def test_incoming_weights_are_held_to_their_norm_at_every_training_step():
    torch.manual_seed(0)
    net = mlp(3, (1, 4, 4), widths=(32, 16), max_norm=0.6)
    optimizer = torch.optim.SGD(net.parameters(), lr=5.0)
    seen = []
    net.layer1[1].register_forward_hook(lambda *_: seen.extend([net.layer1[0].weight.clone()]))
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(64, 1, 4, 4)).square().sum(1).mean().backward()
        optimizer.step()
    norms = torch.stack([w.norm(dim=1) for w in seen[1:]])
    assert norms.max() <= 0.6 * (1 + 1e-5)
    assert (norms > 0.599).any()  # the steps are large: without the constraint they would leave it far behind
    assert net.layer1[0].weight.norm(dim=1).max() > 0.61
    assert (norms < 0.599).any()  # shorter ones are left alone
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.eval()(torch.randn(8, 1, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [[3], [0, 4]])
def test_the_shift_is_the_best_of_all(seed, classes):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, 5, generator=draw)
    targets = torch.randint(5, (200,), generator=draw)
    logits[torch.arange(200), targets] += 1.0
    logits[:, classes] -= 2.0

    def hits(shift: float) -> int:
        moved = logits.double().clone()
        moved[:, classes] += shift
        return int((moved.argmax(1) == targets).sum())

    best = hits(best_shift(logits, targets, classes))
    assert best == max(hits(s) for s in torch.linspace(-10, 10, 4001).tolist())
    assert best > hits(0.0)


def started(cfg: DictConfig) -> DictConfig:
    """Leaves in the run's folder what Hydra leaves there when it starts one."""
    folder = Path(cfg.folder) / ".hydra"
    folder.mkdir(parents=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    return cfg


def test_a_student_whose_bias_is_corrected_is_a_run_that_can_be_measured_again(small):
    omit = ["data.omit=[3]", "data.per_class=null"]
    first = small(*omit, "method.hard=0", "method.soft=1", name="first")
    train(started(first))
    before = evaluate(first.folder)["student"]["accuracy"]
    step = ["optimizer.lr=0", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    step += ["+teacher.recipe.optimizer.lr=1e-3", "+teacher.recipe.trainer.limit_train_batches=null"]
    bias = "+callbacks.bias={_target_: litdistill.training.callbacks.ClassBias, classes: [3]}"
    second = small(*omit, *step, bias, f"student.checkpoint={first.folder}", "watch_test=true", name="second")
    train(started(second))
    summary = json.loads((Path(second.folder) / "summary.json").read_text())
    found = evaluate(second.folder)
    assert differences(found, summary) == []
    accuracy = summary["student"]["test"]["accuracy"]
    assert accuracy["best"] == accuracy["last"] == accuracy["best_on_test"]  # nothing was trained
    assert accuracy["best"] != before

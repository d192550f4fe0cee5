"""Images without labels as a transfer set: `data.unlabelled`."""

import shutil

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from litdistill import Distiller, methods
from litdistill.config.schema import rules
from litdistill.data.datamodule import ImageData
from litdistill.distillation.running_means import RunningMeans, Seen
from litdistill.methods import AT, CRD, DKD, KD, PKT, SRRL, LogitMSE, SimKD, Sum, Supervised, TeacherFree
from litdistill.methods.base import Method
from litdistill.methods.shuffled import Shuffled
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.tasks import Classification
from litdistill.training.distill import distill
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests.fits import same


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of 2 x 10 images, and 9 without labels in nested folders, two of which are copies."""
    top, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)

    def picture(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)

    for name in ("cat", "dog"):
        for i in range(10):
            picture(top / "labeled" / name / f"{i}.png")
    for i in range(7):
        picture((top / "more").joinpath(*["a"] * (i % 3), f"{i}.png"))
    shutil.copy(top / "labeled" / "cat" / "0.png", top / "more" / "copy of a labelled one.png")
    shutil.copy(top / "more" / "0.png", top / "more" / "a" / "copy.png")
    (top / "more" / "notes.txt").write_text("no image")
    return top


def folder(root, **options):
    options = {"image_size": 8, "val_size": 0.2, "batch_size": 4, "unlabelled": root / "more", **options}
    return ImageData("folder", root / "labeled", **options)


def networks():
    torch.manual_seed(0)
    nets = [conv4(2, (3, 8, 8), (4, 4, 4)) for _ in range(2)]
    return [Preprocessed(net, Preprocess([0.5] * 3, [0.25] * 3)) for net in nets]


@pytest.mark.parametrize("resident", [True, False])
def test_images_of_any_folder_follow_those_with_labels(root, resident):
    data, plain = (
        folder(root, resident=resident, workers=0),
        folder(root, unlabelled=None, resident=resident, workers=0),
    )
    data.setup()
    plain.setup()
    assert data.source.unlabelled == 7
    assert data.train_targets.tolist() == [*plain.train_targets.tolist(), *[-1] * 7]
    for split in ("val_ids", "test_ids"):
        assert torch.equal(getattr(data, split), getattr(plain, split))
    assert data.train_ids.tolist() == [*plain.train_ids.tolist(), *range(16, 23)]
    assert (data.mean, data.std) == (plain.mean, plain.std)
    batch = data.get_batch("train", torch.arange(23))
    paths = [path for path in (root / "more").rglob("*.png") if "copy" not in path.name]
    small = [Image.open(path).resize((8, 8), Image.Resampling.BILINEAR) for path in paths]
    expected = [np.asarray(picture) for picture in small]
    assert sorted(x.permute(1, 2, 0).numpy().tobytes() for x in batch.inputs[16:]) == sorted(
        x.tobytes() for x in expected
    )
    assert torch.equal(batch.inputs[:16], plain.get_batch("train", torch.arange(16)).inputs)
    rows = list(data.train_loader())
    assert sorted(torch.cat([r.ids for r in rows]).tolist()) == data.train_ids.tolist()
    assert data.identity("train") != plain.identity("train")
    alone = folder(root, labelled=False, resident=resident, workers=0)
    alone.setup()
    assert alone.train_ids.tolist() == list(range(16, 23))
    assert torch.equal(alone.val_ids, plain.val_ids)
    assert [d.train_labels for d in (plain, data, alone)] == ["all", "some", "none"]


def test_a_data_set_of_fixed_size_takes_them_too(root):
    data = ImageData("digits", unlabelled=root / "more", classes=[0, 7])
    data.setup()
    assert data.source.unlabelled == 8  # a copy of a labelled one is none here
    assert data.get_batch("train", data.train_ids[-8:]).inputs.shape == (8, 1, 8, 8)
    assert data.train_targets[-8:].tolist() == [-1] * 8
    assert set(data.train_targets[data.train_ids].tolist()) == {0, 1, -1}


class Scripted(torch.nn.Module):
    """Whatever the images, these logits in turn."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]


def test_the_labels_loss_is_the_mean_over_those_with_labels_and_the_teachers_over_all(root):
    data = folder(root)
    data.setup()
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 2, generator=draw) for _ in range(2))
    targets = torch.tensor([1, -1, 0, -1, -1])
    method = KD(hard=0.3, soft=0.7, temperature=2.0)
    distiller = Distiller(Scripted(student), method, Scripted(teacher), data=data)
    batch = Batch(torch.zeros(5, 3, 8, 8), targets)
    log_p, soft = student.log_softmax(1), (teacher / 2).softmax(1)
    hard = -(log_p[0, 1] + log_p[2, 0]) / 2
    kl = 4 * (soft * (soft.log() - (student / 2).log_softmax(1))).sum(1).mean()
    assert distiller.loss(batch).item() == pytest.approx((0.3 * hard + 0.7 * kl).item(), rel=1e-5)
    none = batch._replace(targets=torch.full((5,), -1))
    assert distiller.loss(none).item() == pytest.approx((0.7 * kl).item(), rel=1e-5)


def test_the_accuracy_of_training_counts_those_with_labels():
    logits = torch.eye(2)[torch.tensor([0, 0, 1, 1])] * 5
    for labels, expected in (("all", 0.5), ("some", 2 / 3), ("none", None)):
        means = RunningMeans(Classification(), labels)
        targets = torch.tensor([0, 1, 1, -1 if labels != "all" else 0])
        means.add(Seen({"hard": torch.tensor(1.0)}, Outputs.of(logits), None, targets, len(targets)))
        found = means.means().get("accuracy")
        assert (None if found is None else found.item()) == (expected and pytest.approx(expected))


@pytest.mark.parametrize("labelled", [None, False])
def test_a_student_is_distilled_on_them(root, labelled, tmp_path):
    student, teacher = networks()
    before = [p.clone() for p in student.parameters()]
    data = folder(root, labelled=labelled, augment=["Flip"])
    done = distill(student, teacher, data, method=KD(hard=0.5), max_epochs=2, out=tmp_path, allow_chance=True)
    assert all(torch.isfinite(p).all() for p in done.deployed_student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, done.deployed_student.parameters(), strict=True))
    assert done.labels == ("some" if labelled is None else "none")


METHODS = {
    "DKD": DKD(),
    "TeacherFree": TeacherFree(),
    "Shuffled": Shuffled(KD()),
    "CRD": Sum({"kd": KD(), "crd": CRD(hard=0)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_read_all_labels_are_refused_by_name(root, name):
    student, teacher = networks()
    with pytest.raises(UserError, match=f"{name} compares the labels of all samples"):
        Distiller(student, METHODS[name], teacher, data=folder(root))


def test_a_config_is_refused_for_the_same_before_anything_is_read():
    kinds = [kind for kind in vars(methods).values() if isinstance(kind, type) and issubclass(kind, Method)]
    assert sorted(kind.__name__ for kind in {*kinds} if kind.reads_targets) == sorted(rules.READ_LABELS)
    node = {"unlabelled": "more"}

    def lines(method, **options):
        method = {"_target_": f"litdistill.methods.{method}"}
        return list(rules.broken({"data": {**node, **options}, "method": method}))

    assert lines("KD") == lines("KD", labelled=False) == lines("Supervised") == []
    assert "DKD compares the labels" in lines("DKD")[0]
    assert "Supervised learns from labels" in lines("Supervised", labelled=False)[0]
    assert "data.balanced draws by labels" in lines("KD", balanced=True)[0]
    assert "leaves nothing to train on" in lines("KD", unlabelled=None, labelled=False)[0]


def test_without_any_label_a_teacher_is_needed(root):
    student, _ = networks()
    with pytest.raises(UserError, match="Supervised has no teacher"):
        Distiller(student, Supervised(), data=folder(root, labelled=False))
    Distiller(student, Supervised(), data=folder(root))


@pytest.mark.parametrize(
    "method", [AT(), PKT(), SRRL(), Sum({"at": AT(hard=0), "pkt": PKT()})], ids=lambda m: type(m).__name__
)
def test_without_any_label_a_method_that_trains_no_classifier_is_refused(root, method):
    student, teacher = networks()
    with pytest.raises(UserError, match=rf"{type(method).__name__} reads features and trains no classifier \(fc\)"):
        Distiller(
            student,
            method,
            teacher,
            example=(torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1])),
            data=folder(root, labelled=False),
        )


@pytest.mark.parametrize(
    "method", [KD(), SimKD(), LogitMSE(), Sum({"kd": KD(), "at": AT(hard=0)})], ids=lambda m: type(m).__name__
)
def test_one_that_trains_it_is_taken_and_nothing_is_left_of_the_trial(root, method):
    student, teacher = networks()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    done = Distiller(
        student,
        method,
        teacher,
        example=(torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1])),
        data=folder(root, labelled=False),
    )
    assert done.student.training
    assert all(p.grad is None for p in done.parameters())
    after = student.state_dict()  # SimKD gives it another head
    assert same(*({name: found[name] for name in before.keys() & after.keys()} for found in (before, after)))
    Distiller(
        *networks()[:1],
        AT(),
        networks()[1],
        example=(torch.zeros(2, 3, 8, 8), torch.tensor([-1, -1])),
        data=folder(root),
    )  # some labels


class Loaders(LightningDataModule):
    """Samples without ids, of which `train_labels` says which have a label."""

    def __init__(self, labels):
        super().__init__()
        self.train_labels = labels

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=draw)
        targets = torch.tensor([0, 1, -1] * 4 if self.train_labels == "some" else [-1] * 12)
        return DataLoader(TensorDataset(images, targets), 4)


@pytest.mark.parametrize("labels", ["some", "none"])
def test_data_of_ones_own_say_that_labels_are_missing(labels, tmp_path):
    student, teacher = networks()
    before = [p.clone() for p in student.parameters()]
    options = {"method": KD(hard=0.5), "max_epochs": 1, "trainer": {"logger": False}}
    done = distill(student, teacher, Loaders(labels), out=tmp_path, **options)
    assert done.labels == labels
    assert all(torch.isfinite(p).all() for p in done.deployed_student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, done.deployed_student.parameters(), strict=True))
    loader = Loaders(labels).train_dataloader()
    assert distill(*networks(), loader, out=tmp_path, labels=labels, **options).labels == labels
    with pytest.raises(UserError, match="train_labels='few' must be all, some or none"):
        distill(*networks(), Loaders("few"), out=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"unlabelled": "nowhere"}, "data.unlabelled=nowhere: there is no such folder"),
        ({"unlabelled": None, "labelled": False}, "leaves nothing to train on"),
        ({"balanced": True}, "data.balanced=true draws by labels"),
    ],
)
def test_options_without_sense_are_refused(root, options, said):
    with pytest.raises(UserError, match=said):
        folder(root, **options).setup()


def test_a_folder_of_what_is_read_already_is_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"no image that is not read already .*10 of the same bytes"):
        folder(root, unlabelled=root / "labeled" / "cat").setup()
    with pytest.raises(UserError, match="it is empty"):
        folder(root, unlabelled=tmp_path).setup()

"""Weights that meet other data than they were trained on: classes go by their names, and preprocessing comes along."""

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from litdistill.config.build import build_net, build_student
from litdistill.data.datamodule import ImageData
from litdistill.models.classes import with_columns
from litdistill.models.metadata import student_metadata
from litdistill.models.preprocess import Preprocess, Preprocessed, bare, preprocess_of
from litdistill.models.small import conv4
from litdistill.utils.checkpoint import load_state_dict_checked, load_weights, read_metadata, save_student
from litdistill.utils.errors import UserError
from tests.pictures import ripeness, shapes

CONV4 = {"_target_": "litdistill.models.small.conv4", "widths": [16, 16]}
TASK = {"_target_": "litdistill.tasks.Classification"}


def node(checkpoint=None, **options):
    return OmegaConf.create({**CONV4, "checkpoint": None if checkpoint is None else str(checkpoint), **options})


def folder(root, **options) -> ImageData:
    data = ImageData("folder", root=root, image_size=32, batch_size=16, **options)
    data.setup()
    return data


def digits(**options) -> ImageData:
    data = ImageData("digits", batch_size=32, **options)
    data.setup()
    return data


def trained(data: ImageData, epochs: int):
    """A network as a run would leave it, without the run."""
    torch.manual_seed(0)
    net = build_net(node(), data, "student").train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for ids in data.train_ids[torch.randperm(len(data.train_ids))].split(data.batch_size):
            batch = data.get_batch("train", ids)
            optimizer.zero_grad()
            F.cross_entropy(net(batch.inputs), batch.targets).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def accuracy(net, data: ImageData, split: str = "test") -> float:
    pairs = [(net.eval()(batch.inputs).argmax(1) == batch.targets) for batch in data.batches(split)]
    return torch.cat(pairs).double().mean().item()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a network that knows the ten digits, and the network."""
    place, data = tmp_path_factory.mktemp("digits"), digits()
    net = trained(data, 8)
    save_student(net, place / "student.safetensors", student_metadata(net, data))
    (place / "checkpoints").mkdir()
    state = {f"student.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state}, place / "checkpoints" / "best.ckpt")
    return place, net


# -- classes by name ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("name", ["", "student.safetensors", "checkpoints/best.ckpt"])
def test_classes_in_another_order_are_put_into_the_datas(run, caplog, role, name):
    caplog.set_level("INFO")
    place, net = run
    swapped = digits(classes=[1, 0, 2, 3, 4, 5, 6, 7, 8, 9])
    found = build_net(node(place / name), swapped, role)
    assert accuracy(found, swapped) == pytest.approx(
        accuracy(net, digits())
    )  # 79 % and less with the indices as they were
    assert accuracy(found, swapped) > 0.95
    assert f"The {role}'s classes are those of the data in another order" in caplog.text
    x = swapped.get_batch("test", swapped.test_ids[:8]).inputs
    assert torch.allclose(found.eval()(x), net(x)[:, [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]], atol=1e-5)


def test_the_same_classes_are_taken_as_they_are(run, caplog):
    caplog.set_level("INFO")
    place, net = run
    found = build_net(node(place), digits(), "teacher")
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in net.state_dict().items())
    assert "another order" not in caplog.text


def test_other_classes_are_refused_with_their_names(tmp_path, caplog):
    caplog.set_level("INFO")
    first = folder(shapes(tmp_path / "a", 12))
    net = build_net(node(), first, "student")
    save_student(net, tmp_path / "run" / "student.safetensors", student_metadata(net, first))
    other = folder(shapes(tmp_path / "b", 12, {"triangle": "pyramid"}))  # it comes before the square
    for source in (tmp_path / "run", tmp_path / "run" / "student.safetensors"):
        with pytest.raises(UserError, match=r"only there triangle, only here pyramid.*student\.head=new"):
            build_net(node(source), other, "student")
    again = build_net(node(tmp_path / "run", head="new"), other, "student")  # whose classifier knows no class yet
    assert torch.equal(bare(again).layer1[0].weight, bare(net).layer1[0].weight)
    teacher = build_net(node(tmp_path / "run"), other, "teacher")  # which teaches the classes that it knows
    assert teacher.known.tolist() == [[True, True, False, True]]
    assert "The teacher knows 3 of the data's 4 classes, and not pyramid" in caplog.text
    strange = folder(shapes(tmp_path / "c", 12, {"triangle": "pyramid", "square": "cube", "disk": "ball"}))
    with pytest.raises(UserError, match=r"only there disk, square, triangle, only here ball, cube, pyramid"):
        build_net(node(tmp_path / "run"), strange, "teacher")


def test_a_teacher_of_more_classes_is_read_for_those_of_the_data(run, caplog):
    caplog.set_level("INFO")
    place, net = run
    data = digits(classes=[7, 1])
    x = data.get_batch("test", data.test_ids[:8]).inputs
    found = build_net(node(place), data, "teacher")
    assert torch.allclose(found.eval()(x), net(x)[:, [7, 1]], atol=1e-5)
    assert accuracy(found, data) > 0.95
    assert "knows 2 of the data's 2 classes; its outputs for 0, 2, 3, 4, 5, 6, 8, 9, which" in caplog.text
    with pytest.raises(UserError, match=r"only there 0, 2, 3, 4, 5, 6, 8, 9, only here none"):
        build_net(node(place), data, "student")


def test_a_teacher_of_fewer_classes_says_nothing_of_the_others(tmp_path):
    five = digits(classes=[4, 0, 2, 1, 3])
    net = trained(five, 3)
    save_student(net, tmp_path / "student.safetensors", student_metadata(net, five))
    data = digits(classes=[3, 9, 1, 0])  # its 2 and 4 are none of these
    x = data.get_batch("test", data.test_ids[:8]).inputs
    found = build_net(node(tmp_path), data, "teacher").eval()(x)
    expected = net(x)[:, [4, 3, 1]].log_softmax(1)
    assert torch.allclose(found["members"][:, 0, [0, 2, 3]], expected, atol=1e-5)
    assert torch.allclose(found["logits"][:, [0, 2, 3]], expected, atol=1e-5)
    assert (found["logits"][:, 1] == -torch.inf).all()


def test_an_order_that_no_layer_can_take_is_refused():

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1)) * torch.arange(10)

    net, x = Odd(), torch.rand(2, 1, 8, 8)
    before = net(x)
    assert not with_columns(net, list(reversed(range(10))), x)
    assert torch.equal(net(x), before)


# -- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ripe(tmp_path_factory):
    """A network trained on as many images of each class, and where its run lies."""
    place = tmp_path_factory.mktemp("ripeness")
    data = folder(ripeness(place / "even", [80] * 4))
    net = trained(data, 8)
    assert accuracy(net, data) > 0.98
    save_student(net, place / "run" / "student.safetensors", student_metadata(net, data))
    return place, net


@pytest.mark.parametrize(("name", "counts"), [("mild", [60, 60, 60, 160]), ("uneven", [30, 30, 30, 300])])
def test_a_teacher_sees_images_on_the_scale_that_it_was_trained_on(ripe, name, counts):
    place, net = ripe
    data = folder(ripeness(place / name, counts))
    teacher = build_net(node(place / "run"), data, "teacher")
    assert accuracy(teacher, data) > 0.97
    theirs = preprocess_of(teacher)
    assert theirs.facts() == preprocess_of(net).facts()
    assert theirs.mean != tuple(data.mean)
    assert preprocess_of(build_net(node(), data, "student")).mean == tuple(data.mean)  # beside it, on its own scale
    if name == "uneven":  # as a teacher without a word of its scale would fare
        assert accuracy(Preprocessed(bare(teacher), Preprocess(data.mean, data.std)), data) < 0.5


def test_the_config_says_more_than_the_weights_and_these_more_than_the_data(run):
    place, net = run
    data = digits()
    own = preprocess_of(build_net(node(place, preprocess={"mean": [0.5], "std": [0.25]}), data, "teacher"))
    assert own.facts() == {"mean": [0.5], "std": [0.25], "size": None}
    resized = build_net(node(preprocess={"size": 16}), data, "student")
    assert preprocess_of(resized).facts() == {"mean": list(data.mean), "std": list(data.std), "size": [16, 16]}
    assert resized(data.get_batch("train", data.train_ids[:2]).inputs).shape == (2, 10)
    three = build_net(
        node(preprocess={"mean": [0.4] * 3, "std": [0.2] * 3}), data, "student"
    )  # gray images to three channels
    assert bare(three).layer1[0].in_channels == 3
    with pytest.raises(UserError, match=r"student\.preprocess=.*mean, std and size"):
        build_net(node(preprocess={"scale": 2}), data, "student")

    class Unknown:
        class_names, num_classes, input_shape = tuple("0123456789"), 10, (1, 8, 8)

    assert build_net(node(), Unknown(), "student").__class__ is not Preprocessed
    assert preprocess_of(build_net(node(place), Unknown(), "teacher")).facts() == preprocess_of(net).facts()
    with pytest.raises(UserError, match="needs mean and std"):
        build_net(node(preprocess={"size": 16}), Unknown(), "student")


def test_a_students_own_preprocessing_is_in_its_file_and_comes_back(tmp_path, run):
    data = digits()
    cfg = OmegaConf.create(
        {
            "student": {**CONV4, "checkpoint": None, "preprocess": {"mean": [0.5], "std": [0.2], "size": 12}},
            "task": TASK,
        }
    )
    student = build_student(cfg, data, None)
    save_student(student, tmp_path / "student.safetensors", student_metadata(student, data))
    assert read_metadata(tmp_path, "size") == [12, 12]
    assert read_metadata(tmp_path, "data_mean") == list(data.mean)
    cfg.student.preprocess = None
    again = build_student(cfg, data, None, finished=tmp_path)
    assert preprocess_of(again).facts() == preprocess_of(student).facts()
    from_teacher = OmegaConf.create({"student": {**CONV4, "checkpoint": "teacher"}, "task": TASK})
    assert preprocess_of(build_student(from_teacher, data, student)).size == (12, 12)


def test_the_file_of_a_network_fits_it_with_and_without_its_preprocessing(run):
    place, net = run
    alone = conv4(10, (1, 8, 8), widths=[16, 16])
    load_state_dict_checked(alone, load_weights(place), place, "student")
    data = digits()
    x = data.get_batch("test", data.test_ids[:4]).inputs
    assert torch.equal(alone.eval()(preprocess_of(net)(x)), net(x))

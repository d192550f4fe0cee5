"""Int8: against integer arithmetic written out in NumPy, its ranges, its gradients, and the file that onnxruntime runs."""

import copy
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from litdistill.compress.quantize import Int8, converted, int8
from litdistill.compress.restore import restore
from litdistill.compress.structure import structure_of
from litdistill.config.build import build_data, build_net, build_student
from litdistill.config.distiller import build_distiller, build_method, example_batch
from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.models.preprocess import Preprocess, bare
from litdistill.models.profile import count_macs, count_parameters
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4, mlp
from litdistill.training import finish
from litdistill.training.train import train
from litdistill.utils.checkpoint import save_student
from litdistill.utils.errors import UserError
from tests.conftest import SMALL, compose_config

if find_spec("torchao") is None:  # to import it takes a second, in each process that collects tests
    pytest.skip("torchao is not installed", allow_module_level=True)


def images(n=64):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    net.train()
    for _ in range(3):
        net(torch.randn(32, 1, 8, 8) * 2 + 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def pair():
    """A perceptron and its int8 form."""
    torch.manual_seed(0)
    net = mlp(10, (1, 8, 8), (20,))
    return net, int8(copy.deepcopy(net), images())


def affine(low, high):
    """Scale and zero point of uint8 for a range that holds zero. Jacob et al. 2018, section 2.1."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return scale, round(-low / scale)


def test_the_logits_are_those_of_integer_arithmetic(pair):
    net, small = pair
    x, layers = images().flatten(1).double().numpy(), [net.layer1[0], net.fc]
    for i, layer in enumerate(layers):
        w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        scale, zero = affine(x.min(), x.max())
        q = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64)
        row = np.abs(w).max(1) / 63  # 7 bits, a scale a row, symmetric
        rounded = np.rint(w / row[:, None]).astype(np.int64)
        assert np.abs(rounded).max() == 63
        x = (q - zero) @ rounded.T * (scale * row) + b
        if i == 0:
            x = np.maximum(x, 0)
    found = small(images()).detach().numpy()
    close = np.abs(found - x) < 1e-4 * np.abs(x).max()  # but where float32 rounds to the other side of a half
    assert close.mean() > 0.98
    assert np.abs(found - x).max() < 0.02 * np.abs(x).max()
    assert np.abs(found - net(images()).detach().numpy()).max() > 1e-3  # and it is not the float network


@pytest.mark.parametrize(
    "build", [lambda: conv4(10, (1, 8, 8)), lambda: resnet(10, (1, 8, 8), 8), lambda: mlp(10, (1, 8, 8), (30, 20))]
)
def test_batch_normalization_is_folded_and_the_converted_network_gives_the_same_to_the_bit(build):
    net = trained(build())
    small = int8(copy.deepcopy(net), images())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert count_parameters(small) == count_parameters(net) - sum(m.num_features for m in norms)
    assert count_macs(small, (1, 8, 8)) == count_macs(net, (1, 8, 8))
    logits = small(images())
    assert (logits - net(images())).abs().max() < 0.1 * logits.abs().max()
    form = converted(small)
    assert torch.equal(form(images()), logits)
    weights = [b for _, b in form.program.named_buffers() if b.dtype == torch.int8]
    assert len(weights) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())
    assert max(int(w.abs().max()) for w in weights) == 63


@pytest.mark.parametrize("share", [1, 1e-2, 1e-3, 1e-4])
def test_small_weights_and_small_activations_are_rounded_like_any_others(share):
    torch.manual_seed(0)
    data = ImageData("digits", mean=[0.3], std=[0.37])
    data.setup()
    images = data.get_batch("train", torch.arange(len(data.train_targets))).inputs
    net, x = mlp(10, (1, 8, 8), (20,)), Preprocess(data.mean, data.std)(images)
    logits = net(x)
    with torch.no_grad():
        for tensor in net.layer1[0].parameters():
            tensor *= share
        net.fc.weight /= share
    small = int8(net, x[:512])
    found, form = small(x), converted(small)(x)
    assert torch.equal(form, found)  # of real images too, many of whose values lie halfway between two levels
    assert (found.argmax(1) == logits.argmax(1)).float().mean() > 0.75


def test_ranges_follow_in_training_and_stand_in_evaluation(pair):
    small = copy.deepcopy(pair[1])
    small.eval()(images())
    before = {k: v.clone() for k, v in small.state_dict().items()}
    small(images() * 100)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    small.train()(images() * 100)
    moved = [k for k, v in small.state_dict().items() if not torch.equal(v, before[k])]
    assert any("max_val" in k for k in moved)
    assert not any(k.endswith(("weight", "bias")) for k in moved)


def test_gradients_pass_straight_through(pair):
    net, small = copy.deepcopy(pair[0]), copy.deepcopy(pair[1]).train()
    y = torch.arange(64) % 10
    for one in (net, small):
        nn.functional.cross_entropy(one(images()), y).backward()
    ours = {k.removeprefix("program."): p.grad for k, p in small.named_parameters()}
    for name, parameter in net.named_parameters():
        cosine = nn.functional.cosine_similarity(ours[name].flatten(), parameter.grad.flatten(), dim=0)
        assert cosine > 0.98, name
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(small(images()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(converted(small)(images()), small.eval()(images()))


def test_it_is_restored_from_plain_values(pair):
    small = pair[1]
    steps = json.loads(json.dumps(structure_of(small)))
    again = restore(mlp(10, (1, 8, 8), (20,)), steps, torch.zeros(2, 1, 8, 8))
    again.load_state_dict(small.state_dict())
    assert isinstance(again, Int8)
    assert torch.equal(again.eval()(images()), small.eval()(images()))
    assert again(images(1)).shape == (1, 10)


def distiller_of(cfg) -> Distiller:
    """Of a config, with a teacher as it is built."""
    data, task = build_data(cfg)
    teacher = build_net(cfg.teacher, data, "teacher")
    student = build_student(cfg, data, teacher)
    return build_distiller(cfg, student, build_method(cfg), teacher, task, example_batch(data), data)


@pytest.mark.parametrize("method", ["at", "fitnet", "rkd", "simkd", "kd_at"])
def test_a_method_that_reads_features_of_the_student_is_refused_with_those_that_work(tmp_path, method):
    cfg = compose_config(tmp_path / "run", *SMALL, "compress=int8", f"method={method}", "teacher.checkpoint=null")
    with pytest.raises(UserError, match=r"in int8 .*reads logits alone \(kd, dkd, dist, mlkd, supervised\)"):
        distiller_of(cfg)


@pytest.mark.parametrize("method", ["kd", "dkd", "dist", "mlkd", "supervised"])
def test_the_methods_that_are_named_then_work(tmp_path, method):
    cfg = compose_config(tmp_path / "run", *SMALL, "compress=int8", f"method={method}", "teacher.checkpoint=null")
    distiller = distiller_of(cfg)
    assert isinstance(bare(distiller.student), Int8)
    distiller.on_train_epoch_start()
    distiller.loss(distiller.data.get_batch("train", distiller.data.train_ids[:8])).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """The folder of an int8 student."""
    net = int8(trained(conv4(10, (1, 8, 8), (8, 8))), images())
    save_student(net, tmp_path / "start" / "student.safetensors", {"structure": json.dumps(structure_of(net))})
    return tmp_path / "start"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compress=int8"], "compress=int8: the student starts from an int8 network"),
        (["compress=low_rank"], "compress=low_rank: the student starts from an int8 network"),
        (["student.head=new", "data.classes=[0,1,2]"], "student.head=new: an int8 network"),
        (["student.trainable=[head]"], r"student.trainable=\['head'\]: an int8 network"),
    ],
)
def test_what_an_int8_start_cannot_is_said_with_where_to_start_instead(start, tmp_path, overrides, message):
    cfg = compose_config(tmp_path / "run", *SMALL, f"student.checkpoint={start}", *overrides)
    with pytest.raises(UserError, match=rf"{message}.*float"):
        build_student(cfg, build_data(cfg)[0], None)


def test_an_int8_start_is_trained_on(start, tmp_path):
    cfg = compose_config(tmp_path / "run", *SMALL, f"student.checkpoint={start}")
    assert isinstance(bare(build_student(cfg, build_data(cfg)[0], None)), Int8)


def test_what_the_file_of_an_int8_run_needs_is_known_before_training(tmp_path, monkeypatch):
    cfg = compose_config(tmp_path / "run", *SMALL, "compress=int8")
    data, _ = build_data(cfg)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UserError, match=r"onnxscript is not installed.*pip install 'litdistill\[export\]'"):
            build_student(cfg, data, None)
    data._source = data.source._replace(classes=("a\nb", *data.class_names[1:]))
    with pytest.raises(UserError, match=r"The class 'a\\nb' cannot be exported.*Rename its folder"):
        build_student(cfg, data, None)


def test_a_trained_int8_run_is_finished_where_its_file_is_refused(tmp_path, monkeypatch, caplog):
    overrides = ["compress=int8", "method=supervised", "teacher=null", "logger=none", "trainer.max_epochs=1"]
    cfg = compose_config(tmp_path / "run", *SMALL, *overrides)

    def refuse(*_, **__):
        raise UserError("It is not the student. Allow it with tolerance.agreement.")

    monkeypatch.setattr(finish, "export_student", refuse)
    train(cfg)
    student = json.loads((tmp_path / "run" / "summary.json").read_text())["student"]
    assert (student["precision"], student["bytes"]) == ("int8", None)
    assert "finished without it. It is not the student. Allow it with" in caplog.text
    assert "litdistill export run=" in caplog.text


def test_a_network_that_cannot_be_traced_is_refused():
    class Choosy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]

    with pytest.raises(UserError, match="cannot trace this network"):
        int8(Choosy(), images())

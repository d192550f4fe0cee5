"""`compile.student=auto`: what compiling is expected to save and to take, and that a resumed run goes on as it began."""

import pytest
import torch

from litdistill.distillation.distiller import Distiller
from litdistill.training import compiling
from litdistill.training.train import train
from litdistill.utils.checkpoint import load_checkpoint
from tests.conftest import compose_config
from tests.fits import digits, example, net


@pytest.fixture(scope="module")
def small():
    data = digits()
    return Distiller(net(), example=example(data)), example(data)


def test_what_is_expected_is_counted_on_a_forward(small):
    """Two normalizations, of 8 maps of 8x8 and of 4x4 pixels; five layers with parameters."""
    distiller, batch = small
    before = [b.clone() for b in distiller.student.buffers()]
    found = compiling.expected(distiller, batch, 40, element=4)
    moved = 4 * 4 * 40 * 8 * (64 + 16)
    assert found.step_s == pytest.approx(2 * 2 * compiling.LAUNCH_S + moved / compiling.BYTES_PER_S)
    assert found.takes_s == 5 * compiling.LAYER_S
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.student.buffers(), strict=True))
    assert distiller.student.training
    assert not any(m._forward_hooks for m in distiller.student.modules())


@pytest.mark.parametrize(
    ("steps", "device", "kept", "chosen", "words"),
    [
        (10, "cuda", None, "off", "not compiled. It is expected to take 8 s, and to save 0 s over 10 steps"),
        (10**7, "cuda", None, "default", "compiled (default). It is expected to take 8 s, and to save"),
        (10**7, "cpu", None, "off", "not compiled, since on a CPU"),
        (10, "cuda", "default", "default", "compiled (default), as when the run began"),
        (10**7, "cuda", "off", "off", "not compiled, as when the run began"),
        (10, "cuda", "max-autotune", "off", "It is expected to take"),  # no decision of this kind
    ],
)
def test_a_run_is_compiled_where_that_saves_more_than_it_takes(small, caplog, steps, device, kept, chosen, words):
    caplog.set_level("INFO", "litdistill")
    distiller, batch = small
    assert compiling.decide(distiller, batch, 40, steps, device, "bf16-mixed", kept) == chosen
    assert words in caplog.text


def test_a_resumed_run_goes_on_as_it_began(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "litdistill")
    options = [
        "compile.student=auto",
        "logger=none",
        "trainer=cpu",
        "teacher=null",
        "method=supervised",
        "data.per_class=8",
    ]
    train(compose_config(tmp_path / "run", *options, "trainer.max_epochs=1", "data.batch_size=40"))
    assert "not compiled, since on a CPU" in caplog.text
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert load_checkpoint(last)["callbacks"]["RunOptions"]["compiled"] == "off"
    (tmp_path / "run" / "summary.json").unlink()
    caplog.clear()
    train(compose_config(tmp_path / "run", *options, "trainer.max_epochs=2", "data.batch_size=40"))
    assert "not compiled, as when the run began" in caplog.text
    assert load_checkpoint(last)["callbacks"]["RunOptions"]["compiled"] == "off"

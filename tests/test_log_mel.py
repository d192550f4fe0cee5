"""The log-mel layer against NumPy and SciPy in float64, its gradient, and its network as ONNX."""

import numpy as np
import pytest
import torch
from scipy.signal import get_window

from litdistill.export.writers import _float_nodes
from litdistill.models.log_mel import NETS, LogMel, mel_filters, on_log_mel, spectrogram_picture
from litdistill.tasks import Classification
from litdistill.utils.errors import UserError


def htk_filters(rate: int, n_fft: int, bands: int, low: float, high: float) -> np.ndarray:
    """Triangles by interpolation: each is 1 at its own corner and 0 at all others."""
    mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
    hertz = lambda m: 700 * (10 ** (m / 2595) - 1)  # noqa: E731
    corners = hertz(np.linspace(mel(low), mel(high), bands + 2))
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    return np.stack([np.interp(bins, corners, np.eye(bands + 2)[i + 1], left=0, right=0) for i in range(bands)])


def reference(x: np.ndarray, rate: int, n_fft: int, hop: int, bands: int, low: float, high: float, floor: float):
    padded = np.pad(x.astype(np.float64), n_fft // 2)
    window = get_window("hann", n_fft)  # periodic by default
    frames = [padded[i : i + n_fft] * window for i in range(0, len(padded) - n_fft + 1, hop)]
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return np.log(np.maximum(htk_filters(rate, n_fft, bands, low, high) @ power.T, floor))


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 8000, "n_fft": 256, "hop": 128, "bands": 40, "low": 20.0, "high": 4000.0},
        {"rate": 16000, "n_fft": 400, "hop": 160, "bands": 64, "low": 0.0, "high": 7600.0},
        {"rate": 22050, "n_fft": 510, "hop": 100, "bands": 20, "low": 60.0, "high": 11025.0},
    ],
)
def test_spectrograms_are_those_of_numpy(options):
    x = 0.1 * np.random.default_rng(0).standard_normal((3, 4000)).astype(np.float32)
    x[2, 1500:] = 0  # silence is at the floor
    expected = np.stack([reference(row, **options, floor=1e-6) for row in x])
    layer = LogMel(options["rate"], *(options[k] for k in ("n_fft", "hop", "bands", "low", "high")))
    found = layer(torch.from_numpy(x)).numpy()
    assert found.shape == expected.shape == (3, *layer.shape(4000))
    assert found[2, :, -1].max() == pytest.approx(np.log(1e-6))
    assert np.abs(found - expected).max() < 2e-3  # float32 near the floor
    assert np.abs(found - expected).mean() < 2e-6


def test_filters_are_triangles_on_the_htk_scale():
    found = mel_filters(8000, 256, 40, 20, 4000)
    assert np.abs(found - htk_filters(8000, 256, 40, 20, 4000)).max() < 1e-12
    assert 2595 * np.log10(1 + 1000 / 700) == pytest.approx(
        1000, abs=0.1
    )  # the scale's definition: 1,000 Hz are 1,000 mel


def test_the_gradient_is_that_of_the_formula_in_float64():
    """By autograd on a DFT written as a matrix, in float64."""
    layer = LogMel(8000, 32, 16, 4, 100)
    x = (0.1 * torch.randn(2, 64)).requires_grad_()
    weights = torch.randn(2, 4, 5)
    (layer(x) * weights).sum().backward()
    y = x.detach().double().requires_grad_()
    turns = torch.outer(torch.arange(17), torch.arange(32)) * 2 * np.pi / 32
    frames = torch.nn.functional.pad(y, (16, 16)).unfold(1, 32, 16) * torch.from_numpy(get_window("hann", 32))
    power = (frames @ turns.cos().T.double()) ** 2 + (frames @ turns.sin().T.double()) ** 2
    filters = torch.from_numpy(htk_filters(8000, 32, 4, 100, 4000))
    ((power @ filters.T).clamp(min=1e-6).log().transpose(1, 2) * weights.double()).sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, rtol=1e-3, atol=1e-3 * float(y.grad.abs().max()))


def test_int16_and_half_precision_give_the_same_spectrogram():
    layer, x = LogMel(8000), (3000 * torch.randn(2, 2000)).to(torch.int16)
    expected = layer(x.float() / 2**15)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_a_network_standardizes_each_band_and_saves_its_statistics():
    torch.manual_seed(0)
    net = on_log_mel(3, (2000,), 8000, bands=20, options={"widths": [4]})
    for _ in range(200):
        net(0.1 * torch.randn(16, 2000))
    net.eval()
    image = net.image(net.log_mel(0.1 * torch.randn(200, 2000)))
    assert image.shape == (200, 1, 20, 16)
    assert image.mean((0, 1, 3)).abs().max() < 0.1
    assert (image.std((0, 1, 3)) - 1).abs().max() < 0.1
    other = on_log_mel(3, (2000,), 8000, bands=20, options={"widths": [4]}).eval()
    other.load_state_dict(net.state_dict())
    x = 0.1 * torch.randn(2, 2000)
    assert torch.equal(net(x), other(x))


@pytest.mark.parametrize("name", NETS)
def test_every_network_takes_spectrograms(name):
    net = on_log_mel(7, (8000,), 8000, net=name).eval()
    assert net(torch.zeros(2, 8000)).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"net": "conv5"}, "net=conv5 is unknown.*conv4"),
        ({"options": {"width": [4]}}, "do not fit net=conv4"),
        ({"bands": 200}, "bands=200 lie between two frequencies.*larger n_fft"),
        ({"n_fft": 255}, "n_fft=255.*even"),
        ({"high": 5000.0}, "high=5000.0.*sample_rate / 2"),
        ({"input_shape": (1, 28, 28)}, "samples of 1x28x28.*data=sounds"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        on_log_mel(**{"num_classes": 3, "input_shape": (8000,), "sample_rate": 8000} | options)


def test_onnx_has_the_spectrogram_inside(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = on_log_mel(3, (4000,), 8000, options={"widths": [4, 8]}).eval()
    made = torch.onnx.export(
        net, (torch.zeros(2, 4000),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    made.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for count in (1, 5):
        x = 0.1 * torch.randn(count, 4000)
        found = session.run(None, {given.name: x.numpy()})[0]
        assert np.abs(found - net(x).detach().numpy()).max() < 1e-5


def test_a_picture_has_low_frequencies_at_the_bottom_and_is_white_where_it_is_loudest():
    tone = torch.sin(2 * np.pi * 300 * torch.arange(8000) / 8000)
    tone[4000:] = 0
    picture = spectrogram_picture(tone, 8000)
    assert picture.shape[:2] == (1, 64)
    assert (picture.min(), picture.max()) == (0, 1)
    row, column = divmod(int(picture[0].argmax()), picture.shape[2])
    assert row > 44  # 300 Hz are in the lowest fifth of the mel scale up to 4 kHz
    assert column < picture.shape[2] / 2
    assert picture[0, :, -5:].max() == 0


def test_int8_leaves_the_spectrogram_in_float(tmp_path):
    """Quantized, the powers of a sound, over many magnitudes, would be nearly all 0."""
    onnx = pytest.importorskip("onnx")
    net = on_log_mel(3, (2000,), 8000, bands=20, options={"widths": [4]}).eval()
    made = torch.onnx.export(net, (torch.zeros(2, 2000),), dynamo=True, verbose=False)
    made.save(tmp_path / "net.onnx")
    proto = onnx.load(tmp_path / "net.onnx")
    kinds = {node.name: node.op_type for node in proto.graph.node}
    kept = [kinds[name] for name in _float_nodes(proto, preprocessing=False, task=Classification())]
    assert {"STFT", "MatMul", "Log"} <= set(kept)
    assert not {"Conv", "Gemm"} & set(kept)

"""The log-mel spectrogram as a network's first layer, and any network of images behind it.

    net = on_log_mel(10, (8000,), sample_rate=8000, net="conv4", options={"widths": [16, 32, 64]})
    logits = net(waveforms)          # (N, samples), float32 from -1 to 1 or int16

    python scripts/train.py data=spoken_digits net@student=sound_conv net@teacher=sound_conv_wide

Preprocessing is a part of the network: a teacher and its student can have spectrograms of different sizes, and an exported
file takes the waveform.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litdistill.models import mobilenet, resnet, shufflenet, small, vgg, wrn
from litdistill.utils.errors import UserError

INT16 = 2**15  # full scale of int16 samples


def mel_filters(sample_rate: int, n_fft: int, bands: int, low: float, high: float) -> np.ndarray:
    """Returns the (bands, n_fft // 2 + 1) float64 weights of triangular filters over the frequencies of a DFT.

    Their corners are evenly spaced from `low` to `high` Hz on the HTK mel scale, mel = 2595 log10(1 + Hz / 700), and each
    filter's maximum is 1 (no normalization by area). These are torchaudio's `melscale_fbanks` with its defaults.
    """
    first, last = (2595 * math.log10(1 + edge / 700) for edge in (low, high))
    corners = 700 * (10 ** (np.linspace(first, last, bands + 2) / 2595) - 1)  # Hz
    left, center, right = (corners[i : bands + i, None] for i in range(3))
    hertz = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    return np.maximum(0, np.minimum((hertz - left) / (center - left), (right - hertz) / (right - center)))


class LogMel(nn.Module):
    """Waveforms (N, samples), floats from -1 to 1 or int16 -> log-mel spectrograms (N, bands, frames) in float32.

    Frames of `n_fft` samples every `hop` samples, centered (`samples // hop + 1` frames; zeros are assumed beyond both ends),
    under a periodic Hann window; the squared magnitude of their DFT, summed by `mel_filters`; the natural logarithm of
    whatever is above `floor`. There is nothing to learn, and no saved state: the options say all.

    Args:
        sample_rate: samples per second.
        n_fft: samples of a frame, an even number. hop: samples from a frame to the next. bands: mel filters.
        low, high: their lowest and highest frequency in Hz; `high=None` is half the sample rate.
        floor: the least power; that of a full-scale sine is (n_fft / 4)².
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate: int,
        n_fft: int = 256,
        hop: int = 128,
        bands: int = 40,
        low: float = 20.0,
        high: float | None = None,
        floor: float = 1e-6,
    ):
        super().__init__()
        high = sample_rate / 2 if high is None else high
        if (
            min(sample_rate, n_fft, hop, bands) < 1
            or n_fft % 2
            or not 0 <= low < high <= sample_rate / 2
            or not floor > 0
        ):
            raise UserError(
                f"log-mel: sample_rate={sample_rate}, n_fft={n_fft}, hop={hop}, bands={bands}, low={low}, high={high}, "
                f"floor={floor}: counts and floor must be above 0, n_fft even, and 0 <= low < high <= sample_rate / 2."
            )
        filters = mel_filters(sample_rate, n_fft, bands, low, high)
        if (empty := (filters.sum(1) == 0).sum()) > 0:
            raise UserError(
                f"log-mel: {empty} of bands={bands} lie between two frequencies of a DFT of n_fft={n_fft}, and would always "
                "be empty. Choose fewer bands or a larger n_fft."
            )
        self.n_fft, self.hop, self.floor = n_fft, hop, floor
        self.facts = {
            "sample_rate": sample_rate, "n_fft": n_fft, "hop": hop, "bands": bands, "low": low, "high": high, "floor": floor
        }  # fmt: skip
        self.register_buffer("window", torch.hann_window(n_fft, dtype=torch.float64).float(), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms.float() if waveforms.is_floating_point() else waveforms.float() / INT16
        kind = x.device.type
        # In half precision a power would overflow or lose its quiet bands.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            spectrum = torch.stft(
                x,
                self.n_fft,
                self.hop,
                window=self.window.float(),
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            return (self.filters.float() @ power).clamp(min=self.floor).log()

    def shape(self, samples: int) -> tuple[int, int]:
        """Returns (bands, frames) of a waveform."""
        return len(self.filters), samples // self.hop + 1

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.facts.items())


class AsImage(nn.Module):
    """Log-mel spectrograms (N, bands, frames) -> images of one channel (N, 1, bands, frames), each band standardized.

    The mean and the deviation of a band are those of batch normalization without parameters, so they are learned with the
    network, saved with its weights, and exported (Kong et al. 2020, arXiv 1912.10211, normalize so).
    """

    def __init__(self, bands: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(bands, affine=False)

    def forward(self, spectrograms: Tensor) -> Tensor:
        # Weights in half precision (an export) have their input converted to them; in float32 this does nothing.
        mean = self.norm.running_mean
        return self.norm(spectrograms if mean is None else spectrograms.to(mean.dtype)).unsqueeze(1)


# Networks of images by name: the function that builds each, and its options before those of `on_log_mel`.
NETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "conv4": (small.conv4, {}),
    "lenet": (small.lenet, {}),
    "mlp": (small.mlp, {}),
    **{f"resnet{depth}": (resnet.resnet, {"depth": depth}) for depth in (8, 14, 20, 32, 44, 56)},
    **{f"vgg{depth}": (vgg.vgg, {"depth": depth}) for depth in (8, 11, 13, 16)},
    **{f"wrn_{d}_{w}": (wrn.wrn, {"depth": d, "widen": w}) for d, w in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 4))},
    "mobilenet_v2": (mobilenet.mobilenet_v2, {}),
    "shufflenet_v2": (shufflenet.shufflenet_v2, {}),
}


def on_log_mel(
    num_classes: int,
    input_shape: Sequence[int],
    sample_rate: int,
    net: str = "conv4",
    options: Mapping[str, Any] | None = None,
    n_fft: int = 256,
    hop: int = 128,
    bands: int = 40,
    low: float = 20.0,
    high: float | None = None,
    floor: float = 1e-6,
) -> nn.Module:
    """Returns `LogMel`, `AsImage` and one of `NETS` in a row, for waveforms of `input_shape` (samples,).

    Args:
        net: a network of images, by name. options: of its function, such as `{"widths": [16, 32, 64]}`.
        sample_rate, n_fft, hop, bands, low, high, floor: see `LogMel`.

    Raises `UserError` for another shape, an unknown network, and options that it does not take.
    """
    if len(input_shape) != 1:
        raise UserError(
            f"on_log_mel takes waveforms (samples,), and these data have samples of {'x'.join(map(str, input_shape))}. "
            "Choose sounds (data=spoken_digits, data=sounds), or a network of images."
        )
    if net not in NETS:
        raise UserError(f"on_log_mel: net={net} is unknown. Choose one of {', '.join(NETS)}.")
    build, own = NETS[net]
    log_mel = LogMel(sample_rate, n_fft, hop, bands, low, high, floor)
    try:
        inner = build(num_classes, (1, *log_mel.shape(input_shape[0])), **{**own, **(options or {})})
    except TypeError as error:
        raise UserError(f"on_log_mel: options={dict(options or {})} do not fit net={net}: {error}.") from error
    return nn.Sequential(OrderedDict(log_mel=log_mel, image=AsImage(bands), net=inner))


@torch.no_grad()
def spectrogram_picture(waveform: Tensor, sample_rate: int) -> Tensor:
    """Returns the log-mel spectrogram of a waveform (samples,) as a gray picture (1, bands, frames) from 0 to 1.

    Low frequencies are at the bottom; white is the loudest place, and black everything 60 dB below it.
    """
    n_fft = 2 ** max(6, round(math.log2(sample_rate * 0.064)))
    bands = LogMel(sample_rate, n_fft, max(1, len(waveform) // 96), min(64, n_fft // 8), floor=1e-10)(
        waveform[None].cpu()
    )
    decibels = 10 / math.log(10) * bands
    return ((decibels - decibels.max()) / 60 + 1).clamp(0, 1).flip(1)

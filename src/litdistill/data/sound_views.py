"""Augmentations of waveforms (N, samples), float32 from -1 to 1: pure functions of random bits, as `augment.py` defines them.

    python scripts/train.py data=spoken_digits 'data.augment=[{TimeShift:{samples:800}},{FrequencyMask:{most:0.2}}]'

Positions and widths are whole numbers, so that a view is the same on every device; what remains is the rounding of a Fourier
transform (`FrequencyMask`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from litdistill.data.augment import GOLDEN, further_bits, splitmix64
from litdistill.utils.errors import UserError


class TimeShift:
    """A shift by up to ±`samples`; silence comes in. 2 · samples + 1 views."""

    def __init__(self, samples: int):
        if samples < 0:
            raise UserError(f"TimeShift: samples={samples} must not be negative; 800 are 0.1 s at 8,000 a second.")
        self.samples, self.views = samples, 2 * samples + 1

    def draw(self, bits: Tensor) -> Tensor:
        return bits % self.views

    def apply(self, waveforms: Tensor, code: Tensor) -> Tensor:
        length = samples_of(waveforms)
        source = torch.arange(length, device=code.device) - (code - self.samples)[:, None]
        inside = (source >= 0) & (source < length)
        return waveforms.gather(1, source.clamp_(0, length - 1)).mul_(inside)


class TimeMask:
    """A silenced stretch of up to `most` of the length, anywhere (SpecAugment, Park et al. 2019, arXiv 1904.08779)."""

    views = None

    def __init__(self, most: float = 0.2):
        self.most = share("TimeMask", most)

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def apply(self, waveforms: Tensor, code: Tensor) -> Tensor:
        return waveforms.masked_fill(stretch(code, samples_of(waveforms), self.most), 0)


class FrequencyMask:
    """A removed band of up to `most` of the frequencies, anywhere (SpecAugment too); by a Fourier transform of all samples."""

    views = None

    def __init__(self, most: float = 0.2):
        self.most = share("FrequencyMask", most)

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def apply(self, waveforms: Tensor, code: Tensor) -> Tensor:
        length = samples_of(waveforms)
        spectrum = torch.fft.rfft(waveforms)
        return torch.fft.irfft(spectrum.masked_fill(stretch(code, spectrum.shape[1], self.most), 0), n=length)


class Gain:
    """A gain of up to ±`decibels`, uniform on that scale."""

    views = None

    def __init__(self, decibels: float = 6.0):
        if not 0 <= decibels <= 60:
            raise UserError(f"Gain: decibels={decibels} must be from 0 to 60.")
        self.decibels = decibels

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def apply(self, waveforms: Tensor, code: Tensor) -> Tensor:
        samples_of(waveforms)
        decibels = (2 * unit(code) - 1) * self.decibels
        return waveforms * (10 ** (decibels / 20)).to(waveforms.dtype)[:, None]


class Noise:
    """White noise, uniform, of a standard deviation from 0 to `most` (full scale is 1), uniform too."""

    views = None

    def __init__(self, most: float = 0.01):
        self.most = share("Noise", most)

    def draw(self, bits: Tensor) -> Tensor:
        return bits

    def apply(self, waveforms: Tensor, code: Tensor) -> Tensor:
        place = torch.arange(1, samples_of(waveforms) + 1, device=code.device) * GOLDEN
        noise = unit(splitmix64(further_bits(code, 0)[:, None] + place) & (2**63 - 1))
        spread = self.most * unit(code) * 12**0.5  # a uniform variable has a deviation of its range over √12
        return waveforms + ((noise - 0.5) * spread[:, None]).to(waveforms.dtype)


SOUND_VIEWS = (TimeShift, TimeMask, FrequencyMask, Gain, Noise)


def stretch(bits: Tensor, length: int, most: float) -> Tensor:
    """Returns masks (N, length) bool of a stretch in each: 0 to `most` · length places, uniform, as is where it starts."""
    width = further_bits(bits, 1) % (int(most * length) + 1)
    start = further_bits(bits, 2) % (length - width + 1)
    place = torch.arange(length, device=bits.device)
    return (place >= start[:, None]) & (place < (start + width)[:, None])


def unit(bits: Tensor) -> Tensor:
    """Returns 63 random bits as float64 numbers from 0 to 1, equal on every device."""
    return (bits >> 11).double() / 2**52


def share(name: str, most: float) -> float:
    """Returns `most`. Raises `UserError` where it is no share."""
    if not 0 < most <= 1:
        raise UserError(f"{name}: most={most} must be above 0 and at most 1.")
    return most


def samples_of(waveforms: Tensor) -> int:
    """Returns the number of samples. Raises `UserError` for anything but waveforms."""
    if waveforms.ndim != 2 or not waveforms.is_floating_point():
        raise UserError(
            f"data.augment has an augmentation of sounds ({', '.join(v.__name__ for v in SOUND_VIEWS)}), and these samples are "
            f"{waveforms.dtype} of {'x'.join(map(str, waveforms.shape[1:]))}: leave it out."
        )
    return waveforms.shape[1]

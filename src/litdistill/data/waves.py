"""Decoding of one WAV file to a waveform with NumPy and SciPy alone; training and `predict` share it.

    samples = waveform("yes.wav", sample_rate=8000, length=8000)      # (8000,) float32 from -1 to 1

Other rates are resampled, channels averaged, a longer sound is cut to its middle and a shorter one padded with zeros.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

EXTENSIONS = frozenset((".wav", ".wave"))
RATES = (1000, 768_000)  # samples per second; a header outside of these is damaged
LOUDEST = 16.0  # floats from -1 to 1 may clip, but are not integers
SIGNATURES = {  # how files of other sounds begin
    b"ID3": "an MP3",
    b"\xff\xfb": "an MP3",
    b"\xff\xf3": "an MP3",
    b"\xff\xf2": "an MP3",
    b"fLaC": "a FLAC file",
    b"OggS": "an Ogg file",
    b"FORM": "an AIFF file",
}


class Wave(NamedTuple):
    """A sound of one channel."""

    samples: np.ndarray  # (N,) float32; from -1 to 1 where the file has integers
    rate: int  # samples per second


def waveform(path: str | Path, sample_rate: int, length: int) -> np.ndarray:
    """Returns the (length,) float32 waveform of a WAV file, `resampled` and then `fitted`. Raises `UserError`: see `decode`."""
    return fitted(resampled(read_wave(path), sample_rate), length)


def read_wave(path: str | Path) -> Wave:
    """Returns the sound of a WAV file. Raises `UserError`: see `decode`."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"The sound {one_line(path)} cannot be read: {error.strerror}.") from error
    return decode(content, path)


def stated_rate(path: str | Path) -> int | None:
    """Returns the samples per second in the header of a WAV file, without reading its sound; None for anything else."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    place = head.find(b"fmt ")
    if head[:4] not in (b"RIFF", b"RF64") or place < 0 or len(head) < place + 16:
        return None
    return int.from_bytes(head[place + 12 : place + 16], "little")


def decode(content: bytes, name: str | Path) -> Wave:
    """Returns the sound in the bytes of a WAV file, its channels averaged: PCM of 8, 16, 24 or 32 bits, or floats.

    Raises `UserError` with `name` for anything else, a truncated file, no samples, and samples that are no finite numbers.
    """
    name = one_line(name)
    rate, data = _parsed(content, name)
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"The sound {name} states a rate of {rate} samples a second: it is damaged. Replace it.")
    if data.size == 0:
        raise UserError(f"The sound {name} has no samples: it is 0 s long. Record it again, or leave it out.")
    if data.dtype == np.uint8:
        samples = (data.astype(np.float64) - 128) / 128
    elif data.dtype.kind == "i":  # 24 bits come as the upper ones of 32
        samples = data.astype(np.float64) / -float(np.iinfo(data.dtype).min)
    else:
        samples = data.astype(np.float64)
        if bad := int((~np.isfinite(samples)).sum()):
            raise UserError(f"The sound {name} has {bad} samples that are no finite numbers. Export it again.")
        if (peak := float(np.abs(samples).max())) > LOUDEST:
            raise UserError(
                f"The sound {name} has floats of up to {peak:,.6g}; in WAV files they go from -1 to 1. Divide them by full "
                "scale (32768 for 16 bits), or save it as 16-bit PCM."
            )
    return Wave((samples if samples.ndim == 1 else samples.mean(1)).astype(np.float32), rate)


def _parsed(content: bytes, name: str) -> tuple[int, np.ndarray]:
    """Returns rate and samples (N,) or (N, channels) as they are in the file."""
    from scipy.io import wavfile

    if not content:
        raise UserError(f"The sound {name} is an empty file (0 bytes). Copy it again, or leave it out.")
    if content[:4] not in (b"RIFF", b"RIFX", b"RF64") or content[8:12] != b"WAVE":
        what = next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), "no WAV file")
        what = "an MP4 file" if content[4:8] == b"ftyp" else what
        raise UserError(
            f"The sound {name} is {what}, and WAV files are read: convert it, such as with `ffmpeg -i <file> <file>.wav`."
        )
    stated = int.from_bytes(content[4:8], "big" if content[:4] == b"RIFX" else "little") + 8
    # A program that writes to a pipe states the largest number. Some leave out the last byte, which pads to an even number.
    if stated < 2**32 and len(content) + 1 < stated:
        raise UserError(
            f"The sound {name} is truncated: it states {stated:,} bytes and has {len(content):,}. Copy it again, or "
            "leave it out."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of chunks that hold no sound
            rate, data = wavfile.read(io.BytesIO(content))
    except Exception as error:  # the reader raises many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The sound {name} cannot be read ({reason}): PCM of 8, 16, 24 or 32 bits and floats are. Convert it, such as "
            "with `ffmpeg -i <file> -c:a pcm_s16le <file>.wav`, or leave it out."
        ) from error
    return int(rate), np.asarray(data)


def resampled(wave: Wave, rate: int) -> np.ndarray:
    """Returns the (N,) float32 samples at `rate` samples per second; those of `wave` itself where it has that rate.

    `scipy.signal.resample_poly`: zeros are put between samples, and a linear-phase low-pass filter (a sinc under a Kaiser
    window of beta 5) keeps what is below half of the lower of both rates.
    """
    if wave.rate == rate:
        return wave.samples
    from scipy.signal import resample_poly

    common = math.gcd(wave.rate, rate)
    return resample_poly(wave.samples.astype(np.float64), rate // common, wave.rate // common).astype(np.float32)


def fitted(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns (length,) float32: the middle of a longer waveform, a shorter one with zeros before and after it."""
    spare = length - len(samples)
    if spare < 0:
        return samples[-spare // 2 : -spare // 2 + length]
    return np.pad(samples, (spare // 2, spare - spare // 2))

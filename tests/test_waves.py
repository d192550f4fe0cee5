"""WAV files: every sample format against its own arithmetic, resampling against a sine, and files that nobody can read."""

import io
import struct

import numpy as np
import pytest
from scipy.io import wavfile

from litdistill.data.waves import Wave, decode, fitted, resampled, waveform
from litdistill.utils.errors import UserError


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


def pcm(data: bytes, bits: int, channels: int = 1, rate: int = 8000, kind: int = 1) -> bytes:
    """A WAV file as its specification has it, written by hand."""
    width = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * width, width, bits)
    body = b"WAVE" + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_every_format_has_the_same_scale():
    assert decode(pcm(bytes([0, 64, 128, 255]), 8), "a").samples.tolist() == [-1, -0.5, 0, 127 / 128]
    assert decode(pcm(struct.pack("<4h", -(2**15), -(2**14), 0, 2**14), 16), "a").samples.tolist() == [-1, -0.5, 0, 0.5]
    three = b"".join(n.to_bytes(3, "little", signed=True) for n in (-(2**23), -(2**22), 0, 1))
    assert decode(pcm(three, 24), "a").samples.tolist() == [-1, -0.5, 0, 2**-23]
    assert decode(pcm(struct.pack("<3i", -(2**31), 2**30, 2**21), 32), "a").samples.tolist() == [-1, 0.5, 2**-10]
    assert decode(pcm(struct.pack("<3f", -1, 0.25, 1.5), 32, kind=3), "a").samples.tolist() == [-1, 0.25, 1.5]
    assert decode(wav(np.array([0.5, -0.125])), "a").samples.tolist() == [0.5, -0.125]


def test_channels_are_averaged_and_a_last_chunk_of_text_is_no_sound():
    stereo = pcm(struct.pack("<4h", 2**14, 0, -(2**14), -(2**14)), 16, channels=2, rate=44100)
    tagged = stereo + b"LIST" + struct.pack("<I", 4) + b"INFO"
    for content in (stereo, tagged[:4] + struct.pack("<I", len(tagged) - 8) + tagged[8:]):
        found = decode(content, "a")
        assert found.rate == 44100
        assert found.samples.tolist() == [0.25, -0.5]


def test_a_file_from_a_pipe_states_the_largest_size_and_is_read_to_its_end():
    content = wav(np.arange(100, dtype=np.int16))
    endless = content[:4] + b"\xff" * 4 + content[8:40] + b"\xff" * 4 + content[44:]
    assert len(decode(endless, "a").samples) == 100


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 8000), (16000, 8000), (8000, 16000), (11025, 8000)])
def test_resampling_keeps_a_tone_and_removes_what_would_alias(rate, wanted):
    def tone(hertz: float, at: int) -> np.ndarray:
        return np.sin(2 * np.pi * hertz * np.arange(at) / at).astype(np.float32)  # 1 s

    found = resampled(Wave(tone(440, rate), rate), wanted)
    assert len(found) == wanted
    assert found.dtype == np.float32
    inner = slice(wanted // 10, -wanted // 10)  # the ends miss what lies beyond them
    assert np.abs(found - tone(440, wanted))[inner].max() < 5e-3
    if rate > 2 * wanted * 1.2:
        assert (
            np.abs(resampled(Wave(tone(0.6 * wanted, rate), rate), wanted)[inner]).max() < 1e-2
        )  # would alias otherwise


def test_a_sound_of_that_rate_is_left_as_it_is():
    samples = np.array([0.1, 0.2], np.float32)
    assert resampled(Wave(samples, 8000), 8000) is samples


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 12, 13])
def test_a_longer_sound_keeps_its_middle_and_a_shorter_one_is_padded(count):
    samples = np.arange(1, count + 1, dtype=np.float32)
    found = fitted(samples, 8)
    assert found.shape == (8,)
    if count >= 8:
        cut = (count - 8) // 2
        assert found.tolist() == samples[cut : cut + 8].tolist()
    else:
        before = (8 - count) // 2
        assert found.tolist() == [0] * before + samples.tolist() + [0] * (8 - count - before)


GOOD = wav(np.arange(1000, dtype=np.int16))
BAD = {
    b"": r"empty file \(0 bytes\).*leave it out",
    b"ID3\x04\x00" + bytes(100): r"is an MP3.*convert it",
    b"\xff\xfb\x90" + bytes(100): r"is an MP3.*convert it",
    b"fLaC" + bytes(100): r"is a FLAC file.*convert it",
    bytes(4) + b"ftypM4A " + bytes(100): r"is an MP4 file.*convert it",
    b"hello, this is text": r"is no WAV file.*convert it",
    GOOD[:1000]: r"truncated: it states 2,044 bytes and has 1,000.*Copy it again",
    GOOD[:20]: r"truncated.*Copy it again",
    wav(np.zeros(0, np.int16)): r"no samples: it is 0 s long.*leave it out",
    wav(np.array([0, np.nan, np.inf], np.float32)): r"2 samples that are no finite numbers.*Export it again",
    wav(np.array([0, 12000], np.float32)): r"floats of up to 12,000.*Divide them",
    pcm(bytes(100), 16, rate=3): r"a rate of 3 samples a second: it is damaged",
    pcm(bytes(100), 4, kind=17): r"cannot be read.*Convert it",  # ADPCM
}


@pytest.mark.parametrize("content", BAD, ids=BAD.values())
def test_a_file_that_is_no_sound_is_named_in_one_line_with_the_remedy(content, tmp_path):
    path = tmp_path / "odd\nname.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=BAD[content]) as caught:
        waveform(path, 8000, 8000)
    assert "odd?name.wav" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.wav cannot be read: No such file"):
        waveform(tmp_path / "none.wav", 8000, 8000)

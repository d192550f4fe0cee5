"""Sounds: waveforms (N, samples), float32 from -1 to 1, with a class each.

    python scripts/train.py data=spoken_digits net@student=sound_conv net@teacher=sound_conv_wide
    python scripts/train.py data=spoken_digits 'data.held_out=[theo]' net@student=sound_conv net@teacher=sound_conv_wide
    python scripts/train.py data=sounds data.root=<folder> net@student=sound_conv net@teacher=sound_conv_wide

The first layer of a network makes spectrograms of them (`litdistill.models.log_mel`). All sounds have one length and one rate:
others are resampled, cut or padded (`litdistill.data.waves`), and it is said of how many.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from litdistill.data import waves
from litdistill.data.archives import RECORDING, SPOKEN_DIGITS
from litdistill.data.fetch import archived
from litdistill.data.folder import Labeled, read_splits, say
from litdistill.data.listing import SOUNDS
from litdistill.data.sound_views import SOUND_VIEWS
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.utils.errors import UserError
from litdistill.utils.modality import SOUND, Modality
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

DIGITS = tuple("0123456789")
DIGITS_RATE = 8000  # samples per second of the spoken digits
TESTED = 5  # recordings 0 to 4 of each digit and speaker are the test set, by the set's own rule
LONGEST = 120.0  # seconds


def spoken_digits(
    root: str | Path = "data_files",
    length: float = 1.0,
    held_out: Sequence[str | int] | None = None,
    validation: str | int | None = None,
    download: bool = True,
    **options: Any,
) -> TensorData:
    """Returns 3,000 recordings of the ten digits by six speakers, 50 of each digit and speaker: 8,000 samples a second.

    The Free Spoken Digit Dataset (Jackson et al., doi 10.5281/zenodo.1342401; CC BY-SA 4.0). By its own rule recordings 0 to 4
    are the test set (300), and 5 to 49 the training set.

    Args:
        root: the folder of its files, or a copy of the repository or of its archive (`archives.local_copy`).
        length: seconds of each sound.
        held_out: speakers, by name or number from 0, who are the test set, with all of their recordings; nobody trains on them.
        validation: the speaker who is the validation set, likewise. None: with `held_out` the first of the others, without it
            `val_size` of the training set.
        download: fetch files that are missing.
        options: those of `TensorData`.
    """
    read = functools.partial(_read_digits, root, _samples(length, DIGITS_RATE), held_out, validation, download)
    return _with_sound_views(TensorData(read, "spoken_digits", "classification", **options))


def sounds(root: str | Path, length: float = 1.0, sample_rate: int | None = None, **options: Any) -> TensorData:
    """Returns the sounds of a folder: `root/train/<class>/*.wav`, `root/test/…` and, where there is one, `root/val/…`.

    Without a test folder a fifth of each class of `train`, or of `root/<class>/…`, is the test set (`folder.read_splits`).

    Args:
        length: seconds of each sound; a longer one is cut to its middle, and a shorter one padded with silence at both ends.
        sample_rate: samples per second; None: the rate that most of the training files have.
        options: those of `TensorData`.
    """
    if root is None:
        raise UserError("data=sounds needs a folder of WAV files, one subfolder for each class: data.root=<folder>.")
    read = functools.partial(_read_folder, Path(root), length, sample_rate)
    return _with_sound_views(TensorData(read, "sounds", "classification", **options))


def _with_sound_views(data: TensorData) -> TensorData:
    own = [type(step).__name__ for step in data.augment if type(step).__module__.startswith("litdistill.data")]
    if wrong := [name for name in own if name not in {view.__name__ for view in SOUND_VIEWS}]:
        raise UserError(
            f"data.augment={', '.join(wrong)} is of images, and these are sounds: choose of "
            f"{', '.join(view.__name__ for view in SOUND_VIEWS)}."
        )
    return data


def _samples(length: float, rate: int) -> int:
    if not 0 < length <= LONGEST or round(length * rate) < 1:
        raise UserError(f"data.length={length} must be above 0 and at most {LONGEST:g} seconds.")
    return round(length * rate)


# -- the spoken digits -------------------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """What the name of a recording says, `7_theo_12.wav`."""

    digit: int
    speaker: str
    number: int


def _read_digits(
    root: str | Path,
    samples: int,
    held_out: Sequence[str | int] | None,
    validation: str | int | None,
    download: bool,
) -> TensorSource:
    files = archived("spoken_digits", SPOKEN_DIGITS, root, download)
    named = sorted((Recording(int(m[1]), m[2], int(m[3])), name) for name in files if (m := RECORDING.fullmatch(name)))
    found = [recording for recording, _ in named]
    waveforms = _fitted(
        [waves.decode(files[name], name) for _, name in named], DIGITS_RATE, samples, "the spoken digits"
    )
    names = sorted({recording.speaker for recording in found})
    testers = _speakers("data.held_out", held_out, names)
    validators = _speakers("data.validation", None if validation is None else [validation], names)
    if held_out is not None and not validators:
        validators = [name for name in names if name not in testers][:1]
    if both := set(testers) & set(validators):
        raise UserError(f"data.validation={', '.join(both)} is one of data.held_out: choose another speaker, or null.")
    if len(testers) + len(validators) >= len(names):
        raise UserError(f"data.held_out leaves no speaker to train on: there are {', '.join(names)}.")
    tested = torch.tensor([r.speaker in testers if testers else r.number < TESTED for r in found])
    targets = torch.tensor([r.digit for r in found])
    ids = {"train": (~tested).nonzero().flatten(), "test": tested.nonzero().flatten()}
    validated = torch.tensor([found[i].speaker in validators for i in ids["train"].tolist()])
    if testers:
        say(
            [f"Speakers: {', '.join(testers)} to test, {', '.join(validators)} to validate, the others to train on."],
            "",
        )

    def show(split: str, i: int) -> str:
        return f"recording {found[ids[split][i]].number} of {found[ids[split][i]].speaker}"

    return TensorSource(
        TensorSplit(waveforms[ids["train"]], targets[ids["train"]]),
        TensorSplit(waveforms[ids["test"]], targets[ids["test"]]),
        DIGITS,
        _modality(DIGITS_RATE, samples),
        validated.nonzero().flatten() if validators else None,
        {"sample_rate": DIGITS_RATE},
        show,
    )


def _speakers(option: str, chosen: Sequence[str | int] | None, names: Sequence[str]) -> list[str]:
    """Returns the names of speakers that an option gives by name or number. Raises `UserError` for an unknown one."""
    found = []
    for one in chosen or ():
        if type(one) is int and 0 <= one < len(names):
            found.append(names[one])
        elif one in names:
            found.append(str(one))
        else:
            near = difflib.get_close_matches(str(one), names, 1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}, or 0 to {len(names) - 1}."
            raise UserError(f"{option}: there is no speaker {one}; {known}")
    return list(dict.fromkeys(found))


def _modality(rate: int, samples: int) -> Modality:
    return Modality(SOUND, {"sample_rate": rate, "samples": samples})


# -- a user's own ------------------------------------------------------------------------------------------------------


def _read_folder(root: Path, length: float, sample_rate: int | None) -> TensorSource:
    found = read_splits(root, SOUNDS)
    rate = sample_rate or _usual_rate(found.train)
    samples = _samples(length, rate)
    splits = {}
    for name, part in (("train", found.train + found.val), ("test", found.test)):
        read = [waves.read_wave(file.path) for file, _ in part]
        what = f"the {'training' if name == 'train' else 'test'} sounds"
        splits[name] = TensorSplit(_fitted(read, rate, samples, what), torch.tensor([label for _, label in part]))
    paths = {"train": found.train + found.val, "test": found.test}

    def show(split: str, i: int) -> str:
        return one_line(paths[split][i][0].path.name)

    validation = torch.arange(len(found.train), len(paths["train"])) if found.val else None
    facts = {"sample_rate": rate}
    return TensorSource(
        splits["train"], splits["test"], found.classes, _modality(rate, samples), validation, facts, show
    )


def _usual_rate(files: Labeled) -> int:
    """Returns the rate that most of the files state."""
    rates = Counter(rate for file, _ in files if (rate := waves.stated_rate(file.path)))
    if not rates:
        waves.read_wave(files[0][0].path)  # says why
        raise UserError("The rate of these sounds is unknown: set data.sample_rate, such as 16000.")
    return rates.most_common(1)[0][0]


def _fitted(read: Sequence[waves.Wave], rate: int, samples: int, what: str) -> Tensor:
    """Returns the waveforms (N, samples) at one rate, and says of how many sounds rate or length were changed."""
    made = np.empty((len(read), samples), np.float32)
    lengths = np.empty(len(read), np.int64)
    for i, wave in enumerate(read):
        own = waves.resampled(wave, rate)
        lengths[i], made[i] = len(own), waves.fitted(own, samples)
    longer, shorter = int((lengths > samples).sum()), int((lengths < samples).sum())
    changes = [f"{longer:,} longer cut to their middle"] * bool(longer)
    changes += [f"{shorter:,} shorter padded with silence"] * bool(shorter)
    others = Counter(wave.rate for wave in read if wave.rate != rate)
    changes += [f"{count:,} resampled from {other:,}" for other, count in others.most_common(3)]
    said = f" ({', '.join(changes)})" if changes else ""
    size = quantity(len(read), "sound")
    say([f"Waveforms of {what}: {size} of {samples / rate:g} s at {rate:,} samples a second{said}."], "")
    return torch.from_numpy(made)

"""Sounds: the spoken digits and their speakers, folders of WAV files, and what `predict` reads."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.io import wavfile

from litdistill.config.build import build_net
from litdistill.data import archives, fetch, sound
from litdistill.data.archives import SPOKEN_DIGITS, to_tar, unpacked
from litdistill.data.sound import sounds, spoken_digits
from litdistill.export.export import export
from litdistill.export.predict import load, predict
from litdistill.export.readers import READERS
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.manifest import check_facts
from tests.conftest import compose_config

SPEAKERS = ("anna", "bob", "carl", "dora")
PER_DIGIT = 7  # recordings of each digit and speaker


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


def spoken(digit: int, speaker: int, number: int) -> bytes:
    """A tone of half a second, different for every recording."""
    seconds = np.arange(4000 + 10 * number) / 8000
    pitch = 200 + 150 * digit + 10 * speaker
    return wav((8000 * np.sin(2 * np.pi * pitch * seconds + number)).astype(np.int16))


FILES = {
    f"{digit}_{name}_{number}.wav": spoken(digit, speaker, number)
    for digit in range(10)
    for speaker, name in enumerate(SPEAKERS)
    for number in range(PER_DIGIT)
}


def archive(files: dict[str, bytes], top: str = "free-spoken-digit-dataset-26eb9aa", mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, content in {
            f"{top}/README.md": b"text",
            **{f"{top}/recordings/{k}": v for k, v in files.items()},
        }.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(content), 1234
            tar.addfile(about, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def published(monkeypatch):
    """The set has the recordings of `FILES`, and its host sends them in an archive."""
    sha = archives.digest(to_tar(FILES, SPOKEN_DIGITS.folder))
    monkeypatch.setattr(sound, "SPOKEN_DIGITS", SPOKEN_DIGITS._replace(sha256=sha))
    monkeypatch.setattr(archives, "download", lambda url: archive(FILES))
    known = fetch.DATASETS["spoken_digits"]._replace(digests={"recordings.tar": sha})
    monkeypatch.setitem(fetch.DATASETS, "spoken_digits", known)


# -- the spoken digits -------------------------------------------------------------------------------------------------


def test_the_official_split_is_by_recording(tmp_path, published):
    data = spoken_digits(tmp_path, val_size=0.25)
    data.setup()
    assert (data.count("test"), data.count("train") + data.count("val")) == (10 * 4 * 5, 10 * 4 * 2)
    assert data.count("val") == 20
    assert data.input_shape == (8000,)
    numbers = {split: {int(data.show(split, i).split()[1]) for i in range(80)} for split in ("train", "test")}
    assert numbers == {"train": {5, 6}, "test": {0, 1, 2, 3, 4}}
    x, y = data.source.test
    for i in (0, 77, 199):
        number, name = data.show("test", i).removeprefix("recording ").split(" of ")
        own = spoken(int(y[i]), SPEAKERS.index(name), int(number))
        samples = wavfile.read(io.BytesIO(own))[1] / 2**15
        start = (8000 - len(samples)) // 2
        assert torch.equal(x[i, start : start + len(samples)], torch.from_numpy(samples).float())
        assert x[i].count_nonzero() <= len(samples)


def test_speakers_who_are_held_out_are_in_no_training_set(tmp_path, published):
    data = spoken_digits(tmp_path, held_out=["dora", 1])
    data.setup()
    who = lambda split, ids: {data.show(split, int(i)).split(" of ")[1] for i in ids}  # noqa: E731
    assert who("test", data.test_ids) == {"dora", "bob"}
    assert who("train", data.val_ids) == {"anna"}  # the first of the others
    assert who("train", data.train_ids) == {"carl"}
    assert (data.count("test"), data.count("val"), data.count("train")) == (140, 70, 70)
    other = spoken_digits(tmp_path, held_out=["dora"], validation="carl")
    other.setup()
    assert {other.show("train", int(i)).split(" of ")[1] for i in other.val_ids} == {"carl"}


def test_the_archive_is_fetched_once_and_then_read_offline(tmp_path, published, monkeypatch):
    first = spoken_digits(tmp_path)
    first.setup()
    monkeypatch.setattr(archives, "download", lambda url: pytest.fail("fetched again"))
    again = spoken_digits(tmp_path, download=False)
    again.setup()
    assert again.identity("test") == first.identity("test")
    assert [p.name for p in (tmp_path / "spoken_digits").iterdir()] == ["recordings.tar"]


@pytest.mark.parametrize("form", ["folder", "repository", "gz", "xz"])
def test_a_local_copy_is_read_where_it_lies_and_nothing_is_written(form, tmp_path, published, monkeypatch):
    monkeypatch.setattr(archives, "download", lambda url: pytest.fail("fetched"))
    if form in ("gz", "xz"):
        (tmp_path / f"free_spoken_digits.tar.{form}").write_bytes(archive(FILES, ".", f"w:{form}"))
    else:
        place = tmp_path / ("recordings" if form == "folder" else "free-spoken-digit-dataset/recordings")
        place.mkdir(parents=True)
        for name, content in FILES.items():
            (place / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    data = spoken_digits(tmp_path, download=False)
    data.setup()
    assert data.count("test") == 200
    assert sorted(tmp_path.rglob("*")) == before


def test_an_altered_copy_is_refused_and_fetched_instead(tmp_path, published, caplog):
    bad = FILES | {"3_anna_2.wav": FILES["3_anna_2.wav"][:-2] + b"\0\1"}
    (tmp_path / "digits.tar.gz").write_bytes(archive(bad))
    with pytest.raises(UserError, match=r"not tried, since download=false") as caught:
        spoken_digits(tmp_path, download=False).setup()
    assert "280 recordings of spoken digits, which are not the" in caplog.text
    assert "the repository's archive, or its folder recordings" in str(caught.value)
    data = spoken_digits(tmp_path)
    data.setup()
    assert data.count("test") == 200


def test_what_no_archive_of_recordings_holds_is_refused():
    for content in (archive({}), archive({"0_anna_0.wav": bytes(2**20 + 1)})):
        with pytest.raises(ValueError, match=r"holds no recordings|plausible size"):
            unpacked(SPOKEN_DIGITS, content)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        link = tarfile.TarInfo("recordings/0_anna_0.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="plausible size"):
        unpacked(SPOKEN_DIGITS, made.getvalue())


@pytest.mark.network
def test_the_set_itself(tmp_path):
    beside = Path(__file__).parents[2] / "shared" / "data"  # a copy, where there is one
    data = spoken_digits(beside if (beside / "free_spoken_digits.tar.xz").is_file() else tmp_path)
    data.setup()
    assert (len(data.source.train.inputs), data.count("test")) == (2700, 300)
    assert data.source.train.targets.bincount().tolist() == [270] * 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"held_out": ["ana"]}, r"data\.held_out: there is no speaker ana; did you mean anna\?"),
        ({"held_out": [7]}, "no speaker 7; there are anna, bob, carl, dora, or 0 to 3"),
        ({"held_out": ["anna"], "validation": "anna"}, "data.validation=anna is one of data.held_out"),
        ({"held_out": [0, 1, 2]}, "leaves no speaker to train on"),
        ({"length": 1000}, "data.length=1000.*at most 120 seconds"),
        ({"augment": ["Flip"]}, "Flip is of images, and these are sounds: choose of TimeShift"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says, tmp_path, published):
    with pytest.raises(UserError, match=says):
        spoken_digits(tmp_path, **options).setup()


# -- a user's own ------------------------------------------------------------------------------------------------------


def record(root: Path, layout: dict[str, int], rate: int = 8000, seconds: float = 0.5) -> None:
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng([i, rate, *place.encode()]).integers(-9000, 9000, round(rate * seconds))
            (root / place / f"{i}-{rate}.wav").write_bytes(wav(noise.astype(np.int16), rate))


def test_a_folder_of_sounds_is_read_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record(tmp_path, {"train/no": 6, "train/yes": 6, "val/no": 2, "val/yes": 2, "test/no": 3, "test/yes": 3}, 16000)
    record(tmp_path, {"train/yes": 2}, 44100, seconds=1.5)
    (tmp_path / "train/no/song.mp3").write_bytes(b"ID3")
    data = sounds(tmp_path, length=1.0)
    data.setup()
    assert data.class_names == ("no", "yes")
    assert data.input_shape == (16000,)
    assert (data.count("train"), data.count("val"), data.count("test")) == (14, 4, 6)
    assert {data.show("train", int(i)) for i in data.val_ids} == {"0-16000.wav", "1-16000.wav"}
    assert dict(data.modality.options) == {"sample_rate": 16000, "samples": 16000}
    said = caplog.text
    assert "24 sounds (24 .wav), 2 classes: no 11, yes 13" in said
    assert "1 .mp3 (convert them to .wav)" in said
    assert (
        "18 sounds of 1 s at 16,000 samples a second (2 longer cut to their middle, 16 shorter padded with silence"
        in said
    )
    assert "2 resampled from 44,100" in said
    at_8k = sounds(tmp_path, length=0.25, sample_rate=8000)
    at_8k.setup()
    assert at_8k.input_shape == (2000,)


def test_without_a_test_folder_a_fifth_is_held_out(tmp_path):
    record(tmp_path, {"no": 10, "yes": 10})
    data = sounds(tmp_path)
    data.setup()
    assert data.count("test") == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zero.wav", wav(np.zeros(0, np.int16)), "zero.wav has no samples: it is 0 s long"),
        ("cut.wav", wav(np.ones(500, np.int16))[:700], "cut.wav is truncated"),
        ("song.wav", b"ID3" + bytes(99), "song.wav is an MP3"),
        ("nan.wav", wav(np.full(9, np.nan, np.float32)), "nan.wav has 9 samples that are no finite numbers"),
    ],
)
def test_a_bad_file_is_named_with_the_remedy(name, content, says, tmp_path):
    record(tmp_path, {"no": 5, "yes": 5})
    (tmp_path / "no" / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        sounds(tmp_path).setup()
    assert "\n" not in str(caught.value)


def test_other_classes_in_the_test_set_and_folders_without_sounds_are_refused(tmp_path):
    record(tmp_path / "a", {"train/no": 3, "train/yes": 3, "test/no": 2, "test/maybe": 2})
    with pytest.raises(
        UserError, match=r"only in train yes, only in test maybe\. Make both hold the same class folders"
    ):
        sounds(tmp_path / "a").setup()
    record(tmp_path / "b", {"no": 3, "yes": 0})
    with pytest.raises(UserError, match=r"yes holds no sound\. Add some, or remove the folder"):
        sounds(tmp_path / "b").setup()
    with pytest.raises(UserError, match=r"data=sounds needs a folder of WAV files.*data\.root"):
        sounds(None)


# -- predict -----------------------------------------------------------------------------------------------------------


def facts(**changes):
    modality = {"kind": "sound", "sample_rate": 8000, "samples": 8000, "files": {}}
    entry = {
        "format": "onnx", "preprocessing": False, "classes": ["a", "b"], "mean": [], "std": [], "size": None,
        "input_shape": [8000], "kind": "categorical", "modality": modality, "units": None,
    }  # fmt: skip
    return check_facts(json.loads(json.dumps(entry | changes)), Path("student.onnx"))


def test_predict_reads_sounds_as_training_does(tmp_path, caplog):
    record(tmp_path, {"no": 3, "yes": 3}, seconds=1.25)
    record(tmp_path, {"no": 2, "yes": 2}, 11025)
    data = sounds(tmp_path, sample_rate=8000, val_size=2)
    data.setup()
    paths = {path.name: path for path in tmp_path.rglob("no/*.wav")}
    ids = [i for i in range(len(data.source.train.inputs)) if data.source.train.targets[i] == 0]
    given = [paths[data.show("train", i)] for i in ids]
    ((labels, inputs),) = READERS["sound"](given, facts(), tmp_path)
    assert [label["sound"] for label in labels] == [str(path) for path in given]
    assert torch.equal(torch.from_numpy(inputs), data.source.train.inputs[ids])
    assert "resampled from 11,025 to 8,000 samples a second" in caplog.text
    assert "1.25 s long, of which the middle 1 s count" in caplog.text


def test_predict_refuses_a_manifest_without_a_rate(tmp_path):
    for options in ({}, {"sample_rate": "8000"}, {"sample_rate": -1}):
        about = facts(modality={"kind": "sound", **options, "files": {}})
        with pytest.raises(UserError, match="states no sample rate: export it again"):
            next(READERS["sound"]([tmp_path / "a.wav"], about, tmp_path))


# -- from the command's config to the files that are shipped -------------------------------------------------------------


def test_a_run_on_sounds_of_ones_own_is_exported_and_predicts_its_files(tmp_path):
    pytest.importorskip("onnxruntime")
    tones = {"high": 900, "low": 300}
    for name, hertz in tones.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(30):
            at = np.arange(4000) / 8000
            noise = np.random.default_rng([i, hertz]).normal(0, 300, 4000)
            sound = 3000 * np.sin(2 * np.pi * (hertz + 5 * i) * at) + noise
            (tmp_path / "data" / name / f"{i}.wav").write_bytes(wav(sound.astype(np.int16)))
    cfg = compose_config(
        tmp_path / "run",
        *(
            "data=sounds",
            f"data.root={tmp_path / 'data'}",
            "data.length=0.5",
            "data.batch_size=12",
            "data.val_size=0.25",
        ),
        *("net@student=sound_conv", "student.options.widths=[8,8]", "student.bands=16", "method=kd"),
        *("net@teacher=sound_conv_wide", "teacher.options.widths=[8,16]", "+teacher.recipe.trainer.max_epochs=8"),
        *(
            "data.augment=[{TimeShift:{samples:100}},{Noise:{most:0.01}}]",
            "data.labels=24",
            "+teacher.recipe.data.labels=null",
        ),
        *("trainer=cpu", "trainer.max_epochs=8", "optimizer.lr=0.01", "logger=tensorboard"),
    )
    cfg.runs = str(tmp_path)
    write_text(tmp_path / "run" / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["kind"] == "sound"
    assert summary["teacher"]["test"]["accuracy"] == 1
    path, check = export(tmp_path / "run")
    assert check["difference"] < 1e-3
    given = sorted((tmp_path / "data").glob("*/*.wav"))
    found = predict(load(path), given, top=1)
    assert [one["sound"] for one in found] == list(map(str, given))
    right = [one["top"][0]["class"] == Path(one["sound"]).parent.name for one in found]
    assert sum(right) > 0.7 * len(right)


def test_a_network_of_images_is_refused_with_those_of_sounds(tmp_path, published):
    data = spoken_digits(tmp_path)
    data.setup()
    node = OmegaConf.create({"_target_": "litdistill.models.small.conv4"})
    with pytest.raises(UserError, match=r"student: conv4 does not take inputs of 8000 .*sound_conv for sounds"):
        build_net(node, data, "student")

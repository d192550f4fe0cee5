"""Weights from outside: nothing executes, nothing half-written, and clear words where they do not fit."""

import os
import pickle

import pytest
import torch

from litdistill.checkpoint import fit_weights, load_checkpoint, load_weights, save_student, write_atomically, write_text
from litdistill.errors import UserError
from litdistill.nets.small import conv4, mlp


def net(classes: int = 10, widths=(4, 4)):
    return conv4(classes, (1, 8, 8), widths=list(widths))


def test_a_student_comes_back_from_every_form(tmp_path):
    a = net()
    save_student(a, tmp_path / "run" / "student.safetensors", {"classes": "[]"})
    torch.save(a.state_dict(), tmp_path / "plain.pt")
    torch.save(
        {"state_dict": {f"student.{k}": v for k, v in a.state_dict().items()} | {"method.p": torch.ones(1)}},
        tmp_path / "a.ckpt",
    )
    for source in ("run", "run/student.safetensors", "plain.pt", "a.ckpt"):
        b = net()
        fit_weights(b, load_weights(tmp_path / source), source, "student")
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_a_pickle_bomb_does_not_go_off(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match=r"refused|damaged"):
        load_weights(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_checkpoint_names_those_nearby(tmp_path):
    torch.save(net().state_dict(), tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"no checkpoint at .*lost\.ckpt.*best\.ckpt"):
        load_checkpoint(tmp_path / "lost.ckpt")
    with pytest.raises(UserError, match=r"Was the run finished"):
        load_weights(tmp_path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_truncated_file_is_found_out(tmp_path, name):
    if name == "a.ckpt":
        torch.save(net().state_dict(), tmp_path / name)
    else:
        save_student(net(), tmp_path / name, {})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_weights(tmp_path / name)


def test_weights_of_another_network_are_refused_with_what_differs():
    with pytest.raises(UserError, match=r"missing.*not in this network.*net@teacher"):
        fit_weights(net(), mlp(10, (1, 8, 8)).state_dict(), "x", "teacher")
    with pytest.raises(UserError, match=r"is \(4, 1, 3, 3\) there and \(6, 1, 3, 3\) here"):
        fit_weights(net(widths=(6, 4)), net().state_dict(), "x", "student")
    with pytest.raises(UserError, match="trained on 10 classes, and this data has 2"):
        fit_weights(net(classes=2), net().state_dict(), "x", "teacher")


def test_what_is_written_is_whole_or_not_there(tmp_path):
    write_text(tmp_path / "a.json", "old")

    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomically(tmp_path / "a.json", fails)
    assert (tmp_path / "a.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "plain").touch()  # the umask decides who may read, as for any other file
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "summary.json", "x")

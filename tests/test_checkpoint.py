"""Weights from outside: nothing executes, nothing half-written, and clear words where they do not fit."""

import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from litdistill.models.small import conv4, mlp
from litdistill.utils.checkpoint import load_checkpoint, load_state_dict_checked, load_weights, save_student
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically, write_text


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
        load_state_dict_checked(b, load_weights(tmp_path / source), source, "student")
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


WRAPPINGS = {
    "DataParallel": lambda s: prefixed("module.", s),
    "LightningModule": lambda s: {"state_dict": prefixed("model.", s) | {"loss.weight": torch.ones(3)}, "epoch": 3},
    "torch.compile": lambda s: prefixed("_orig_mod.", s),
    "mdistiller": lambda s: {"model": s, "epoch": 240, "best_acc": 74.2},
    "net": lambda s: {"net": s, "acc": 98.0},
    "torch's tutorial": lambda s: {
        "model_state_dict": s,
        "optimizer_state_dict": {"state": {0: {}}, "param_groups": [{"lr": 1}]},
    },
    "two levels": lambda s: {"checkpoint": {"weights": prefixed("module.net.", s)}},
    "timm": lambda s: {"state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}},
    "a compiled Distiller": lambda s: {"state_dict": prefixed("student._orig_mod.", s) | {"method.p": torch.ones(1)}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_their_common_wrappings(tmp_path, wrapping):
    a, b = net(), net()
    torch.save(WRAPPINGS[wrapping](a.state_dict()), tmp_path / "a.pth")
    load_state_dict_checked(b, load_weights(tmp_path / "a.pth", b.state_dict().keys()), "a.pth", "teacher")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_prefix_that_does_not_fit_to_the_last_key_is_left(tmp_path):
    state = prefixed("module.", net().state_dict())
    del state["module.fc.bias"]
    torch.save(state, tmp_path / "a.pth")
    b = net()
    with pytest.raises(UserError, match=r"not in this network: module\."):
        load_state_dict_checked(b, load_weights(tmp_path / "a.pth", b.state_dict().keys()), "a.pth", "teacher")


def test_a_file_with_several_such_networks_names_them(tmp_path):
    state = net().state_dict()
    torch.save({"model": state, "teacher": prefixed("module.", state)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"several such networks: model\., teacher\.module\."):
        load_weights(tmp_path / "a.pth", state.keys())
    torch.save({"first": {"w": torch.ones(1)}, "second": {"v": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="none of this network: first, second"):
        load_weights(tmp_path / "a.pth", state.keys())


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


def archive(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world, this is text\n",
        b'{"a": 1}',
        b"<!DOCTYPE html>",
        b"\x89PNG\r\n\x1a\n" + b"x" * 100,
        bytes(5000),
        pickle.dumps({"a": 1}),
        archive({"a/b.txt": b"x"}),
        archive({"archive/data.pkl": pickle.dumps({"a": 1}), "archive/version": b"3"}),
    ],
)
def test_a_file_of_something_else_is_not_said_to_be_dangerous_nor_that_danger_helps(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="is damaged, or no file that") as refused:
        load_checkpoint(tmp_path / "a.ckpt")
    assert "weights_only" not in str(refused.value)


def test_a_network_saved_whole_is_refused_with_what_it_holds(tmp_path):
    torch.save(net(), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"Python objects \(torch\.nn\.[\w.]+\).*Save the state dict alone") as refused:
        load_checkpoint(tmp_path / "a.ckpt")
    assert "weights_only" not in str(refused.value)


def test_a_garbled_file_is_one_line_whatever_byte_it_is(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.ckpt")
    whole, draw = (tmp_path / "a.ckpt").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        garbled = bytearray(whole)
        for _ in range(3):
            garbled[draw.randrange(len(garbled))] = draw.randrange(256)
        (tmp_path / "a.ckpt").write_bytes(garbled)
        try:
            load_weights(tmp_path / "a.ckpt")
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("found", [{"state_dict": None}, {"state_dict": 3}, {1: torch.ones(1)}, {}, [1], 3])
def test_what_is_no_state_dict_is_said_to_be_none(tmp_path, found):
    torch.save(found, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no state dict of a network"):
        load_weights(tmp_path / "a.ckpt")


def test_images_of_another_kind_are_not_taken_for_other_classes():
    for here, there in (
        (conv4(10, (3, 8, 8), widths=[4, 4]), net()),
        (mlp(10, (1, 8, 8)), mlp(10, (1, 9, 9))),
    ):
        with pytest.raises(UserError, match="images of another size, or another number of channels"):
            load_state_dict_checked(here, there.state_dict(), "x", "student")


def test_weights_of_another_network_are_refused_with_what_differs():
    with pytest.raises(UserError, match=r"missing.*not in this network.*net@teacher"):
        load_state_dict_checked(net(), mlp(10, (1, 8, 8)).state_dict(), "x", "teacher")
    with pytest.raises(UserError, match=r"is \(4, 1, 3, 3\) in the file and \(6, 1, 3, 3\) in the network"):
        load_state_dict_checked(net(widths=(6, 4)), net().state_dict(), "x", "student")
    with pytest.raises(UserError, match="trained on 10 classes, and this data has 2"):
        load_state_dict_checked(net(classes=2), net().state_dict(), "x", "teacher")


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 832 vs 726"),
            "the disk is full, or a quota",
        ),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_a_disk_that_fills_while_others_write_is_one_line(tmp_path, error, reason):
    """torch says neither the system's error nor its number."""

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(UserError, match=rf"last.ckpt cannot be written: .*{reason}.*Free some space"):
        write_atomically(tmp_path / "last.ckpt", write)
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_a_writer_stays_a_defect(tmp_path):
    def write(temporary):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        write_atomically(tmp_path / "last.ckpt", write)


def test_equal_weights_and_metadata_are_equal_bytes_that_others_can_read(tmp_path):
    facts = {f"fact {i}": f"café {i}" for i in range(12)}
    made, found = net(), set()
    for i, order in enumerate((1, -1, 1, -1)):
        path = tmp_path / f"{i}.safetensors"
        save_student(made, path, dict(list(facts.items())[::order]))
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == facts
        assert all(torch.equal(file.get_tensor(k), v) for k, v in made.state_dict().items())


def test_numbers_of_numpy_beside_the_weights_are_read_and_no_other_object_of_it(tmp_path):
    net, keys = torch.nn.Linear(2, 2), ["weight", "bias"]
    best = {"best": np.float64(0.9), "epoch": np.int64(3), "done": np.bool_(True), "lr": np.float32(0.1)}
    torch.save({"model": net.state_dict(), **best}, tmp_path / "numbers.pt")
    assert torch.equal(load_weights(tmp_path / "numbers.pt", keys)["weight"], net.weight)
    assert load_checkpoint(tmp_path / "numbers.pt")["best"] == 0.9
    for name, other in {"curve": np.zeros(3), "text": np.array(["a"]), "object": np.array([net], dtype=object)}.items():
        torch.save({"model": net.state_dict(), name: other}, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match="refused"):
            load_checkpoint(tmp_path / f"{name}.pt")

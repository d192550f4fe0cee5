"""Every method of conf/method, with its published weights, on pairs of networks that its authors did not try.

One family, two families with other numbers of stages, and a teacher of tokens: a method trains the student there, term
by term, in float32 and under bfloat16 autocast, or says in one line that it needs spatial maps.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from litdistill.methods.base import Method
from litdistill.models.mobilenet import mobilenet_v2
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4
from litdistill.models.timm import timm_classifier
from litdistill.utils.errors import UserError
from tests.methods.contract import Reader, batch

CONF = Path(__file__).parents[2] / "conf"
YAMLS = sorted((CONF / "method").glob("*.yaml"))
NAMES = [p.stem for p in YAMLS if "litdistill.tasks." not in p.read_text()]  # without those of one task
SHAPE, CLASSES, N = (3, 32, 32), 10, 4

# Modules of methods that compare positions, and so have nothing to read in tokens: a new one is added, or works on tokens.
SPATIAL = {"ab", "at", "cwd", "fitnet", "fsp", "ft", "ickd", "kdsvd", "mgd", "nst", "ofd", "pkd", "reviewkd", "simkd"}
SPATIAL |= {"srrl", "vid"}
TWO_PHASES = {"ab", "fsp", "ft"}  # whose first epochs, under 1000 of them, have a loss of their own
LABELS_AFTERWARDS = {"ab", "fsp"}  # which have no more to say after their first epochs
METHODS_OWN = {"paraphraser"}  # terms that train the method's own networks and not the student

PAIRS = {
    "resnet14-resnet8": (lambda: resnet(CLASSES, SHAPE, 14), lambda: resnet(CLASSES, SHAPE, 8)),
    "resnet14-mobilenet_v2": (lambda: resnet(CLASSES, SHAPE, 14), lambda: mobilenet_v2(CLASSES, SHAPE)),
    "vit_tiny-conv4": (
        lambda: timm_classifier(CLASSES, SHAPE, "vit_tiny_patch16_224", patch_size=8),
        lambda: conv4(CLASSES, SHAPE),
    ),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """A pair's name, its teacher, whose BatchNorms have seen some images, and its student, to be copied."""
    if request.param.startswith("vit"):
        pytest.importorskip("timm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, student = (make() for make in PAIRS[request.param])
    with torch.no_grad():
        for _ in range(20):
            teacher.train()(torch.randn(N, *SHAPE))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    yield request.param, teacher.eval(), student
    torch.set_num_threads(threads)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def built(method: Method, teacher, student, example):
    """The calls of a distiller in their order: readers of the network that is trained and of the frozen teacher."""
    student = method.prepare(student, teacher, example)
    asked = method.taps()
    reader = Reader(student, example, asked.student)
    frozen = Reader(teacher.requires_grad_(False), example, asked.teacher)
    student.eval()
    try:
        with torch.no_grad():
            method.build(reader(example), frozen(example), torch.arange(40) % CLASSES)
    except UserError:
        frozen.remove()
        raise
    student.train()
    return reader, frozen


@pytest.mark.parametrize("name", NAMES)
def test_trains_the_student_or_says_that_it_needs_maps(pair, name):
    pair_name, teacher, student = pair
    torch.manual_seed(1)
    images, labels, ids = torch.randn(N, *SHAPE), torch.tensor([3, 1, 4, 1]), torch.tensor([3, 11, 34, 21])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        method = instantiate(compose(overrides=[f"+method={name}"]).method, _convert_="all")
    inside = {type(m).__module__.rpartition(".")[2] for m in method.modules()}  # of a sum, those it sums as well
    teacher.requires_grad_(True)  # as it comes, before anything freezes it
    if pair_name.startswith("vit") and inside & SPATIAL:
        with pytest.raises(UserError, match=f"^({'|'.join(inside)}) compares spatial maps") as error:
            built(method, teacher, copy.deepcopy(student), images[:2])
        assert "\n" not in str(error.value)
        return
    reader, frozen = built(method, teacher, copy.deepcopy(student), images[:2])
    student = reader.net
    trained = [*student.parameters(), *method.parameters()]
    assert not {id(p) for p in trained} & {id(p) for p in teacher.parameters()}
    wanted_grads = [p for p in student.parameters() if p.requires_grad]
    names = {}
    two_phases = bool(inside & TWO_PHASES)
    for epoch in (0, 1000):
        for low in (
            (False, True) if two_phases or epoch == 0 else (False,)
        ):  # otherwise the terms are those of the start
            method.set_epoch(epoch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                with torch.no_grad():
                    wanted = frozen(images) if method.needs_teacher else None
                terms = method(reader(images), wanted, batch(labels, ids))
            names[epoch, low] = set(terms)
            assert "hard" not in terms
            labels_alone = name == "supervised" or (epoch == 1000 and bool(inside & LABELS_AFTERWARDS))
            assert bool(terms) != labels_alone
            assert all(v.shape == () and v.dtype == torch.float32 and v.isfinite() for v in terms.values()), terms
            for key, term in terms.items():
                grads = torch.autograd.grad(term, wanted_grads, retain_graph=True, allow_unused=True)
                reached = any(g is not None and g.any() for g in grads)
                assert reached == (key.rpartition("_")[2] not in METHODS_OWN), f"{key} at epoch {epoch}, autocast {low}"
            if not terms:
                continue
            for p in trained:
                p.grad = None
            sum(terms.values()).backward()
            summed = [p.grad for p in trained if p.grad is not None]
            assert any(g.any() for g in summed)
            assert all(g.isfinite().all() for g in summed)
    frozen.remove()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert names[0, False] == names[0, True]
    assert names[1000, False] == names.get((1000, True), names[1000, False])
    assert (names[0, False] != names[1000, False]) == two_phases

"""Low rank and pruning in float64: against NumPy's SVD, brute force, zeroed channels and formulas of the sizes."""

import copy
import itertools
import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from litdistill.compress.low_rank import Layer, _uses, choose_ranks, factors, low_rank, set_ranks
from litdistill.compress.prune import prune
from litdistill.compress.restore import restore
from litdistill.compress.structure import load_structure, structure_of
from litdistill.config.build import build_net
from litdistill.models.mobilenet import mobilenet_v2
from litdistill.models.profile import count_macs, count_parameters
from litdistill.models.resnet import resnet
from litdistill.models.shufflenet import shufflenet_v1
from litdistill.models.small import conv4, lenet, mlp
from litdistill.models.wrn import wrn
from litdistill.utils.checkpoint import save_student
from litdistill.utils.errors import UserError

if find_spec("torch_pruning") is None:  # to import it takes seconds, in each process that collects tests
    pytest.skip("torch_pruning is not installed", allow_module_level=True)


def trained(net: nn.Module) -> nn.Module:
    """In float64 and eval mode, batch normalization with statistics of its own."""
    draw = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return net.double().eval()


def images(shape=(1, 8, 8), n=6):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LAYERS = {
    "conv": (nn.Conv2d(3, 7, 3, padding=1), (3, 8, 8)),
    "strided, dilated, no bias": (nn.Conv2d(4, 5, (3, 2), stride=2, padding=1, dilation=2, bias=False), (4, 9, 8)),
    "reflecting": (nn.Conv2d(2, 9, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "linear": (nn.Linear(11, 6), (11,)),
    "linear, no bias": (nn.Linear(4, 9, bias=False), (4,)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_at_full_rank_the_factors_give_what_the_layer_gave(layer):
    module, shape = LAYERS[layer]
    module, x = copy.deepcopy(module).double(), images(shape)
    full = min(module.weight.flatten(1).shape)
    torch.testing.assert_close(factors(module, full)(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_at_any_rank_the_factors_are_the_best_approximation_of_the_unfolded_kernel(layer, rank):
    module = copy.deepcopy(LAYERS[layer][0]).double()
    two = factors(module, rank)
    w = module.weight.detach().numpy().reshape(module.weight.shape[0], -1)
    inner, outer = (part.weight.detach().numpy() for part in two)
    product = outer.reshape(len(w), rank) @ inner.reshape(rank, -1)
    u, s, vt = np.linalg.svd(w)
    assert ((w - product) ** 2).sum() == pytest.approx((s[rank:] ** 2).sum(), abs=1e-13)  # Eckart and Young
    np.testing.assert_allclose(product, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-12)
    assert count_parameters(two) == rank * sum(w.shape) + (0 if module.bias is None else len(w))


def test_ranks_are_those_of_a_search_through_all_combinations():
    rng = np.random.default_rng(0)
    layers, spectra = [], [rng.random(n) ** 3 for n in (4, 5, 3)]
    for i, spectrum in enumerate(spectra):
        spectrum = np.sort(spectrum)[::-1] / spectrum.sum()
        layers.append(Layer(str(i), [1.0, *(1 - spectrum.cumsum()).tolist()], cost=9 + i, whole=30 + 5 * i))
    total = sum(layer.whole for layer in layers) + 10  # and ten that no rank changes

    def outcome(ranks):
        lost = sum(layer.tails[ranks[layer.name]] if layer.name in ranks else 0 for layer in layers)
        paid = sum(layer.cost * ranks[layer.name] if layer.name in ranks else layer.whole for layer in layers)
        return 10 + paid, lost

    options = [[None, *range(1, len(layer.tails))] for layer in layers]
    every = [
        outcome({str(i): r for i, r in enumerate(choice) if r is not None}) for choice in itertools.product(*options)
    ]
    for allowed in range(45, total + 1, 5):
        paid, lost = outcome(choose_ranks(layers, total, allowed))
        assert paid <= allowed
        # none that costs as little loses less
        assert lost <= min(other for cost, other in every if cost <= paid) + 1e-12
    with pytest.raises(UserError, match="too small: rank 1 everywhere"):
        choose_ranks(layers, total, 30)


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("budget", [0.15, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("net", [conv4(10, (1, 8, 8)), resnet(10, (1, 8, 8), 8), mlp(10, (1, 8, 8), (40, 30))])
def test_low_rank_keeps_to_its_budget_and_is_restored_from_plain_values(net, budget, of):
    net, x = trained(copy.deepcopy(net)), images()
    size = (lambda n: count_macs(n, (1, 8, 8))) if of == "macs" else count_parameters
    whole, before = size(net), net(x)
    blank = copy.deepcopy(net)
    small = low_rank(net, x, budget, of)
    assert size(small) <= budget * whole
    assert size(small) > 0.6 * budget * whole  # and uses it
    if budget == 1:
        torch.testing.assert_close(small(x), before)
    steps = json.loads(json.dumps(structure_of(small)))
    again = restore(blank, steps, x)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    assert structure_of(again) == steps


class Tokens(nn.Module):
    """A block of linear layers on 16 tokens of 4 numbers that is applied `times` times, and a wide classifier."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.up, self.down, self.fc = times, nn.Linear(4, 24), nn.Linear(24, 4), nn.Linear(64, 40)

    def forward(self, x):
        x = x.reshape(len(x), 16, 4)
        for _ in range(self.times):
            x = x + self.down(self.up(x).relu())
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_a_layer_counts_for_every_token_and_every_call(times, budget):
    torch.manual_seed(0)
    net = Tokens(times).double().eval()
    assert _uses(net, images()) == {"up": 16 * times, "down": 16 * times, "fc": 1}
    whole = count_macs(net, (1, 8, 8))
    assert whole == 2 * 16 * 24 * 4 * times + 64 * 40
    small = low_rank(net, images(), budget, "macs")
    assert 0.6 * budget * whole < count_macs(small, (1, 8, 8)) <= budget * whole


NETS = {
    "conv4": (conv4(10, (1, 8, 8)), (1, 8, 8)),
    "conv4, places apart": (conv4(10, (1, 8, 8), global_pool=False), (1, 8, 8)),
    "lenet": (lenet(10, (1, 12, 12)), (1, 12, 12)),
    "resnet": (resnet(10, (1, 8, 8), 8), (1, 8, 8)),
    "wrn": (wrn(10, (1, 8, 8), 10, 1), (1, 8, 8)),
    "mobilenet": (mobilenet_v2(10, (3, 32, 32), 0.25), (3, 32, 32)),
}


@pytest.mark.parametrize(("name", "budget"), [(name, 0.4) for name in NETS] + [("conv4", 0.1), ("resnet", 0.8)])
def test_a_pruned_network_is_the_old_one_with_those_channels_zeroed(name, budget):
    net, shape = NETS[name]
    net, x = trained(copy.deepcopy(net)), images(shape)
    small = prune(copy.deepcopy(net), x, budget)
    assert count_parameters(small) <= budget * count_parameters(net)
    zeroed, old = copy.deepcopy(net), dict(net.named_modules())
    cut = 0
    for layer, module in small.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # its numbers are all different: they say which channels are left
            kept = torch.isin(old[layer].running_mean, module.running_mean)
            assert kept.sum() == module.num_features
            cut += int((~kept).sum())
            twin = zeroed.get_submodule(layer)
            twin.weight.data[~kept], twin.bias.data[~kept] = 0, 0
        elif name == "lenet" and layer != "fc" and isinstance(module, (nn.Conv2d, nn.Linear)):
            kept = torch.isin(old[layer].bias, module.bias)
            cut += int((~kept).sum())
            twin = zeroed.get_submodule(layer)
            twin.weight.data[~kept], twin.bias.data[~kept] = 0, 0
    assert cut > 0
    torch.testing.assert_close(small(x), zeroed(x), rtol=0, atol=1e-10)


def test_the_parameters_of_a_pruned_network_are_those_of_the_formula():
    net, x = trained(conv4(10, (1, 8, 8), (20, 30, 40))), images()
    small = prune(net, x, 0.3)
    a, b, c = (getattr(small, f"layer{i}")[0].out_channels for i in (1, 2, 3))
    assert (small.layer2[0].in_channels, small.layer3[0].in_channels, small.fc.in_features) == (a, b, c)
    assert count_parameters(small) == 9 * (a + a * b + b * c) + 2 * (a + b + c) + 10 * c + 10 <= 0.3 * 16_970
    assert count_macs(small, (1, 8, 8)) == 9 * (64 * a + 16 * a * b + 4 * b * c) + 10 * c
    assert count_parameters(prune(conv4(10, (1, 8, 8), (a, b, c)).double(), x, 1.0)) == count_parameters(small)


def test_the_channels_that_go_are_those_of_the_smallest_norm():
    net = mlp(3, (1, 1, 6), (8,)).double()
    size = torch.tensor([5.0, 0.1, 4.0, 3.0, 0.2, 2.0, 0.3, 1.0], dtype=torch.float64)
    net.layer1[0].weight.data = torch.ones(8, 6, dtype=torch.float64) * size[:, None]
    net.layer1[0].bias.data = size.clone()
    net.fc.weight.data = torch.ones(3, 8, dtype=torch.float64) * size
    small = prune(net, images((1, 1, 6)), 0.65)
    assert small.layer1[0].bias.tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("name", NETS)
def test_a_pruned_network_is_restored_from_plain_values(name):
    net, shape = NETS[name]
    net, x = trained(copy.deepcopy(net)), images(shape)
    small = prune(net, x, 0.7, "macs")
    assert count_macs(small, shape) <= 0.7 * count_macs(net, shape)
    again = restore(copy.deepcopy(net), json.loads(json.dumps(structure_of(small))), x)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(x), small(x), rtol=0, atol=0)


def test_steps_add_up():
    net, x = trained(conv4(10, (1, 8, 8), (20, 30, 40))), images()
    blank = copy.deepcopy(net)
    small = low_rank(prune(net, x, 0.5), x, 0.5)
    assert [step["kind"] for step in structure_of(small)] == ["prune", "low_rank"]
    again = restore(blank, structure_of(small), x)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize(("way", "budget"), [(prune, 0.3), (low_rank, 0.1)])
def test_a_compressed_start_is_given_a_new_head_for_other_classes(tmp_path, way, budget, classes):
    small = way(trained(conv4(10, (1, 8, 8), (20, 30))), images(), budget)
    (step,) = structure_of(small)
    assert "fc" in step["layers"]
    save_student(small.float(), tmp_path / "student.safetensors", {"structure": json.dumps([step])})
    options = {
        "_target_": "litdistill.models.small.conv4",
        "widths": [20, 30],
        "checkpoint": str(tmp_path),
        "head": "new",
    }
    data = SimpleNamespace(num_classes=classes, input_shape=(1, 8, 8), class_names=tuple(map(str, range(classes))))
    net = build_net(OmegaConf.create(options), data, "student").eval()
    assert net(images().float()).shape == (6, classes)
    assert isinstance(net.fc, nn.Linear)  # a whole one, for the channels that are left
    body = {k: v for k, v in small.state_dict().items() if not k.startswith("fc")}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in body.items())
    again = restore(conv4(classes, (1, 8, 8), (20, 30)), structure_of(net), images().float())
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize("net", [shufflenet_v1(10, (3, 32, 32)), resnet(10, (3, 32, 32), 8, shortcut="pad")])
def test_a_network_that_counts_its_channels_is_refused(net):
    with pytest.raises(UserError, match=r"cannot be pruned .*compress=low_rank"):
        prune(net.double(), images((3, 32, 32)), 0.3)


@pytest.mark.parametrize("compress", [low_rank, prune])
@pytest.mark.parametrize(
    ("budget", "of", "message"), [(0, "parameters", "above 0"), (1.5, "macs", "at most 1"), (0.5, "bytes", "or macs")]
)
def test_a_wrong_budget_is_refused(compress, budget, of, message):
    with pytest.raises(UserError, match=message):
        compress(conv4(10, (1, 8, 8)).double(), images(), budget, of)


@pytest.mark.parametrize(
    "step",
    [
        {"kind": "os.system", "layers": {}},
        {"kind": "low_rank", "layers": {"layer9.0": 2}},
        {"kind": "low_rank", "layers": {"layer1.0": 10**9}},
        {"kind": "low_rank", "layers": {"layer1.0": True}},
        {"kind": "low_rank", "layers": {"layer1.1": 2}},
        {"kind": "prune", "layers": {"layer1.0": {"in_channels": 1, "out_channels": 10**9, "groups": 1}}},
        {"kind": "prune", "layers": {"layer1.0": {"out_channels": 4}}},
        {"kind": "prune", "layers": {"layer1.0": {"in_channels": 1, "out_channels": "4", "groups": 1}}},
        {"kind": "prune", "layers": {"pool": {"output_size": 2}}},
        {"layers": {}},
        "prune",
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(step):
    with pytest.raises(UserError, match=r"none of this network|no way of compressing"):
        restore(conv4(10, (1, 8, 8)), [step], torch.zeros(2, 1, 8, 8))


def test_a_damaged_structure_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors", {"structure": "[" * 100_000})
    (tmp_path / "b.safetensors").write_bytes(b"no such file")
    save_file({"w": torch.zeros(1)}, tmp_path / "c.safetensors", {"structure": "5"})
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match="damaged"):
            load_structure(tmp_path / f"{name}.safetensors")
    assert load_structure(tmp_path / "absent") == []


def test_set_ranks_leaves_other_layers_alone():
    net = conv4(10, (1, 8, 8))
    second = net.layer2[0]
    set_ranks(net, {"layer3.0": 3})
    assert net.layer2[0] is second
    assert net.layer3[0].inner.out_channels == 3

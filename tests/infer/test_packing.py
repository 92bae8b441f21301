"""Batches of texts of different length run without their padding where that is right, and only there."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdp.infer.model.embed import Embedder
from asyncdp.infer.model.packing import PackedEncoder, find_packing, packed
from asyncdp.infer.model.texts import PadTokens

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 40}
MODEL_TYPES = ["bert", "roberta", "xlm-roberta"]

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)


def make_encoder(model_type="bert", **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SMALL, **settings)
    encoder = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    return encoder.eval().requires_grad_(False)


def make_batch(lengths, pad=1):
    """Text of these lengths whose tokens differ; some of them hold the padding token themselves."""
    texts = [
        [(7 * index + 3 * place) % 30 for place in range(length)] for index, length in enumerate(lengths)
    ]
    return texts, PadTokens(pad)(texts)


def plain(embedder):
    """Return the encoder that transformers has made."""
    encoder = embedder.encoder
    return encoder.encoder if isinstance(encoder, PackedEncoder) else encoder


def num_tokens_seen(embedder, batch):
    """How many tokens a layer that treats each by itself is called with."""
    seen = []
    layer = plain(embedder).encoder.layer[0].intermediate
    with layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][..., 0].numel())):
        embedder(**batch)
    return seen


@pytest.fixture(scope="module", params=MODEL_TYPES)
def embedder(request):
    """A tiny encoder of each type that can run without padding."""
    encoder = packed(make_encoder(request.param))
    assert isinstance(encoder, PackedEncoder)
    return Embedder(encoder)


@given(LENGTHS)
@settings(max_examples=30, deadline=None)
def test_every_text_gets_the_vector_it_gets_alone(embedder, lengths):
    """Neighbours, order and lengths do not matter, and the padding token may be part of a text."""
    texts, batch = make_batch(lengths)
    alone = torch.cat([embedder(torch.tensor([text]))["embedding"] for text in texts])
    torch.testing.assert_close(embedder(**batch)["embedding"], alone)


@pytest.mark.parametrize("lengths", [[3, 9, 1, 3, 5], [0, 3, 0, 2]])
def test_padded_batches_give_the_same_vectors(embedder, lengths):
    """The attention over texts back to back still takes a padded batch; an empty text is a zero."""
    _, batch = make_batch(lengths)
    padded = Embedder(plain(embedder))
    torch.testing.assert_close(embedder(**batch), padded(**batch))


def test_nothing_is_computed_for_padding(embedder):
    """Layers see the tokens of the texts alone: 10 here, where padding makes 18 of them."""
    _, batch = make_batch([1, 6, 3])
    assert num_tokens_seen(embedder, batch) == [10]
    assert num_tokens_seen(Embedder(plain(embedder)), batch) == [18]


def test_copies_run_without_padding_too(embedder):
    """A replica runs with its own weights, and not with those of the encoder it was copied from."""
    replica = copy.deepcopy(embedder)
    for parameter in replica.parameters():
        parameter.mul_(1.5)
    texts, batch = make_batch([2, 5, 4])
    alone = torch.cat([replica(torch.tensor([text]))["embedding"] for text in texts])
    torch.testing.assert_close(replica(**batch)["embedding"], alone)
    assert not torch.allclose(alone, embedder(**batch)["embedding"])


def test_gradients_are_those_of_padded_batches():
    """Running without padding is differentiable."""
    encoder = make_encoder().requires_grad_(True)
    embedder = Embedder(packed(encoder))
    _, batch = make_batch([3, 1, 4])
    weights = list(encoder.parameters())
    target = torch.randn(3, 16)
    gradients = [
        torch.autograd.grad((each(**batch)["embedding"] * target).sum(), weights)
        for each in (embedder, Embedder(encoder))
    ]
    torch.testing.assert_close(*gradients)


def test_a_decoder_does_not_look_ahead():
    """Attention over the texts of one length stays causal where that of the encoder is."""
    encoder = make_encoder(is_decoder=True)
    embedder = Embedder(packed(encoder))
    texts, batch = make_batch([2, 5, 4])
    alone = torch.cat([embedder(torch.tensor([text]))["embedding"] for text in texts])
    torch.testing.assert_close(embedder(**batch)["embedding"], alone)


def test_a_compiler_gets_padded_batches(embedder, monkeypatch):
    """Code would have to be compiled again for all lengths of a batch."""
    _, batch = make_batch([1, 6, 3])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert num_tokens_seen(embedder, batch) == [18]


@pytest.mark.gpu
def test_a_gpu_gets_padded_batches(embedder):
    """There, attention by lengths would be many small kernels instead of one."""
    _, batch = make_batch([1, 6, 3])
    there = copy.deepcopy(embedder).to("cuda")
    batch = {name: each.to("cuda") for name, each in batch.items()}
    assert num_tokens_seen(there, batch) == [18]


def test_an_unknown_encoder_is_left_as_it_is():
    """Encoders whose tokens may meet outside of attention get padded batches and keep their attention."""
    config = transformers.AutoConfig.for_model("distilbert", vocab_size=30, dim=16, n_layers=1, n_heads=2)
    encoder = transformers.AutoModel.from_config(config)
    assert find_packing(encoder) is None
    assert encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("drop", [{"runs"}, {"position_ids"}])
def test_an_encoder_that_passes_nothing_on_is_left_as_it_is(drop):
    """Attention or embeddings do not get the further arguments: all texts would be taken for one."""
    encoder = make_encoder()
    forward = encoder.forward
    encoder.forward = lambda **given: forward(**{name: given[name] for name in given.keys() - drop})
    assert find_packing(encoder) is None
    assert encoder.config._attn_implementation == "sdpa"


def test_an_encoder_that_takes_nothing_more_is_left_as_it_is():
    """One that refuses the further arguments gets padded batches."""
    encoder = make_encoder()
    forward = encoder.forward
    encoder.forward = lambda input_ids, attention_mask=None, position_ids=None: forward(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
    )
    assert find_packing(encoder) is None
    assert encoder.config._attn_implementation == "sdpa"


def test_a_transformers_without_attention_of_ones_own_is_no_obstacle(monkeypatch):
    """Older versions pad."""
    encoder = make_encoder()
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace())
    assert find_packing(encoder) is None

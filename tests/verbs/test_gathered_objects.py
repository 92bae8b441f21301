"""Objects in outputs that hold tensors: registered classes, and the key-value caches of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import asyncdp
from asyncdp.errors import GatherError

from .models import Fn, numbered

pytestmark = pytest.mark.anyio


class Boxes:
    """Registered with torch's pytree; its scale is no part of it, but must agree."""

    def __init__(self, corners: Tensor, scale: int) -> None:
        self.corners, self.scale = corners, scale


class Masks:
    """Registered with optree."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


pytree.register_pytree_node(
    Boxes, lambda boxes: ([boxes.corners], boxes.scale), lambda children, scale: Boxes(*children, scale)
)
optree.register_pytree_node(
    Masks, lambda masks: ([masks.rows], None), lambda _, children: Masks(*children), namespace="asyncdp"
)


class Layers:
    """A cache that can be made of what it yields, as torch's own gather expects; nothing knows it."""

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.layers = list(layers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.layers)


class OpaqueCache:
    """A cache that offers nothing."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


async def test_registered_classes() -> None:
    """A class that torch's pytree or optree knows is gathered, and split, part by part."""
    module = Fn(lambda m, x, boxes: (Boxes(x, 3), Masks(-x), boxes))
    given = Boxes(numbered(4) * 2, 7)
    boxes, masks, same = await asyncdp.data_parallel(module, (numbered(4), given), "cpu*2")
    assert (type(boxes), boxes.scale, boxes.corners.tolist()) == (Boxes, 3, numbered(4).tolist())
    assert (type(masks), masks.rows.tolist()) == (Masks, (-numbered(4)).tolist())
    assert (same.scale, same.corners.tolist()) == (7, given.corners.tolist())


async def test_a_registered_class_must_agree() -> None:
    """What a registered class keeps beside its tensors is equal in all shards, or refused."""
    with pytest.raises(GatherError, match="shard 1"):
        await asyncdp.data_parallel(Fn(lambda m, x: Boxes(x, int(x[0]))), numbered(4), "cpu*2")


async def test_what_can_be_made_of_its_parts() -> None:
    """An object that is made of what it yields is gathered as by torch.nn.parallel, with gradients."""
    x = numbered(5).requires_grad_()
    module = Fn(lambda m, x: Layers([(x, x * 2), (x * 3, x * 4)]))
    found = await asyncdp.data_parallel(module, x, "cpu*2")
    assert type(found) is Layers
    assert [len(each) for layer in found for each in layer] == [5] * 4
    found.layers[1][0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0]] * 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OpaqueCache, "use_cache=False"),
        (lambda x: object(), "register_pytree_node"),
        (lambda x: {x}, "PerRow"),
    ],
    ids=["cache", "object", "set"],
)
async def test_refusals_say_what_to_do(make: Any, words: str) -> None:
    """What still cannot be gathered is refused with a remedy."""
    with pytest.raises(GatherError, match=words):
        await asyncdp.data_parallel(Fn(lambda m, x: {"state": make(x)}), numbered(4), "cpu*2")


# --- transformers ----------------------------------------------------------------------------

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
ENCODER_DECODER = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "mistral, sliding": (
        "MistralForCausalLM",
        "MistralConfig",
        {**SIZES, "num_key_value_heads": 1, "sliding_window": 3},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model with random weights that returns a cache, without dropout."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    cls, config, options = MODELS[request.param]
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options))
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def arguments(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(3, 40, (5, 7))}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 40, (5, 4))
    return {**batch, "use_cache": True}  # type: ignore[dict-item]


def parts(value: Any) -> list[Tensor]:
    """All tensors with rows that an output holds, also within its cache."""
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    if isinstance(value, dict):
        return [each for entry in value.values() for each in parts(entry)]
    if isinstance(value, (list, tuple)):
        return [each for entry in value for each in parts(entry)]
    return parts(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
async def test_outputs_with_caches(model: nn.Module, training: bool) -> None:
    """A model's output, its cache included, is what the model gives for the whole batch."""
    model.train(training)
    batch = arguments(model)
    with torch.set_grad_enabled(training):
        expected = model(**batch)
        found = await asyncdp.data_parallel(model, (), "cpu*2", module_kwargs=batch)
        async with asyncdp.DataParallel(model, "cpu*2", num_lanes="auto") as engine:
            again = await engine(**batch)
    assert list(found) == list(expected)
    assert type(found) is type(expected)
    assert len(parts(expected)) >= 5
    for each in (found, again):
        torch.testing.assert_close(parts(each), parts(expected))


async def test_generation_goes_on_from_a_gathered_cache(model: Any) -> None:
    """A gathered cache is whole: it is split again for the next token, which is what one device gives."""
    if model.config.is_encoder_decoder:
        pytest.skip("its next call needs the encoder's output too")
    model.eval()
    batch, last = arguments(model), torch.full((5, 1), 7)
    with torch.no_grad():
        first = model(**batch)
        name = next(key for key, value in first.items() if not isinstance(value, Tensor))
        expected = model(input_ids=last, **{name: first[name]}).logits
        async with asyncdp.DataParallel(model, "cpu*2", num_lanes="all") as engine:
            gathered = await engine(**batch)
            found = await engine(input_ids=last, **{name: gathered[name]})
    torch.testing.assert_close(found.logits, expected)

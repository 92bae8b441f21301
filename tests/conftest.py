"""Shared fixtures: the two event loops, and a guard against code that blocks them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  before `quick_collections`: as it is imported it asks for referrers
import pytest
import torch
from blockbuster import BlockBuster, blockbuster_ctx

from .runtime.helpers import Clock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for mark, num_needed in (("gpu", 1), ("multi_device", 2)):
        if num_devices < num_needed:
            skip = pytest.mark.skip(reason=f"needs {num_needed} CUDA device(s), torch sees {num_devices}")
            for item in items:
                if item.get_closest_marker(mark) is not None:
                    item.add_marker(skip)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every test marked `anyio` on both event loops."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Have tests that collect garbage look through their own, not through all that was imported before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def never_block_the_loop() -> Iterator[BlockBuster]:
    """Fail any test whose code makes a blocking call on an asyncio event loop's thread."""
    with blockbuster_ctx() as blockbuster:
        yield blockbuster


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time tasks by a clock that the test holds."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a word tokenizer, saved as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three", "four"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder

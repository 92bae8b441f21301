"""A pipeline of Ray Data: Parquet in, the rows through a model on all lanes of some workers, Parquet out.

    pip install 'asyncdp[ray,embed]'
    python docs/examples/ray_data.py texts vectors --model ./minilm --column text --workers 4 --cpus 8

Rows that the model refuses are kept, with the reason in the column `error`. A worker keeps its CPUs until
the end: leave some for the tasks that read and write, or Ray waits for ever.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pyarrow.dataset
import ray

from asyncdp.ray import map_batches_class


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline, on the cluster that `RAY_ADDRESS` names, else on this machine."""
    options = parse(arguments)
    ray.init(ignore_reinit_error=True)
    model = map_batches_class(options.model, columns=options.column, on_error="record")
    rows = ray.data.read_parquet(options.input).map_batches(
        model,
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_cpus=options.cpus,
        num_gpus=options.gpus,
    )
    rows.write_parquet(options.output)
    done = pyarrow.dataset.dataset(options.output)
    num_bad = done.count_rows(filter=pyarrow.dataset.field("error") != "")
    print(f"{done.count_rows()} rows, {num_bad} of them bad")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="files of Parquet")
    parser.add_argument("output", help="folder for files of Parquet")
    parser.add_argument("--model", required=True, help="module:factory, .pt2 file or Hugging Face folder")
    parser.add_argument("--column", help="what the model gets; else the only column, or a dict of all")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--cpus", type=int, default=1, help="of each worker; without GPUs one lane for each")
    parser.add_argument("--gpus", type=int, default=0, help="of each worker; one lane for each")
    parser.add_argument("--batch-size", type=int, default=1024, help="rows that Ray hands over at a time")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

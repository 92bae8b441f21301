"""The LitServe contender of bench_serving; a file of its own, since its workers must import the class.

python serving_litserve.py MODEL_FOLDER PORT MAX_BATCH_SIZE
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
from sentence_transformers import SentenceTransformer


class Api(litserve.LitAPI):
    """Sentences to vectors, as LitServe's own guide for batching does it."""

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self.model = SentenceTransformer(sys.argv[1], device="cpu")

    def decode_request(self, request):
        """One request has one text."""
        return request["texts"][0]

    def predict(self, texts: list[str]) -> Any:
        """Embed a batch."""
        return self.model.encode(list(texts), batch_size=len(texts), show_progress_bar=False)

    def encode_response(self, output):
        """Answer in the form of the other services."""
        return {"vectors": [output.tolist()]}


if __name__ == "__main__":
    api = Api(max_batch_size=int(sys.argv[3]), batch_timeout=0.01, api_path="/embed")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)

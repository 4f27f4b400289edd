"""The model of `servers` in LitServe: its workers decode, batch and run, and share the cores.

In a module of its own, since LitServe starts its workers anew and they import it.
"""

import argparse
from collections.abc import Sequence

import litserve
import torch
from fastapi import Request
from torch import Tensor

from benchmarks.peers.servers import PATH, Answer, Model
from server.settings import ModelSettings


class Classify(litserve.LitAPI):  # type: ignore[misc]
    """What a worker does; LitServe calls it."""

    def __init__(
        self, model: ModelSettings, rate: int, threads: int, max_batch: int, timeout: float
    ) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=timeout, api_path=PATH)
        self.settings, self.rate, self.threads = model, rate, threads

    def setup(self, device: str) -> None:
        """Load the model; `device` is the CPU."""
        torch.set_num_threads(self.threads)
        self.model = Model(self.settings, self.rate)

    def decode_request(self, request: Request) -> Tensor:
        """Return the image of a form: LitServe has parsed it."""
        return self.model.prepare(request["file"].file.read())

    def batch(self, inputs: list[Tensor]) -> Tensor:
        """Return a batch; not called where the largest one has one image."""
        return torch.stack(inputs)

    def predict(self, images: Tensor) -> Tensor:
        """Return the logits of a batch, or of a single image."""
        single = images.ndim == 3
        logits = self.model.run(images[None] if single else images)
        return logits[0] if single else logits

    def unbatch(self, logits: Tensor) -> list[Tensor]:
        """Return the logits of each image."""
        return list(logits)

    def encode_response(self, logits: Tensor) -> Answer:
        """Return the answer to one image."""
        return self.model.describe(logits)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["litserve"])
    parser.add_argument("port", type=int)
    parser.add_argument("model", metavar="JSON", help="settings of the model")
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds to wait for a batch")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(argv)
    threads = max(1, torch.get_num_threads() // options.workers)
    model = ModelSettings.model_validate_json(options.model)
    server = litserve.LitServer(
        Classify(model, options.rate, threads, options.max_batch, options.timeout),
        accelerator="cpu",
        workers_per_device=options.workers,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=options.port, num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main()

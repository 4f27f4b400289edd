"""Other ways to serve the same model, to be measured beside ours.

Each takes the same request, an image as the form field `file` of a POST to /v1/classify, decodes
and transforms it by the same functions, runs the same model in the same precision, at one rate for
all (at rate 0 the stock model of timm), and answers with the five most likely classes:

    plain      FastAPI and one thread, which decodes and runs image after image
    batching   FastAPI; decodes in a pool on arrival; one thread runs what has gathered

LitServe, if installed, is in `with_litserve`.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, File
from torch import Tensor

from server.engine.threads import set_torch_threads
from server.models.loading import load_model
from server.models.pictures import prepare
from server.models.served import ServedModel
from server.settings import ModelSettings, Settings

PATH = "/v1/classify"
Answer = dict[str, Any]


class Model:
    """A model at a rate, with its transform."""

    def __init__(self, settings: ModelSettings, rate: int) -> None:
        self.served: ServedModel = load_model(settings)
        self.rate = rate
        self.settings = Settings()

    def prepare(self, data: bytes) -> Tensor:
        """Return the image [3, H, W] that the model wants, as our server makes it."""
        return prepare(data, self.served, self.settings)

    def run(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of images [B, 3, H, W]."""
        with torch.inference_mode():
            if self.rate == 0:
                logits: Tensor = self.served.backbone.model(images)
                return logits
            outputs = self.served.at(self.rate, compensate=True)(images)
            return torch.stack([output.logits for output in outputs])

    def describe(self, logits: Tensor) -> Answer:
        """Return the answer to one image."""
        scores, classes = logits.softmax(dim=-1).topk(5)
        names = self.served.backbone.class_names
        return {
            "predictions": [
                {"index": index, "label": names[index], "score": score}
                for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
            ]
        }


def plain(model: Model) -> FastAPI:
    """Return the application that most people write first."""
    app, thread = FastAPI(), ThreadPoolExecutor(1)

    def work(data: bytes) -> Answer:
        return model.describe(model.run(model.prepare(data)[None])[0])

    @app.post(PATH)
    async def classify(file: Annotated[bytes, File()]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(thread, work, file)

    _add_health(app)
    return app


def batching(model: Model, max_batch: int, timeout: float, decoders: int) -> FastAPI:
    """Return an application with the batching that many people write next.

    A batch is run once `max_batch` images are there or `timeout` seconds after its first one.
    """
    waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor]]] = asyncio.Queue()
    pool = ThreadPoolExecutor(decoders, initializer=set_torch_threads, initargs=(1,))
    thread = ThreadPoolExecutor(1)

    async def run_batches() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            until = loop.time() + timeout
            with suppress(asyncio.TimeoutError):
                while len(batch) < max_batch:
                    left = until - loop.time()
                    batch.append(
                        await asyncio.wait_for(waiting.get(), left)
                        if waiting.empty()
                        else waiting.get_nowait()
                    )
            images = torch.stack([image for image, _ in batch])
            logits = await loop.run_in_executor(thread, model.run, images)
            for row, (_, future) in zip(logits, batch, strict=True):
                future.set_result(row)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batches = asyncio.create_task(run_batches())
        yield
        batches.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post(PATH)
    async def classify(file: Annotated[bytes, File()]) -> Answer:
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(pool, model.prepare, file)
        future: asyncio.Future[Tensor] = loop.create_future()
        waiting.put_nowait((image, future))
        return model.describe(await future)

    _add_health(app)
    return app


def _add_health(app: FastAPI) -> None:
    @app.get("/health")
    async def health() -> str:
        return "ok"


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["plain", "batching"])
    parser.add_argument("port", type=int)
    parser.add_argument("model", metavar="JSON", help="settings of the model")
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds to wait for a batch")
    options = parser.parse_args(argv)
    model = Model(ModelSettings.model_validate_json(options.model), options.rate)
    if options.kind == "plain":
        app = plain(model)
    else:
        app = batching(model, options.max_batch, options.timeout, Settings().decode_threads)
    uvicorn.run(app, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()

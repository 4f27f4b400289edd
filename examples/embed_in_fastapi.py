"""Put an elastic model into a FastAPI application of your own: each request has its rate.

    uvicorn --app-dir examples embed_in_fastapi:app
    curl -F file=@tocom/bundled/samples/cup.jpg 'localhost:8000/classify?rate=2'

All requests share one model and no lock, whatever their rates: a rate is an argument of the
forward, and nothing is written to the model. `tocom-serve` has batches, deadlines, bounded
queues and `rate=auto` besides.
"""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import torch
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Query, UploadFile
from PIL import Image
from pydantic import BaseModel
from timm.data import create_transform

import tocom
from adapters import compose, open_bank

#: Forwards at a time; each uses several processors by itself.
FORWARDS = 2


class Answer(BaseModel):
    """What a picture shows, and what it took to tell."""

    label: str
    score: float
    rate: int
    macs: int


class Classifier:
    """A model with the deltas of all its rates. Nothing changes after it is made."""

    def __init__(self, backbone: str, bank: str) -> None:
        self.backbone = tocom.load_backbone(backbone)
        opened = open_bank(bank)
        opened.check_fits(self.backbone)
        self.ladder = opened.ladder
        # Low-rank deltas are small, so that there is room for all of them. Where memory allows,
        # `tocom.fold` makes the forwards of a rate faster.
        self.deltas = [
            compose(opened, self.backbone.source, rate) for rate in range(opened.info.max_rate + 1)
        ]
        self._transform = create_transform(**self.backbone.data_config, is_training=False)

    def classify(self, data: bytes, rate: int) -> Answer:
        """Say what the picture in a file shows; any number of threads may ask at once."""
        with Image.open(io.BytesIO(data)) as picture:
            images = self._transform(picture.convert("RGB"))[None]  # [1, 3, H, W]
        model = self.backbone.model
        with torch.inference_mode():
            logits = tocom.forward(
                model,
                images,
                rate,
                self.deltas[rate],
                adapter=self.backbone.adapter,
                ladder=self.ladder,
            )
        score, index = logits[0].softmax(dim=-1).max(dim=-1)
        return Answer(
            label=self.backbone.class_names[int(index)],
            score=float(score),
            rate=rate,
            macs=tocom.cost(model, rate, ladder=self.ladder).macs,
        )


def create_app(
    backbone: str = "bundled:deit_tiny", bank: str = "bundled:deit_tiny_bank"
) -> FastAPI:
    """Return the application; its model is loaded when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.classifier = await to_thread.run_sync(Classifier, backbone, bank)
        app.state.forwards = CapacityLimiter(FORWARDS)
        yield

    app = FastAPI(title="My application", lifespan=lifespan)

    @app.post("/classify")
    async def classify(file: UploadFile, rate: Annotated[int, Query(ge=0)] = 0) -> Answer:
        classifier: Classifier = app.state.classifier
        if rate >= len(classifier.deltas):
            raise HTTPException(422, f"rate must be at most {len(classifier.deltas) - 1}")
        data = await file.read()
        try:
            # A forward takes milliseconds in which the event loop could answer nobody else, so it
            # runs in a thread. The limiter is the queue: others wait here, holding no thread.
            return await to_thread.run_sync(
                classifier.classify, data, rate, limiter=app.state.forwards
            )
        # To Pillow a damaged PNG is a SyntaxError.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise HTTPException(422, "the file is no picture that can be read") from error

    return app


app = create_app()

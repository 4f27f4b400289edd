"""The pooled features of images, for search, clustering and classifiers of one's own."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field
from torch.nn import functional as F

from server.engine.job import Answer
from server.inference.run import RateQuery, ask
from server.observe.log import INFERENCE
from server.schemas import Embedding, Embeddings, Problem
from server.v1 import answers, uploads
from server.web.problems import described, problem_of
from server.web.serving import Shared
from tocom import TocomError

router = APIRouter(tags=[INFERENCE])


class EmbedQuery(RateQuery):
    """Parameters of a request for features."""

    normalize: bool = Field(
        default=False, description="scale to length 1: a dot product is the cosine then"
    )


@router.post(
    "/v1/embed",
    responses=described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def embed(
    request: Request, query: Annotated[EmbedQuery, Query()], serving: Shared
) -> Embedding | Embeddings:
    """Return the features of images at the rate that the caller chooses, or `auto`.

    Images are sent and answered as those to classify are.
    """
    asked = await ask(request, serving, query)

    def describe(outcome: Answer | TocomError) -> Embedding | Problem:
        if isinstance(outcome, TocomError):
            return problem_of(request, outcome)
        features = outcome.output.features
        if query.normalize:
            features = F.normalize(features, dim=0)
        request_id = request.state.request_id
        return Embedding(
            embedding=features.tolist(),
            normalized=query.normalize,
            **answers.spent(outcome, query.rate, asked.deadline.spent, request_id),
        )

    results = [describe(outcome) for outcome in asked.outcomes]
    if asked.single:
        (only,) = results
        assert isinstance(only, Embedding)
        return only
    return Embeddings(results=results)

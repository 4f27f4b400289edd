"""Classifying images over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from server.engine.job import Answer
from server.inference.run import ClassifyQuery, ask, top_k
from server.observe.log import INFERENCE
from server.schemas import Classification, Classifications, Problem
from server.v1 import answers, uploads
from server.web.problems import described, problem_of
from server.web.serving import Shared
from tocom import TocomError

router = APIRouter(tags=[INFERENCE])


@router.post(
    "/v1/classify",
    # What nobody asked for (logits, a merge map) is left out; an absent bank is null.
    response_model_exclude_unset=True,
    responses=described(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": uploads.OPENAPI},
)
async def classify(
    request: Request, query: Annotated[ClassifyQuery, Query()], serving: Shared
) -> Classification | Classifications:
    """Classify images (JPEG, PNG or WebP) at the rate that the caller chooses, or `auto`.

    One image is the form field `file` or the whole body, and is answered by itself. Several are
    several fields `file`, or JSON of base64, and are answered together, in their order.
    """
    predictions = top_k(query.top_k, serving.models.get(query.model), serving.settings)
    asked = await ask(request, serving, query, trace=query.merge_map)

    def describe(outcome: Answer | TocomError) -> Classification | Problem:
        if isinstance(outcome, TocomError):
            return problem_of(request, outcome)
        spent, request_id = asked.deadline.spent, request.state.request_id
        return answers.classification(outcome, query, predictions, spent, request_id)

    results = [describe(outcome) for outcome in asked.outcomes]
    if asked.single:
        (only,) = results
        assert isinstance(only, Classification)
        return only
    return Classifications(results=results)

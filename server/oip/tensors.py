"""What a served model takes and gives in the tensors of the Open Inference Protocol.

Takes `image`, encoded pictures, or `pixels`, ready for the model; gives `logits`,
`probabilities` and `features`. A CLIP image tower gives `features` alone; a model of segmentation
takes `image` and gives `classes`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from server.engine.job import Answer
from server.errors import BadRequestError, ImageError, TooLargeError
from server.inference.ran import Ran
from server.models.pictures import prepare
from server.models.segmenting import Scene, ServedSegmenter
from server.models.served import RateWork, ServedModel
from server.oip.schemas import InferRequest, RequestedOutput
from server.oip.wire import InputTensor, OutputTensor
from server.settings import Settings
from server.web import encoded

IMAGE = "image"
PIXELS = "pixels"
LOGITS = "logits"
PROBABILITIES = "probabilities"
FEATURES = "features"
CLASSES = "classes"

#: A free dimension: the number of images, or how large they are.
FREE = -1

#: Pixels whose classes JSON may have: to write more takes seconds in which nothing else runs.
JSON_PIXELS = 2**21

#: What has no scores of classes, and why.
_UNSCORED = {FEATURES: f"{FEATURES} are no classes", CLASSES: f"{CLASSES} are of pixels"}

#: Datatype and shape, less the number of images, by the name of a tensor.
Tensors = Mapping[str, tuple[str, Sequence[int]]]


def inputs(model: ServedModel) -> Tensors:
    """Return what a model takes; one of them is sent."""
    taken: dict[str, tuple[str, Sequence[int]]] = {IMAGE: ("BYTES", [1])}
    if not isinstance(model, ServedSegmenter):
        taken[PIXELS] = "FP32", list(model.input_size)
    return taken


def outputs(model: ServedModel) -> Tensors:
    """Return what it gives."""
    if isinstance(model, ServedSegmenter):
        return {CLASSES: ("UINT8", [FREE, FREE])}
    classes = len(model.class_names)
    scored = {LOGITS: classes, PROBABILITIES: classes} if classes else {}
    shapes = {**scored, FEATURES: model.backbone.dimensions}
    return {name: ("FP32", [size]) for name, size in shapes.items()}


def max_images(settings: Settings) -> int:
    """Return how many images a request may have."""
    return min(settings.max_images, settings.max_queue)


def preparations(
    sent: Sequence[InputTensor], model: ServedModel, settings: Settings
) -> list[Callable[[], Tensor]]:
    """Return what makes each image of a request, to be called where images are decoded.

    Raises:
        BadRequestError: if the inputs are not what the model takes.
        TooLargeError: if there are more images than can ever be taken.
    """
    known = inputs(model)
    names = [each.name for each in sent]
    if len(sent) != 1 or names[0] not in known:
        raise BadRequestError(f"one of the inputs {', '.join(known)} is needed, got {names}")
    (only,) = sent
    datatype, shape = known[only.name]
    if only.datatype != datatype:
        raise BadRequestError(
            f"input {only.name!r} must have the datatype {datatype}, got {only.datatype[:40]!r}"
        )
    # Where an image is one element, its dimension may be left out.
    if list(only.shape[1:]) not in ([shape, []] if shape == [1] else [shape]):
        raise BadRequestError(
            f"input {only.name!r} must have the shape {[FREE, *shape]}, got {list(only.shape)}"
        )
    if only.shape[0] > max_images(settings):
        raise TooLargeError(
            f"a request may have {max_images(settings)} images here, got {only.shape[0]}"
        )
    if only.name == PIXELS:
        return [partial(_to_image, values) for values in only.floats()]
    in_json = not isinstance(only.content, memoryview)
    if isinstance(model, ServedSegmenter):
        pictures = [_from_base64(data) if in_json else data for data in only.strings()]
        return [Scene(data, model, settings) for data in pictures]
    decode = _prepare_base64 if in_json else prepare
    return [partial(decode, data, model, settings) for data in only.strings()]


def _prepare_base64(data: bytes, model: ServedModel, settings: Settings) -> Tensor:
    return prepare(_from_base64(data), model, settings)


def _from_base64(data: bytes) -> bytes:
    """Return an image of JSON, whose strings cannot hold pictures as they are."""
    try:
        return encoded.decode(data.decode())
    except ValueError as error:
        raise BadRequestError(f"in JSON images are base64, and this is not: {error}") from None


def _to_image(values: np.ndarray) -> Tensor:
    # Copied: who keeps an image of a request must not keep all of its body.
    image = torch.from_numpy(values.astype(np.float32, copy=True))
    if not image.isfinite().all():
        raise ImageError("its pixels must be finite numbers")
    return image


def wanted(request: InferRequest, model: ServedModel) -> Sequence[RequestedOutput]:
    """Return the outputs that a request asks for.

    Raises:
        BadRequestError: if the model does not have them, or not in that form.
    """
    known = outputs(model)
    if not request.outputs:
        return [RequestedOutput(name=name) for name in known]
    names = [each.name for each in request.outputs]
    for each in request.outputs:
        if each.name not in known:
            raise BadRequestError(f"the outputs are {', '.join(known)}; got {each.name[:40]!r}")
        if names.count(each.name) > 1:
            raise BadRequestError(f"output {each.name!r} is asked for more than once")
        if each.parameters.classification and each.name in _UNSCORED:
            raise BadRequestError(
                f"classification is of {LOGITS} or {PROBABILITIES}; {_UNSCORED[each.name]}"
            )
    return request.outputs


def results(
    request: InferRequest,
    asked: Sequence[RequestedOutput],
    scenes: Sequence[Scene],
    answers: Sequence[Answer],
    settings: Settings,
) -> list[OutputTensor]:
    """Return the outputs that were asked for.

    Where they are of pixels it waits until there is room for so many.

    Args:
        request: what was asked.
        asked: its outputs.
        scenes: the pictures, of a model of segmentation.
        answers: what the engine said of each.
        settings: of the server.

    Raises:
        BadRequestError: if pictures whose classes are asked for differ in size.
        TooLargeError: if together they have more pixels than one picture may have, or than JSON.
    """
    binary = request.parameters.binary_data_output
    if [each.name for each in asked] == [CLASSES]:
        own = asked[0].parameters.binary_data
        as_bytes = binary if own is None else own
        limit = settings.max_pixels if as_bytes else min(settings.max_pixels, JSON_PIXELS)
        return [OutputTensor(CLASSES, _class_maps(scenes, answers, limit, as_bytes), as_bytes)]
    return [_result(each, binary, answers) for each in asked]


def _class_maps(
    scenes: Sequence[Scene], answers: Sequence[Answer], limit: int, as_bytes: bool
) -> np.ndarray:
    """Return the classes [B, H, W] of pixels, as bytes."""
    sizes = sorted({scene.size for scene in scenes})
    if len(sizes) > 1:
        told = " and ".join(f"{width} x {height}" for height, width in sizes[:2])
        raise BadRequestError(
            f"the classes of a request are one tensor: its images must be of one size, got {told} "
            "pixels; send them one by one"
        )
    pixels = len(scenes) * math.prod(sizes[0])
    if pixels > limit:
        hint = "" if as_bytes else " in JSON: ask for binary output (binary_data_output)"
        raise TooLargeError(
            f"the images of a request have {pixels:,} pixels together; at most {limit:,} are "
            f"allowed{hint}"
        )
    pairs = zip(scenes, answers, strict=True)
    return np.stack([scene.classes(answer.output).numpy() for scene, answer in pairs])


def _result(asked: RequestedOutput, binary: bool, answers: Sequence[Answer]) -> OutputTensor:
    work = answers[0].work
    assert isinstance(work, RateWork)
    backbone = work.model.backbone
    values = torch.stack([answer.output.logits for answer in answers])
    if asked.name == FEATURES:
        features = torch.stack([answer.output.features for answer in answers])
        values = backbone.embedding(features, values)
    if asked.name == PROBABILITIES:
        values = backbone.scores(values)
    found = values.numpy()
    if asked.parameters.classification:
        found = _classified(values, asked.parameters.classification, work.model)
    own = asked.parameters.binary_data
    return OutputTensor(asked.name, found, binary if own is None else own)


def _classified(values: Tensor, count: int, model: ServedModel) -> np.ndarray:
    """Return `value:index:label` of the highest of values [B, C], as strings [B, count]."""
    names = model.backbone.class_names
    best = values.topk(min(count, len(names)))
    rows = [
        [f"{value:.6f}:{index}:{names[index]}" for value, index in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return np.array(rows, dtype=object)


def telling(answers: Sequence[Answer]) -> Answer:
    """Return the answer that stands for all: one that ran at the highest rate.

    Images whose rate is left to the server may run in several batches, at several rates. Of a
    cascade it is one that ran most often.
    """
    return max(answers, key=lambda each: (len(each.before), each.work.rate))


def parameters(answers: Sequence[Answer]) -> dict[str, int | float | bool | str]:
    """Return what ran, why and at which cost; `rates` in the images' order if they differ.

    An image that ran at several has all of them there: 4+0.
    """
    answer = telling(answers)
    ran = Ran.of_scene(answer) if isinstance(answer.output, Tensor) else Ran.of(answer)
    told: dict[str, int | float | bool | str] = {
        "ladder": ran.model.ladder.name,
        "method": ran.model.ladder.method.name,
        "rate": ran.rate,
        "reason": ran.reason,
        "source_rate": ran.model.source,
        "compensate": ran.compensate,
        "tokens": ran.cost.plan.tokens[-1],
        "macs": ran.macs,
        "macs_ratio": ran.macs_ratio,
        "batch_size": ran.batch_size,
    }
    if ran.bank_digest is not None:
        told["bank_digest"] = ran.bank_digest
    runs = [Ran.of(each).rates for each in answers]
    if len(set(runs)) > 1 or len(ran.rates) > 1:
        told["rates"] = ",".join("+".join(map(str, rates)) for rates in runs)
    return told

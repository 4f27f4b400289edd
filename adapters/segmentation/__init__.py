"""Tasks of segmentation: a decoder on a backbone's dense features, with classes and a palette."""

from adapters.segmentation.decoder import Decoder, DecoderInfo, LinearDecoder, MaskTransformer
from adapters.segmentation.task import (
    SegmentationInfo,
    SegmentationModel,
    Segmenter,
    is_segmentation,
    open_segmentation,
)

__all__ = [
    "Decoder",
    "DecoderInfo",
    "LinearDecoder",
    "MaskTransformer",
    "SegmentationInfo",
    "SegmentationModel",
    "Segmenter",
    "is_segmentation",
    "open_segmentation",
]

"""What the layers of a forward read of some pictures: what int8 is rounded by."""

import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom import ConfigError, FoldedWeights, Variant, bundled_folder
from tocom.pictures import in_rgb, turn_of

if TYPE_CHECKING:
    from tocom.engines.layers import Ranges  # needs OpenVINO

#: Pictures that count; on more of them answers were no nearer to those in fp32.
PICTURES = 64
#: Of them that run at once.
BATCH = 8
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Calibration:
    """Measures forwards on pictures, each forward once.

    The pictures are kept as the files they are. A measurement takes a second or two on one core.
    """

    def __init__(self, pictures: Path | None = None) -> None:
        """Read pictures: a folder or a tar file, of which `PICTURES` count; None: the samples.

        Raises:
            ConfigError: if there are none, or one cannot be opened.
        """
        source = bundled_folder("samples") if pictures is None else pictures
        files = _read(source)
        if not files:
            raise ConfigError(f"int8_pictures: there are no JPEG, PNG or WebP files in {source}")
        for name, data in files.items():
            _check(f"{name} in {source}", data)
        self._files = tuple(files.values())
        self._known: WeakKeyDictionary[FoldedWeights, dict[object, Ranges]] = WeakKeyDictionary()
        self._bare = FoldedWeights({})  # stands for no delta

    def __call__(self, engine: Any, forward: tuple[VisionTransformer, Variant]) -> "Ranges":
        """Return what the linear layers of a forward read, by the module that makes its graph."""
        model, variant = forward
        delta = variant.delta if isinstance(variant.delta, FoldedWeights) else self._bare
        known = self._known.setdefault(delta, {})
        # Not kept for their ranges; once they are gone, nothing else is equal to their references.
        beside = tuple(each and ref(each) for each in (variant.adapter, variant.learned))
        key = model, variant.ladder, variant.rate, variant.proportional, beside
        if key not in known:
            batches = torch.split(self._images(model), BATCH)
            whole = [batch for batch in batches if len(batch) == len(batches[0])]
            with torch.inference_mode():
                known[key] = engine.measure(*forward, whole, threads=1)
        return known[key]

    def _images(self, model: VisionTransformer) -> Tensor:
        """Return the pictures [B, 3, H, W] as a model wants them."""
        transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
        return torch.stack([transform(_decode(data)) for data in self._files])


def _check(name: str, data: bytes) -> None:
    try:
        _decode(data)
    except Exception as error:  # Pillow's formats raise what they like
        raise ConfigError(f"int8_pictures: {name}: {error}") from error


def _decode(data: bytes) -> Image.Image:
    """Return a picture as models see it in service."""
    image = Image.open(BytesIO(data))
    image.load()
    turn, picture = turn_of(image), in_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _read(source: Path) -> dict[str, bytes]:
    """Return the pictures that count, by name."""
    try:
        if source.is_dir():
            found = (path for path in source.rglob("*") if path.is_file())
            paths = {str(path.relative_to(source)): path for path in found}
            return {name: paths[name].read_bytes() for name in _chosen(paths)}
        with tarfile.open(source) as tar:
            members = {member.name: member for member in tar if member.isfile()}
            files = {name: tar.extractfile(members[name]) for name in _chosen(members)}
            return {name: file.read() for name, file in files.items() if file is not None}
    except Exception as error:  # so do the compressions of tar files
        raise ConfigError(
            f"int8_pictures: expected a folder of pictures or a tar file of them, got {source} "
            f"({error})"
        ) from error


def _chosen(names: Iterable[str]) -> list[str]:
    """Return names of as many pictures as count, from all over: folders may be classes."""
    pictures = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    if len(pictures) <= PICTURES:
        return pictures
    return [pictures[i * len(pictures) // PICTURES] for i in range(PICTURES)]

"""Loading backbones: timm's own schemes, the bundled models, local folders and files.

A backbone is a stock timm Vision Transformer and what one must know to use it. A model that is
not `supported` is refused before any picture is seen.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tocom.adapter import Adapter
from tocom.errors import BackboneError, ReductionError, UnsupportedModelError
from tocom.ladder import TOME, Ladder
from tocom.pruned import Channels, narrow
from tocom.reduction import ReductionWeights, method_of
from tocom.supported import check_supported

BUNDLED = "bundled:"
#: What a model folder calls the weights of the method of its ladder, if that is learned.
REDUCTION = "reduction.safetensors"


@dataclass(frozen=True)
class Backbone:
    """A loaded model in evaluation mode.

    Attributes:
        model: the stock timm model.
        name: how it was asked for.
        architecture: timm's name of it, such as `deit_tiny_patch16_224`.
        class_names: one a class; `class 0` ... where nobody says.
        source: the rate that the model was tuned at.
        ladder: what that rate means.
        proportional: whether merged tokens counted in attention by their size when it was tuned,
            and do where no bank says otherwise.
        tuned_from: digest of the backbone that it was tuned from; empty where nobody says.
        calibration: the multiplier that was searched for it, as its folder says; None: nothing.
        evaluation: what was measured of it, likewise.
        adapter: branches that it was tuned with, without which it is another model.
        learned: weights of its ladder's method, if that learns.
        multi_label: whether a picture has several classes, each scored by itself.
        task_digest: digest of the task folder that it was made from; empty if from none.
    """

    model: VisionTransformer
    name: str
    architecture: str
    class_names: tuple[str, ...]
    source: int = 0
    tuned_from: str = ""
    calibration: Any = None
    evaluation: Any = None
    adapter: Adapter | None = None
    learned: ReductionWeights | None = None
    task_digest: str = ""
    ladder: Ladder = TOME
    proportional: bool = True
    multi_label: bool = False

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """The pictures that the model wants, in timm's words (size, crop, mean, std)."""
        return dict(resolve_model_data_config(self.model))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the pictures that it wants.

        Raises:
            BackboneError: if its configuration says others than its weights are for.
        """
        channels, height, width = self.data_config["input_size"]
        own = tuple(self.model.patch_embed.img_size)
        if own != (height, width) and not self.model.dynamic_img_size:
            raise BackboneError(
                f"{self.name}: its weights are for pictures of {own} pixels, its configuration "
                f"says {(height, width)}"
            )
        return channels, height, width

    @cached_property
    def projects(self) -> bool:
        """Whether its head is no classifier but CLIP's projection: what it gives is the embedding.

        timm has the width of the projection as the number of classes. So it is one if weights of
        the architecture that timm knows have as many, and nobody names classes: towers that were
        tuned to classify have ImageNet's, or those of their folder or task.
        """
        count = self.model.num_classes
        if "_clip_" not in self.architecture or self.class_names != _unnamed(count):
            return False
        known = timm.list_pretrained(f"{self.architecture}.*")
        return any(timm.get_pretrained_cfg(name).num_classes == count for name in known)

    @property
    def max_rate(self) -> int:
        """The highest rate where no bank says one: all patches, shared among the blocks."""
        patches: int = self.model.patch_embed.num_patches
        return patches // len(self.model.blocks)

    def scores(self, logits: Tensor) -> Tensor:
        """Return how likely each class is, of logits [..., classes], from 0 to 1.

        Softmax: together they are 1. Where a picture has several classes, each is a sigmoid.
        """
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    @property
    def dimensions(self) -> int:
        """How many numbers an embedding has."""
        size: int = self.model.num_classes if self.projects else self.model.num_features
        return size

    def embedding(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the embedding [..., D]: what the head reads, or what it projects to."""
        return logits if self.projects else features

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights as fp32, whatever precision they were stored in."""
        return weights_digest(self.model, self.adapter, self.learned)


def load_backbone(
    name: str,
    architecture: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a Vision Transformer.

    Args:
        name: `bundled:NAME` (in this package); a folder with timm's `config.json` and
            `model.safetensors`; a `.safetensors` file (needs `architecture`); or what timm loads
            itself: `vit_small_patch16_224.augreg_in21k_ft_in1k`, `timm/...`, `hf-hub:...`,
            `local-dir:...`.
        architecture: timm's name of the model, for a bare weights file.
        device, dtype: where the weights go and what they become there.

    Raises:
        BackboneError: if it cannot be found or its weights do not fit.
        UnsupportedModelError: if its forward is not supported here.
    """
    if name.startswith(BUNDLED):
        folder = bundled_folder(name.removeprefix(BUNDLED))
        model, origin = _load_folder(folder, name), _origin(folder)
    elif Path(name).is_dir() or name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        model, origin = _load_folder(folder, name), _origin(folder)
    elif name.endswith(".safetensors"):
        model, origin = _load_file(Path(name), architecture), {}
    else:
        model, origin = _load_timm(name), {}
    check_supported(model, name)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if "ladder" in origin:
        origin["learned"] = _learned(origin["ladder"], model, folder)
    return Backbone(
        model=model,
        name=name,
        architecture=str(model.pretrained_cfg.get("architecture", architecture or name)),
        class_names=_class_names(model),
        **origin,
    )


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled model, bank or of `samples`.

    Raises:
        BackboneError: naming what is bundled.
    """
    folders = {folder.name: folder for folder in bundled_folders()}
    if name not in folders:
        raise BackboneError(f"nothing bundled is called {name!r}; there are: {', '.join(folders)}")
    return folders[name]


def bundled_folders() -> list[Path]:
    """Return the folders of all that is bundled, by name."""
    root = Path(str(resources.files("tocom") / "bundled"))
    return sorted(path for path in root.iterdir() if path.is_dir())


def weights_digest(
    model: VisionTransformer,
    adapter: Adapter | None = None,
    learned: ReductionWeights | None = None,
) -> str:
    """Return SHA-256 over names, shapes and fp32 values of the weights."""
    weights: dict[str, Tensor] = dict(model.state_dict())
    for i, (down, up) in enumerate(adapter.branches if adapter else ()):
        weights |= {f"blocks.{i}.adapter.down": down, f"blocks.{i}.adapter.up": up}
    weights |= {f"reduction.{name}": x for name, x in (learned.tensors if learned else {}).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_folder(folder: Path, name: str) -> VisionTransformer:
    try:
        pruned = _pruned(folder)
        model = timm.create_model(f"local-dir:{folder}", pretrained=pruned is None)
        if pruned is not None:
            check_supported(model, name)
            narrow(model, Channels.read(pruned, model))
            model.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        if (folder / "task.json").exists():
            raise BackboneError(
                f"{name} is a task folder: give it as the task of the backbone that it was tuned on"
            ) from error
        raise BackboneError(
            f"{name}: a model folder holds timm's config.json and model.safetensors; {error}"
        ) from error
    except UnsupportedModelError:
        raise
    except BackboneError as error:
        raise BackboneError(f"{name}: {error}") from error
    except Exception as error:  # timm raises whatever a wrong config.json leads it to
        raise BackboneError(
            f"{name}: cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if model.num_classes != (declared := model.pretrained_cfg["num_classes"]):
        # timm has left the head at random without a word.
        raise BackboneError(
            f"{name}: config.json declares {declared} classes, its model_args {model.num_classes}"
        )
    return model


def _pruned(folder: Path) -> Any:
    """Return what the folder of a pruned model says of its channels, which timm does not know."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("pruned") if path.exists() else None


def _origin(folder: Path) -> dict[str, Any]:
    """Return what our trainer wrote into timm's config.json, beside the model itself."""
    config = json.loads((folder / "config.json").read_text())
    source = config.get("source_rate", 0)
    if isinstance(source, bool) or not isinstance(source, int) or source < 0:
        raise BackboneError(f"{folder}: source_rate must be a whole number from 0, got {source!r}")
    proportional = config.get("proportional", True)
    if not isinstance(proportional, bool):
        raise BackboneError(f"{folder}: proportional must be true or false, got {proportional!r}")
    multi_label = config.get("multi_label", False)
    if not isinstance(multi_label, bool):
        raise BackboneError(f"{folder}: multi_label must be true or false, got {multi_label!r}")
    return {
        "source": source,
        "proportional": proportional,
        "multi_label": multi_label,
        "ladder": _ladder(config.get("ladder"), folder),
        "tuned_from": str(config.get("backbone_digest", "")),
        "calibration": config.get("calibration"),
        "evaluation": config.get("evaluation"),
    }


def _ladder(said: Any, folder: Path) -> Ladder:
    """Return the ladder of a source rate, as `ladder.json` has it; None: the paper's."""
    if said is None:
        return TOME
    try:
        method = method_of(said["method"]["name"], said["method"].get("options"))
        rungs = None if said["rungs"] is None else tuple(map(tuple, said["rungs"]))
        return Ladder(str(said["name"]), method, rungs, said["patches"])
    except (AttributeError, KeyError, TypeError, ReductionError) as error:
        raise BackboneError(
            f"{folder}: the ladder in config.json cannot be read ({type(error).__name__}: {error})"
        ) from error


def _learned(ladder: Ladder, model: VisionTransformer, folder: Path) -> ReductionWeights | None:
    """Return the weights of a ladder's method, as precise as the model; None: it learns nothing."""
    file = folder / REDUCTION
    if not ladder.method.learns:
        return None
    try:
        wanted = ladder.shapes(len(model.blocks), model.embed_dim, model.patch_embed.grid_size)
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise BackboneError(
            f"{folder} lacks {REDUCTION}, the weights of the method {ladder.method.name!r} of its "
            "ladder"
        ) from error
    except (ReductionError, SafetensorError) as error:
        raise BackboneError(f"{file} cannot be read: {error}") from error
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := [k for k in {**wanted, **there} if wanted.get(k) != there.get(k)]:
        raise BackboneError(
            f"{file} does not hold the weights of the ladder {ladder.name!r}: {len(wrong)} tensors "
            f"are missing, too many or of another shape, such as {', '.join(wrong[:4])}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise BackboneError(f"{file}: {name} must be finite numbers with fractions")
    weight = model.patch_embed.proj.weight
    return ReductionWeights(ladder.method, {name: x.to(weight) for name, x in tensors.items()})


def _load_file(path: Path, architecture: str | None) -> VisionTransformer:
    if not path.is_file():
        raise BackboneError(f"there is no weights file {path}")
    if architecture is None:
        raise BackboneError(
            f"{path} holds weights only: say which timm architecture they are of, as in "
            "architecture=vit_small_patch16_224 or, in a recipe, backbone.architecture=..."
        )
    if not timm.is_model(architecture):
        raise BackboneError(f"timm knows no architecture {architecture!r}")
    try:
        with safe_open(path, "pt") as file:
            head = file.get_slice("head.weight") if "head.weight" in file.keys() else None  # noqa: SIM118
            classes = head.get_shape()[0] if head is not None else 0
        model = timm.create_model(architecture, num_classes=classes)
        check_supported(model, architecture)  # rather than that its weights do not fit
        weights, wanted = load_file(path), model.state_dict()
        shapes, theirs = ({k: v.shape for k, v in each.items()} for each in (wanted, weights))
        if wrong := [k for k in {**shapes, **theirs} if shapes.get(k) != theirs.get(k)]:
            raise BackboneError(
                f"{path} does not hold the weights of {architecture}: {len(wrong)} tensors are "
                f"missing, too many or of another shape, such as {', '.join(wrong[:4])}"
            )
        model.load_state_dict(weights)
    except (RuntimeError, SafetensorError) as error:
        raise BackboneError(
            f"{path} does not hold the weights of {architecture}: {error}"
        ) from error
    return model


def _load_timm(name: str) -> VisionTransformer:
    spec = f"hf-hub:{name}" if name.startswith("timm/") else name
    try:
        return timm.create_model(spec, pretrained=True)
    except Exception as error:  # timm and the hub raise whatever their transport raises
        architecture = name.rpartition("/")[2].partition(".")[0]
        if timm.is_model(architecture):  # one that is not supported is no matter of the network
            check_supported(timm.create_model(architecture), name)
        raise BackboneError(
            f"timm cannot load {name!r} ({type(error).__name__}: {error}). Names are as in "
            f"timm.list_pretrained('vit_*'), {BUNDLED}NAME, a model folder or a .safetensors file; "
            "hub models need the network once, then the cache serves."
        ) from error


def _class_names(model: VisionTransformer) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, Mapping):  # timm allows {index: name}, which JSON makes strings
        names = [names.get(str(i), f"class {i}") for i in range(model.num_classes)]
    if names and len(names) == model.num_classes:
        descriptions = model.pretrained_cfg.get("label_descriptions") or {}
        return tuple(descriptions.get(name, name) for name in names)
    if model.num_classes > 1 and (subset := infer_imagenet_subset(model)):
        info = ImageNetInfo(subset)
        return tuple(info.index_to_description(i) for i in range(model.num_classes))
    return _unnamed(model.num_classes)


def _unnamed(count: int) -> tuple[str, ...]:
    """Return what classes are called that nobody names."""
    return tuple(f"class {i}" for i in range(count))

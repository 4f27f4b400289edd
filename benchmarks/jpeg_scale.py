"""Whether large JPEGs may be decoded at a reduced scale: what it changes and what it saves.

    python -m benchmarks.jpeg_scale --pictures eval.tar

The server lets the JPEG decoder skip to 1/2, 1/4 or 1/8 of the size, as long as the picture stays
twice as large as the model wants it. The same pictures are decoded in full and in this way, and
the model answers both.

Large pictures are made here by upscaling (Lanczos) and encoding small ones. They have no detail
that the small ones lacked, which makes it easier to leave detail out than with real photographs;
--photos measures those of a folder in their place.
"""

import argparse
import io
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine, subject
from benchmarks.estimates import markdown, spread
from benchmarks.subject import Subject
from server.models.pictures import decoding
from server.models.served import ServedModel
from server.settings import Settings


def enlarged(picture: bytes, factor: int, quality: int) -> bytes:
    """Return a picture as a JPEG of `factor` times its width and height."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    size = image.width * factor, image.height * factor
    written = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(written, "JPEG", quality=quality)
    return written.getvalue()


def picture_sets(
    what: Subject, options: argparse.Namespace
) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Yield sets of large JPEGs, with their names."""
    if options.photos:
        paths = sorted(options.photos.rglob("*"))
        jpegs = [path for path in paths if path.suffix.lower() in (".jpg", ".jpeg")]
        yield "photographs", map(Path.read_bytes, jpegs)
        return
    for factor in options.factors:
        name = f"{factor} times as large"
        yield name, [enlarged(picture, factor, options.quality) for picture in what.pictures]


class Comparison:
    """A model's answers to pictures that were decoded in full and at a reduced scale."""

    def __init__(self, model: ServedModel, rates: Sequence[int]) -> None:
        self.model, self.rates = model, rates
        self.max_pixels = Settings().max_pixels
        self.seconds: dict[str, list[float]] = {"full": [], "reduced": []}
        self.logits: dict[tuple[str, int], list[Tensor]] = {}
        self.sizes: list[float] = []
        self.reduced = 0

    def add(self, picture: bytes) -> None:
        """Decode a picture both ways, in turns, and let the model answer."""
        for way, least_side in (("full", None), ("reduced", self.model.least_side)):
            began = time.perf_counter()
            with decoding(picture, self.max_pixels, least_side) as decoded:
                image = self.model.transform(decoded)
            self.seconds[way].append(time.perf_counter() - began)
            if way == "full":
                whole = decoded.size
            for rate in self.rates:
                with torch.inference_mode():
                    (output,) = self.model.at(rate, compensate=True)(image[None])
                self.logits.setdefault((way, rate), []).append(output.logits)
        self.sizes.append(whole[0] * whole[1] / 1e6)
        self.reduced += decoded.size != whole

    def row(self, rate: int, name: str, classes: Sequence[int] | None) -> list[object]:
        """Return a row of the table."""
        full, reduced = (torch.stack(self.logits[way, rate]) for way in self.seconds)
        each = F.kl_div(
            reduced.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        agreement = (full.argmax(-1) == reduced.argmax(-1)).float().mean()
        times = [1000 * statistics.median(self.seconds[way]) for way in self.seconds]
        ratios = [
            one / other
            for one, other in zip(self.seconds["full"], self.seconds["reduced"], strict=True)
        ]
        row: list[object] = [
            name, rate, f"{statistics.mean(self.sizes):.1f}", f"{self.reduced} of {len(full)}",
            f"{each.mean():.1e}", f"{each.max():.1e}", f"{100 * agreement:.1f}",
            f"{times[0]:.1f}", f"{times[1]:.1f}", spread(ratios, ".1f"),
        ]  # fmt: skip
        if classes is not None:
            right = torch.tensor(classes)
            row += [
                f"{100 * (of.argmax(-1) == right).float().mean():.1f}" for of in (full, reduced)
            ]
        return row


def compare(what: Subject, options: argparse.Namespace) -> str:
    """Return a Markdown table."""
    model = what.load()
    rates = options.rates or [0, model.max_rate]
    classes = None if options.photos else what.classes
    rows = []
    for name, encoded in picture_sets(what, options):
        comparison = Comparison(model, rates)
        for picture in encoded:
            comparison.add(picture)
        rows += [comparison.row(rate, name, classes) for rate in rates]
    header = ["pictures", "rate", "Mpx", "decoded smaller", "KL", "largest KL", "agreement, %",
              "full, ms", "reduced, ms", "full / reduced"]  # fmt: skip
    if classes is not None:
        header += ["top-1 full, %", "top-1 reduced, %"]
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    subject.add_arguments(parser)
    parser.set_defaults(limit=100)
    parser.add_argument("--photos", type=Path, help="folder of large JPEGs to measure instead")
    parser.add_argument("--factors", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--rates", type=int, nargs="+", help="default: 0 and the highest")
    options = parser.parse_args(argv)
    what = subject.from_arguments(options)
    print(f"{machine.describe()}.\n\n{what.described}; milliseconds are of decoding and "
          f"transforming, medians.\n\n{compare(what, options)}")  # fmt: skip


if __name__ == "__main__":
    main()

"""The folder of a training run.

It holds `config.json` (the resolved recipe), `metrics.jsonl` (a line a step),
`checkpoints/step-NNNNNN` (the last two) and what the job makes at its end. Only the first
of several processes writes.
"""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import gather_object
from safetensors import SafetensorError

from adapters.durable import new_folder, replace_file
from tocom import ConfigError, TocomError
from training.config import DistillConfig, ElasticConfig
from training.loop_config import LoopConfig
from training.prune.config import PruneConfig
from training.recipe import Recipe, differing, with_defaults
from training.screen.curves import Curves, figure
from training.screen.progress import Progress, say

_KEPT_CHECKPOINTS = 2
#: Keys that change nothing of what a run has learned: they may be others when it goes on.
_FREE = {
    f"loop.{key}"
    for key in (
        "save_every", "watch_every", "workers", "time_limit", "on_unreadable", "on_full_disk",
        "tensorboard", "wandb",
    )
}  # fmt: skip
#: The same of what measures.
_FREE_OF_MEASURING = {"workers", "save_every"}
#: The length of a run, which may grow.
_LENGTHS = ("loop.steps", "loop.epochs")
#: What a run makes at its end.
_RESULTS = re.compile(r"bank|model|task|(result|test-after)(-\d+-of-\d+)?\.json")
_LONGEST_VALUE = 60  # characters of a value in a message
_EPOCH = "pictures-an-epoch"  # their number, in a checkpoint
_log = logging.getLogger(__name__)


class TrainingError(TocomError):
    """A run that cannot go on; the last good checkpoint is kept."""


class OtherRunError(ConfigError):
    """A folder that holds another run than the one that is asked for."""


def refuse_other_recipe(
    folder: Path, then: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()
) -> None:
    """Refuse a folder whose recipe is not the one that is asked for.

    Args:
        folder: of a run.
        then: its recipe.
        now: the recipe that is asked for.
        free: keys, such as loop.workers, that may differ.

    Raises:
        OtherRunError: naming the keys that differ, with both values.
    """
    other = [
        f"{key} {_short(there)} there, {_short(here)} here"
        for key, (there, here) in differing(then, now).items()
        if key not in free
    ]
    if other:
        raise OtherRunError(
            f"{folder} holds a run of another recipe: {'; '.join(other)}; choose another run folder"
        )


def refuse_other_run(folder: Path, recipe: Recipe) -> str:
    """Refuse a folder that holds a run of another recipe, done or not.

    A recipe that differs in its length alone, and asks for more, is the same run; so is one that
    differs in keys that change nothing of what was learned.

    Returns:
        The length of the run so far, such as `200-steps`, if the recipe asks for more; else "".

    Raises:
        ConfigError: naming the keys that differ, with both values.
    """
    if not (said := _begun(folder)):
        return ""
    then, now = with_defaults(said, type(recipe)), recipe.model_dump(mode="json")
    longer = {
        key: f"{there:g}-{key.removeprefix('loop.')}"
        for key, (there, here) in differing(then, now).items()
        if key in _LENGTHS and there is not None and here is not None and there < here
    }
    refuse_other_recipe(folder, then, now, {*_FREE, *longer})
    return next(iter(longer.values()), "")


def refuse_other_measurement(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Refuse a folder in which another recipe is measured, to its end or not.

    Returns:
        All that its `config.json` says; empty if nothing has begun there.

    Raises:
        ConfigError: naming the keys that differ, with both values.
    """
    if said := _begun(folder):
        then = with_defaults(said.get("recipe", said), type(recipe))
        refuse_other_recipe(folder, then, recipe.model_dump(mode="json"), _FREE_OF_MEASURING)
    return said


def _begun(folder: Path) -> dict[str, Any]:
    """Return what `config.json` says of the run in a folder; empty if none has begun.

    A folder that holds no more than a recipe is free: that could not be followed.
    """
    if not (path := folder / "config.json").exists():
        return {}
    try:
        said = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} does not say which run the folder holds ({error}); choose another run folder"
        ) from error
    names = (each.name for each in folder.iterdir())
    begun = any(name != "config.json" and not name.startswith(".") for name in names)
    return said if begun else {}


def _short(value: Any) -> str:
    """Return a value of a recipe as a message has room for it."""
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` but for what a crash or a full disk has cut off."""
    lines: list[dict[str, Any]] = []
    if (path := folder / "metrics.jsonl").exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def facts(
    config: DistillConfig | ElasticConfig | PruneConfig, distinct: int, folder: Path
) -> dict[str, Any]:
    """Return what is worth knowing of a run of so many steps, beside what came out.

    Args:
        config: its recipe.
        distinct: pictures that it saw.
        folder: of the run.
    """
    return {
        "recipe": config.model_dump(
            mode="json", exclude={"pictures", "test", "backbone", "task", "ladder"}
        ),
        "pictures": [{"name": Path(p.path).name, "times": p.times} for p in config.pictures],
        "distinct_pictures": distinct,
        "samples_seen": config.loop.steps * config.loop.batch_size,
        "last": metrics[-1] if (metrics := read_metrics(folder)) else {},
        "versions": {name: version(name) for name in ("torch", "timm")},
    }


class RunFolder:
    """What a run leaves on disk, and its progress bar."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, config: LoopConfig, pictures: int
    ) -> None:
        """Remember the arguments, such as the pictures of an epoch; nothing is written yet."""
        self.folder, self.accelerator, self.config = folder, accelerator, config
        self.pictures = pictures
        self.recipe: dict[str, Any] = {}  # what was claimed
        self.curves = Curves()
        self._undrawn = False  # whether it was said that curves are not drawn
        self._cut = ""  # a new line, while the last one of the metrics has none

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe down; what came out of a run that is to get longer is put aside.

        Raises:
            ConfigError: if the folder holds a run of another recipe or of another number of
                pictures, or one that is done and has no checkpoint to go on from.
        """
        self._refuse_other_pictures()
        self.recipe = recipe.model_dump(mode="json")
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if before := refuse_other_run(self.folder, recipe):
                self._put_aside(before)
            resolved = json.dumps(self.recipe, indent=2, ensure_ascii=False) + "\n"
            replace_file(self.folder / "config.json", resolved)
        self.accelerator.wait_for_everyone()

    def _refuse_other_pictures(self) -> None:
        """Refuse to go on with more or fewer: which ones a step sees follows from their number."""
        then = self.pictures
        for checkpoint in self._checkpoints()[-1:]:
            with suppress(OSError, ValueError):  # older versions did not write it down
                then = int((checkpoint / _EPOCH).read_text(encoding="utf-8"))
        if then != self.pictures:
            raise OtherRunError(
                f"{self.folder} was begun with {then:,} pictures an epoch; there are "
                f"{self.pictures:,} now; choose another run folder"
            )

    def _put_aside(self, length: str) -> None:
        """Rename what came out of a run of this length: `bank` to `bank-200-steps`."""
        made = sorted(path for path in self.folder.iterdir() if _RESULTS.fullmatch(path.name))
        if made and not self._checkpoints():
            raise ConfigError(
                f"{self.folder} has no checkpoint to go on from; choose another run folder"
            )
        for path in made:
            aside = path.with_name(f"{path.stem}-{length}{path.suffix}")
            path.rename(aside)
            say(f"what the shorter run made is now {aside}")

    def resume(self) -> int:
        """Load the newest checkpoint that can be read and return its step; forget what came after.

        Raises:
            TrainingError: if there are checkpoints and none can be read.
        """
        step = self._load_newest()
        path = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process:
            self._clean()
            if path.exists():
                kept = [line for line in read_metrics(self.folder) if line["step"] <= step]
                replace_file(path, "".join(f"{json.dumps(line)}\n" for line in kept))
                self.curves = Curves.of(kept)
        self.accelerator.wait_for_everyone()
        return step

    def _clean(self) -> None:
        """Remove what a killed run was about to write; see `adapters.durable`."""
        for leftover in (*self.folder.glob(".*"), *self.folder.glob("checkpoints/.*")):
            if not re.fullmatch(r"\..+\.[0-9a-f]{8}", leftover.name):
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    @contextmanager
    def progress(self, step: int) -> Iterator[None]:
        """Show a progress bar from `step` on; open the trackers that were asked for."""
        if self.accelerator.is_main_process:
            self.accelerator.log_with = self._trackers()
            self.accelerator.init_trackers("tocom")
        try:
            with Progress("training", self.config.steps, "step", step) as self.bar:
                self.bar.note("waiting for the first pictures")
                yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _trackers(self) -> list[GeneralTracker]:
        found: list[GeneralTracker] = []
        if self.config.tensorboard:
            found.append(TensorBoardTracker("tensorboard", str(self.folder)))
        if self.config.wandb:
            if not (path := self.folder / "wandb-id").exists():
                replace_file(path, secrets.token_hex(8))
            # A resumed run goes on there as the same one.
            run = path.read_text(encoding="utf-8")
            found.append(
                WandBTracker(
                    "tocom", id=run, resume="allow", name=self.folder.resolve().name,
                    dir=str(self.folder), config=self.recipe,
                )
            )  # fmt: skip
        return found

    def note(self, line: dict[str, Any]) -> None:
        """Write a step's line and move the progress bar."""
        if self.accelerator.is_main_process:
            path = self.folder / "metrics.jsonl"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{self._cut}{json.dumps(line)}\n")
                self._cut = ""
            except OSError as error:
                self._cut = "\n"
                self._unwritten(path, error)
        figures = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(figures, step=line["step"])
        self.bar.update(note=f"loss {figure(line['loss'])}")
        self.curves.add(line)

    def show(self) -> None:
        """Say how the run is doing, and draw its curves."""
        if self.accelerator.is_main_process:
            self.curves.tell(self.config.steps, self.bar.left())
            self.draw()

    def draw(self) -> None:
        """Write `curves.png`; what keeps it from being written does not end a run."""
        path = self.folder / "curves.png"
        try:
            from training.plot import plot_curves

            plot_curves(self.curves.losses, self.curves.watched, path)
        except ModuleNotFoundError as error:
            if not self._undrawn:
                self._undrawn = True
                say(
                    f"{path} is not drawn: {error.name} is not installed: "
                    "pip install 'tocom-serve[train]'"
                )
        except OSError as error:
            _log.warning("%s cannot be written (%s); going on", path, error)

    def save(self, step: int) -> None:
        """Write a checkpoint beside the others, name it when it is whole, drop the oldest."""
        if not self.accelerator.is_main_process:
            return
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)  # one that could not be read
        try:
            with new_folder(final, TrainingError) as beside:
                self.accelerator.save_state(str(beside))
                (beside / _EPOCH).write_text(str(self.pictures))
        # torch reports a failed write as RuntimeError.
        except (OSError, RuntimeError, SafetensorError) as error:
            self._unwritten(final, error)
            return
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def _load_newest(self) -> int:
        newest = ""
        for checkpoint in reversed(self._checkpoints()):
            if not (fault := self._load(checkpoint)):
                if newest and self.accelerator.is_main_process:
                    _log.warning("%s; going on from %s", newest, checkpoint.name)
                return int(checkpoint.name.removeprefix("step-"))
            newest = newest or f"{checkpoint} cannot be read ({fault})"
        if newest:
            raise TrainingError(
                f"{newest}, and there is no older one that can; remove "
                f"{self.folder / 'checkpoints'} to begin anew"
            )
        return 0

    def _load(self, checkpoint: Path) -> str:
        """Load a checkpoint; return what is wrong with it, the same in all processes."""
        faults = []
        try:
            self.accelerator.load_state(str(checkpoint))
        except Exception as error:  # a damaged file makes torch and safetensors raise anything
            faults = [f"{type(error).__name__}: {error}"]
        return "".join(gather_object(faults)[:1])

    def _checkpoints(self) -> list[Path]:
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted(path for path in found if re.fullmatch(r"step-\d{6}", path.name))

    def _unwritten(self, path: Path, error: Exception) -> None:
        """Stop or go on, as the recipe says, when something could not be written."""
        last = next((path.name for path in reversed(self._checkpoints())), "none")
        fault = f"{path} cannot be written ({error}); the last whole checkpoint: {last}"
        if self.config.on_full_disk == "stop":
            raise TrainingError(f"{fault}. Make room and give the same command again") from error
        _log.warning("%s; going on", fault)

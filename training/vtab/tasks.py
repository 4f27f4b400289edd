"""The tasks of VTAB-1k and others, and whether a folder holds one.

Layout that is common for parameter-efficient tuning: a folder a task, with `images/` (or the same
in `images.tar`) and the lists `train800.txt`, `val200.txt`, `train800val200.txt` and `test.txt`,
a line `relative/path class` each. A task of another layout says where its parts are.

Reference: VTAB, arXiv:1910.04867; ToCom, section 4.1.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tocom import DataError
from training.pictures.config import PicturesConfig
from training.pictures.readers import ListReader
from training.pictures.sets import class_names, open_pictures


class Parts(NamedTuple):
    """Where the parts of a task are, below its folder: lists (.txt), .tar files or folders."""

    all: str
    test: str
    train: str | None = None  # with `validation`, to search on; None: a part of `all` is drawn
    validation: str | None = None


#: The lists of a task of VTAB-1k.
VTAB_1K = Parts("train800val200.txt", "test.txt", "train800.txt", "val200.txt")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as tables call it.
        folder: below the root.
        group: whose mean it counts in.
        classes: how many there are.
        test: pictures to test on; None: as many as there are.
        train: pictures to train on, likewise.
        parts: where its pictures are.
    """

    name: str
    folder: str
    group: str
    classes: int
    test: int | None = None
    train: int | None = None
    parts: Parts = VTAB_1K

    def pictures(self, root: Path, part: str) -> PicturesConfig:
        """Return one of the task's parts as a set of pictures."""
        folder = root / self.folder
        if not part.endswith(".txt"):
            return PicturesConfig(path=str(folder / part))
        tar = folder / "images.tar"
        path = tar if tar.is_file() and not (folder / "images").is_dir() else folder
        return PicturesConfig(path=str(path), list=part)


def _vtab(name: str, folder: str, group: str, classes: int, test: int) -> Task:
    return Task(name, folder, group, classes, test, train=1000)


VTAB = (
    _vtab("CIFAR-100", "cifar", "Natural", 100, 10_000),
    _vtab("Caltech101", "caltech101", "Natural", 102, 6_084),
    _vtab("DTD", "dtd", "Natural", 47, 1_880),
    _vtab("Flowers102", "oxford_flowers102", "Natural", 102, 6_149),
    _vtab("Pets", "oxford_iiit_pet", "Natural", 37, 3_669),
    _vtab("SVHN", "svhn", "Natural", 10, 26_032),
    _vtab("Sun397", "sun397", "Natural", 397, 21_750),
    _vtab("Camelyon", "patch_camelyon", "Specialized", 2, 32_768),
    _vtab("EuroSAT", "eurosat", "Specialized", 10, 5_400),
    _vtab("Resisc45", "resisc45", "Specialized", 45, 6_300),
    _vtab("Retinopathy", "diabetic_retinopathy", "Specialized", 5, 42_670),
    _vtab("Clevr-Count", "clevr_count", "Structured", 8, 15_000),
    _vtab("Clevr-Dist", "clevr_dist", "Structured", 6, 15_000),
    _vtab("DMLab", "dmlab", "Structured", 6, 22_735),
    _vtab("KITTI-Dist", "kitti", "Structured", 4, 711),
    _vtab("dSpr-Loc", "dsprites_loc", "Structured", 16, 73_728),
    _vtab("dSpr-Ori", "dsprites_ori", "Structured", 16, 73_728),
    _vtab("sNORB-Azim", "smallnorb_azi", "Structured", 18, 12_150),
    _vtab("sNORB-Elev", "smallnorb_ele", "Structured", 18, 12_150),
)


def check(root: Path, task: Task) -> list[str]:
    """Return what is missing or wrong in a task's folder; empty if nothing is.

    Classes of test pictures are not looked at.
    """
    folder = root / task.folder
    if not folder.is_dir():
        return [f"{task.name}: there is no folder {folder}"]
    problems: list[str] = []
    lists: dict[str, Counter[tuple[str, int]]] = {}
    for part in dict.fromkeys(part for part in task.parts if part is not None):
        try:
            pictures = open_pictures(task.pictures(root, part))
            classes = class_names(pictures)
        except DataError as error:
            problems.append(f"{task.name}: {error}")
            continue
        expected = {task.parts.test: task.test, task.parts.all: task.train}.get(part)
        if expected not in (None, len(pictures)):
            problems.append(f"{task.name}: {part} has {len(pictures)} pictures, not {expected}")
        if not isinstance(pictures.reader, ListReader):
            if len(classes) != task.classes:
                problems.append(
                    f"{task.name}: {part} has {len(classes)} classes, not {task.classes}"
                )
            continue
        samples: list[tuple[str, int]] = [
            (path, label) for path, (label,) in pictures.reader.samples
        ]
        if part == task.parts.test:
            lists[part] = Counter((path, 0) for path, _ in samples)
            continue
        lists[part] = Counter(samples)
        if (highest := max(label for _, label in samples)) >= task.classes:
            problems.append(
                f"{task.name}: {part} has the class {highest}; there are {task.classes}, from 0"
            )
    return problems + _compare(task, lists)


def _compare(task: Task, lists: dict[str, Counter[tuple[str, int]]]) -> list[str]:
    """Return in what the lists contradict each other."""
    problems = []
    everything, test = task.parts.all, task.parts.test
    parts = [lists[part] for part in (task.parts.train, task.parts.validation) if part in lists]
    # Of other tasks what is searched on need not be all that is trained on in the end.
    whole = task.parts == VTAB_1K and len(parts) == 2 and everything in lists
    if whole and parts[0] + parts[1] != lists[everything]:
        together = f"{task.parts.train} and {task.parts.validation} together"
        problems.append(f"{task.name}: {everything} is not {together}")
    if everything in lists:
        missing = set(range(task.classes)) - {label for _, label in lists[everything]}
        if missing:
            problems.append(f"{task.name}: {everything} has no picture of the class {min(missing)}")
    if {everything, test} <= lists.keys():
        seen = {path for path, _ in lists[everything]}
        if both := sorted(path for path, _ in lists[test] if path in seen):
            problems.append(f"{task.name}: {both[0]} is trained on and tested on")
    return problems

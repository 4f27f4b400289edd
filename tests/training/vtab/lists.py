"""The three colours in the layout of VTAB-1k's tasks."""

import tarfile
from pathlib import Path


def write_lists(root: Path, name: str, pictures: Path) -> Path:
    """Unpack class folders of 8 pictures: 4 to train on, 2 to validate on, 2 to test on."""
    folder = root / name
    (folder / "images").mkdir(parents=True)
    with tarfile.open(pictures) as tar:
        tar.extractall(folder / "images", filter="data")
    lines: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for label, colour in enumerate(("blue", "green", "red")):
        for i in range(8):
            part = "train800" if i < 4 else "val200" if i < 6 else "test"
            lines[part].append(f"images/{colour}/{i}.png {label}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for part, each in lines.items():
        (folder / f"{part}.txt").write_text("\n".join(each) + "\n")
    return root

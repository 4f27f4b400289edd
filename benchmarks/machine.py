"""What figures were measured on: they mean nothing without it."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch", "openvino", "timm", "numpy", "pillow", "fastapi", "uvicorn", "uvloop", "httptools",
    "litserve",
)  # fmt: skip


def describe() -> str:
    """Return a line on the processor, the system and the versions of what matters."""
    packages = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch "
        f"threads; {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"{', '.join(packages)}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()

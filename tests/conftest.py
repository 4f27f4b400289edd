"""What all tests share."""

import os
import sys
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that tests start should not take the cores of another worker's tests. Before torch
    # is imported, which reads it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of a tiny forward wait for each other longer than they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Many processes import the same: the first one compiles it for all, where nothing may be kept.

    Torch and timm alone take seconds to compile.
    """
    with pytest.MonkeyPatch.context() as environment:
        if sys.dont_write_bytecode:
            folder = tmp_path_factory.getbasetemp()
            if "PYTEST_XDIST_WORKER" in os.environ:
                folder = folder.parent  # of all workers
            environment.setenv("PYTHONDONTWRITEBYTECODE", "")
            environment.setenv("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
        yield

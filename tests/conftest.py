"""What all tests share."""

import os
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of a tiny forward wait for each other longer than they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

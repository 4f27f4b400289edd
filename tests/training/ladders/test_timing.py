"""Forwards are timed until they are computed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.ladders import timing


class OnGpu:
    device = torch.device("cuda")

    def to(self, _: torch.device) -> "OnGpu":
        return self


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Candidate:
        backbone = SimpleNamespace(
            model=SimpleNamespace(patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=OnGpu))),
            input_size=(3, 8, 8),
        )

        def __call__(self, images: OnGpu) -> None:
            events.append("run")

    def clock() -> float:
        events.append("clock")
        return 0.0

    monkeypatch.setattr(timing, "_compiled", lambda *_: None)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch, "randn", lambda *_: OnGpu())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("wait"))
    candidates: Any = [Candidate()]
    timing.time_forwards(candidates, rows := [{}], size=1, repeats=1, threads=0)
    # Each run is over before the clock is read.
    assert events[-3:] == ["run", "wait", "clock"]
    assert events.count("wait") == events.count("run")
    assert rows == [{"ms": {"eager x1": 0.0}}]

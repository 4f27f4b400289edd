"""A tiny model on several ladders, as files that its settings name."""

from pathlib import Path

from adapters.ladder import LadderInfo, write_ladder
from server.settings import ModelSettings
from tocom import Ladder
from tocom.reduction import DPCKNN, Pattern, ToMe

#: For three blocks and 4 x 4 patches, the model of the server's tests.
UNEVEN = Ladder("uneven", ToMe(), ((0, 0, 0), (0, 2, 0), (0, 4, 4), (4, 4, 4)), patches=16)
RINGS = Ladder("rings", Pattern(), ((0, 0, 0), (0, 12, 12), (12, 4, 4)), patches=16)
CLUSTERS = Ladder("clusters", DPCKNN(), ((0, 0, 0), (0, 9, 6), (8, 6, 3)), patches=16)

#: As a search writes it.
EVIDENCE = {
    "rows": [
        {"rung": 0, "kl": 0.0, "agreement": 1.0},
        {"rung": 2, "kl": 0.25, "agreement": 0.75, "top1": 0.5},
    ]
}


def on_ladders(tiny: ModelSettings, folder: Path, *names: str) -> ModelSettings:
    """Write the ladders above into a folder; return settings of a model on those of some names."""
    for ladder in (UNEVEN, RINGS, CLUSTERS):
        path = folder / ladder.name
        path.mkdir(exist_ok=True)
        write_ladder(LadderInfo.of(ladder, EVIDENCE), path / "ladder.json")
    known = {each.name for each in (UNEVEN, RINGS, CLUSTERS)}
    ladders = tuple(str(folder / name) if name in known else name for name in names)
    return tiny.model_copy(update={"ladders": ladders})

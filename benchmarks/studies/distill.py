r"""What each choice of the distillation recipe gives: one change at a time, several seeds.

    python -m benchmarks.studies.distill --folder runs/study --seeds 0 1 2 \
        --measure eval.tar backbone.name=... 'pictures=[{path="pictures.tar"}]'

Every arm is a run of `tocom-train distill` from one preset with some keys changed, and a
measurement by `tocom-train evaluate` on pictures that no run has seen. Finished runs are kept
and stopped ones resume, so the program may be started again, or several times side by side
with other `--arms`; it prints what it has as a Markdown table, and adds it to `study.json`.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters import Bank
from training.config import DistillConfig
from training.distill import distill
from training.evaluate import evaluate
from training.measuring_config import EvaluateConfig
from training.presets import read_recipe

ARMS: dict[str, list[str]] = {
    "preset": [],
    "rank 1": ["rank=1"],
    "rank 4": ["rank=4"],
    "rank 8": ["rank=8"],
    "q, v": ['targets=["q", "v"]'],
    "q, k, v, proj": ['targets=["q", "k", "v", "proj"]'],
    "fc1, fc2": ['targets=["fc1", "fc2"]'],
    "q, v, rank 9": ['targets=["q", "v"]', "rank=9"],
    "all pairs alike": ["pairs=uniform", "from_zero=0"],
    "pairs by distance": ["from_zero=0"],
    "pairs to 0 as well": ["pairs=uniform", "from_zero=0.15", "to_zero=0.15"],
    "no rates beyond": ["beyond=0"],
    "logits only": ["features=0", "tokens=0"],
    "logits and features": ["tokens=0"],
    "logits and tokens": ["features=0"],
    "shared basis, rank 4": ["basis=shared", "rank=4"],
    "one student a teacher": ["students=1", "sources=8", "loop.batch_size=64"],
    "four students a teacher": ["students=4", "sources=2", "loop.batch_size=16"],
    "no mixing": ["augment.mixup=0", "augment.cutmix=0"],
    "dropout 0.1": ["dropout=0.1"],
    "multiplier 0.05": ["scale=0.05"],
    "multiplier 0.2": ["scale=0.2"],
    "paper": [
        'targets=["q", "v"]', "pairs=uniform", "from_zero=0", "features=0", "tokens=0",
        "dropout=0.1", "students=1", "sources=1", "loop.batch_size=64", "drop_path=0.1", "beyond=0",
    ],
}  # fmt: skip
RATES = "sources=[0, 16]", "targets=[0, 4, 8, 12, 16]"
SHOWN = ((0, 4), (0, 8), (0, 12), (0, 16), (16, 8), (16, 0))


def measured(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure an arm, or find that it has been, and return its figures."""
    name = f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    changes = [*arguments.overrides, *ARMS[arm], f"loop.steps={arguments.steps}"]
    config = read_recipe(DistillConfig, arguments.preset, [*changes, f"loop.seed={seed}"])
    bank = Bank.load(distill(config, arguments.folder / name))
    backbone = config.backbone
    recipe = [
        f"backbone.name={backbone.name}", f"bank={arguments.folder / name / 'bank'}",
        f"pictures.path={arguments.measure}", *RATES,
    ]  # fmt: skip
    if arguments.measure_list:
        recipe += [f"pictures.list={arguments.measure_list}", "labelled=false"]
    if backbone.architecture:
        recipe.append(f"backbone.architecture={backbone.architecture}")
    path = evaluate(
        read_recipe(EvaluateConfig, "every-rate", recipe), arguments.folder / f"{name}-measured"
    )
    rows = {(row["source"], row["target"]): row for row in json.loads(path.read_text())["rows"]}
    return {
        "arm": arm,
        "seed": seed,
        "parameters": bank.parameters,
        **{f"kl {s}→{t}": rows[s, t]["bank"]["kl"] / rows[s, t]["plain"]["kl"] for s, t in SHOWN},
        "agreement 0→16": rows[0, 16]["bank"]["agreement"] - rows[0, 16]["plain"]["agreement"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Return mean ± spread (half of largest minus smallest) over the seeds of each arm."""
    figures = [key for key in found[0] if key not in ("arm", "seed", "parameters")]
    lines = [
        f"| arm | seeds | parameters | {' | '.join(figures)} |",
        "|---" * (3 + len(figures)) + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in found):
        rows = [row for row in found if row["arm"] == arm]
        cells = []
        for key in figures:
            values = [row[key] for row in rows]
            form = ".3f" if key.startswith("kl") else ".2f"
            spread = (max(values) - min(values)) / 2
            cells.append(f"{statistics.mean(values):{form}} ± {spread:{form}}")
        lines.append(f"| {arm} | {len(rows)} | {rows[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def added(found: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Add figures to a file, in place of older ones of the same arm and seed; return all."""
    before = json.loads(path.read_text()) if path.exists() else []
    every = list({(row["arm"], row["seed"]): row for row in [*before, *found]}.values())
    every.sort(key=lambda row: list(ARMS).index(row["arm"]))
    path.write_text(json.dumps(every, indent=1) + "\n")
    return every


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="+", metavar="key=value")
    parser.add_argument("--preset", default="deit-tiny-small-data")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--measure", required=True, help="pictures that no run has seen")
    parser.add_argument("--measure-list", help="a list of some of them; labels are not used")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    arguments = parser.parse_args(argv)
    found = []
    for seed in arguments.seeds:  # all arms once before any twice
        for arm in arguments.arms:
            found.append(measured(arm, seed, arguments))
            print(table(found), flush=True)
    found = added(found, arguments.folder / "study.json")
    print("KL: with the bank, as a share of plain merging's. Agreement: change in points.")
    print(table(found))


if __name__ == "__main__":
    main()

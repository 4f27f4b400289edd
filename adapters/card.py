"""What a bank is, in words: rows for a terminal, a model card for the Hugging Face Hub.

Says what `bank.json` says and measures nothing. Notes in a form that is not known here are
shown as they are.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError

from adapters.bank import Bank
from adapters.ladder import digest
from tocom import TOME

_TAGS = ["tocom", "token-merging", "token-compensation", "vision-transformer", "low-rank"]
_HUB_BACKBONE = re.compile(r"(?:hf-hub:(?=[^/]+/)|(?=timm/))([\w.-]+/[\w.-]+)(?:@.+)?", re.ASCII)


class _Figures(BaseModel):
    top1: float | None = None  # pictures without labels have none
    agreement: float
    kl: float


class _Row(BaseModel):
    source: int
    target: int
    gmacs: float
    plain: _Figures
    bank: _Figures | None = None


class _Pictures(BaseModel):
    name: str
    count: int


class _Result(BaseModel):
    """What `tocom-train evaluate` writes, as far as a card shows it."""

    model: str
    pictures: _Pictures
    rows: list[_Row] = Field(min_length=1)


_RESULTS = TypeAdapter(list[_Result])


def model_card(
    bank: Bank,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002 (the hub's word)
    plots: Sequence[str | Path] = (),
) -> ModelCard:
    """Return the page of a bank on the hub.

    Args:
        bank: the bank.
        repo_id: `ORG/NAME`, where it is or will be.
        license: the hub's identifier, such as `apache-2.0`; none is claimed unless given.
        plots: pictures to show, by their names in the repository.
    """
    base = _base_model(bank.info.training)
    data = ModelCardData(
        license=license,
        library_name="tocom-serve",
        tags=_TAGS,
        base_model=base,
        base_model_relation=base and "adapter",
    )
    sections = [
        _introduction(bank),
        _use(bank, repo_id),
        f"## What it is\n\n{_table(facts(bank))}",
        _training(bank.info.training),
        _evaluation(bank.info.evaluation, plots),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def facts(bank: Bank) -> Iterator[tuple[str, str]]:
    """Yield what decides a bank's answers, as rows of a name and a value."""
    info = bank.info
    geometry = info.backbone.geometry
    tensors = bank.tensors.values()
    dtype = str(next(iter(tensors)).dtype).removeprefix("torch.")
    yield "bank", info.name
    yield "digest", info.digest
    yield "backbone", f"{info.backbone.architecture}, weights {info.backbone.digest[:12]}"
    yield (
        "geometry",
        f"{geometry.depth} blocks, width {geometry.width}, {geometry.heads} heads, "
        f"hidden {geometry.hidden}, input {_pixels(geometry.input)} px, "
        f"patch {_pixels(geometry.patch)} px",
    )
    yield "rates", f"0..{info.max_rate} of {info.method}"
    if info.ladder is not None:
        yield "ladder", f"{info.ladder.name}, {digest(bank.ladder)[:12]}"
    if not info.proportional:
        yield "attention", "not proportional: merged tokens count as one"
    yield "rank", f"{info.rank} a step"
    yield "targets", ", ".join(info.targets)
    yield "scale", f"{info.scale:g}"
    yield "parameters", f"{bank.parameters:,}"
    yield "size", f"{sum(tensor.nbytes for tensor in tensors) / 1e6:.2f} MB as {dtype}"


def notes(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    """Yield one row for each value within nested notes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from notes(f"{name}.{key}" if name else key, inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _introduction(bank: Bank) -> str:
    info = bank.info
    return f"""\
# {info.name}

A bank of plug-ins for timm's `{info.backbone.architecture}`.
{_cheaper(bank)}
the bank repairs what that costs. It holds one small low-rank step for each unit of rate. From these
the change of weights is composed that lets a model tuned at one rate run at another, without
training. It fits the backbone and every model that was tuned from it.

Nothing in the files is executable, and a bank that was changed or damaged is not loaded.

Papers: [Token Compensator](https://arxiv.org/abs/2408.06798),
[Token Merging](https://arxiv.org/abs/2210.09461)."""


def _cheaper(bank: Bank) -> str:
    ladder, top = bank.ladder, bank.info.max_rate
    if ladder == TOME:
        return (
            f"Merging tokens makes the model cheaper, at any rate from 0 to {top} tokens per block;"
        )
    return (
        f"Reducing tokens by `{ladder.method.name}` makes the model cheaper, at any rate from 0 to "
        f"{top} of the ladder `{ladder.name}`;"
    )


def _use(bank: Bank, repo_id: str) -> str:
    info = bank.info
    named = info.training.get("backbone")
    backbone = named if _base_model(info.training) else info.backbone.architecture
    height, width = info.backbone.geometry.input
    rate = min(8, info.max_rate)
    ladder = "" if info.ladder is None else ", ladder=bank.ladder"
    ladder += ', learned=bank.learned("cpu")' if bank.ladder.method.in_bank else ""
    ladder += "" if info.proportional else ", proportional=False"
    return f"""\
## How to use it

```sh
pip install tocom-serve
```

In a program, with the backbone or a model tuned from it:

```python
import torch
import tocom
from adapters import compose, open_bank

bank = open_bank("hf://{repo_id}")
backbone = tocom.load_backbone("{backbone}")
bank.check_fits(backbone)

delta = compose(bank, source=backbone.source, target={rate})
images = torch.rand(1, 3, {height}, {width})  # prepared as backbone.data_config says
with torch.inference_mode():
    logits = tocom.forward(backbone.model, images, rate={rate}, delta=delta{ladder})
```

As a server, where every request chooses its rate:

```sh
tocom-serve --model my-model={backbone},bank=hf://{repo_id}
```"""


def _training(training: dict[str, JsonValue]) -> str:
    # The metrics of the last step are for who continues a run; bank.json keeps them.
    rows = [row for row in notes("", training) if not row[0].startswith("last.")]
    return f"## How it was trained\n\n{_table(rows)}" if rows else ""


def _evaluation(evaluation: dict[str, JsonValue], plots: Sequence[str | Path]) -> str:
    parts = [f"![{Path(plot).stem}]({quote(Path(plot).name)})" for plot in plots]
    if evaluation:
        try:
            parts += map(_figures, _RESULTS.validate_python(evaluation.get("results")))
        except ValidationError:
            parts.append(f"```json\n{json.dumps(evaluation, indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(["## What was measured", *parts]) if parts else ""


def _figures(result: _Result) -> str:
    """Return the rows of the lowest source, 0 where that was measured, as a Markdown table."""
    source = min(row.source for row in result.rows)
    tuned = f", a model tuned at rate {source}" if source else ""
    lines = [
        f"{_cell(result.model)}, {result.pictures.count} pictures of "
        f"{_cell(result.pictures.name)}{tuned}. Agreement and KL divergence are to the same model "
        f"at rate {source}.",
        "",
        "| rate | GMACs | top-1 % | with the bank | agreement % | with the bank "
        "| KL (nats) | with the bank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result.rows:
        if row.source == source:
            cells = [
                _figure(getattr(figures, key, None), form)
                for key, form in (("top1", ".1f"), ("agreement", ".1f"), ("kl", ".4f"))
                for figures in (row.plain, row.bank)
            ]
            lines.append(f"| {row.target} | {row.gmacs:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def _cell(text: str) -> str:
    """Keep a text on its line and in its cell."""
    return " ".join(text.split()).replace("|", r"\|")


def _base_model(training: dict[str, JsonValue]) -> str | None:
    """Return the hub id of the backbone, if the notes name it as `load_backbone` takes one."""
    match = _HUB_BACKBONE.fullmatch(str(training.get("backbone")))
    return match[1] if match else None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

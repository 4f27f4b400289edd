"""Keeping what was measured with what it was measured on.

An evaluation or a calibration goes into the `config.json` of the model's folder, an evaluation
also into the `bank.json` of the bank's: notes, which change no digest. A cascade becomes a file
beside the model's. Each is one file, exchanged in one step: a reader sees the old one or the new
one. What is published in a store or cached from the hub is not touched.
"""

import json
from pathlib import Path
from typing import Any

from adapters import Bank, TaskModel
from adapters.cascade import FILE, Cascade, read_cascade, write_cascade
from adapters.durable import replace_file
from adapters.segmentation import SegmentationModel, is_segmentation
from tocom import ConfigError, load_backbone

_EVALUATION = {"model", "bank", "pictures", "rows"}
_CALIBRATION = {"weights_digest", "bank", "source", "multiplier", "measure", "pictures"}
_CASCADE = {"points", "ladder_digest"}


def attach(result: Path, folder: Path) -> Path:
    """Write a result of `evaluate`, `evaluate-segment` or `calibrate` into its folder.

    Args:
        result: an `evaluation.json`, a `calibration.json` or a `cascade.json`.
        folder: a model folder, a task folder or, for an evaluation, a bank folder.

    Returns:
        The file that was changed.

    Raises:
        ConfigError: if `result` is none, or of another model or bank.
        BackboneError, BankError, TaskError: if the folder is faulty.
    """
    said = _read(result)
    if said.keys() >= _CASCADE:
        return _cascade_to_model(read_cascade(result), result, folder)
    if (folder / "bank.json").exists():
        return _to_bank(said, result, folder)
    if (folder / "config.json").exists():
        return _to_model(said, result, folder)
    if (folder / "task.json").exists():
        return _to_task(said, result, folder)
    raise ConfigError(
        f"{folder} is neither a model folder (config.json) nor a task folder (task.json) nor a "
        "bank folder (bank.json)"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict) or not any(
        keys <= said.keys() for keys in (_EVALUATION, _CALIBRATION, _CASCADE)
    ):
        raise ConfigError(
            f"{path} is neither an evaluation.json nor a calibration.json nor a cascade.json"
        )
    return said


def _cascade_to_model(cascade: Cascade, result: Path, folder: Path) -> Path:
    task = (folder / "task.json").exists()
    if not task and not (folder / "config.json").exists():
        raise ConfigError(
            f"a cascade belongs into a model folder (config.json) or a task folder (task.json), "
            f"and {folder} is neither"
        )
    digest = TaskModel.load(folder).info.digest if task else load_backbone(str(folder)).digest
    own = cascade.task_digest if task else cascade.weights_digest
    if digest != own or (cascade.task_digest and not task):
        raise ConfigError(f"{result} is of another model than the one in {folder}")
    return write_cascade(cascade, folder / FILE)


def _to_model(said: dict[str, Any], result: Path, folder: Path) -> Path:
    path = folder / "config.json"
    if "weights_digest" not in said:
        raise ConfigError(
            f"{result} was made by an older version and does not say which weights it is of; "
            "measure again"
        )
    if "task_digest" in said:
        raise ConfigError(
            f"{result} is of {_task_said(said)}, which {folder}, a model folder, does not hold"
        )
    digest = load_backbone(str(folder)).digest
    if said["weights_digest"] != digest:
        raise ConfigError(
            f"{result} is of a model with the weights {said['weights_digest'][:12]}, {folder} has "
            f"the weights {digest[:12]}"
        )
    _replace(path, json.loads(path.read_text(encoding="utf-8")) | _notes(said))
    return path


def _to_task(said: dict[str, Any], result: Path, folder: Path) -> Path:
    path = folder / "task.json"
    scenes = is_segmentation(folder)
    task = SegmentationModel.load(folder) if scenes else TaskModel.load(folder)
    if said.get("task_digest") != task.info.digest:
        raise ConfigError(
            f"{result} is of {_task_said(said)}, {folder} holds the task {task.info.digest[:12]}"
        )
    if scenes and "multiplier" in said:
        raise ConfigError(f"{result} is a calibration, and a task of segmentation takes none")
    # Through the task, so that what is written can be read.
    info: Any = task.info.model_copy(update=_notes(said))
    _replace(path, type(task)(info, task.tensors).info.model_dump(mode="json"))
    return path


def _task_said(said: dict[str, Any]) -> str:
    digest = said.get("task_digest")
    return f"the task {digest[:12]}" if digest else "no task"


def _notes(said: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a model or a task that a result becomes."""
    if "multiplier" not in said:
        return {"evaluation": said}
    kept = {key: said[key] for key in ("source", "multiplier", "measure", "pictures")}
    return {"calibration": {"bank_digest": said["bank"]["digest"], **kept}}


def _to_bank(said: dict[str, Any], result: Path, folder: Path) -> Path:
    if "multiplier" in said:
        raise ConfigError(
            f"{result} is a calibration, which belongs into the folder of its model: the bank in "
            f"{folder} serves other models too"
        )
    path, bank = folder / "bank.json", Bank.load(folder)
    resolved = folder.resolve()
    if resolved.parent.parent.name == "banks" and resolved.name == bank.info.digest:
        raise ConfigError(
            f"{folder} is a version in a store, which never changes; attach the evaluation to the "
            "bank's own folder before it is published"
        )
    if path.is_symlink():
        raise ConfigError(f"{path} is a link, as in the hub's cache; attach to a copy of the bank")
    measured = (said["bank"] or {}).get("digest", "")
    if measured != bank.info.digest:
        raise ConfigError(
            f"{result} is of {f'the bank {measured[:12]}' if measured else 'no bank'}, {folder} "
            f"holds the bank {bank.info.digest[:12]}"
        )
    notes: dict[str, Any] = bank.info.evaluation
    others = [other for other in notes.get("results") or [] if _about(other) != _about(said)]
    info = bank.info.model_copy(update={"evaluation": {**notes, "results": [*others, said]}})
    # As Bank.save writes it; through Bank, so that what is written can be read.
    _replace(path, Bank(info, bank.tensors).info.model_dump(mode="json"))
    return path


def _about(said: dict[str, Any]) -> tuple[Any, ...]:
    """Return what an evaluation is of: one of the same model on the same pictures replaces it.

    The same model has the same task, or none.
    """
    return said.get("model"), said.get("task_digest"), (said.get("pictures") or {}).get("name")


def _replace(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

"""What is added to a backbone: banks of plug-ins, their arithmetic and their store.

Builds on `tocom` alone; knows nothing of training or serving.
"""

from typing import TYPE_CHECKING

from tocom.on_demand import on_demand

if TYPE_CHECKING:
    from adapters.adaptformer import AdaptFormer
    from adapters.bank import Bank, BankInfo
    from adapters.calibration import Calibration
    from adapters.card import model_card
    from adapters.composition import compose, compose_steps
    from adapters.export import export_model
    from adapters.hub import pull_bank, push_bank
    from adapters.peft import export_peft
    from adapters.reference import import_reference
    from adapters.schema import BackboneInfo, Geometry
    from adapters.store import Store, Version, open_bank, use_bank
    from adapters.task import TaskInfo, TaskModel, open_task
else:
    __getattr__ = on_demand(
        __name__,
        {
            "adaptformer": ["AdaptFormer"],
            "bank": ["Bank", "BankInfo"],
            "calibration": ["Calibration"],
            "card": ["model_card"],
            "composition": ["compose", "compose_steps"],
            "export": ["export_model"],
            "hub": ["pull_bank", "push_bank"],
            "peft": ["export_peft"],
            "reference": ["import_reference"],
            "schema": ["BackboneInfo", "Geometry"],
            "store": ["Store", "Version", "open_bank", "use_bank"],
            "task": ["TaskInfo", "TaskModel", "open_task"],
        },
    )

__all__ = [
    "AdaptFormer",
    "BackboneInfo",
    "Bank",
    "BankInfo",
    "Calibration",
    "Geometry",
    "Store",
    "TaskInfo",
    "TaskModel",
    "Version",
    "compose",
    "compose_steps",
    "export_model",
    "export_peft",
    "import_reference",
    "model_card",
    "open_bank",
    "open_task",
    "pull_bank",
    "push_bank",
    "use_bank",
]


def __dir__() -> list[str]:
    return __all__

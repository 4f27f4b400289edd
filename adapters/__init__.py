"""What is added to a backbone: banks of plug-ins, their arithmetic and their store.

Builds on `tocom` alone; knows nothing of training or serving.
"""

from adapters.bank import Bank, BankBackbone, BankInfo, Geometry
from adapters.card import model_card
from adapters.compose import compose, compose_steps
from adapters.peft import export_peft, import_reference
from adapters.store import Store, Version, open_bank, use_bank

__all__ = [
    "Bank",
    "BankBackbone",
    "BankInfo",
    "Geometry",
    "Store",
    "Version",
    "compose",
    "compose_steps",
    "export_peft",
    "import_reference",
    "model_card",
    "open_bank",
    "use_bank",
]

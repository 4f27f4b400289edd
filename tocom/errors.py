"""Every error that this project raises on purpose, in one tree.

A message says what was wrong, what came and what is allowed; it is written for
the person who called, so it may be shown as it is. `assert` is for our own bugs.
"""


class TocomError(Exception):
    """Base of all errors that a caller can cause and mend."""


class RateError(TocomError, ValueError):
    """A rate, schedule or pair of rates that is not allowed here."""


class ReductionError(TocomError, ValueError):
    """A method or ladder that there is not, that is malformed or that a model cannot have."""


class ShapeError(TocomError, ValueError):
    """Tensors whose shapes do not fit together."""


class BackboneError(TocomError):
    """A backbone that cannot be found or read."""


class UnsupportedModelError(BackboneError):
    """A model whose forward this project does not reproduce; never run it wrongly."""


class DeltaError(TocomError, ValueError):
    """A delta that does not fit the model it is given to."""


class BankError(TocomError):
    """A bank that is corrupted, of another format or of another geometry."""


class TaskError(TocomError):
    """A task model that is corrupted, of another format or tuned on another backbone."""


class StoreError(TocomError):
    """A name or version that the store does not hold, or may not change."""


class ConfigError(TocomError, ValueError):
    """A configuration that cannot be run."""


class DataError(TocomError):
    """Pictures or data folders that cannot be read."""

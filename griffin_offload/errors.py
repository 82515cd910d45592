"""All errors, in one tree. A GriffinError is for the user to fix: it prints as one line, exit code 1.

GriffinError
├── ModelNotFound             no such alias, folder, hub id or file
│   └── FetchError            it exists, but could not be fetched: network, licence, checksum
├── CheckpointError           the folder's files are damaged, incomplete or inconsistent
├── UnsupportedArchitecture   a model that Griffin cannot prune
├── PromptError               empty, or not for this model
│   └── ContextError          longer than the context
├── OptionError               a value outside its range
├── BudgetError               more memory or disk is needed than there is
├── NumericError              NaN or infinite weights or activations
├── ExportError               the output cannot be written, or its format cannot say what the model is
└── WorkerError               a process that answered prompts has ended, or failed
"""

from .foreign import NAME, sentence


class GriffinError(Exception):
    """Base of every error that the user can fix."""


class ModelNotFound(GriffinError):
    """There is no model of this name."""


class FetchError(ModelNotFound):
    """The model has a source, but it could not be fetched from it."""


class CheckpointError(GriffinError):
    """A checkpoint's files are damaged, incomplete or inconsistent."""


class UnsupportedArchitecture(GriffinError):
    """The model type has no entry in `architecture.py`."""


class PromptError(GriffinError):
    """A prompt that cannot be run."""


class ContextError(PromptError):
    """A prompt that is longer than the context."""


class OptionError(GriffinError, ValueError):
    """An option outside its range."""


class BudgetError(GriffinError):
    """More memory or disk is needed than there is. `needed`: bytes of memory, where a plan says it; else 0."""

    def __init__(self, text: str, needed: int = 0) -> None:
        super().__init__(text)
        self.needed = needed


class NumericError(GriffinError):
    """NaN or infinite weights or activations."""


class ExportError(GriffinError):
    """The output cannot be written, or its format cannot say what the model is."""


class WorkerError(GriffinError):
    """A process that answered prompts has ended, or failed."""


def one_line(error: object) -> str:
    """Another library's error, short and on one line."""
    return sentence(error, NAME) or type(error).__name__

"""Names that a user may choose from, apart from the code that they choose, so that --help imports no torch."""

from collections.abc import Sequence

from .errors import OptionError

SELECTIONS = ("topk", "sampling", "topk-sampling", "magnitude", "random")
DRAWN = ("sampling", "topk-sampling", "random")  # which a seed repeats
AUTO = "auto"
RESIDENT_DTYPES = ("bfloat16", "int8", "int4")  # of what stays; bfloat16: as the model runs
RESTS = ("drop", "int8", "int4")  # what becomes of the neurons that are no experts
EXPORT_FORMATS = ("safetensors", "gguf")  # of an export
GGUF_TYPES = ("bf16", "f16", "f32", "q8_0")  # of its matrices, in GGUF
SCORES = ("griffin", "wanda", "magnitude", "random")  # of calibration texts: what a neuron is worth
FORMS = ("text", "qa", "concat", "question")  # of calibration samples
SKIP_MODES = ("token", "prompt")  # of whole feed-forward blocks
ALLOCATIONS = ("uniform", "sensitivity")
MODES = ("gen", "class")  # of multiple choice: what is the prompt
ORDERS = ("original", "permuted", "random")  # of a prompt's tokens, to draw


def check(name: str, known: Sequence[str], what: str) -> None:
    """Raises OptionError for a name that is not among `known`."""
    if name not in known:
        raise OptionError(f"{what} {name!r} is not known; known: {', '.join(known)}")

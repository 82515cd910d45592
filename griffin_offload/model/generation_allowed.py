"""What of a generation config reaches transformers: the fields that Griffin knows, each of its kind, and no others.

The file is the checkpoint's: a field of another kind would fail in the midst of an answer, a text or a list without a
bound would be worked on for hours, and an unknown field would become an attribute that some code may act on."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..foreign import shown
from ..small_json import is_text

MOST_IDS = 300_000  # entries
STOPS = 100  # characters of all stop strings: transformers searches the vocabulary for each (262,144 entries: seconds)
Check = Callable[[Any, int], bool]  # (value, rows of the table of embeddings) -> whether it is of the kind


def allowed_generation(facts: Mapping[str, Any], rows: int, where: Path) -> dict[str, Any]:
    """The known fields of a generation_config.json or a config.json that are set. Raises CheckpointError for one of
    another kind."""
    found = {}
    for kind, (fields, check) in _KINDS.items():
        for name in fields.split():
            value = facts.get(name)
            if value is None:
                continue
            if not check(value, rows):
                raise CheckpointError(
                    f"{where} cannot be used: {name} is {shown(repr(value), 60)}, which is not {kind}"
                )
            found[name] = value
    return found


def _number(value: Any, rows: int = 0) -> bool:
    try:
        return type(value) in (int, float) and not math.isnan(float(value))
    except OverflowError:
        return False


def _whole(value: Any, rows: int = 0) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_id(value: Any, rows: int) -> bool:
    return type(value) is int and 0 <= value < rows


def _some(value: Any, most: int, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= most and all(check(each) for each in value)


def _special(value: Any, rows: int) -> bool:
    """Those outside the table never come, or are told of elsewhere."""
    return _whole(value) or value == [] or _some(value, MOST_IDS, _whole)


def _phrase(value: Any, rows: int) -> bool:
    return _some(value, 1000, lambda token: _is_id(token, rows))


def _phrases(value: Any, rows: int) -> bool:
    return _some(value, 10_000, lambda phrase: _phrase(phrase, rows))


def _biases(value: Any, rows: int) -> bool:
    return _some(
        value,
        10_000,
        lambda pair: isinstance(pair, list) and len(pair) == 2 and _phrase(pair[0], rows) and _number(pair[1]),
    )


def _stops(value: Any, rows: int) -> bool:
    texts = [value] if isinstance(value, str) else value
    return _some(texts, STOPS, lambda text: is_text(text) and len(text) > 0) and sum(map(len, texts)) <= STOPS


def _decay(value: Any, rows: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and _whole(value[0]) and _number(value[1])


_WATERMARK: dict[str, Callable[[Any], bool]] = {
    "greenlist_ratio": _number,
    "bias": _number,
    "hashing_key": _whole,
    "seeding_scheme": lambda value: isinstance(value, str),
    "context_width": _whole,
}


def _watermark(value: Any, rows: int) -> bool:
    return isinstance(value, dict) and all(name in _WATERMARK and _WATERMARK[name](value[name]) for name in value)


# Kind -> its fields, and what tells it. Fields that are overridden or refused whatever they say are of any kind.
_KINDS: dict[str, tuple[str, Check]] = {
    "a number": (
        """temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
        encoder_repetition_penalty length_penalty max_time guidance_scale penalty_alpha diversity_penalty""",
        _number,
    ),
    "a whole number": (
        """max_length max_new_tokens min_length min_new_tokens top_k num_beams num_return_sequences
        no_repeat_ngram_size encoder_no_repeat_ngram_size""",
        _whole,
    ),
    "true or false": (
        "do_sample renormalize_logits remove_invalid_values token_healing",
        lambda value, rows: isinstance(value, bool),
    ),
    "one or more ids of tokens": (
        "eos_token_id pad_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens",
        _special,
    ),
    "a list of lists of ids of tokens that the model has": ("bad_words_ids", _phrases),
    "a list of pairs: ids of tokens that the model has, and a number": ("sequence_bias", _biases),
    f"one or more texts of {STOPS} characters in all at most": ("stop_strings", _stops),
    "a whole number and a number": ("exponential_decay_length_penalty", _decay),
    f"an object with {', '.join(_WATERMARK)}": ("watermarking_config", _watermark),
    "anything": (
        """bos_token_id constraints force_words_ids dola_layers cache_implementation cache_config max_cache_len
        prefill_chunk_size prompt_lookup_num_tokens assistant_early_exit use_mtp""",
        lambda value, rows: True,
    ),
}

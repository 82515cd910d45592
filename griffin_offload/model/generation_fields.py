"""A checkpoint's generation config: which fields act as in transformers, which are overridden, which are refused.

Sampling, penalties, lengths and stop strings are transformers' own. The KV cache, the streamer and the one forward per
token are ours: a field that would replace them is overridden where that changes no answer, or else refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..errors import CheckpointError, OptionError, one_line
from ..options import COLD
from ..small_json import read_object
from .generation_allowed import allowed_generation

_CACHE = "the KV cache is Griffin's own"
_ONE_BY_ONE = "tokens are decoded one by one, with the same answer"
# Field -> why it does nothing here; '' where nobody would miss it.
_OVERRIDDEN = {
    "use_cache": "",
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "compile_config": "",
    "disable_compile": "",
    "prefill_chunk_size": "the prompt passes in one forward",
    "prompt_lookup_num_tokens": _ONE_BY_ONE,
    "assistant_early_exit": _ONE_BY_ONE,
    "use_mtp": _ONE_BY_ONE,
    "is_assistant": "",
    "output_attentions": "",
    "output_hidden_states": "",
    "output_scores": "",
    "output_logits": "",
    "return_dict_in_generate": "",
}
_USUAL = (None, False, "dynamic", "hybrid")  # values that transformers does not act on, or that it drops itself
_BEAMS = "one answer a prompt, without beams: they cannot be streamed"
_HUB = "transformers would fetch code from the hub for it"
_SEVERAL = "it decodes several tokens at a time, which cannot be streamed"
_AGAIN = "it would run the model on a second text for every token"
# Field -> why it cannot be had. For what is asked of `generate`, and for the generation config.
_REFUSED = {
    "num_beams": _BEAMS,
    "num_return_sequences": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "penalty_alpha": _HUB,
    "dola_layers": _HUB,
    "guidance_scale": _AGAIN,
    "token_healing": "it would change the prompt's last tokens after the plan is made",
    "prefill_chunk_size": "it would read the model once a chunk",
    "prompt_lookup_num_tokens": _SEVERAL,
    "assistant_early_exit": _SEVERAL,
    "use_mtp": _SEVERAL,
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
}
# As `_REFUSED`, for keywords of `generate` alone: in a file they do nothing.
_REFUSED_KEYWORDS = {
    "assistant_model": _SEVERAL,
    "custom_generate": "only transformers' own generate is run",
    "past_key_values": _CACHE,
}
_TOKENS = ("forced_bos_token_id", "forced_eos_token_id", "pad_token_id")


def load_generation_config(
    folder: Path, rows: int, facts: Mapping[str, Any] | None = None
) -> tuple[GenerationConfig, list[str]]:
    """transformers' generation config, from config.json where it has no file of its own; and what is overridden in it,
    in words. `rows`: of the table of embeddings, of which padding needs one. `facts`: of config.json, where it has been
    read. Raises CheckpointError."""
    name = "generation_config.json"
    own = (folder / name).exists()
    if not own:
        name = "config.json"
    where = folder / name
    try:
        if own or facts is None:
            facts = read_object(where)
        allowed = allowed_generation(facts, rows, where)
        acting = {field: value for field, value in allowed.items() if field not in _OVERRIDDEN}
        settings = GenerationConfig(**acting, **({} if own else {"_from_model_config": True}))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{where} cannot be used: {one_line(error)}") from None
    told = []
    if settings.bos_token_id is not None and not isinstance(settings.bos_token_id, int):
        settings.bos_token_id = None  # it is no matter: every prompt has a first token
    end = settings.eos_token_id
    ends = end if isinstance(end, list) else [end]
    pad = settings.pad_token_id
    if pad is not None and not _inside(pad, rows):
        told.append(f"pad_token_id {one_line(pad)} of {name}: the table of embeddings has {rows} rows")
    settings.pad_token_id = next((token for token in (pad, *ends) if _inside(token, rows)), 0)
    cold = settings.temperature
    if isinstance(cold, int | float) and 0 < cold < COLD and settings.do_sample:
        told.append(f"temperature {cold} of {name}: the likeliest token is taken every time")
        settings.temperature, settings.do_sample = None, False
    for field, why in _OVERRIDDEN.items():
        value = allowed.get(field)
        if why and value not in _USUAL:
            told.append(f"{field} {one_line(value)} of {name}: {why}")
        setattr(settings, field, None)
    settings.use_cache = True
    return settings, told


def check_generation(settings: GenerationConfig, options: Mapping[str, Any], rows: int) -> None:
    """Raises OptionError for what neither keywords of `generate` nor the model's generation config may ask for.

    `rows`: of the table of embeddings."""
    given = options.get("generation_config")

    def asked(field: str) -> Any:
        for value in (options.get(field), getattr(given, field, None), getattr(settings, field, None)):
            if value is not None:
                return value
        return None

    def refuse(field: str, why: str) -> None:
        ours = options.get(field) is not None or getattr(given, field, None) is not None
        place = "" if ours else " of the model's generation config"
        raise OptionError(f"{field} {one_line(asked(field))}: {why}; leave it out{place}")

    for field, why in _REFUSED_KEYWORDS.items():
        if options.get(field) is not None:
            raise OptionError(f"{field}: {why}; leave it out")
    for field, why in _REFUSED.items():
        if _acts(field, asked):
            refuse(field, why)
    for field in _TOKENS:
        value = asked(field)
        wrong = [i for i in (value if isinstance(value, list) else [value]) if i is not None and not _inside(i, rows)]
        if wrong:
            refuse(field, f"the model knows the tokens 0 to {rows - 1}")


def _acts(field: str, asked: Any) -> bool:
    value = asked(field)
    if value is None:
        return False
    if field in ("num_beams", "num_return_sequences", "guidance_scale"):
        return bool(value != 1)
    if field == "use_cache":
        return value is False
    if field == "penalty_alpha":  # contrastive search; where tokens are sampled, transformers ignores it
        top_k = asked("top_k")
        return bool(value > 0 and (50 if top_k is None else top_k) > 1 and asked("do_sample") is not True)
    return value is not False and value != 0


def _inside(token: Any, rows: int) -> bool:
    return isinstance(token, int) and 0 <= token < rows

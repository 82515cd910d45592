"""A tokenizer <-> the fields of a GGUF file's header, with the way texts are split before merges.

llama.cpp has a name, `pre`, for each way of splitting; its converter finds it by hashing the tokens of one text. We
compare the tokenizer's own steps with what each name means in src/llama-vocab.cpp of
https://github.com/ggml-org/llama.cpp, and write a name only if llama.cpp splits as the tokenizer does."""

import json
from typing import Any

from ...errors import ExportError, UnsupportedArchitecture
from ...foreign import shown
from .values import Values

_WORDS = r"[^\r\n\p{L}\p{N}]?"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"{_SIGNS}[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BYTES, _DIGITS = ("ByteLevel", False), ("Digits", True)
_GPT2 = ("ByteLevel", True)  # splits as GPT-2 does
# Name -> the steps of a tokenizer.json's pre_tokenizer. The last one makes bytes.
PRE: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "llama-bpe": (("Split", rf"{_SHORT}|{_WORDS}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"), _BYTES),
    "qwen2": (("Split", rf"{_SHORT}|{_WORDS}\p{{L}}+|\p{{N}}|{_REST}"), _BYTES),
    "tekken": (
        ("Split", rf"{_WORDS}{_UPPER}*{_LOWER}+|{_WORDS}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}"),
        _BYTES,
    ),
}
ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    "phi-2": "gpt-2",
}
UNNAMED = ("", "default")  # of files from before there were names: left to transformers
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word of the vocabulary becomes one token without merges
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
_UNDERLINE = "\u2581"  # a space, in SentencePiece's vocabularies


def check_tokenizer(fields: Values) -> None:
    """Raises UnsupportedArchitecture for a file whose way of splitting texts is not known here."""
    model, pre = fields.text("tokenizer.ggml.model", "llama"), fields.text("tokenizer.ggml.pre", "default")
    wrong = {"model": model} if model not in ("gpt2", "llama") else {}
    if model == "gpt2" and pre not in (*PRE, *ALIASES, *UNNAMED):
        wrong = {"pre": pre}
    for key, value in wrong.items():
        raise UnsupportedArchitecture(
            f"{fields.name}: its header says tokenizer.ggml.{key} {shown(value, 40)!r}, a way of splitting texts that "
            "is not known here: use the original safetensors"
        )


def split_as(backend: Any, fields: Values) -> None:
    """Makes a tokenizer split texts as a file with these fields says; without a name it stays as it is."""
    from tokenizers import Tokenizer, decoders, normalizers

    header = fields.of("tokenizer.ggml.")
    pre = ALIASES.get(header.text("pre"), header.text("pre"))
    if header.text("model") == "gpt2" and pre in PRE:
        model = {"type": "BPE", "vocab": {}, "merges": []}
        empty = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": as_json(PRE[pre])}
        backend.pre_tokenizer = Tokenizer.from_str(json.dumps(empty)).pre_tokenizer
        backend.model.ignore_merges = pre in WHOLE_WORDS_FIRST
    elif header.text("model") == "llama" and not header.flag(
        "add_space_prefix", True
    ):  # transformers adds one for Llama
        backend.normalizer, backend.pre_tokenizer = normalizers.Replace(" ", _UNDERLINE), None
        steps = [decoders.Replace(_UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)


def vocabulary_fields(tokenizer: Any, rows: int, ends: list[int], name: str) -> dict[str, Any]:
    """A tokenizer -> a header's fields, for an embedding of `rows` rows. `ends`: tokens that end an answer.

    Raises ExportError if llama.cpp would tokenize otherwise."""
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parsed["model"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE":
        raise ExportError(f"{name}: a tokenizer of type {model.get('type')} cannot be written to GGUF: {_WAY_OUT}")
    added = {token["id"]: token for token in parsed["added_tokens"]}
    words = {number: word for word, number in vocabulary.items()} | {n: t["content"] for n, t in added.items()}
    if max(words) >= rows:
        raise ExportError(f"{name}: the tokenizer has {max(words) + 1} tokens, the embedding table {rows}")
    types = [_token_type(number, words, added, model) for number in range(rows)]
    fields: dict[str, Any] = {"model": "gpt2", "tokens": [words.get(i, f"[PAD{i}]") for i in range(rows)]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields |= {"model": "llama", "pre": "default", "add_space_prefix": _adds_space(parsed, name)}
        fields["scores"] = _scores(fields["tokens"], merges)
    else:
        fields |= {"pre": _pre(parsed, name)}
        if merges:
            fields["merges"] = merges
    fields["token_type"] = types
    fields |= _special(tokenizer, ends)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()} | (
        {"tokenizer.chat_template": template} if template else {}
    )


_WAY_OUT = "use --format safetensors"


def _token_type(number: int, words: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    if number not in words:
        return UNUSED
    if words[number] == model.get("unk_token") and model.get("byte_fallback"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    word = words[number]
    is_byte = model.get("byte_fallback") and len(word) == 6 and word.startswith("<0x") and word.endswith(">")
    return BYTE if is_byte else NORMAL


def _special(tokenizer: Any, ends: list[int]) -> dict[str, Any]:
    ids = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    own = tokenizer.eos_token_id
    ends = ([own] if own in ends or not ends else []) + [end for end in ends if end != own]
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    encoded = tokenizer.encode("a")
    fields: dict[str, Any] = {f"{key}_token_id": int(value) for key, value in ids.items() if value is not None}
    fields["add_bos_token"] = tokenizer.bos_token_id is not None and encoded[:1] == [tokenizer.bos_token_id]
    fields["add_eos_token"] = len(encoded) > 1 and own is not None and encoded[-1] == own
    return fields


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's score of each token: the earlier its first merge, the higher."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge.split(" ")), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _pre(parsed: dict[str, Any], name: str) -> str:
    """The `pre` of a byte-level tokenizer. Raises ExportError."""
    steps = _steps(parsed.get("pre_tokenizer"))
    found = next((pre for pre, known in PRE.items() if known == steps), None)
    normalizer = (parsed.get("normalizer") or {}).get("type")
    if found is None or normalizer not in (None, "NFC"):  # llama.cpp does not normalize; most texts are in NFC
        raise ExportError(
            f"{name}: its tokenizer splits texts in a way that has no known name in llama.cpp "
            f"(known: {', '.join(PRE)}): {_WAY_OUT}, or give a GGUF file of the model"
        )
    return found


def _steps(pre: Any) -> tuple[tuple[str, Any], ...]:
    """A pre_tokenizer of tokenizer.json -> steps as in PRE; () if it has others."""
    if not pre:
        return ()
    if pre["type"] == "Sequence":
        parts = [_steps(part) for part in pre["pretokenizers"]]
        return tuple(step for part in parts for step in part) if all(parts) else ()
    if pre["type"] == "ByteLevel" and not pre.get("add_prefix_space"):
        return (("ByteLevel", pre.get("use_regex", True)),)
    if pre["type"] == "Digits":
        return (("Digits", pre["individual_digits"]),)
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"] and "Regex" in pre["pattern"]:
        return (("Split", pre["pattern"]["Regex"]),)
    return ()


def as_json(steps: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The inverse of `_steps`."""
    parts: list[dict[str, Any]] = []
    for kind, value in steps:
        if kind == "ByteLevel":
            parts.append({"type": kind, "add_prefix_space": False, "trim_offsets": True, "use_regex": value})
        elif kind == "Digits":
            parts.append({"type": kind, "individual_digits": value})
        else:
            parts.append({"type": kind, "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0]


def _adds_space(parsed: dict[str, Any], name: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text. Raises ExportError."""
    steps = parsed.get("normalizer") or {}
    steps = steps["normalizers"] if steps.get("type") == "Sequence" else [steps] if steps else []
    pre = parsed.get("pre_tokenizer") or {}
    kinds = [step["type"] for step in steps]
    if pre.get("type") == "Metaspace" and pre["replacement"] == _UNDERLINE and not pre.get("split") and not kinds:
        return bool(pre.get("prepend_scheme", "always") != "never")
    replaces = bool(steps) and steps[-1].get("pattern") == {"String": " "} and steps[-1].get("content") == _UNDERLINE
    splits_nothing = not pre or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    if replaces and splits_nothing and kinds in (["Replace"], ["Prepend", "Replace"]):
        return len(kinds) == 2
    raise ExportError(f"{name}: its tokenizer changes texts in a way that llama.cpp does not: {_WAY_OUT}")

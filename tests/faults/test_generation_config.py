"""A generation config reaches transformers field by field, each of its kind; what is of another is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from griffin_offload.errors import CheckpointError
from griffin_offload.model.generation_allowed import STOPS
from griffin_offload.model.generation_fields import load_generation_config

pytestmark = pytest.mark.fault
ROWS = 300

OF_ANOTHER_KIND: list[tuple[str, Any]] = [
    ("temperature", "x"),
    ("temperature", [1]),
    ("temperature", True),
    ("temperature", float("nan")),
    ("repetition_penalty", "inf"),
    ("repetition_penalty", 10**400),
    ("max_time", "q"),
    ("penalty_alpha", "x"),
    ("eta_cutoff", {}),
    ("top_k", 1.5),
    ("top_k", 2**63),
    ("max_length", "x"),
    ("min_new_tokens", [2]),
    ("no_repeat_ngram_size", "3"),
    ("do_sample", "yes"),
    ("do_sample", 1),
    ("renormalize_logits", "x"),
    ("eos_token_id", True),
    ("eos_token_id", [2, None]),
    ("eos_token_id", [2] * 300_001),
    ("suppress_tokens", "a"),
    ("suppress_tokens", [[1]]),
    ("forced_eos_token_id", 1.0),
    ("bad_words_ids", []),
    ("bad_words_ids", "x"),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [[ROWS]]),
    ("bad_words_ids", [[-1]]),
    ("bad_words_ids", [[10**30]]),
    ("bad_words_ids", [[1]] * 10_001),
    ("bad_words_ids", [[1] * 1001]),
    ("sequence_bias", {"a": 1}),
    ("sequence_bias", [[[1], "a"]]),
    ("sequence_bias", [[[ROWS], 1.0]]),
    ("sequence_bias", [[[1]]]),
    ("stop_strings", 5),
    ("stop_strings", [""]),
    ("stop_strings", []),
    ("stop_strings", [1]),
    ("stop_strings", ["\ud800"]),
    ("stop_strings", ["a"] * (STOPS + 1)),
    ("stop_strings", ["a" * STOPS, "b"]),
    ("exponential_decay_length_penalty", ["a", "b"]),
    ("exponential_decay_length_penalty", [1]),
    ("watermarking_config", 5),
    ("watermarking_config", {"class": "x"}),
    ("watermarking_config", {"bias": "x"}),
    ("watermarking_config", {"context_width": 1.5}),
]
UNKNOWN: dict[str, Any] = {
    "custom_generate": "somebody/code",
    "trust_remote_code": True,
    "_from_model_config": True,
    "compile_config": {"backend": "somebody.module"},
    "continuous_batching_config": {"scheduler_type": "x"},
    "transformers_version": 5,
    "validate": 1,
    "to_dict": 1,
    "update": 1,
    "__class__": "x",
    "__dict__": {"temperature": 0.5},
    "": 2,
}
KNOWN: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 5,
    "do_sample": True,
    "eos_token_id": [2, 3],
    "suppress_tokens": list(range(100)),
    "begin_suppress_tokens": [],
    "bad_words_ids": [[1], [2, 3]],
    "sequence_bias": [[[4], -float("inf")], [[5, 6], 2]],
    "stop_strings": ["a", "bc"],
    "exponential_decay_length_penalty": [3, 1.5],
    "max_time": 60,
}


def file(folder: Path, facts: Any, name: str = "generation_config.json") -> Path:
    (folder / name).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("field", "value"), OF_ANOTHER_KIND, ids=lambda value: str(value)[:20])
def test_a_field_of_another_kind_is_named(field: str, value: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name} cannot be used: {field} is .*, which is not ") as told:
        load_generation_config(file(tmp_path, {field: value}, name), ROWS)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("field", UNKNOWN)
def test_an_unknown_field_is_left_out(field: str, tmp_path: Path) -> None:
    plain, told = load_generation_config(file(tmp_path, {}), ROWS)
    settings, told_too = load_generation_config(file(tmp_path, {field: UNKNOWN[field]}), ROWS)
    assert vars(settings) == vars(plain)
    assert told == told_too == []


@pytest.mark.parametrize("field", KNOWN)
def test_a_known_field_is_as_transformers_reads_it(field: str, tmp_path: Path) -> None:
    settings, _ = load_generation_config(file(tmp_path, {field: KNOWN[field]}), ROWS)
    expected = GenerationConfig.from_pretrained(tmp_path)
    assert getattr(settings, field) == getattr(expected, field) == KNOWN[field]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b'{"top_k": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be used: "):
        load_generation_config(tmp_path, ROWS)

"""Fields of generation_config.json and config.json: each works as in transformers, is overridden, or is refused."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt, tiny_tokenizer

from griffin_offload import Engine
from griffin_offload.errors import CheckpointError, OptionError, UnsupportedArchitecture
from griffin_offload.run import Answer

PROMPT, COUNT = tiny_prompt(), 12
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "suppress_tokens": list(range(100)),
    "exponential_decay_length_penalty": [3, 1.5],
    "forced_eos_token_id": 7,
}
SILENT: dict[str, Any] = {
    "use_cache": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict_in_generate": True,
    "disable_compile": True,
    "is_assistant": True,
    "is_encoder_decoder": True,
}
TOLD: dict[str, Any] = {
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "prefill_chunk_size": 16,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
}
REFUSED: dict[str, Any] = {
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [1],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "token_healing": True,
    "forced_bos_token_id": 300,
    "forced_eos_token_id": [2, -1],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama") / "m", "llama")


def changed(llama: Path, out: Path, name: str, fields: dict[str, Any], *, alone: bool = False) -> Path:
    """A copy of the model in `out` with fields set in a file; `alone`: without a generation config."""
    for file in llama.iterdir():
        if not alone or file.name != "generation_config.json":
            (out / file.name).write_bytes(file.read_bytes())
    (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | fields))
    return out


def answer(folder: Path, **options: Any) -> Answer:
    return Engine(folder, device_memory="8GiB").generate(
        PROMPT, sparsity=0, max_new_tokens=COUNT, do_sample=False, **options
    )


def plain(folder: Path) -> list[int]:
    """What transformers answers by itself."""
    ids = torch.tensor([PROMPT])
    out = oracle.load(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, tokenizer=tiny_tokenizer()
    )
    return list(out[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", PENALTIES)
def test_penalties_work_as_in_transformers(llama: Path, tmp_path: Path, name: str, field: str) -> None:
    """In config.json alone too; there transformers reads some of them and not others."""
    folder = changed(llama, tmp_path, name, {field: PENALTIES[field]}, alone=name == "config.json")
    assert answer(folder).token_ids == plain(folder)
    if name == "generation_config.json":
        assert plain(folder) != plain(llama)


def test_sampling_in_config_json_alone_is_read(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, "config.json", {"do_sample": True, "temperature": 0.3}, alone=True)
    settings = Engine(folder).skeleton.model.generation_config
    assert settings.do_sample is True
    assert settings.temperature == 0.3


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", SILENT | TOLD)
def test_what_changes_no_answer_is_overridden(llama: Path, tmp_path: Path, name: str, field: str) -> None:
    folder = changed(llama, tmp_path, name, {field: (SILENT | TOLD)[field]}, alone=name == "config.json")
    got = answer(folder)
    assert got.token_ids == plain(llama)
    if field in SILENT or (name == "config.json" and not got.report.overridden):
        assert got.report.overridden == ()
    else:
        assert field in got.report.overridden[0]
        assert ("not used", got.report.overridden[0]) in got.report.rows()
        assert got.report.to_json()["overridden"] == list(got.report.overridden)


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(llama: Path, tmp_path: Path, field: str) -> None:
    folder = changed(llama, tmp_path, "generation_config.json", {field: REFUSED[field]})
    with pytest.raises(OptionError, match=f"{field}.*generation config"):
        answer(folder)
    with pytest.raises(OptionError, match=field):
        answer(llama, **{field: REFUSED[field]})


def test_an_option_goes_before_the_file(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, "generation_config.json", {"num_beams": 3})
    assert answer(folder, num_beams=1).token_ids == plain(llama)


@pytest.mark.parametrize("field", ["use_cache", "cache_implementation", "past_key_values"])
def test_another_cache_cannot_be_asked_for(llama: Path, field: str) -> None:
    with pytest.raises(OptionError, match=f"{field}.*KV cache"):
        answer(llama, **{field: False if field == "use_cache" else "static"})


@pytest.mark.parametrize(
    "fields", [{"return_dict": False}, {"attn_implementation": "flash_attention_2"}, {"pad_token_id": 5000}]
)
def test_fields_that_stop_transformers(llama: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = changed(llama, tmp_path, "config.json", fields)
    got = answer(folder)
    assert got.token_ids == plain(llama)
    assert [name for name in fields if name != "return_dict"] == [line.split()[0] for line in got.report.overridden]


@pytest.mark.parametrize(
    ("kind", "field"), [("llama", "is_causal"), ("gemma2", "is_causal"), ("gemma3_text", "use_bidirectional_attention")]
)
def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, kind: str, field: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: field != "is_causal"}))
    with pytest.raises(UnsupportedArchitecture, match=field):
        Engine(folder)


def test_a_field_that_the_type_ignores_refuses_nothing(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, "config.json", {"use_bidirectional_attention": True})
    assert answer(folder).token_ids == plain(folder)


@pytest.mark.parametrize("window", [-1, 0])
def test_a_window_of_no_token_is_refused(tmp_path: Path, window: int) -> None:
    folder = tiny_checkpoint(tmp_path / "m", "mistral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    with pytest.raises(CheckpointError, match=f"sliding_window is {window}"):
        Engine(folder)


def test_a_begin_token_that_is_none_is_no_matter(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, "generation_config.json", {"bos_token_id": float("nan")})
    assert answer(folder).token_ids == plain(llama)


def test_a_watermark_without_a_bias_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, "generation_config.json", {"watermarking_config": {"bias": "x"}})
    with pytest.raises(CheckpointError, match="watermarking_config"):
        Engine(folder)

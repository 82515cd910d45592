"""The KV cache is as large as the keys of the model that transformers builds, whatever else its config says."""

import json
from pathlib import Path

import oracle
import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from tiny_types import TINY
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from griffin_offload import Engine
from griffin_offload.model.architecture import architecture
from griffin_offload.model.attention_sizes import attention_sizes

STRAY = {"num_key_value_heads": 1, "num_kv_heads": 1, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "v_head_dim": 2}
STRAY |= {"multi_query": True, "new_decoder_architecture": True, "head_dim": 2, "global_head_dim": 3}


@pytest.mark.parametrize("kind", TINY)
def test_as_large_as_what_transformers_caches(kind: str) -> None:
    config = AutoConfig.for_model(**{"model_type": kind, **TINY[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.tensor([tiny_prompt(5)]), past_key_values=cache, use_cache=True)
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    entry = architecture(config.model_type)
    assert entry
    found = attention_sizes(model.get_submodule(entry.layers), config)
    assert found.cached == max(s.shape[1] * s.shape[3] for s in states if s is not None)
    assert found.width >= found.cached or kind == "mimo_v2_flash"


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "gpt2", "bloom", "gptj", "mpt", "xglm", "falcon", "biogpt"])
def test_fields_that_the_type_ignores_change_no_plan(tmp_path: Path, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "m", kind)
    before = Engine(folder, device_memory="8GiB").sizes
    file = folder / "config.json"
    config = json.loads(file.read_text())
    declared = AutoConfig.from_pretrained(folder)
    own = {field for field in STRAY if hasattr(type(declared), field) or field in declared.attribute_map}
    file.write_text(json.dumps(config | {field: STRAY[field] for field in STRAY.keys() - own}))
    engine = Engine(folder, device_memory="8GiB")
    assert engine.sizes == before
    got = engine.generate(tiny_prompt(40), sparsity=0, max_new_tokens=8, greedy=True)
    assert got.token_ids == oracle.full_generate(oracle.load(folder), tiny_prompt(40), 8)[0]

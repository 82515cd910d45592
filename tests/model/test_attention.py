"""Attention of one token against torch's own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_checkpoint, tiny_prompt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from griffin_offload import Engine
from griffin_offload.model import attention
from griffin_offload.model.attention import attend_one


def states(batch: int, heads: int, keys: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """As a cache gives them: the first tokens of more room."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, heads, keys + 5, size), generator=generator).to(dtype)[:, :, :keys]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch", [2**20, 1000, 1])  # all keys at once, some, one at a time
@pytest.mark.parametrize(("batch", "heads", "queries"), [(1, 1, 1), (1, 2, 3), (3, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("width", [16, 24])  # of a value
@pytest.mark.parametrize("kind", ["none", "bool", "added", "heads"])
def test_one_token_attends_as_torch_has_it(
    dtype: torch.dtype,
    scratch: int,
    batch: int,
    heads: int,
    queries: int,
    width: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SCRATCH", scratch)
    keys = 37
    query = states(batch, heads * queries, 1, 16, dtype, 0)
    key, value = states(batch, heads, keys, 16, dtype, 1), states(batch, heads, keys, width, dtype, 2)
    seen = torch.rand((batch, 1, 1, keys), generator=torch.Generator().manual_seed(3)) > 0.3
    masks = {"none": None, "bool": seen, "added": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)}
    masks["heads"] = torch.randn((batch, heads * queries, 1, keys)).to(dtype)
    mask = masks[kind]
    wanted = scaled_dot_product_attention(
        query.float(),
        key.float().repeat_interleave(queries, 1),
        value.float().repeat_interleave(queries, 1),
        attn_mask=mask.float() if mask is not None and mask.dtype != torch.bool else mask,
        scale=0.3,
    )
    found = attend_one(query, key, value, mask, 0.3)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.float(), wanted.transpose(1, 2), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mistral", "gpt_neox"])
def test_answers_use_it_and_prompts_do_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine(tiny_checkpoint(tmp_path / kind, kind), dtype="float32"), list[int]()
    ours = attention.attend_one
    monkeypatch.setattr(attention, "attend_one", lambda q, *args: (calls.append(q.shape[2]), ours(q, *args))[1])
    engine.generate(tiny_prompt(20), sparsity=0.5, method="griffin", max_new_tokens=4, min_new_tokens=4)
    assert calls == [1] * 3 * len(engine.skeleton.layers)


def test_keys_are_written_out_for_each_query_where_no_kernel_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in float32: of several heads of keys, and in the order of the queries."""
    module = SimpleNamespace(training=False, num_key_value_groups=3, is_causal=True)
    query, key, value = (states(2, heads, 9, 16, torch.float32, heads) for heads in (6, 2, 2))
    wanted, _ = attention._attend(sdpa_attention_forward, module, query, key, value, None)
    heads: list[int] = []

    def own(module: object, query: Tensor, key: Tensor, value: Tensor, *args: object, **more: object) -> object:
        heads.append(key.shape[1])
        return sdpa_attention_forward(module, query, key, value, *args, **more)

    monkeypatch.setattr(attention, "sdpa_attention_forward", own)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: False)
    found, _ = attention._attend(own, module, query, key, value, None)
    assert heads == [6]
    torch.testing.assert_close(found, wanted)

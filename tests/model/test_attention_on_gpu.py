"""Memory of attention on a GPU; skipped without CUDA. test_attention.py tests its numbers."""

from types import SimpleNamespace

import pytest
import torch
from emulator import CARDS
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from griffin_offload.model.attention import _attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.skipif(CARDS > 0, reason="an emulated card has the kernels of the CPU"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_scores_of_all_pairs_of_tokens_are_written_for_grouped_queries(dtype: torch.dtype) -> None:
    tokens, module = 2048, SimpleNamespace(training=False, num_key_value_groups=4, is_causal=True)
    query, key, value = (torch.randn(1, heads, tokens, 64, device="cuda").to(dtype) for heads in (8, 2, 2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        _attend(sdpa_attention_forward, module, query, key, value, None)
    assert torch.cuda.max_memory_allocated() - before < 8 * tokens * tokens * dtype.itemsize / 2

"""Skipped blocks the slow way: plain transformers, their z at zero, one token and one block at a time."""

import copy
from typing import Any

import oracle
import torch
from torch import Tensor

from griffin_offload import Engine
from griffin_offload.engine import Answer
from griffin_offload.options import FfnSkip

LAYERS = 6
SIX = {"num_hidden_layers": LAYERS}
DEEP: dict[str, dict[str, Any]] = {
    "llama": SIX,
    "llama-relu": SIX,  # with biases
    "qwen2": SIX,
    "opt": SIX,  # its projections lie in the layer itself
    "phi": SIX,  # beside the attention
    "gptj": {"n_layer": LAYERS},
    "gpt2": {"n_layer": LAYERS},  # transposed
    "phi3": SIX,  # gate and up in one
    "gemma3_text": {**SIX, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},  # a norm behind
    "falcon-alibi": SIX,
}
TOKENS = 30  # so that the threshold is corrected


@torch.no_grad()
def leaving(model: Any, ids: list[int], cache: Any, off: set[int], layer: int, bare: bool = False) -> Tensor:
    """The states (T, D) that leave a layer when the blocks `off` have no z; `bare`: nor the layer's own, nor a bias."""
    seen: list[Tensor] = []
    blocks = oracle.blocks(model)
    experts = [torch.arange(0 if b.layer in off or (bare and b.layer == layer) else width(b)) for b in blocks]
    bias = next(b for b in blocks if b.layer == layer).module.bias if bare else None
    kept = None if bias is None else bias.clone()
    hook = oracle.decoder_layers(model)[layer].register_forward_hook(
        lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    try:
        if bias is not None:
            bias.zero_()
        with oracle._masked(model, experts):
            oracle._forward(model, ids, copy.deepcopy(cache))
    finally:
        hook.remove()
        if bias is not None:
            bias.copy_(kept)
    return seen[0]


def width(block: oracle.Block) -> int:
    return block.module.weight.shape[0 if type(block.module).__name__ == "Conv1D" else 1]


def similarity(model: Any, ids: list[int], cache: Any, off: set[int], layer: int) -> Tensor:
    """(T,), by two forwards: one with the layer's block, one without."""
    return torch.cosine_similarity(
        leaving(model, ids, cache, off, layer, bare=True), leaving(model, ids, cache, off, layer), dim=-1
    )


def prompt_similarity(model: Any, prompt: list[int]) -> Tensor:
    """(T, L)."""
    return torch.stack([similarity(model, prompt, None, set(), layer) for layer in range(LAYERS)], 1)


def greedy(engine: Engine, prompt: list[int], skip: FfnSkip | None, sparsity: float = 0.0, **how: Any) -> Answer:
    how = {"rest": "drop", "fold": False, "prior": "off", "max_new_tokens": TOKENS, "do_sample": False, **how}
    return engine.generate(prompt, sparsity=sparsity, skip=skip, **how)

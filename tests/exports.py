"""Exports in plain transformers: loaded whole, and continued from a cache."""

from pathlib import Path
from typing import Any

import oracle
import torch
from transformers import AutoModelForCausalLM

TEXT = "Why is the sky blue?"


def load(folder: Path) -> Any:
    """By plain transformers, which must find every weight and nothing more."""
    model, facts = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(facts.values()), facts
    return model.eval()


@torch.no_grad()
def go_on(model: Any, cache: Any, first: int, count: int) -> list[int]:
    """`count` greedy tokens from a cache and the token that follows it, ended by the model's own end."""
    tokens = [first]
    while len(tokens) < count and tokens[-1] not in oracle.end_tokens(model):
        output = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens

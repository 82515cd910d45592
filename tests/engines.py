"""Engines under test: what they answer, with the logits of each token, held against the oracle."""

import threading
from functools import partial
from pathlib import Path

import oracle
import torch
from transformers import LogitsProcessor

from griffin_offload import Engine
from griffin_offload.engine import Answer


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "griffin-reader"]


class Logits(LogitsProcessor):
    """Keeps the logits that every token is chosen from."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores[0].clone())
        return scores


copying = partial(Engine, copies=True)  # copies every layer to its device, as on a GPU, though the device is the CPU


def greedy(engine: Engine, prompt: list[int], sparsity: float, tokens: int = 24) -> tuple[Answer, torch.Tensor]:
    logits = Logits()
    generation = engine.generate(
        prompt, sparsity=sparsity, method="griffin", max_new_tokens=tokens, do_sample=False, logits_processor=[logits]
    )
    return generation, torch.stack(logits.steps)


def assert_equals_oracle(folder: Path, prompt: list[int], sparsity: float, engine: Engine, tokens: int = 24) -> None:
    model = oracle.load(folder)
    experts = oracle.experts(model, prompt, sparsity)
    expected, expected_logits = oracle.masked_generate(model, prompt, experts, tokens)
    generation, logits = greedy(engine, prompt, sparsity, tokens)
    if sparsity:
        assert [layer[0].tolist() for layer in engine.kept_neurons()] == [e.tolist() for e in experts]
    assert generation.token_ids == expected
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)

"""One case for each tiny model type, made once a session: its folder, the whole model, and what the oracle says."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import oracle
import torch
from tiny import tiny_checkpoint
from torch import Tensor
from transformers import PreTrainedModel


class Case:
    """A tiny model in float32. Its files and its model are shared by all tests: read them, never change them."""

    def __init__(self, kind: str, folder: Path) -> None:
        """`kind`: a key of TINY; `folder`: where its checkpoint is, or is written as soon as it is asked for."""
        self.kind = kind
        self._folder = folder
        self._kept: dict[tuple[tuple[int, ...], float], list[torch.LongTensor]] = {}
        self._answers: dict[tuple[tuple[int, ...], float, int], tuple[list[int], Tensor]] = {}

    @cached_property
    def folder(self) -> Path:
        there = (self._folder / "config.json").is_file()
        return self._folder if there else tiny_checkpoint(self._folder, self.kind)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole model by plain transformers."""
        return oracle.load(self.folder)

    def kept(self, prompt: Sequence[int], sparsity: float) -> list[torch.LongTensor]:
        """The oracle's kept neurons of each block: (k,), of routed experts (E, k)."""
        key = (tuple(prompt), sparsity)
        if key not in self._kept:
            self._kept[key] = oracle.experts(self.model, prompt, sparsity)
        return self._kept[key]

    def answer(self, prompt: Sequence[int], sparsity: float, count: int) -> tuple[list[int], Tensor]:
        """The oracle's greedy tokens, `count` at most, and the logits (N, V) each was chosen from."""
        key = (tuple(prompt), sparsity, count)
        if key not in self._answers:
            kept = self.kept(prompt, sparsity) if sparsity else None
            self._answers[key] = oracle.masked_generate(self.model, prompt, kept, count)
        return self._answers[key]

"""Compiles the decoder layers for a static step by torch.compile: one program for all layers, kept on disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..paths import cache_folder
from .modules import Pieces
from .norms import is_fused

LIMIT = 64  # programs of one process: for other sparsities, batches, lengths of the cache. torch's own limit is 8


def why_not_compiled(quantized: bool, per_prompt: bool, kept: Sequence[Sequence[int]]) -> str:
    """Why layers are not compiled; '' if they are. `kept`: neurons by layer and block. Layers that differ would each
    make a program of their own."""
    if quantized:
        return "not compiled: weights are quantized"
    if per_prompt:
        return "not compiled: each prompt has neurons of its own"
    return "not compiled: layers keep different numbers of neurons" if len(set(map(tuple, kept))) > 1 else ""


class CompiledLayers:
    """Compiled forwards of decoder layers, in place of their own within `in_place`. `failed`: why there are none."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        self._modules, self.failed = modules, ""
        self._forwards: list[Callable[..., Any]] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Only a prompt's feed-forward needs its `Pieces`, and the compiler fuses norms by itself; with either, each
        layer would be a program of its own."""
        if not self._forwards:  # only now: while layers are streamed, their forwards are hooked
            self._forwards = [torch.compile(module.forward) for module in self._modules]
        own: list[tuple[Any, Any]] = []
        try:
            for index, layer in enumerate(self._modules):
                for module in layer.modules():
                    forward = module.__dict__.get("forward")
                    if isinstance(forward, Pieces) or is_fused(forward):
                        own.append((module, forward))
                        del module.__dict__["forward"]
                own.append((layer, layer.__dict__.get("forward")))
                layer.forward = partial(_run, self._forwards[index], index)
            with torch._dynamo.config.patch(recompile_limit=LIMIT):  # type: ignore[attr-defined]
                yield
        finally:
            for module, forward in reversed(own):
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.forward = forward


class _OneLayer(Cache):  # type: ignore[misc]
    """A layer of a cache, whatever number the layer gives: so the program does not depend on the number."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layer.update(key_states, value_states)


def _run(forward: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
    kwargs["past_key_values"] = _OneLayer(kwargs["past_key_values"].layers[index])
    return forward(*args, **kwargs)

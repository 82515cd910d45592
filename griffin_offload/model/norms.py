"""Gives a model's RMS norms one or two operators in place of the eight or ten of transformers' code: our own kernel for
a few tokens on a CPU (native/norm.py), torch's own for any number on a GPU.

A trial on a few tokens shows which way computes what a module does; without one, the module keeps its own forward."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..native.library import chosen
from ..native.norm import LARGEST, rms_norm, trial, way_of

EPSILONS = ("variance_epsilon", "eps")  # what modules call it
Norm = Callable[[Tensor, Tensor], Tensor]  # rows (..., D), weights (D,) -> normed rows
Way = Callable[[Tensor, Tensor, float], Tensor]  # the same, by an epsilon


def norm_by_own_kernel(model: nn.Module) -> None:
    """Gives each RMS norm in bfloat16 that our kernel computes alike a forward that takes it."""
    ways: dict[Any, int | None] = {}
    for module, eps in _norms(model) if chosen() else ():
        kind = type(module), module.weight.shape, eps
        if kind not in ways:
            ways[kind] = way_of(_of(module), module.weight.numel(), eps)
        if (way := ways[kind]) is not None:
            module.forward = partial(_norm, module, module.forward, eps, way)


def norm_by_torchs_kernel(model: nn.Module) -> None:
    """Gives each RMS norm that torch's operator computes alike, to the bit on a CPU, a forward that takes it."""
    ways: dict[Any, Way | None] = {}
    for module, eps in _norms(model):
        kind = type(module), module.weight.shape, module.weight.dtype, eps
        if kind not in ways:
            ways[kind] = _fused_way(module, eps)
        if found := ways[kind]:
            module.forward = _Fused(module, eps, found)


class _Fused:
    """The forward of a norm by one operator for the sums."""

    def __init__(self, module: Any, eps: float, way: Way) -> None:
        self._module, self._forward, self._eps, self._way = module, module.forward, eps, way

    def __call__(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self._module.weight
        if args or kwargs or states.dtype != weight.dtype:
            return self._forward(states, *args, **kwargs)
        return self._way(states, weight, self._eps)


def _rounded_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's, and most: rounded to the model's dtype before it is multiplied by the weights."""
    return weight * nn.functional.rms_norm(x, weight.shape, None, eps)


def _rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """OLMo 2's: rounded once, at the end."""
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


def _one_more(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's: weights are less by 1 than what is multiplied; rounded at the end."""
    return (nn.functional.rms_norm(x.float(), weight.shape, None, eps) * (1.0 + weight.float())).to(x.dtype)


WAYS = (_rounded_first, _rounded_last, _one_more)


def is_fused(forward: Any) -> bool:
    return isinstance(forward, _Fused)


def _fused_way(module: Any, eps: float) -> Way | None:
    """What computes the same as a module, to the bit; None: nothing does."""
    x, weight = (each.to(module.weight.dtype) for each in trial(module.weight.numel()))
    with suppress(Exception):  # the module's: it may want more than states
        expected = _of(module)(x, weight)
        return next((way for way in WAYS if _is_equal(way(x, weight, eps), expected)), None)
    return None


def _norms(model: nn.Module) -> Iterator[tuple[Any, float]]:
    """The RMS norms of a model that have weights, and their epsilons."""
    for module in model.modules():
        eps = next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
        if (
            type(module).__name__.endswith("RMSNorm")
            and eps is not None
            and getattr(module, "weight", None) is not None
        ):
            yield module, eps


def _of(module: nn.Module) -> Norm:
    """What a norm computes, with other weights."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = functional_call(module, {"weight": weight}, (x,))
        return out

    return norm


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _norm(module: Any, before: Any, eps: float, way: int, states: Tensor, *args: Any, **kwargs: Any) -> Any:
    weight = module.weight
    few = states.numel() <= LARGEST and states.device.type == "cpu" and not (args or kwargs)
    if few and states.dtype == weight.dtype == torch.bfloat16 and states.is_contiguous():
        return rms_norm(states, weight, eps, way)
    return before(states, *args, **kwargs)

"""Forwards that take the place of a module's own: experts one by one, quantized products, embeddings read from disk,
long prompts in chunks.

T tokens, D hidden, F neurons, E routed experts; N rows of tokens, whatever their shape.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quant.products import dense_linear
from ..quant.weight import Weight, dense_matrix

PIECE = 1024  # tokens of a long prompt that are computed at a time: enough for the products' full speed
Watch = Callable[[Tensor, Tensor | None, int | None], Tensor | None]


class RoutedExperts:
    """The forward of a module of routed experts: one expert after the other, so that each one's z can be observed.

    The same sums as transformers' own loop; the weights' layout and the gate are the module's."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.watch: Watch | None = None
        self.quantized: dict[str, Sequence[Weight]] = {}  # by parameter: one weight for each expert

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens (N, D), their experts (N, K), int64, and the experts' weights (N, K) -> (N, D)."""
        module = self._module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        out = torch.zeros_like(hidden)
        for expert, places in enumerate(by_expert(index, len(self.quantized.get("down_proj", module.down_proj)))):
            if not len(places):
                continue
            tokens = places // index.shape[1]
            z = self._project(hidden[tokens], up, expert)
            z = module._apply_gate(z) if module.has_gate else module.act_fn(z)
            if self.watch and (other := self.watch(z, tokens, expert)) is not None:
                z = other
            result = self._project(z, "down_proj", expert) * weights.flatten()[places, None]
            out.index_add_(0, tokens, result.to(out.dtype))
        return out

    def _project(self, states: Tensor, name: str, expert: int) -> Tensor:
        bias = getattr(self._module, f"{name}_bias")[expert] if self._module.has_bias else None
        if name in self.quantized:
            out = self.quantized[name][expert].linear(states)
            return out if bias is None else out + bias
        weight = getattr(self._module, name)[expert]
        return dense_linear(states, weight.T if self._module.is_transposed else weight, bias)


def by_expert(index: Tensor, experts: int) -> Sequence[Tensor]:
    """Experts of tokens (N, K), int64 -> for each expert the places where it is, ascending, in the flat index.

    Numbers that are no expert's are left out. A GPU is waited for once, and not for every expert."""
    flat = torch.where((index >= 0) & (index < experts), index, experts).flatten()
    counts = flat.new_zeros(experts + 1).index_add_(0, flat, torch.ones_like(flat))
    places: Sequence[Tensor] = flat.argsort(stable=True).split(counts.tolist())
    return places[:experts]


def multiply(module: Any, states: Tensor) -> Tensor:
    """The forward of a linear module, torch's Linear or GPT-2's Conv1D, by the quicker way (quant/products.py), for any
    number of outputs: Conv1D's own shapes them by a number that it keeps."""
    return dense_linear(states, dense_matrix(module, module.weight), module.bias)


def multiply_by_the_quicker_way(model: nn.Module) -> None:
    """Gives a model's linear modules, and its routed experts, forwards that multiply so."""
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = partial(multiply, module)
        elif hasattr(module, "is_concatenated") and not isinstance(module.forward, RoutedExperts):
            module.forward = RoutedExperts(module)


class Projection:
    """The forward of a linear module: its own, or a product with a quantized weight."""

    def __init__(self, module: Any) -> None:
        self._module, self._dense = module, module.forward
        self.quantized: Weight | None = None

    def __call__(self, states: Tensor) -> Tensor:
        if self.quantized is None:
            out: Tensor = self._dense(states)
            return out
        out = self.quantized.linear(states)
        bias = self._module.bias
        return out if bias is None else out + bias


class LookedUp:
    """The forward of an embedding that stays in its file: only the rows of the tokens are read.

    `ahead`: the rows of the next call's tokens, looked up before it: a recorded forward cannot read."""

    def __init__(self, module: Any, read: Callable[[list[int]], Tensor]) -> None:
        """`read(rows)`: those rows of the table, (len(rows), D), on the CPU."""
        self._module, self._read, self._forward = module, read, module.forward
        self.ahead: RowsAhead | None = None

    def rows_ahead(self, ids: Tensor) -> "RowsAhead":
        """Memory for the rows of tokens like these (B, 1)."""
        return RowsAhead(len(ids), self._module.weight, ids.device)

    def look_ahead(self, tokens: list[int], memory: "RowsAhead") -> None:
        """Looks one token of each sequence up for the next call, into `memory`. Does not wait for the device."""
        memory.table.copy_(self._read(tokens), non_blocking=True)
        self.ahead = memory

    def __call__(self, ids: Tensor) -> Tensor:
        if self.ahead is not None:
            table, places, self.ahead = self.ahead.table, self.ahead.places, None
        else:
            tokens = ids.flatten().tolist()  # waits for a GPU once: sorting them there would wait twice
            rows = sorted(set(tokens))
            place = dict(zip(rows, range(len(rows)), strict=True))
            table = self._read(rows).to(ids.device)
            places = ids.new_tensor([place[token] for token in tokens]).view(ids.shape)
        self._module.register_parameter("weight", nn.Parameter(table, requires_grad=False))
        out: Tensor = self._forward(places)
        return out


class RowsAhead:
    """Rows of an embedding at a fixed address: `table` (B, D), of a token of each sequence; `places` (B, 1) in it."""

    def __init__(self, sequences: int, weight: Tensor, device: torch.device) -> None:
        """`weight` (..., D): any rows of the embedding."""
        self.table = torch.empty(sequences, weight.shape[1], dtype=weight.dtype, device=device)
        self.places = torch.arange(sequences, device=device)[:, None]


class Pieces:
    """The forward of a feed-forward module that computes a long prompt PIECE tokens at a time.

    `begin`: how many tokens came before the piece at hand."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.begin = 0

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Any states (..., D), and others of the same shape."""
        tokens = hidden.shape[:-1].numel()
        if tokens <= PIECE:
            return self._forward(hidden, *args, **kwargs)
        flat = [a.reshape(1, tokens, -1) if isinstance(a, Tensor) else a for a in (hidden, *args)]
        out, others = torch.empty_like(flat[0]), []
        try:
            for self.begin in range(0, tokens, PIECE):
                end = min(self.begin + PIECE, tokens)
                result = self._forward(
                    *(a[:, self.begin : end] if isinstance(a, Tensor) else a for a in flat), **kwargs
                )
                if isinstance(result, tuple):  # a mixture's router logits (N, E) beside
                    result, *rest = result
                    others.append(rest)
                out[:, self.begin : end] = result
        finally:
            self.begin = 0
        out = out.view(hidden.shape)
        return (out, *(torch.cat(parts) for parts in zip(*others, strict=True))) if others else out

"""The hooks of the sweep: stream a decoder layer (on accelerate's contract), observe z, cut a long prompt into pieces.

B batch, T tokens, D hidden, F neurons, E routed experts; N rows of tokens, whatever their shape.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from .packed import Weight
from .statistic import neuron_statistic

PIECE = 1024  # tokens of a long prompt that are computed at a time: enough for the products' full speed
Watch = Callable[[Tensor, Tensor | None, int | None], Tensor | None]
Measure = Callable[[Tensor, Tensor | None], Tensor]


class RoutedExperts:
    """The forward of a module of routed experts: one expert after the other, so that each one's z can be seen.

    The same sums as transformers' own loop; the weights' layout and the gate are the module's."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.watch: Watch | None = None
        self.packed: dict[str, Sequence[Weight]] = {}  # of each expert, in the place of the module's parameter

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens (N, D), their experts (N, K), int64, and the experts' weights (N, K) -> (N, D)."""
        module = self._module
        up = "gate_up_proj" if module.has_gate else "up_proj"
        out = torch.zeros_like(hidden)
        for expert in range(len(self.packed.get("down_proj", module.down_proj))):
            tokens, place = torch.where(index == expert)
            if not len(tokens):
                continue
            z = self._project(hidden[tokens], up, expert)
            z = module._apply_gate(z) if module.has_gate else module.act_fn(z)
            if self.watch and (other := self.watch(z, tokens, expert)) is not None:
                z = other
            result = self._project(z, "down_proj", expert) * weights[tokens, place, None]
            out.index_add_(0, tokens, result.to(out.dtype))
        return out

    def _project(self, states: Tensor, name: str, expert: int) -> Tensor:
        bias = getattr(self._module, f"{name}_bias")[expert] if self._module.has_bias else None
        if name in self.packed:
            out = self.packed[name][expert].linear(states)
            return out if bias is None else out + bias
        weight = getattr(self._module, name)[expert]
        return linear(states, weight.T if self._module.is_transposed else weight, bias)


class Projection:
    """The forward of a linear module: its own, or with a packed weight in the place of its parameter."""

    def __init__(self, module: Any) -> None:
        self._module, self._dense = module, module.forward
        self.packed: Weight | None = None

    def __call__(self, states: Tensor) -> Tensor:
        if self.packed is None:
            out: Tensor = self._dense(states)
            return out
        out = self.packed.linear(states)
        bias = self._module.bias
        return out if bias is None else out + bias


class LookedUp:
    """The forward of an embedding whose table stays in its file: only the rows that are asked for are read."""

    def __init__(self, module: Any, read: Callable[[list[int]], Tensor]) -> None:
        """`read(rows)`: those rows of the table, (len(rows), D), on the CPU."""
        self._module, self._read, self._forward = module, read, module.forward

    def __call__(self, ids: Tensor) -> Tensor:
        rows, places = ids.unique(return_inverse=True)
        table = self._read(rows.tolist()).to(ids.device)
        self._module.register_parameter("weight", nn.Parameter(table, requires_grad=False))
        out: Tensor = self._forward(places)
        return out


class Tap:
    """Shows `watch` what enters a block's down projection, while it is attached.

    `watch(z, tokens, expert)`: z (..., F); of a routed expert also which tokens (N,), counted in the piece at hand,
    and which expert. What it returns, unless None, goes on in the place of z."""

    def __init__(self, layer: nn.Module, path: str, watch: Watch) -> None:
        self._module: Any = layer.get_submodule(path)
        self._handle: Any = None
        if isinstance(self._module.forward, RoutedExperts):
            self._module.forward.watch = watch
        else:
            self._handle = self._module.register_forward_pre_hook(lambda _, args: watch(args[0], None, None))

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        else:
            self._module.forward.watch = None


class Pieces:
    """The forward of a feed-forward module that computes a long prompt PIECE tokens at a time: every token for itself.

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


class ObserveNeurons:
    """Adds the statistic of a block's z to `total`, (F,) or (E, F), float32, while it is attached.

    `weights` (B T,), float32: of every token of the forward (see neuron_statistic); None: 1.
    `measure`: what is added of z, `neuron_statistic` or another sum over tokens."""

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        total: Tensor,
        weights: Tensor | None = None,
        pieces: Pieces | None = None,
        measure: Measure = neuron_statistic,
    ) -> None:
        self._total, self._weights, self._pieces, self._measure = total, weights, pieces, measure
        self._tap = Tap(layer, path, self._observe)

    def _observe(self, z: Tensor, tokens: Tensor | None, expert: int | None) -> None:
        weights = self._weights
        if weights is not None:
            begin = self._pieces.begin if self._pieces else 0
            rows = z.shape[:-1].numel()
            weights = weights[begin : begin + rows] if tokens is None else weights[begin + tokens]
        total = self._total if expert is None else self._total[expert]
        total += self._measure(z, weights)

    def remove(self) -> None:
        self._tap.remove()


class Residual:
    """Tells how far a layer's feed-forward block turns the hidden state, while it is attached.

    What the block adds is what the last of the layer's modules to run puts out: the block, or a norm behind it."""

    def __init__(self, layer: nn.Module) -> None:
        self._added: Tensor | None = None
        self._last: nn.Module | None = None
        self._handles = {child: child.register_forward_hook(self._ran) for child in layer.children()}

    def _ran(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = module
        self._added = output[0] if isinstance(output, tuple) else output

    def settle(self) -> None:
        """After a forward: from here on, listen to none but the module that ran last."""
        for module in self._handles.keys() - {self._last}:
            self._handles.pop(module).remove()

    def similarity(self, leaving: Tensor, last: int | None = None) -> Tensor:
        """Cosine of the states (..., T, D) that leave the layer with those that entered its block: (N,), float32.

        `last`: of so many tokens at the end alone."""
        assert self._added is not None
        begin = 0 if last is None else -last
        states, added = leaving.flatten(0, -2)[begin:], self._added.reshape(-1, leaving.shape[-1])[begin:]
        self._added = None
        parts = zip(states.split(PIECE), added.split(PIECE), strict=True)
        return torch.cat([cosine_similarity(s.float() - a.float(), s.float(), dim=-1) for s, a in parts])

    def similarity_of_token(self, leaving: Tensor) -> float:
        """The same of one token's states (1, 1, D), in a third of the time."""
        assert self._added is not None
        states = leaving.reshape(1, -1).float()
        both = torch.cat([states - self._added.reshape(1, -1), states])  # the difference in float32, as above
        (entering, inner), (_, left) = (both @ both.T).tolist()
        self._added = None
        return float(inner / max(math.sqrt(entering * left), 1e-12))

    def remove(self) -> None:
        while self._handles:
            self._handles.popitem()[1].remove()
        self._added = None


class StreamLayer(ModelHook):  # type: ignore[misc]
    """Tells the conductor when decoder layer `index` is about to run, and when it has, with the states (B, T, D)."""

    def __init__(self, conductor: Any, index: int) -> None:
        self._conductor, self._index = conductor, index

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._conductor.enter(self._index, args[0] if args else kwargs.get("hidden_states"))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._conductor.leave(self._index, output[0] if isinstance(output, tuple) else output)
        return output

"""Observers of a layer: z, what its block adds, and (on accelerate's contract) the moments before and after it.

B batch, T tokens, D hidden, F neurons, E routed experts; N rows of tokens, whatever their shape.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..pruning.statistic import neuron_statistic
from .modules import PIECE, Pieces, RoutedExperts, Watch
from .threads import Threads

Measure = Callable[[Tensor, Tensor | None], Tensor]


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


class ObserveNeurons:
    """Adds the statistic of a block's z to `total`, (F,) or (E, F), float32, while it is attached.

    `weights` (B T,), float32: of every token of the forward (see neuron_statistic); None: 1.
    `measure`: what is added of z, `neuron_statistic` or another sum over tokens. `activations`: keeps rows of z too.
    `first`: a number of tokens, and another total, of these first tokens of the forward alone."""

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        total: Tensor,
        weights: Tensor | None = None,
        measure: Measure = neuron_statistic,
        activations: "Activations | None" = None,
        first: tuple[int, Tensor] | None = None,
    ) -> None:
        self._total, self._measure = total, measure
        self._weights = None if weights is None else weights.to(total.device)
        self._activations, self._first = activations, first
        self._pieces = pieces_of(layer, path)
        self._tap = Tap(layer, path, self._observe)

    def _observe(self, z: Tensor, tokens: Tensor | None, expert: int | None) -> None:
        begin = self._pieces.begin if self._pieces else 0
        places = slice(begin, begin + z.shape[:-1].numel()) if tokens is None else begin + tokens
        if self._activations:
            self._activations.add(z, places, expert)
        weights = None if self._weights is None else self._weights[places]
        total = self._total if expert is None else self._total[expert]
        if self._first is None:
            total += self._measure(z, weights)
            return
        rows, (count, of_first) = z.reshape(-1, z.shape[-1]), self._first
        here = min(max(0, count - begin), len(rows)) if tokens is None else int((tokens < count - begin).sum())
        if here:
            measured = self._measure(rows[:here], None if weights is None else weights[:here])
            total += measured
            of_first = of_first if expert is None else of_first[expert]
            of_first += measured
        if here < len(rows):
            total += self._measure(rows[here:], None if weights is None else weights[here:])

    def remove(self) -> None:
        self._tap.remove()


class CountedTokens:
    """Which tokens of a forward count: `mask` (N,), bool. Where they are is looked up once for all layers: a GPU is
    waited for."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._found: dict[tuple[int, int, torch.device], Tensor] = {}  # by range and device: places in it

    def among(self, rows: Tensor, places: slice | Tensor) -> Tensor:
        """Those of some rows (n, F) that belong to a token that counts; `places`: of the rows in the forward."""
        if isinstance(places, Tensor):
            return rows[self._mask.to(rows.device)[places]]
        key = places.start, places.stop, rows.device
        if key not in self._found:
            self._found[key] = self._mask[places].nonzero()[:, 0].to(rows.device)
        return rows[self._found[key]]


class Activations:
    """Keeps the rows of a block's z that belong to `tokens` of a forward, which may be others for the next one."""

    def __init__(self, tokens: CountedTokens) -> None:
        self.tokens = tokens
        self._rows: dict[int | None, list[Tensor]] = {}  # by expert; None: a plain block

    def add(self, z: Tensor, places: slice | Tensor, expert: int | None) -> None:
        """z (..., F) of the tokens at these places of the forward, and of which expert."""
        self._rows.setdefault(expert, []).append(self.tokens.among(z.reshape(-1, z.shape[-1]), places))

    def pieces(self, expert: int | None = None) -> list[Tensor]:
        """The rows kept, in pieces (s, F): the list itself."""
        return self._rows.get(expert, [])


def pieces_of(layer: nn.Module, path: str) -> Pieces | None:
    """What cuts a long prompt into chunks around the block at `path` of a layer; None where nothing does."""
    owner, _, rest = path.partition(".")
    module: Any = layer.get_submodule(owner)
    return module.forward if rest else None


class Residual:
    """Measures how far a layer's feed-forward block turns the hidden state, while it is attached.

    What the block adds is the output of the last of the layer's modules to run: the block, or a norm behind it."""

    def __init__(self, layer: nn.Module) -> None:
        self._added: Tensor | None = None
        self._last: nn.Module | None = None
        self._handles = {child: child.register_forward_hook(self._ran) for child in layer.children()}

    def _ran(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = module
        self._added = output[0] if isinstance(output, tuple) else output

    def settle(self) -> None:
        """After a forward: from here on, listen only to the module that ran last."""
        for module in self._handles.keys() - {self._last}:
            self._handles.pop(module).remove()

    def similarity(self, leaving: Tensor, last: int | None = None) -> Tensor:
        """Cosine of the states (..., T, D) that leave the layer with those that entered its block: (N,), float32.

        `last`: only of the last so many tokens."""
        assert self._added is not None
        begin = 0 if last is None else -last
        states, added = leaving.flatten(0, -2)[begin:], self._added.reshape(-1, leaving.shape[-1])[begin:]
        added = added.to(states.device)  # of several, the states of the last layer have gone to the first device
        self._added = None
        parts = zip(states.split(PIECE), added.split(PIECE), strict=True)
        return torch.cat([cosine_similarity(s.float() - a.float(), s.float(), dim=-1) for s, a in parts])

    def similarity_of_token(self, leaving: Tensor) -> float:
        """The same of one token's states (1, 1, D), in a third of the time."""
        assert self._added is not None
        states = leaving.reshape(1, -1).float()
        added = self._added.reshape(1, -1).to(states.device)
        both = torch.cat([states - added, states])  # the difference in float32, as above
        (entering, inner), (_, left) = (both @ both.T).tolist()
        self._added = None
        return float(inner / max(math.sqrt(entering * left), 1e-12))

    def remove(self) -> None:
        while self._handles:
            self._handles.popitem()[1].remove()
        self._added = None


class LayerDriver(Protocol):
    """Who runs a pass over the layers."""

    def enter(self, layer: int, states: Tensor | None) -> None:
        """Layer number `layer` is about to run on states (B, T, D)."""

    def leave(self, layer: int, states: Tensor) -> None:
        """It has run; `states` leave it."""


class StreamLayer(ModelHook):  # type: ignore[misc]
    """accelerate's hook on decoder layer `index`: tells the driver of every forward, which gets fitting threads."""

    def __init__(self, driver: LayerDriver, index: int, threads: Threads) -> None:
        self._driver, self._index, self._threads = driver, index, threads

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        states = args[0] if args else kwargs.get("hidden_states")
        self._driver.enter(self._index, states)
        if states is not None and states.device.type == "cpu":
            self._threads.fit(states.shape[:-1].numel())
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._driver.leave(self._index, output[0] if isinstance(output, tuple) else output)
        return output

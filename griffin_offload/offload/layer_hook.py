"""The contract of everything that acts while a layer passes: before its forward, after it, and once at the end.

Sweep and Lockstep are the drivers: they call the hooks, whichever forwards they run."""

from collections.abc import Mapping, Sequence

from torch import Tensor


class LayerHook:
    """Acts on decoder layers as they pass, dense weights in place. Every method may be left as it is."""

    def before(self, layer: int, states: Tensor | None) -> None:
        """Before layer number `layer` runs on the hidden states (B, T, D), where they are known."""

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        """After it: the states (B, T, D) that leave it, and its `dense` tensors by name, which are gone afterwards.

        `states` is None for a hook that acts once for many forwards."""

    def close(self) -> None:
        """Undo what is still attached, whatever happened. May be called more than once."""


class HookSequence(LayerHook):
    """Several hooks as one, in this order."""

    def __init__(self, hooks: Sequence[LayerHook]) -> None:
        self._hooks = hooks

    def before(self, layer: int, states: Tensor | None) -> None:
        for hook in self._hooks:
            hook.before(layer, states)

    def after(self, layer: int, states: Tensor | None, dense: Mapping[str, Tensor]) -> None:
        for hook in self._hooks:
            hook.after(layer, states, dense)

    def close(self) -> None:
        for hook in self._hooks:
            hook.close()

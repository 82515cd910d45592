"""The sweep: one prompt passes through every layer, each read once, and leaves its kept neurons behind.

For every decoder layer, in order: wait until it is read ► forward ► statistic ► select ► gather ► release.
This is the only place that knows the order.
"""

from collections.abc import Mapping

from torch import Tensor

from .layer_hook import LayerHook
from .layer_stream import LayerStream


class Sweep:
    """Arms a model's layers; the next forward of the model is the sweep. Use as a context manager.

    Raises, from within that forward, NumericError for NaN or infinite activations and what the reader raises.
    When the last layer has passed, hooks and staging are gone and the model is resident."""

    def __init__(self, stream: LayerStream, hook: LayerHook) -> None:
        self.started = False
        self._stream, self._hook = stream, hook
        self._dense: Mapping[str, Tensor] = {}

    def __enter__(self) -> "Sweep":
        self._stream.open(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.close()
        self._stream.close()

    def enter(self, layer: int, states: Tensor | None) -> None:
        self.started = True
        self._dense = self._stream.onload(layer)
        self._hook.before(layer, states)

    def leave(self, layer: int, states: Tensor) -> None:
        self._stream.check(layer, states)
        self._hook.after(layer, states, self._dense)
        self._dense = {}
        self._stream.release(layer)
        if layer + 1 == len(self._stream):
            self._stream.close()

"""The hooks of the sweep, on accelerate's contract: stream a decoder layer, observe its z."""

from typing import Any

from accelerate.hooks import ModelHook
from torch import Tensor, nn

from .statistic import neuron_statistic


class ObserveNeurons:
    """Adds the statistic of whatever enters a down projection, while it is attached, to `total` (F,), float32."""

    def __init__(self, down: nn.Module, total: Tensor) -> None:
        self.total = total
        self._handle = down.register_forward_pre_hook(self._observe)

    def _observe(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.total += neuron_statistic(args[0])

    def remove(self) -> None:
        self._handle.remove()


class StreamLayer(ModelHook):  # type: ignore[misc]
    """Tells the sweep when decoder layer `index` is about to run, and when it has."""

    def __init__(self, sweep: Any, index: int) -> None:
        self._sweep, self._index = sweep, index

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._sweep.onload(self._index)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._sweep.finish(self._index, output[0] if isinstance(output, tuple) else output)
        return output

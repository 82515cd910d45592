"""What acts on the forwards of a scoring pass, job by job, as they pass each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from ...engine import Engine
from ...offload.lockstep import Lockstep
from ...options import OnLayer


class LayerHook(Protocol):
    def before(self, layer: int, states: Tensor | None) -> None:
        """States (B, T, D) are about to pass a layer, whose dense weights are in place."""

    def after(self, layer: int, states: Tensor, dense: Mapping[str, Tensor]) -> None:
        """They have passed it, and leave it as `states`."""

    def close(self) -> None: ...


class JobHooks:
    """Calls the hook of the job at hand."""

    def __init__(self, lockstep: Lockstep, hooks: Sequence[LayerHook]) -> None:
        self._lockstep, self._hooks = lockstep, hooks

    def before(self, layer: int, states: Tensor | None) -> None:
        self._hooks[self._lockstep.job].before(layer, states)

    def after(self, layer: int, states: Tensor, dense: Mapping[str, Tensor]) -> None:
        self._hooks[self._lockstep.job].after(layer, states, dense)

    def close(self) -> None:
        for hook in self._hooks:
            hook.close()


class _Around(ModelHook):  # type: ignore[misc]
    def __init__(self, hook: LayerHook, layer: int) -> None:
        self._hook, self._layer = hook, layer

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._hook.before(self._layer, args[0] if args else kwargs.get("hidden_states"))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._hook.after(self._layer, output[0] if isinstance(output, tuple) else output, {})
        return output


@contextmanager
def hooked_passage(
    engine: Engine, tokens: int, waiting: int, on_layer: OnLayer | None, hook_of: Callable[[Lockstep], LayerHook]
) -> Iterator[Lockstep]:
    """Engine.passage, with a hook around every layer of every job."""
    with engine.passage(tokens, waiting, on_layer) as lockstep:
        hook = hook_of(lockstep)
        try:
            for number, layer in enumerate(engine.skeleton.layers):
                add_hook_to_module(layer.module, _Around(hook, number), append=True)
            yield lockstep
        finally:
            hook.close()

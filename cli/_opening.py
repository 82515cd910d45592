"""--model and the options of where it runs: a command gets what opens its engine."""

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import click
from click.shell_completion import CompletionItem

from ..options import Placement
from ..sources.resolve import DEFAULT_MODEL, find
from ..units import format_bytes
from . import _console as console
from ._flags import Decorator, F
from ._options import Some, takes

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class Opening:
    """Opens the engine of a model when it is called."""

    model: str
    placement: Placement

    def __call__(self) -> "Engine":
        return open_engine(self.model, self.placement)


def opens_engine(*, host_memory: bool = False) -> Decorator:
    """Gives a command --model and the options of Placement; it gets `open_engine`, which opens that model.

    `host_memory`: for commands that may answer more than one prompt."""

    def wrap(command: F) -> F:
        @takes(Some(Placement, without=() if host_memory else ("host_memory",)))
        @wraps(command)
        def run(*, model: str, placement: Placement, **values: Any) -> Any:
            return command(open_engine=Opening(model, placement), **values)

        text = "An alias (see `griffin models`), a folder, a hub id or a .gguf file."
        facts: dict[str, Any] = {"metavar": "NAME", "shell_complete": complete_model}
        model = click.option("--model", default=DEFAULT_MODEL, show_default=True, help=text, **facts)
        return cast(F, model(run))

    return wrap


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models known by name, and files."""
    from ..sources.catalogue import CATALOGUE

    names = [name for name in CATALOGUE if name.startswith(incomplete)]
    return [*map(CompletionItem, names), CompletionItem(incomplete, type="file")]


def open_engine(model: str, placement: Placement) -> "Engine":
    """The engine of a model; a bar shows if the model has to be fetched."""
    find(model)  # a name of no model is refused before torch is imported
    from ..engine import Engine
    from ..memory.machine import total_memory

    with console.progress_bytes("Fetching") as on_progress:
        engine = Engine(model, placement, on_progress=on_progress)
    devices = [card.device for card in engine.opened.cards] or [engine.device]
    if placement.device_memory is not None and engine.budget > (there := min(map(total_memory, devices))):
        asked = f"--device-memory {format_bytes(engine.budget)}"
        console.note(f"{asked} is more than the memory of this machine, {format_bytes(there)}: a run may be killed")
    return engine

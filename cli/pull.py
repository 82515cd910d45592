"""`griffin pull`: fetch a model now, to run it later."""

import click

from ._print import echo


@click.command("pull", short_help="Fetch a model now, to run it later.")
@click.argument("name")
def command(*, name: str) -> None:
    """Fetch NAME: an alias (see `griffin models`), a hub id (owner/name) or a .gguf file, which stays where it is.

    The folder that holds the model is printed when it is there. What is already on this machine is not fetched again.
    """
    from ..sources.resolve import CATALOGUE, find, origin, resolve
    from . import _console as console

    path = find(name)
    if path is not None:
        console.note(f"{name} is already on this machine")
    else:
        if model := CATALOGUE.get(name.lower()):
            console.note(f"{model.hub_id}, licence: {model.licence}")
        with console.progress_bytes("Fetching") as update:
            path = resolve(name, on_progress=update)
        if made_from := origin(path):
            console.note(f"made from {made_from}")
    echo(path)

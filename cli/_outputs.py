"""No input of a command is ever its output, and a figure replaces nothing but figures of ours."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import GriffinError
from ..files import FIGURE, reason, refuse_inputs
from ..sources.resolve import find, weight_files
from ..units import MIB
from ..workspace import sweep

READ = "griffin.read"  # in click's `meta`: files whose content took their names' place among the parameters


def check_outputs(*names: str) -> None:
    """Raises GriffinError where one of the current command's parameters of these names, its outputs, is a file that
    another parameter has the command read, or would replace one; or where two are the same.

    Removes what killed processes left beside them."""
    context = click.get_current_context()
    given = [context.params[name] for name in names if context.params.get(name) is not None]
    outputs = [Path(value) for value in given if "\0" not in str(value)]  # that is no name: told when it is opened
    values = [value for name, value in context.params.items() if name not in (*names, "model")]
    inputs = [*_files(values), *context.meta.get(READ, ()), *_model(context.params.get("model"))]
    if len({os.path.realpath(out) for out in outputs}) < len(outputs):
        raise GriffinError(f"{outputs[0]} is to be two outputs: give each its own name")
    for out in outputs:
        refuse_inputs(out, inputs)
        sweep(out.parent)


def check_figure(path: Path, force: bool) -> None:
    """Raises GriffinError where a figure would replace something else."""
    try:
        with path.open("rb") as file:
            ours = FIGURE.encode() in file.read(256 * MIB)
    except FileNotFoundError:
        return
    except OSError as error:
        raise GriffinError(f"{path} cannot be written: {reason(error)}") from None
    if not (ours or force):
        raise GriffinError(
            f"{path} exists and is no figure of Griffin's: choose another name, or --force to replace it"
        )


def _files(values: Iterable[Any]) -> Iterator[Path]:
    for value in values:
        if isinstance(value, tuple):
            yield from _files(value)
        elif isinstance(value, str | Path):
            for name in (os.fspath(value), os.fspath(value).rpartition(":")[0]):  # FILE:SHARE
                if name and os.path.exists(os.path.expanduser(name)):
                    yield Path(os.path.expanduser(name))


def _model(name: str | None) -> list[Path]:
    """The folder of a model that is on this machine, and the files of its weights."""
    try:
        folder = find(name) if name else None
        given = [Path(name)] if name and os.path.isfile(name) else []
        return given + ([folder, *weight_files(folder)] if folder else [])
    except GriffinError:  # told when it is opened
        return []

"""`griffin models`: the catalogue, and what is on this machine."""

import json
from typing import Any

import click

from ..errors import GriffinError
from ..units import format_bytes
from ._print import echo


@click.command("models", short_help="The models known by name, and those on this machine.")
@click.argument("word", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def command(*, word: str | None, as_json: bool) -> None:
    """List the models that --model and `griffin pull` know by name, and others found on this machine; with WORD, those
    that have it in their name.

    --model also takes a folder, any hub id (owner/name) and a .gguf file. A gated model asks for its licence to be
    accepted on its page on the hub before it is fetched.
    """
    from . import _console as console

    rows = [row for row in entries() if word is None or word.lower() in f"{row['name']} {row['hub_id']}".lower()]
    if not rows:
        raise GriffinError(f"no model here or in the catalogue has {word!r} in its name: `griffin models` lists all")
    if as_json:
        echo(json.dumps(rows, indent=2))
        return
    columns = ["model", "parameters", "bf16", "licence", "gated", "on this machine"]
    console.table("Models", columns, [cells(row) for row in rows])


def entries() -> list[dict[str, Any]]:
    """One object per model: the catalogue in its order, then what else is on this machine. Sizes in bytes."""
    from ..sources.resolve import CATALOGUE, local_models

    local = {model.name: model for model in local_models()}
    rows: list[dict[str, Any]] = [
        {
            "name": alias,
            "hub_id": model.hub_id,
            "parameters": model.parameters,
            "bytes_bf16": model.bytes,
            "licence": model.licence,
            "gated": model.gated,
            "chat": model.chat,
            "path": str(local[alias].path) if alias in local else None,
            "bytes_on_disk": local[alias].bytes if alias in local else None,
        }
        for alias, model in CATALOGUE.items()
    ]
    unknown = dict.fromkeys(rows[0])
    others = [model for name, model in local.items() if name not in CATALOGUE]
    rows += [{**unknown, "name": m.name, "path": str(m.path), "bytes_on_disk": m.bytes} for m in others]
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as people read it; '-' for what is not known or not here."""
    if row["parameters"] is None:
        return [row["name"], "-", f"({format_bytes(row['bytes_on_disk'])} on disk)", "-", "-", row["path"]]
    count = row["parameters"] / 1e9
    return [
        row["name"],
        f"{count:.1f} B" if count >= 1 else f"{count * 1000:.0f} M",
        format_bytes(row["bytes_bf16"]),
        row["licence"],
        "yes" if row["gated"] else "no",
        row["path"] or "-",
    ]

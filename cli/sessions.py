"""`griffin sessions`: the saved chats."""

import json
import time

import click

from ..units import format_bytes
from ._print import echo


@click.command("sessions", short_help="The saved chats, for griffin chat --resume.")
@click.option("--delete", multiple=True, metavar="NAME", help="Delete a session. May be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def command(*, delete: tuple[str, ...], as_json: bool) -> None:
    """The saved chats, the newest first. `griffin chat --session NAME` saves one, `griffin chat --resume NAME` goes on
    with it.
    """
    from ..session import delete_session
    from . import _console as console

    for name in delete:
        delete_session(name)
        console.note(f"deleted the session {name}")
    if delete and not as_json:
        return
    rows = entries()
    if as_json:
        echo(json.dumps(rows, indent=2))
        return
    if not rows:
        console.note("no session is saved: griffin chat --session NAME saves one")
        return
    columns = ("session", "model", "messages", "tokens", "size", "saved")
    console.table("Sessions", columns, [cells(row) for row in rows])


def entries() -> list[dict[str, object]]:
    """One object per session; a damaged one has its "error"."""
    from ..errors import GriffinError
    from ..session import open_session, session_names, session_path

    rows: list[dict[str, object]] = []
    for name in session_names():
        path = session_path(name)
        row: dict[str, object] = {"name": name, "path": str(path), "bytes": path.stat().st_size}
        row["saved"] = path.stat().st_mtime
        try:
            session = open_session(name)
            row |= {"model": session.model, "messages": session.messages, "tokens": session.tokens}
        except GriffinError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def cells(row: dict[str, object]) -> list[object]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(str(row["saved"]))))
    size = format_bytes(float(str(row["bytes"])))
    if "error" in row:
        return [row["name"], "cannot be read", "-", "-", size, when]
    return [row["name"], row["model"], row["messages"], f"{row['tokens']:,}", size, when]

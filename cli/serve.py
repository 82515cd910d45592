"""`griffin serve`: the model behind OpenAI's API."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ..errors import GriffinError
from ..options import Decoding, Pruning
from ..units import parse_bytes
from . import _console as console
from ._flags import count, switch
from ._opening import opens_engine
from ._options import Some, takes
from ._outcome import debugging

if TYPE_CHECKING:
    from ..engine import Engine

NEEDED = "griffin serve needs more packages: pip install 'griffin-offload[serve]'"


@click.command("serve", short_help="Answer programs that speak OpenAI's API.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. Any but this needs a key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: a free one."
)
@click.option("--api-key", metavar="KEY", help="What clients must show as their API key. [default: $GRIFFIN_API_KEY]")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Another name that the model answers to.")
@count("--queue", 16, "Requests that may wait; more are told to try again later (429).", "waiting", low=0)
@count("--token-limit", None, "Most tokens of a prompt and its answer. [default: the model's context]", "tokens")
@click.option("--max-body", default="4MiB", show_default=True, metavar="SIZE", help="Largest request.")
@switch("--no-reuse", "Compute the whole prompt of every request, also what the one before has computed.")
@opens_engine(host_memory=True)
@takes(Pruning, Some(Decoding, defaults={"max_new_tokens": 1024}))
def command(
    *,
    host: str,
    port: int,
    api_key: str | None,
    aliases: tuple[str, ...],
    waiting: int,
    tokens: int | None,
    max_body: str,
    no_reuse: bool,
    open_engine: Callable[[], "Engine"],
    pruning: Pruning,
    decoding: Decoding,
) -> None:
    """Answer programs that speak OpenAI's API: chat and completions, streamed or whole, with tools and JSON schemas.

    One answer is made at a time, the other requests wait. The next request of a conversation computes its new tokens
    only. The options below are the defaults; a request may change them. Ctrl-C stops the server.
    """
    import os

    try:  # before the engine is opened, which counts what is loaded
        from ..serving.server import Address, ApiServer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client", "anyio"):
            raise
        raise GriffinError(NEEDED) from None
    from ..serving.served import Limits, Served

    address = Address(host, port, api_key or os.environ.get("GRIFFIN_API_KEY") or None)
    address.check()
    limits = Limits(body=parse_bytes(max_body), tokens=tokens, waiting=waiting)
    with address.bind() as bound:  # before the model is opened: a port in use is known at once
        engine = open_engine()
        served = Served(engine, pruning, decoding, aliases, limits, reuse=not no_reuse)
        server = ApiServer(served, bound, address.api_key, on_answer=console.note, debug=debugging())

        def on_ready() -> None:
            where = f"{served.name} on {engine.opened.where}, at {server.url}"
            console.note(f"{where}; Ctrl-C stops")

        server.run(on_ready)

"""The address, the signals, and uvicorn."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn

from ..errors import GriffinError, OptionError
from .app import App
from .guard import LOOPBACK, Guard
from .metrics import Metrics
from .respond import Responder
from .served import Served
from .worker import Worker

GRACE = 5.0  # seconds that the running answer has to end, after Ctrl-C
CONNECTIONS = 256


@dataclass(frozen=True)
class Address:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None

    def check(self) -> None:
        """Raises OptionError for an address that others reach, without a key."""
        if self.host not in LOOPBACK and not self.api_key:
            raise OptionError(
                f"--host {self.host} lets other machines in: give --api-key KEY (or GRIFFIN_API_KEY), which clients "
                "must show"
            )

    def bind(self) -> socket.socket:
        """A socket that takes connections only later. Raises GriffinError where it cannot be had."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            bound.close()
            why = getattr(error, "strerror", None) or str(error)
            raise GriffinError(
                f"cannot serve on {self.host} port {self.port}: {why.lower()}; try another --port"
            ) from None
        return bound


def serve(
    served: Served,
    bound: socket.socket,
    api_key: str | None,
    *,
    on_ready: Callable[[str], None],
    on_answer: Callable[[str], None],
    debug: bool = False,
) -> None:
    """Answer requests until SIGINT or SIGTERM. `on_ready` gets the address of the API.

    After the signal no new request is taken, those that wait are refused, and the running answer has GRACE seconds to
    end; a second signal ends it at once."""
    responder, engine = Responder(served), served.engine
    metrics = Metrics(lambda: worker.waiting, lambda: float(worker.running))
    hooks: dict[str, Any] = {"recover": engine.unload, "on_wait": metrics.waited}
    worker = Worker(responder.respond, served.limits.waiting, debug=debug, **hooks)
    app = App(served, worker, metrics, Guard(api_key, served.limits.body), on_answer)
    config = uvicorn.Config(
        app.starlette(),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(GRACE) + 5,
    )
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    try:
        _Server(config, worker, partial(on_ready, address)).run(sockets=[bound])
    finally:
        worker.stop()
        worker.cancel_running()
        worker.join(GRACE)


class _Server(uvicorn.Server):
    """uvicorn's, which a signal ends as a success."""

    def __init__(self, config: uvicorn.Config, worker: Worker, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._worker, self._on_ready = worker, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(number: int, frame: Any) -> None:
            loop.call_soon_threadsafe(self.stop)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """At the first call gently, at the second at once."""
        if self.should_exit:
            self._worker.cancel_running()
            return
        self.should_exit = True
        self._worker.stop()
        asyncio.get_running_loop().call_later(GRACE, self._worker.cancel_running)

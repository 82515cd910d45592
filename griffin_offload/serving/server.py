"""The address, the signals, and uvicorn."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from ..errors import GriffinError, OptionError
from .app import App
from .guard import LOOPBACK, Guard
from .metrics import Metrics
from .respond import Responder
from .served import Served
from .worker import Worker

GRACE = 5.0  # seconds that the running answer has to end, after Ctrl-C
CONNECTIONS = 64  # each may bring a body


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


class ApiServer:
    """Answers requests on a bound socket. `api_key`: what clients must show; `on_answer` hears of each answer, in
    words; `debug`: errors that nobody foresaw are shown with their traceback."""

    def __init__(
        self,
        served: Served,
        bound: socket.socket,
        api_key: str | None = None,
        *,
        on_answer: Callable[[str], None] = lambda text: None,
        debug: bool = False,
    ) -> None:
        metrics = Metrics(lambda: self._worker.waiting, lambda: float(self._worker.running))
        limits, recover = served.limits, served.engine.unload
        respond = Responder(served).respond
        self._worker = Worker(respond, limits.waiting, recover=recover, on_wait=metrics.waited, debug=debug)
        app = App(served, self._worker, metrics, Guard(api_key, limits.body), on_answer)
        config = uvicorn.Config(
            app.starlette(),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=int(GRACE) + 5,
        )
        self._bound, self._uvicorn = bound, _Uvicorn(config, self._worker)

    @property
    def url(self) -> str:
        """What clients call their base URL."""
        host, port = self._bound.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self, on_ready: Callable[[], None]) -> None:
        """Answer until SIGINT or SIGTERM, or `stop`.

        Then no new request is taken, those that wait are refused, and the running answer has GRACE seconds to end; a
        second signal ends it at once."""
        self._uvicorn.on_ready = on_ready
        try:
            self._uvicorn.run(sockets=[self._bound])
        finally:
            self._worker.stop()
            self._worker.cancel_running()
            self._worker.join(GRACE)

    def stop(self) -> None:
        """As a signal does; from any thread."""
        self._uvicorn.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn's, which a signal ends as a success."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.on_ready: Callable[[], None] = lambda: None
        self._worker = worker
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, lambda *_: self.stop()) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """From any thread, or a signal's handler."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._stop)
        else:
            self.should_exit = True

    def _stop(self) -> None:
        """At the first call gently, at the second at once."""
        if self.should_exit:
            self._worker.cancel_running()
            return
        self.should_exit = True
        self._worker.stop()
        asyncio.get_running_loop().call_later(GRACE, self._worker.cancel_running)

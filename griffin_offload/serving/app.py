"""The routes, on Starlette: HTTP and JSON here, everything else in the worker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from anyio import CapacityLimiter, fail_after, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .api_error import LEFT, ApiError, api_error, client_left
from .asked import Request as Asked
from .asked import read_chat, read_completion
from .fields import parse_body
from .guard import Guard
from .metrics import CONTENT_TYPE, Metrics
from .objects import Objects, model, models
from .respond import Ended, Event
from .served import Served
from .worker import Job, Worker

PATIENCE = 15.0  # seconds without an event, after which a stream says that it is still there
Read = Callable[[dict[str, Any], Served], Asked]


class App:
    """What the routes do. `on_answer` hears of each request that was answered, in words."""

    def __init__(
        self, served: Served, worker: Worker, metrics: Metrics, guard: Guard, on_answer: Callable[[str], None]
    ) -> None:
        self._served, self._worker, self._metrics, self._guard = served, worker, metrics, guard
        self._on_answer, self._created = on_answer, int(time.time())
        self._readers = CapacityLimiter(1)  # the tokenizer reads one prompt at a time

    def starlette(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._told(self._chat), methods=["POST"]),
            Route("/v1/completions", self._told(self._completion), methods=["POST"]),
            Route("/v1/models", self._told(self._models)),
            Route("/v1/models/{name:path}", self._told(self._model)),
            Route("/health", self._health),
            Route("/metrics", self._told(self._metrics_page)),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _any_error})

    def _told(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler, for whoever may ask; its errors as JSON; counted."""

        async def handle(request: Request) -> Response:
            try:
                self._guard.check(request)
                response = await handler(request)
            except Exception as error:
                response = error_response(api_error(error))
            path = getattr(request.scope.get("route"), "path", "")
            self._metrics.requests.labels(path, str(response.status_code)).inc()
            if response.status_code == LEFT:
                self._metrics.cancelled.inc()
            return response

        return handle

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def _models(self, request: Request) -> Response:
        names = [self._served.name, *self._served.aliases]
        return JSONResponse(models(names, self._created, self._served.tokens))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._served.check_model(name)
        return JSONResponse(model(name, self._created, self._served.tokens))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self._worker.running, "waiting": self._worker.waiting})

    async def _metrics_page(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _answer(self, request: Request, read: Read) -> Response:
        self._worker.check_room()
        body = parse_body(await self._guard.read(request))
        asked = await to_thread.run_sync(lambda: read(body, self._served), limiter=self._readers)
        objects = Objects(asked, self._served.name, self._served.engine.tokenizer)
        events = _Events(request, asked, self._worker)
        try:
            first = await anext(events)  # an error before it has a status of its own, in a stream too
            if asked.stream:
                chunks = self._stream(first, events, objects)
                return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            told = [event async for event in _after(first, events) if event]
        except BaseException:
            events.close()
            raise
        events.close()
        self._count(told)
        return JSONResponse(objects.whole(told))

    async def _stream(self, first: Event | None, events: "_Events", objects: Objects) -> AsyncIterator[str]:
        """The chunks of an answer as server-sent events."""
        ended: list[Ended] = []
        try:
            async for event in _after(first, events):
                if event is None:
                    yield ": still here\n\n"
                    continue
                if isinstance(event, Ended):
                    ended.append(event)
                for chunk in objects.chunks(event):
                    yield _line(chunk)
            for chunk in objects.last(ended):
                yield _line(chunk)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            if error.status == LEFT:
                self._metrics.cancelled.inc()
            yield _line(error.to_json())
        finally:
            events.close()
            self._count(ended)

    def _count(self, events: Sequence[Event]) -> None:
        """Tell the metrics, and whoever watches."""
        for event in (event for event in events if isinstance(event, Ended)):
            self._metrics.ended(event)
            reused = f" ({event.cached} of them known)" if event.cached else ""
            speed = event.report.decode_tokens_per_s
            pace = f", {speed:.1f} tokens/s" if speed else ""
            first = f"first after {event.first_s:.2f} s"
            self._on_answer(f"{event.prompt_tokens} prompt tokens{reused}, {event.tokens} tokens, {first}{pace}")


class _Events:
    """The events of a request in the worker's hands; None where nothing came for a while. Raises ApiError.

    Its client is watched: when it leaves, the job is cancelled."""

    def __init__(self, request: Request, asked: Asked, worker: Worker) -> None:
        """Raises ApiError where the worker takes no more."""
        loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()
        self._worker = worker

        def on_event(event: Event | ApiError | None) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it everyone who would hear
                loop.call_soon_threadsafe(self._told.put_nowait, event)

        self._job = Job(asked, on_event)
        worker.submit(self._job)
        self._watcher = asyncio.create_task(self._watch(request))

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._worker.cancel(self._job)
        self._told.put_nowait(client_left())

    def __aiter__(self) -> "_Events":
        return self

    async def __anext__(self) -> Event | None:
        try:
            with fail_after(PATIENCE):
                event = await self._told.get()
        except TimeoutError:
            return None
        if isinstance(event, ApiError):
            raise event
        if event is None:
            raise StopAsyncIteration
        return event

    def close(self) -> None:
        """However it ended, nobody waits for it any more."""
        self._watcher.cancel()
        self._worker.cancel(self._job)


async def _after(first: Event | None, events: _Events) -> AsyncIterator[Event | None]:
    yield first
    async for event in events:
        yield event


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.to_json(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, not that method."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    return JSONResponse(told.to_json(), error.status_code, error.headers)


async def _any_error(request: Request, error: Exception) -> Response:
    return error_response(api_error(error))

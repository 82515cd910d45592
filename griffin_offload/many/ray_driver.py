"""The process that speaks to Ray. Ray Data gives the batches to a pool of actors, each with an engine of its own.

Ray starts an actor that ended again, on a node that lives, and has another one do what it had."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GriffinError, WorkerError, one_line
from ..files import reason
from ..options import Placement
from ..version import __version__
from ..workspace import workspace
from .answers import Answered
from .batches import Batch
from .ray_nodes import Engines, Node, Pool, from_words, look, pool
from .took import Took

if TYPE_CHECKING:
    from .answers import Prompts
    from .workers import Work

RETRIES = 1  # of a batch whose worker or node ended, by Ray; some may meet a node that Ray does not know to be gone
REACH = 10.0  # seconds in which a Ray must take a connection
PATIENCE = 20.0  # seconds in which Ray gives back what this has, and ends if it is this one's own
ADDRESS = "RAY_ADDRESS"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class Setup:
    """What the driver is started with. `address`: None for whatever Ray there is, or one of its own."""

    work: "Work"
    placement: Placement
    address: str | None
    workers: int | None


def drive(setup: Setup, pipe: connection.Connection) -> None:
    """Serves one `Cluster` until its pipe is closed, or its process ends: a request is (method, arguments), a reply
    ("rows", (batch, rows)), ("ended", text), ("done", result) or ("failed", error)."""
    os.setsid()  # neither Ctrl-C nor a closed terminal reaches Ray
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ray has it, once it is there
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with ExitStack() as stack:
        folder = stack.enter_context(workspace(Path(tempfile.gettempdir())))
        with (folder / "ray.log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(QUIET)
        driver = stack.enter_context(Driver(setup, folder))
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # first of all: it is ending as it was told to
        with suppress(EOFError, OSError):  # nobody listens any more
            while True:
                method, arguments = pipe.recv()
                try:
                    for reply in driver.serve(method, arguments):
                        pipe.send(reply)
                except GriffinError as error:
                    pipe.send(("failed", error))
                except (EOFError, BrokenPipeError):
                    raise
                except Exception as error:
                    pipe.send(("failed", WorkerError(f"Ray: {one_line(error)}")))


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)  # the signal is not heard while Ray's own code waits
    os._exit(1)


@dataclass
class Driver:
    """A context manager that ends what it has of Ray. `folder`: for a Ray of its own."""

    setup: Setup
    folder: Path
    pool: Pool | None = None
    clerk: Any = None  # an actor that answers what is no batch
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, method: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        if method == "start":
            yield "done", self.start()
        elif method == "answer_all":
            yield from self.answer_all(*arguments)
            yield "done", None
        else:
            yield "done", self.call(method, *arguments)

    def start(self) -> tuple[str, int]:
        """Connects to Ray, and sees that its nodes can work. Returns what there is, in words, and how many workers."""
        whose = self.connect()
        import ray

        nodes = self.look_at(ray.nodes())
        self.pool = pool(nodes, self.setup.placement, self.setup.workers)
        return f"{whose}: {self.pool.told}", self.pool.size

    def connect(self) -> str:
        """Which Ray it is, in words. Raises WorkerError."""
        named = self.setup.address or os.environ.get(ADDRESS)
        address = named or started()
        silent = unreachable(address) if address else "there is none"
        if named and silent:
            raise WorkerError(f"no Ray answers at {named}: {silent}; `ray start --head` starts one")
        import ray

        self._stack.callback(ray.shutdown)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if silent:
            ray.init(address="local", include_dashboard=False, _temp_dir=str(self.folder), **quiet)
            return "a Ray started for this run"
        try:
            ray.init(address=self.setup.address, **quiet)
        except Exception as error:
            raise WorkerError(f"Ray at {address}: {one_line(error.__cause__ or error)}") from error
        return f"Ray at {address}"

    def look_at(self, listed: Sequence[Mapping[str, Any]]) -> list[Node]:
        """The nodes that live and have a GPU or a CPU. Raises WorkerError for one that cannot work."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Only

        nodes = [node for node in map(Node.of, (each for each in listed if each["Alive"])) if node.cpus or node.gpus]
        if not nodes:
            raise WorkerError("no node of the cluster has a GPU or a CPU for Ray's workers")
        ask = ray.remote(num_cpus=0)(look)
        given = self.setup.work.model, __version__
        asked = [ask.options(scheduling_strategy=Only(node.id, soft=False)).remote(*given) for node in nodes]
        found = []
        for node, reference in zip(nodes, asked, strict=True):
            try:
                there = ray.get(reference)
            except Exception as error:
                lacks = "No module named 'griffin_offload'" in str(error)
                told = f"Griffin is not installed there: it needs {__version__}" if lacks else one_line(error)
                raise WorkerError(f"node {node.address}: {told}") from error
            if there["version"] != __version__:
                theirs = there["version"]
                raise WorkerError(f"node {node.address} has Griffin {theirs}, and this is {__version__}: install one")
            if "error" in there:
                kind, text = there["error"]
                raise from_words(kind, f"{text} (on node {node.address})")
            found.append(replace(node, memory=there["memory"]))
        return found

    def call(self, method: str, *arguments: Any) -> Any:
        """Asks one engine. Raises what it raises."""
        import ray

        assert self.pool is not None
        if self.clerk is None:
            actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **self.pool.resources)(Engines)
            self.clerk = actor.remote(self.setup.work, self.pool.placement, self.pool.each)
        kind, value = ray.get(self.clerk.ask.remote(method, *arguments))
        if kind == "failed":
            raise from_words(*value)
        return value

    def answer_all(self, batches: "Mapping[Batch, Prompts]") -> Iterator[tuple[str, Any]]:
        """Replies, as they come. What a lost node or worker had is asked again; those batches of which every worker
        ends that tries them are the errors of their rows. Raises what an engine raises, WorkerError where all end."""
        import ray

        if self.clerk is not None:  # its GPU is for the pool
            ray.kill(self.clerk)
            self.clerk = None
        waiting, before = dict(batches), 0
        while waiting and len(waiting) != before:
            before = len(waiting)
            for batch, rows in self.ask_pool(waiting):
                del waiting[batch]
                yield "rows", (batch, rows)
            if waiting:
                again = "they are asked again" if len(waiting) < before else "they have no answer"
                yield "ended", f"workers ended on {len(waiting)} of {before} batches: {again}"
        if len(waiting) == len(batches) > 1:
            raise WorkerError("all workers have ended: the same command goes on")
        for batch in waiting:
            yield "rows", (batch, {row: {"error": "every worker ended that tried this prompt"} for row in batch})

    def ask_pool(self, batches: "Mapping[Batch, Prompts]") -> "Iterator[tuple[Batch, Answered]]":
        """The batches that are answered, in the order in which Ray is done. Raises what an engine raises."""
        import ray.data

        assert self.pool is not None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # what is lost too often is left out
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        by_number = dict(enumerate(batches))
        tasks = [{"task": json.dumps([number, batches[batch]])} for number, batch in by_number.items()]
        replies = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            Engines,
            fn_constructor_args=(self.setup.work, self.pool.placement, self.pool.each),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self.pool.size, max_tasks_in_flight_per_actor=1),
            ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},  # Ray Data itself would retry without an end
            **self.pool.resources,
        )
        for reply in replies.iter_rows():
            number, kind, value, took = json.loads(reply["reply"])
            if kind == "failed":
                raise from_words(*value)
            answered = Answered({int(row): answer for row, answer in value.items()})
            answered.took = took and Took(**took)
            yield by_number[number], answered


def started() -> str | None:
    """The address that `ray start` has left on this machine, which may be of a Ray that is no more. Ray itself would
    also take one that another run has started for itself alone, and will end."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with suppress(OSError):
        return Path(temporary, "ray", "ray_current_cluster").read_text().strip()
    return None


def unreachable(address: str) -> str | None:
    """Why nobody listens at HOST:PORT; None where somebody does. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH).close()
    except ValueError:
        return "an address is HOST:PORT"
    except OSError as error:
        return reason(error)
    return None

"""Answers by the nodes of a Ray cluster, as this process sees them: one other process speaks to Ray for it.

Ray ends its own driver where a node is lost, takes over its signals and writes to its stderr. None of it reaches this
process, which alone writes what is answered."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import OptionError, WorkerError
from ..jsonl import Row
from ..options import AUTO, OnLayer, Placement
from ..sources.catalogue import CATALOGUE
from ..workspace import sweep
from .answers import Prompts
from .batches import Batch
from .process import Process
from .ray_driver import PATIENCE, Setup, drive
from .workers import Work

EXTRA = "pip install 'griffin-offload[ray]'"


class Cluster:
    """Workers on the nodes of a Ray, until `close`: Answerers, as those of `workers.py`.

    `address`: HOST:PORT of a Ray that runs; "auto": what RAY_ADDRESS says, a Ray that runs on this machine, or one that
    is started here and ended with this. `workers`: as many; None: one for each GPU, one on each node without GPUs.

    Raises OptionError for what cannot be asked for, WorkerError where there is no Ray, or no node that can work."""

    def __init__(self, work: Work, placement: Placement, address: str, workers: int | None = None) -> None:
        if find_spec("ray") is None:
            raise OptionError(f"--cluster needs Ray: {EXTRA}")
        if not address:
            raise OptionError(f"--cluster is empty: give HOST:PORT or {AUTO}")
        if "://" in address:
            raise OptionError(f"--cluster {address}: run griffin on a node of the cluster, with HOST:PORT or {AUTO}")
        work = replace(work, model=located(work.model))
        setup = Setup(work, placement, None if address == AUTO else address, workers)
        self._driver = Process(drive, (setup,), "griffin Ray driver", PATIENCE)
        self.told, self.count = "", 0
        try:
            self.told, self.count = self.call("start")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._driver.end()
        sweep(Path(tempfile.gettempdir()))  # where a Ray of its own was slow to end

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of `Answers` returns, on one of the nodes. Raises what it raises, WorkerError without Ray."""
        for kind, value in self._replies(method, *arguments):
            assert kind == "done"
            return value
        raise AssertionError

    def answer_all(
        self, batches: Mapping[Batch, Prompts], on_layer: OnLayer, on_end: Callable[[str], None]
    ) -> Iterator[tuple[Batch, dict[int, Row]]]:
        """As Answerers says; Ray has no word for `on_layer`."""
        for kind, value in self._replies("answer_all", dict(batches)):
            if kind == "rows":
                yield value
            elif kind == "ended":
                on_end(value)
            else:
                return

    def _replies(self, method: str, *arguments: Any) -> Iterator[tuple[str, Any]]:
        """Each (kind, value), "done" the last. Raises what failed."""
        try:
            self._driver.ask(method, *arguments)
            while True:
                yield self._driver.reply()
        except (EOFError, OSError):
            raise WorkerError("Ray has ended, or the node on which this runs: the same command goes on") from None


def located(model: str) -> str:
    """The name by which every node knows a model: that of a file or a folder is whole."""
    path = Path(model).expanduser()
    return str(path.absolute()) if model.lower() not in CATALOGUE and os.path.exists(path) else model

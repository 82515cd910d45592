"""What the nodes of a Ray cluster are and do: which workers they get, and the actor that each worker is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import GriffinError, OptionError, WorkerError
from ..options import Placement
from ..units import parse_bytes
from ..version import __version__

if TYPE_CHECKING:
    from .answers import Answers
    from .workers import Work


@dataclass(frozen=True)
class Pool:
    """`size` workers, at most `each` on a node; what Ray gives each (GPUs or CPUs), and what each makes of it."""

    size: int
    each: int
    resources: Mapping[str, int]
    placement: Placement
    told: str


@dataclass(frozen=True)
class Node:
    """A node that can work. `memory`: bytes of RAM that were free when it was asked."""

    id: str
    address: str
    cpus: int
    gpus: int
    memory: int = 0

    @staticmethod
    def of(listed: Mapping[str, Any]) -> "Node":
        """One that `ray.nodes` lists."""
        has = listed["Resources"]
        return Node(listed["NodeID"], listed["NodeManagerAddress"], int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def pool(nodes: Sequence[Node], placement: Placement, workers: int | None) -> Pool:
    """One worker for each GPU, or one on each node's CPU, or as many as asked for; those for which there is no room now
    wait for nodes that come later.

    Raises OptionError for a device that no node has."""
    gpus = sum(node.gpus for node in nodes)
    device = (placement.device or ("cuda" if gpus else "cpu")).lower()
    many = f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    if device == "cuda":
        if not gpus:
            raise OptionError("--device cuda: Ray knows of no GPU in the cluster")
        size = workers or gpus
        told = f"{size} worker{'s' * (size > 1)} on {gpus} GPU{'s' * (gpus > 1)} of {many}"
        each = min(size, max(node.gpus for node in nodes))
        return Pool(size, each, {"num_gpus": 1}, replace(placement, device=device), told)
    if device != "cpu":
        raise OptionError(f"--device {device}: on a cluster it is cuda or cpu")
    size = workers or len(nodes)
    each = -(-size // len(nodes))
    cpus = max(1, min(node.cpus for node in nodes) // each)
    own = replace(placement, device=device)
    if each > 1:  # as on one machine, but alike on all nodes: so that the same batch has the same plan on each
        own = replace(own, threads=placement.threads or cpus)
        if placement.device_memory is None:
            left = min(node.memory for node in nodes) * 9 // 10 - parse_bytes(placement.host_memory or 0)
            own = replace(own, device_memory=max(each, left) // each)
    told = f"{size} worker{'s' * (size > 1)} on the CPU of {many}, {cpus} core{'s' * (cpus > 1)} each"
    return Pool(size, each, {"num_cpus": cpus}, own, told)


def look(model: str, version: str) -> dict[str, Any]:
    """A node's version of Griffin and its free memory; where the version is this one, fetches the model if need be."""
    from ..memory.machine import available_memory
    from ..sources.resolve import resolve

    found: dict[str, Any] = {"version": __version__, "memory": available_memory()}
    if __version__ == version:
        try:
            resolve(model)
        except GriffinError as error:
            found["error"] = to_words(error)
    return found


class Engines:
    """An actor with one engine, opened when it is first asked something."""

    def __init__(self, work: "Work", placement: Placement, workers: int) -> None:
        """`workers`: on this node."""
        self._work, self._placement, self._workers = work, placement, workers
        self._answers: Answers | None = None

    def ask(self, method: str, *arguments: Any) -> tuple[str, Any]:
        """("done", result) or ("failed", an error in words)."""
        import ray

        try:
            self._answers = self._answers or self._work.open(self._placement, self._workers)
            return "done", getattr(self._answers, method)(*arguments)
        except Exception as error:
            kind, text = to_words(error)
            return "failed", (kind, f"{text} (on node {ray.util.get_node_ip_address()})")

    def __call__(self, columns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """A block of one batch, as JSON in its column, becomes one with the reply."""
        (task,) = columns["task"]
        number, batch = json.loads(task)
        prompts = {int(row): ids for row, ids in batch.items()}
        kind, value = self.ask("answer", prompts, lambda done, total: None)
        took = getattr(value, "took", None)
        return {"reply": [json.dumps([number, kind, value, took and asdict(took)])]}


def to_words(error: Exception) -> tuple[str, str]:
    """An error by the name of its class in errors.py: what is not ours does not always travel."""
    if isinstance(error, GriffinError):
        return type(error).__name__, str(error)
    return WorkerError.__name__, f"{type(error).__name__}: {error}"


def from_words(kind: str, text: str) -> GriffinError:
    made: GriffinError = getattr(errors, kind, WorkerError)(text)
    return made

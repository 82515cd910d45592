"""Answers by a Ray of this machine, started by the test: those of one process, whoever is killed meanwhile."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import PYTHON
from fake_answers import FakeWork, fake_drive
from griffin_offload.cli._opening import Opening
from griffin_offload.cli.generate_many import Job, generate_many
from tiny import tiny_checkpoint
from waiting import wait_for

from griffin_offload.errors import BudgetError, OptionError, WorkerError
from griffin_offload.jsonl import Row, read_rows
from griffin_offload.many.cluster import Cluster, located
from griffin_offload.many.ray_nodes import Node, pool
from griffin_offload.options import Decoding, Placement, Pruning
from griffin_offload.workspace import remove

RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
TOKENS = 40
PROMPTS = [f"Alice went down the rabbit hole for the {number}th time" for number in range(24)]


@pytest.fixture
def needs_ray() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'griffin-offload[ray]'")


@pytest.fixture
def place(needs_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for Ray's files, whose path is short, as its sockets need; at the end no process of Ray is left."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a key is left in the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    left = ray_processes(folder)
    for process in left:
        process.kill()
    psutil.wait_procs(left, 10)
    remove(folder)
    assert not folder.exists()


def ray_processes(folder: Path, name: str = "") -> list[psutil.Process]:
    """Those of a Ray whose files are in a folder, its workers among them; `name`: which its command line has."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            parent = each.parent()
            words = each.cmdline()
            whose = words + (parent.cmdline() if parent else [])
            if any(str(folder) in word for word in whose) and any(name in word for word in words):
                found.append(each)
    return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("cluster") / "llama", "llama", chat=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"row {n}", "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
    return path


def by_one_process(source: Path, model: Path) -> list[Row]:
    output = source.with_name("one.jsonl")
    chosen = Pruning(sparsity=0.5), Decoding(max_new_tokens=TOKENS, greedy=True)
    generate_many(Job(source, output), Opening(str(model), Placement("cpu")), *chosen)
    return untimed(read_rows(output))


def untimed(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "timings"} for row in rows]


@contextmanager
def running(source: Path, model: Path, workers: int) -> "Iterator[subprocess.Popen[str]]":
    """griffin generate on a cluster, in a process of its own, which is killed in the end."""
    options = ["--sparsity", "0.5", "--greedy", "--max-new-tokens", str(TOKENS), "--model", str(model)]
    files = ["--input", str(source), "--output", str(source.with_name("out.jsonl"))]
    words = [*PYTHON, "generate", *files, *options, "--cluster", "auto", "--workers", str(workers)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def written(source: Path) -> list[bytes]:
    output = source.with_name("out.jsonl")
    return output.read_bytes().split(b"\n")[:-1] if output.exists() else []


def wait_for_rows(run: "subprocess.Popen[str]", source: Path, more: int = 2) -> list[bytes]:
    """The whole rows, once there are some more."""
    first = len(written(source))

    def there() -> bool:
        assert run.poll() is None, run.communicate()
        return len(written(source)) >= first + more

    wait_for(there, 120)
    return written(source)


def test_whoever_is_killed_no_answer_is_lost(place: Path, source: Path, model: Path) -> None:
    """The driver, then the node that it runs on, then a worker; nothing is done again, doubled or half-written."""
    with running(source, model, 1) as run:
        wait_for_rows(run, source)
        ray = ray_processes(place)
        run.kill()
        assert not psutil.wait_procs(ray, 60)[1]  # the Ray that was its own ends with it
    by_the_first = written(source)

    start_ray()
    with running(source, model, 1) as run:
        wait_for_rows(run, source)
        ray_processes(place, "/raylet/raylet")[0].kill()
        _, told = run.communicate(timeout=180)
    assert run.returncode == 1
    assert told.splitlines()[-1] == "error: Ray has ended, or the node on which this runs: the same command goes on"
    assert "Ray at " in told
    by_the_second = written(source)
    assert by_the_first == by_the_second[: len(by_the_first)]
    for process in ray_processes(place):
        process.kill()

    with running(source, model, 2) as run:
        wait_for_rows(run, source)
        ray_processes(place, "ray::MapWorker")[0].kill()
        out, told = run.communicate(timeout=180)
    assert run.returncode == 0, told
    assert out == ""
    assert "a Ray started for this run: 2 workers on the CPU of 1 node, 1 core each" in told
    assert f"continuing after {len(by_the_second)} of {len(PROMPTS)} prompts" in told
    assert all("Ray started" in line or "prompts" in line for line in told.splitlines()), told  # none of Ray's own
    assert untimed(read_rows(source.with_name("out.jsonl"))) == by_one_process(source, model)
    assert set(by_the_second) <= set(written(source))
    assert not ray_processes(place)
    assert not list(place.glob(".griffin*"))


def start_ray() -> None:
    """As for a cluster of this machine alone; it goes on after this."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = ["start", "--head", "--num-cpus=2", f"--port={port}"]
    made = [sys.executable, "-c", RAY, *words, "--include-dashboard=false", "--include-log-monitor=false"]
    subprocess.run(made, check=True, capture_output=True, timeout=120)


def test_faults_of_workers(place: Path, model: Path, tmp_path: Path) -> None:
    """What kills every worker is an error of its row; what a worker raises is the driver's, and names the node."""
    told: list[str] = []
    work: Any = FakeWork(tmp_path, str(model))
    with closing(Cluster(work, Placement("cpu"), "auto", 2)) as cluster:
        assert cluster.call("facts")["process"] != os.getpid()
        with pytest.raises(BudgetError, match=r"^too big \(on node [0-9.]+\)$"):
            cluster.call("answer", {0: [-3]}, print)
        with pytest.raises(WorkerError, match=r"^RuntimeError: of a library \(on node [0-9.]+\)$"):
            cluster.call("answer", {0: [-4]}, print)
        batches = {(row,): {row: [number]} for row, number in enumerate([-1, *range(8)])}
        found = dict(cluster.answer_all(batches, lambda done, total: None, told.append))
    assert found.pop((0,)) == {0: {"error": "every worker ended that tried this prompt"}}
    assert {batch: rows[batch[0]]["text"] for batch, rows in found.items()} == {(n + 1,): str(n) for n in range(8)}
    assert told == [
        "workers ended on 1 of 9 batches: they are asked again",
        "workers ended on 1 of 1 batches: they have no answer",
    ]
    assert not ray_processes(place)
    assert not list(place.glob(".griffin*"))


def test_a_cluster_that_is_not_there(place: Path, model: Path, tmp_path: Path) -> None:
    work: Any = FakeWork(tmp_path, str(model))
    with pytest.raises(WorkerError, match=r"^no Ray answers at 127.0.0.1:9: connection refused; `ray start"):
        Cluster(work, Placement("cpu"), "127.0.0.1:9")
    with pytest.raises(WorkerError, match="an address is HOST:PORT"):
        Cluster(work, Placement("cpu"), "localhost")
    with pytest.raises(OptionError, match="run griffin on a node of the cluster"):
        Cluster(work, Placement("cpu"), "ray://127.0.0.1:10001")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("griffin_offload.many.cluster.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'griffin-offload\[ray\]'"):
        Cluster(FakeWork(tmp_path, ""), Placement("cpu"), "auto")  # type: ignore[arg-type]


def test_a_pool_has_a_worker_for_each_gpu_or_each_node() -> None:
    gpus = [Node("a", "10.0.0.1", 32, 8), Node("b", "10.0.0.2", 32, 8), Node("c", "10.0.0.3", 8, 0)]
    made = pool(gpus, Placement(), None)
    assert (made.size, made.each, made.resources, made.placement) == (16, 8, {"num_gpus": 1}, Placement("cuda"))
    assert made.told == "16 workers on 16 GPUs of 3 nodes"
    assert pool(gpus, Placement(), 20).size == 20  # four wait for nodes that come later
    made = pool(gpus, Placement("cpu"), None)
    assert (made.size, made.each, made.resources, made.placement) == (3, 1, {"num_cpus": 8}, Placement("cpu"))
    with pytest.raises(OptionError, match="Ray knows of no GPU"):
        pool(gpus[2:], Placement("cuda"), None)
    with pytest.raises(OptionError, match="on a cluster it is cuda or cpu"):
        pool(gpus, Placement("mps"), None)


def test_workers_on_one_node_share_its_cores_and_its_memory() -> None:
    nodes = [Node("a", "10.0.0.1", 32, 0, 1000), Node("b", "10.0.0.2", 16, 0, 2000)]
    made = pool(nodes, Placement(), 5)
    assert made.resources == {"num_cpus": 5}  # three on a node of 16
    assert made.placement == Placement("cpu", 300, threads=5)
    assert pool(nodes, Placement(device_memory=77, threads=2), 4).placement == Placement("cpu", 77, threads=2)
    assert pool(nodes, Placement(host_memory=600), 5).placement.device_memory == 100  # (900 - 600) // 3
    assert pool(nodes[:1], Placement(), 100).resources == {"num_cpus": 1}


def test_a_model_of_this_machine_is_known_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert located("llama") == located("./llama") == str(tmp_path / "llama")
    assert located("smollm2-135m") == "smollm2-135m"  # one of the catalogue goes before a folder
    assert located("owner/name") == "owner/name"
    assert located("/only/on/the/nodes") == "/only/on/the/nodes"


def test_what_the_driver_says_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replies, errors, and a driver that ends."""
    monkeypatch.setattr("griffin_offload.many.cluster.find_spec", lambda name: True)
    monkeypatch.setattr("griffin_offload.many.cluster.drive", fake_drive)
    work: Any = FakeWork(tmp_path)
    told: list[str] = []
    with closing(Cluster(work, Placement("cpu"), "auto")) as cluster:
        assert (cluster.told, cluster.count) == ("told", 2)
        process = cluster.call("facts")["process"]
        assert process != os.getpid()
        with pytest.raises(BudgetError, match="too big"):
            cluster.call("answer", {0: [-3]}, print)
        batches = {(row,): {row: [row]} for row in range(3)}
        found = dict(cluster.answer_all(batches, lambda done, total: None, told.append))
        assert {row: rows[row]["text"] for (row,), rows in found.items()} == {0: "0", 1: "1", 2: "2"}
        assert told == ["a worker ended"]
        with pytest.raises(WorkerError, match="Ray has ended"):
            cluster.call("answer", {0: [-1]}, print)
    assert not psutil.pid_exists(process)

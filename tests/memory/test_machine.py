"""The default budget in a container: control groups of both versions, as files of a made-up /proc and /sys."""

from pathlib import Path

import pytest

from griffin_offload.memory import machine
from griffin_offload.memory.machine import available_memory, container_limit, device_budget
from griffin_offload.units import MIB

VERSIONS = {
    1: ("5:memory:/a/b", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("0::/a/b", "a/b", "memory.max", "memory.current", "inactive_file"),
}


def container(folder: Path, version: int, *, limit: int, usage: int, cache: int) -> None:
    line, place, limit_name, usage_name, cache_name = VERSIONS[version]
    group = folder / "cgroup" / place
    group.mkdir(parents=True)
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(f"{line}\n")
    (group / limit_name).write_text(f"{limit}\n")
    (group / usage_name).write_text(f"{usage}\n")
    (group / "memory.stat").write_text(f"{cache_name} {cache}\nrss 1\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_budget_is_within_a_containers_limit(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path, version, limit=900 * MIB, usage=400 * MIB, cache=300 * MIB)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    assert container_limit() == 900 * MIB
    assert available_memory() == 800 * MIB  # the page cache gives way
    monkeypatch.setattr(machine, "resident_set", lambda: 100 * MIB)
    assert device_budget("cpu") == 100 * MIB + 760 * MIB
    monkeypatch.setattr(machine, "resident_set", lambda: 300 * MIB)  # 200 MiB of them libraries that others pay for
    assert device_budget("cpu") == 900 * MIB


def test_without_a_limit_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path, 2, limit=2**62, usage=0, cache=0)
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    assert container_limit() is None

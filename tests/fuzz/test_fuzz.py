"""A short run of the fuzzer, and every input that a long one ever found: a result, or one of our errors."""

import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz.mutate import Gguf, damaged, in_json
from fuzz.run import FINDINGS, case_of, ready, restore, run_case
from fuzz.targets import TARGETS, Inputs

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore")]

SHARE = 6  # cases for each of a target's weight: 6,000 in all
FOUND = sorted(path.name for path in FINDINGS.iterdir())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    made = Inputs(tmp_path_factory.mktemp("fuzz") / "inputs").make()
    with made.environment():
        before = signal.getsignal(signal.SIGVTALRM)
        try:
            yield made
        finally:
            signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(scope="module")
def seeds(inputs: Inputs) -> dict[str, bytes]:
    return ready(inputs)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs(inputs: Inputs, seeds: dict[str, bytes], name: str) -> None:
    target = TARGETS[name]
    cases = ((seed, run_case(inputs, target, case_of(seeds, target, seed))) for seed in range(SHARE * target.weight))
    found = [f'--case "{name}" {seed}: {wrong}' for seed, wrong in cases if wrong]
    restore(inputs, target, seeds)
    assert not found


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_once(inputs: Inputs, seeds: dict[str, bytes], found: str) -> None:
    target = TARGETS[found.rsplit("-", 1)[0].replace("_", " ")]
    wrong = run_case(inputs, target, (FINDINGS / found).read_bytes())
    restore(inputs, target, seeds)
    assert not wrong


def test_a_finding_is_seen(inputs: Inputs, seeds: dict[str, bytes]) -> None:
    """What a read may not do: another's exception, several lines, too long."""

    def fails(_: Inputs, path: Path) -> None:
        raise RuntimeError("a\nb")

    def spins(_: Inputs, path: Path) -> None:
        while True:
            pass

    target = TARGETS["curves"]
    assert run_case(inputs, type(target)("x", target.file, "json", fails), b"{}").startswith(
        "RuntimeError at test_fuzz"
    )
    assert run_case(inputs, type(target)("x", target.file, "json", spins), b"{}", 0.1) == "more than 0.1 s"
    restore(inputs, target, seeds)


@pytest.mark.parametrize("form", ["json", "bytes", "safetensors", "gguf", "lines"])
def test_damage_is_the_same_each_time_and_not_always_the_same(seeds: dict[str, bytes], form: str) -> None:
    target = next(target for target in TARGETS.values() if target.form == form)
    data = seeds[target.name]
    made = [damaged(data, form, Random(seed), target.words) for seed in range(50)]
    assert made == [damaged(data, form, Random(seed), target.words) for seed in range(50)]
    assert len(set(made)) > 40
    assert sum(one != data for one in made) > 40


def test_parts_of_a_file_are_put_together_again(seeds: dict[str, bytes]) -> None:
    assert Gguf(seeds["gguf"]).to_bytes() == seeds["gguf"]
    assert in_json(b'{"a": [1, {"b": "c"}]}', Random(1)) != b""

"""The budget from outside: a control group of exactly --device-memory, from what just fits upwards."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint

from griffin_offload.evaluation.bench.control_group import control_group
from griffin_offload.planning.plan import DRIFT
from griffin_offload.units import MIB, parse_bytes

SIZES = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 12, "max_position_embeddings": 4096}
GENERATE = [
    sys.executable,
    "-c",
    "from griffin_offload.cli.main import main; main()",
    "generate",
    "--raw",
    "--greedy",
    "--json",
]


def generate(folder: Path, budget: int, *options: str, capped: bool = True) -> subprocess.CompletedProcess[str]:
    """`griffin generate` within a control group of its budget."""
    command = [*GENERATE, "--model", str(folder), "--device-memory", str(budget), "--max-new-tokens", "4", *options]
    if not capped:
        return subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        with control_group(budget) as group:
            run = subprocess.run(group.enter(command), check=False, capture_output=True, text=True)
            assert group.kills() == 0, f"killed for memory at {budget}"
            return run
    except OSError as error:
        pytest.skip(f"no control group here: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("budget") / "m", "llama", dtype=torch.bfloat16, **SIZES)


@pytest.mark.parametrize(("sparsity", "words"), [("0.5", 100), ("0.9", 5)])
def test_from_just_enough_upwards(folder: Path, sparsity: str, words: int) -> None:
    """What is refused says what would do; that does, and so does more, in no more memory than was given."""
    options = ["--sparsity", sparsity, "--prompt", "word " * words]
    refused = generate(folder, 100 * MIB, *options, capped=False)
    assert refused.returncode == 1
    suggested = re.search(r"--device-memory (\w+)", refused.stderr)
    assert suggested, refused.stderr
    enough = parse_bytes(suggested[1])
    for budget in (enough, enough * 3 // 2):
        run = generate(folder, budget, *options)
        assert run.returncode == 0, run.stderr
        memory = json.loads(run.stdout)["memory"]
        assert memory["measured_peak_bytes"] <= memory["planned_peak_bytes"] <= budget
    assert generate(folder, enough - 40 * MIB, *options).returncode == 1


def test_the_sparsity_that_is_suggested_fits(folder: Path) -> None:
    options = ["--prompt", "word " * 5]
    budget = 800 * MIB
    refused = generate(folder, budget, "--sparsity", "0.1", *options, capped=False)
    suggested = re.search(r"--sparsity ([\d.]+)", refused.stderr)
    assert suggested, refused.stderr
    assert generate(folder, budget, "--sparsity", suggested[1], *options).returncode == 0
    assert generate(folder, budget, "--sparsity", f"{float(suggested[1]) - 0.1:.2f}", *options).returncode == 1


TURNS = """
import json, sys
from griffin_offload import Engine
engine = Engine(sys.argv[1], device_memory=int(sys.argv[2]))
ids, told = list(range(5, 300)) * 2, []
for _ in range(3):
    answer = engine.generate(ids, continues=True, sparsity=0.5, max_new_tokens=30, greedy=True)
    ids = [*ids, *answer.token_ids, *range(5, 40)]
    report = answer.report
    told.append([report.turn.kept_tokens, report.measured_peak, report.plan.peak])
print(json.dumps(told))
"""


def test_the_turns_of_a_conversation(folder: Path) -> None:
    def run(budget: int, enter: Callable[[list[str]], list[str]] = list) -> list[list[int]]:
        command = enter([sys.executable, "-c", TURNS, str(folder), str(budget)])
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        turns: list[list[int]] = json.loads(done.stdout)
        return turns

    budget = max(planned for *_, planned in run(2000 * MIB)) + DRIFT
    try:
        with control_group(budget) as group:
            turns = run(budget, group.enter)
            assert group.kills() == 0
    except OSError as error:
        pytest.skip(f"no control group here: {error}")
    assert [kept for kept, *_ in turns] == [0, 590, 655]
    assert all(measured <= planned <= budget for _, measured, planned in turns)

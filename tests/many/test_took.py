"""What a run of many prompts reports: sums of what its batches took, and the bound by the longer part."""

import pickle
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from griffin_offload import Engine
from griffin_offload.many.answers import Answers
from griffin_offload.many.took import MEMORY, Throughput, Took
from griffin_offload.options import Decoding, Pruning


def test_a_batch_takes_what_its_report_says(tmp_path: Path) -> None:
    engine = Engine(tiny_checkpoint(tmp_path / "m", "llama"), dtype="float32")
    answers = Answers(engine, Pruning(0.5, rest="drop"), Decoding(max_new_tokens=20, greedy=True))
    found = answers.answer({3: [5, 6, 7], 8: [9, 10]})
    taken = pickle.loads(pickle.dumps(found)).took  # as it comes from a worker
    assert set(found) == {3, 8}
    assert (taken.prompts, taken.prompt_tokens) == (2, 5)
    assert taken.tokens == sum(row["tokens"] for row in found.values())
    assert taken.bytes_read >= engine.checkpoint.bytes // 2
    assert taken.memory_s > 0
    assert round(taken.prompt_s, 3) == found[3]["timings"]["prompt_s"]
    assert sum(taken.stages.values()) > 0


@pytest.mark.parametrize(
    ("one", "bound"),
    [
        (Took(prompt_s=3, decode_s=1, stages={"reading": 2.0, "computing": 1.0}), "reading"),
        (Took(prompt_s=3, decode_s=1, stages={"reading": 1.0, "the bus": 1.5, "computing": 1.4}), "the bus"),
        (Took(prompt_s=1, decode_s=3, memory_s=2, stages={"reading": 2.0}), MEMORY),
        (Took(prompt_s=1, decode_s=3, memory_s=1, stages={"reading": 2.0}), "computing"),
    ],
)
def test_the_longer_part_says_what_bounds_a_run(one: Took, bound: str) -> None:
    assert one.bound_by == bound
    assert (one + one).bound_by == bound
    assert (one + one).prompt_s == 2 * one.prompt_s


def test_rates_are_by_the_clock() -> None:
    run = Throughput(Took(prompts=4, prompt_tokens=100, tokens=20, bytes_read=4096, prompt_s=3), seconds=2)
    told = run.to_json()
    assert (told["prompts_per_s"], told["prompt_tokens_per_s"], told["tokens_per_s"]) == (2, 50, 10)
    assert told["bytes_read_per_prompt"] == 1024
    assert "2 prompts/s, 50 prompt tokens/s, 10 tokens/s of answers; 1.00 KiB read a prompt; bound by" in str(run)

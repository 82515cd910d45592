"""Ten thousand rows: the driver's memory grows by what it must know of each row, and by nothing else."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from griffin_offload.cli import generate_many
from griffin_offload.cli._opening import Opening

from griffin_offload.jsonl import Row, read_rows
from griffin_offload.many.answers import Answered, Facts
from griffin_offload.many.batches import Batch
from griffin_offload.many.rows import PromptForm
from griffin_offload.many.took import Took
from griffin_offload.options import Decoding, Pruning

ROWS = 10_000
OF_A_ROW = 4096  # bytes: its prompt and answer, as texts, token ids and dictionaries


class Quick:
    """Answers without a model: each prompt is its characters, the answer its text."""

    count = 1

    def __init__(self) -> None:
        self.memory: list[int] = []  # after each batch

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "facts":
            return Facts("quick", "float32", "uniform")
        if method == "encode":
            return [[ord(letter) for letter in row["prompt"]] for row in arguments[0]]
        if method == "refusals":
            return [None] * len(arguments[0])
        return {"apart": True, "fitting": 16, "check": None}[method]

    def answer_all(
        self, batches: Mapping[Batch, Any], on_layer: Any, on_end: Callable[[str], None]
    ) -> Iterator[tuple[Batch, Answered]]:
        for batch, prompts in batches.items():
            answered = Answered({row: {"text": "".join(map(chr, ids))} for row, ids in prompts.items()})
            answered.took = Took(prompts=len(batch), prompt_tokens=sum(map(len, prompts.values())))
            self.memory.append(psutil.Process().memory_info().rss)
            yield batch, answered


@pytest.mark.alone
def test_memory_is_for_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Quick()

    @contextmanager
    def answerers(*_: Any) -> Iterator[Quick]:
        yield quick

    monkeypatch.setattr(generate_many, "answerers", answerers)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(ROWS)))

    def run(**options: Any) -> list[Row]:
        job = generate_many.Job(source, output, PromptForm(), per_prompt=True, **options)
        generate_many.generate_many(job, Opening("quick", None), Pruning(), Decoding())  # type: ignore[arg-type]
        return read_rows(output)

    rows = run()
    assert [row["text"] for row in rows] == [f"prompt {n}" for n in range(ROWS)]
    assert len(quick.memory) == ROWS // 16
    while_answering = quick.memory[-1] - quick.memory[0]
    assert while_answering < ROWS * OF_A_ROW, while_answering / ROWS
    assert run() == rows  # which are there already
    assert len(quick.memory) == ROWS // 16
    run(force=True)
    again = quick.memory[-1] - quick.memory[ROWS // 16 - 1]
    assert again < ROWS * OF_A_ROW, again / ROWS  # what the first run held was given back, or used again

"""`griffin generate --input --output`: answer a file of prompts, one row each; a stopped run goes on where it was."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..chat import Settings
from ..errors import BudgetError, GriffinError, NumericError, OptionError, PromptError
from ..jsonl import Results, Row, read_rows
from . import _console as console
from ._options import open_engine

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation import Answer
    from ..options import OnLayer

ROLES = ("system", "user", "assistant")
MESSAGE = f'{{"role": {" or ".join(ROLES)}, "content": a text}}'


class Pace:
    """How far a long run is, as a line on stderr now and then: `step` after each row; a Ctrl-C in the block says it."""

    def __init__(self, results: Results, total: int, what: str, every: float = 10.0) -> None:
        """Of `total` rows some may be in `results` already. A line at most every `every` seconds."""
        self._results, self._total, self._what, self._every = results, total, what, every
        self._first = len(results.rows)
        self._start = self._told = time.monotonic()
        if self._first:
            console.note(f"going on after {self._first} of {total} {what}")

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is KeyboardInterrupt:
            done = f"{len(self._results.rows)} of {self._total} {self._what}"
            console.note(f"{done} are in {self._results.path}; the same command goes on")

    def step(self) -> None:
        now, done = time.monotonic(), len(self._results.rows)
        if now - self._told < self._every or done in (self._first, self._total):
            return
        self._told = now
        left = (now - self._start) / (done - self._first) * (self._total - done)
        console.note(f"{done} of {self._total} {self._what}, about {duration(left)} left")


def duration(seconds: float) -> str:
    """Two places that matter: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def generate_many(
    source: Path,
    output: Path,
    chosen: Settings,
    *,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 1,
    per_prompt: bool = False,
    force: bool = False,
    as_json: bool = False,
    model: str,
    device: str | None,
    device_memory: str | None,
    dtype: str | None,
    host_memory: str = "0",
) -> None:
    """Answer every row of `source`; a row that cannot be answered gets its "error" and fails the run at its end.

    Rows are {"prompt"} or {"messages"}, with "id" and "system" where there are any; checked before the model opens."""
    if chosen.ffn_skip and batch_size > 1:
        raise OptionError(f"--ffn-skip is for one prompt at a time: leave out --batch-size {batch_size}")
    rows = read_rows(source, lambda row: fault(row, raw))
    engine = open_engine(model, device=device, device_memory=device_memory, host_memory=host_memory, dtype=dtype)
    skip = chosen.skip()
    settings = {
        "model": str(engine.path.resolve()),
        "dtype": engine.dtype,
        "system": system,
        "raw": raw,
        "batch_size": 1 if per_prompt else batch_size,  # where the prompts of a batch share their experts
        **{name: value for name, value in chosen.arguments().items() if name != "prior"},
        **({"prior": chosen.prior} if chosen.prior else {}),
        **({"skip": asdict(skip)} if skip else {}),
    }
    with Results(output, settings, source=source, force=force) as results:
        answer_rows(engine, rows, results, chosen, system=system, raw=raw, size=batch_size, per_prompt=per_prompt)
        failed = sum("error" in row for row in results.rows)
    if as_json:
        click.echo(json.dumps({"output": str(output), "rows": len(rows), "failed": failed}))
    if failed:
        raise GriffinError(f'{failed} of {len(rows)} prompts have no answer: see "error" in {output}')
    console.note(f"{len(rows)} prompts answered in {output}")


def fault(row: Row, raw: bool) -> str | None:
    """What makes a row unfit, whatever the model; None for nothing."""
    faults = (
        (("prompt" in row) == ("messages" in row), 'give either a "prompt" or "messages"'),
        (not isinstance(row.get("prompt", ""), str), 'the "prompt" is not a text'),
        ("messages" in row and not are_messages(row["messages"]), f'"messages" are a list of {MESSAGE}'),
        (not isinstance(row.get("system", ""), str), 'the "system" is not a text'),
        ("system" in row and "messages" in row, 'a "system" beside "messages": make it their first'),
        (raw and ("system" in row or "messages" in row), "--raw leaves out the chat template, which this row needs"),
    )
    return next((text for wrong, text in faults if wrong), None)


def are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def answer_rows(
    engine: "Engine",
    rows: Sequence[Row],
    results: Results,
    chosen: Settings,
    *,
    system: str | None,
    raw: bool,
    size: int,
    per_prompt: bool,
) -> None:
    """Answer what is not in `results` yet, in batches that are cut from all rows: the same ones after a stop."""
    prompts = [encode(engine, row, chosen, system=system, raw=raw) for row in rows]
    if isinstance(prompts[0], BudgetError) and all(isinstance(prompt, BudgetError) for prompt in prompts):
        raise prompts[0]  # the options are at fault, not the rows
    batches = [range(begin, min(begin + size, len(rows))) for begin in range(0, len(rows), size)]
    fitting = [{i: ids for i in batch if isinstance(ids := prompts[i], list)} for batch in batches]
    for fit in fitting:
        if fit:  # a batch that is too big for the memory is refused before the first is answered
            longest = max(len(ids) for ids in fit.values())
            check_plan(engine, longest, chosen, sequences=len(fit), per_prompt=per_prompt and len(fit) > 1)
    with Pace(results, len(rows), "prompts") as pace:
        for batch, fit in zip(batches, fitting, strict=True):
            if all(results.has(rows[i]) for i in batch):
                continue
            answered: dict[int, Row] = {i: {"error": str(prompts[i])} for i in batch if i not in fit}
            with console.layer_progress(f"Prompt {batch[0] + 1} of {len(rows)}") as on_layer:
                answered |= answer_batch(engine, fit, per_prompt, on_layer, chosen)
            for i in batch:
                if not results.has(rows[i]):
                    results.add({"id": rows[i]["id"], **answered[i]})
            pace.step()


def encode(engine: "Engine", row: Row, chosen: Settings, *, system: str | None, raw: bool) -> list[int] | GriffinError:
    """The token ids of a row's prompt, or why it cannot be answered: empty, too long, too big for the memory."""
    try:
        if "messages" in row:
            has_system = row["messages"][0]["role"] == "system"
            head = [{"role": "system", "content": system}] if system and not has_system else []
            ids = engine.encode_chat([*head, *row["messages"]])
        else:
            ids = engine.encode(row["prompt"], system=row.get("system", system), raw=raw)
        check_plan(engine, len(ids), chosen)
    except (PromptError, BudgetError) as error:
        return error
    return ids


def check_plan(engine: "Engine", tokens: int, chosen: Settings, **together: Any) -> None:
    """Raises PromptError for a prompt beyond the context, BudgetError for what the memory does not hold."""
    how = {name: getattr(chosen, name) for name in ("allocation", "resident_dtype", "rest")}
    engine.plan(tokens, chosen.max_new_tokens, sparsity=chosen.sparsity, skip=chosen.skip(), **how, **together)


def answer_batch(
    engine: "Engine", prompts: dict[int, list[int]], per_prompt: bool, on_layer: "OnLayer", chosen: Settings
) -> dict[int, Row]:
    """What is written of each prompt; a number that overflows in a batch is the error of all its prompts."""
    if not prompts:
        return {}
    ids = list(prompts.values())
    try:
        found = engine.generate_batch(ids, per_prompt=per_prompt, on_layer=on_layer, **chosen.arguments())
    except NumericError as error:
        return {i: {"error": str(error)} for i in prompts}
    if any(generation.finish_reason == "interrupted" for generation in found):
        raise KeyboardInterrupt  # half an answer is none
    return {i: to_row(generation) for i, generation in zip(prompts, found, strict=True)}


def to_row(generation: "Answer") -> Row:
    """The timings are the batch's."""
    values = generation.to_json()
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.prompt_token_ids),
        "tokens": len(generation.token_ids),
        "sparsity": values["sparsity"],
        "timings": {name: round(values["timings"][name], 3) for name in ("prompt_s", "decode_s")},
    }

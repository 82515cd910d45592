"""`griffin generate --input --output`: answer a file of prompts, one row each; a stopped run continues."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, GriffinError, NumericError, OptionError, PromptError
from ..jsonl import Results, Row, read_content, read_rows
from ..options import AUTO, OFF, Decoding, OnLayer, Pruning
from ..paths import cache_folder
from . import _console as console
from ._print import echo
from ._signals import Stopped
from ._text import PromptForm

if TYPE_CHECKING:
    from ..engine import Engine
    from ..run import Answer

ROLES = ("system", "user", "assistant")
MESSAGE = f'{{"role": {" or ".join(ROLES)}, "content": a text}}'


@dataclass(frozen=True)
class Job:
    """A file of prompts and the file of their answers. `batch_size` prompts share one reading of the model, and their
    kept neurons unless `per_prompt`."""

    source: Path
    output: Path
    form: PromptForm = field(default_factory=PromptForm)
    batch_size: int = 1
    per_prompt: bool = False
    force: bool = False
    as_json: bool = False


class Pace:
    """Tells on stderr how far a long run is: call `step` after each row. A signal that ends the block tells it too.

    `total`: rows in all, some of which may be in `results` already. At most one line in `every` seconds."""

    def __init__(self, results: Results, total: int, what: str, every: float = 10.0) -> None:
        self._results, self._total, self._what, self._every = results, total, what, every
        self._first = len(results.rows)
        self._start = self._told = time.monotonic()
        if self._first:
            console.note(f"continuing after {self._first} of {total} {what}")

    def __enter__(self) -> "Pace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind and issubclass(kind, KeyboardInterrupt | Stopped):
            done = f"{len(self._results.rows)} of {self._total} {self._what}"
            with suppress(OSError):  # the terminal may be gone
                console.note(f"{done} are in {self._results.path}; the same command continues")

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


def generate_many(job: Job, open_engine: Callable[[], "Engine"], pruning: Pruning, decoding: Decoding) -> None:
    """Answer every row of `job.source`. A row that cannot be answered gets its "error", and the run fails at its end.

    Rows are {"prompt"} or {"messages"}, with optional "id" and "system"; they are checked before the model opens."""
    if pruning.skip.share and job.batch_size > 1:
        raise OptionError(f"--ffn-skip is for one prompt at a time: leave out --batch-size {job.batch_size}")
    content = read_content(job.source)
    rows = read_rows(job.source, lambda row: fault(row, job.form.raw), content=content)
    engine = open_engine()
    settings = {
        "model": str(engine.path.resolve()),
        "dtype": engine.dtype,
        **asdict(job.form),
        "batch_size": 1 if job.per_prompt else job.batch_size,  # where the prompts of a batch share their kept neurons
        **recorded(with_allocation(engine, pruning), decoding),
    }
    given: dict[str, Any] = {"source": job.source, "content": content, "force": job.force}
    with Results(job.output, settings, **given, memory=cache_folder() / "finished") as results:
        if not results.finished:
            Rows(engine, job, pruning, decoding).answer(rows, results)
        failed = sum("error" in row for row in results.rows)
    if job.as_json:
        echo(json.dumps({"output": str(job.output), "rows": len(rows), "failed": failed}))
    if failed:
        raise GriffinError(f'{failed} of {len(rows)} prompts have no answer: see "error" in {job.output}')
    done = "are answered already in" if results.finished else "answered in"
    console.note(f"{len(rows)} prompts {done} {job.output}" + "; --force answers them again" * results.finished)


def with_allocation(engine: "Engine", pruning: Pruning) -> Pruning:
    """The pruning with the allocation that 'auto' stands for now: a calibration may come before the run goes on."""
    if pruning.allocation != AUTO:
        return pruning
    calibrated = engine.opened.allocation_curves(pruning) is not None
    return replace(pruning, allocation="sensitivity" if calibrated else "uniform")


def recorded(pruning: Pruning, decoding: Decoding) -> dict[str, Any]:
    """What the answers depend on, in the form that a stopped run of any version has written beside them."""
    names = ("selection", "allocation", "resident_dtype", "rest")
    values: dict[str, Any] = {"sparsity": pruning.sparsity}
    values |= {"max_new_tokens": decoding.max_new_tokens, "seed": decoding.seed}
    values |= {name: getattr(pruning, name) for name in names}
    if pruning.sparsity is not None and pruning.rest in (None, AUTO, "drop"):
        values["rest"] = None if pruning.rest == "drop" else AUTO  # earlier versions wrote None, and dropped
    if pruning.folds and pruning.rest in (None, AUTO, "drop"):
        values["fold"] = pruning.folds
    values |= decoding.generate_options(pruning.selection) | ({"stop": list(decoding.stop)} if decoding.stop else {})
    drops = pruning.rest in (None, AUTO, "drop")
    if pruning.prior != OFF and (pruning.prior != AUTO or drops):  # earlier versions had none of their own
        values["prior"] = pruning.prior
        values |= {} if pruning.prior_weight is None else {"prior_weight": pruning.prior_weight}
    return values | ({"skip": asdict(pruning.skip)} if pruning.skip.share else {})


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
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and is_content(turn.get("content")) for turn in turns
    )


def is_content(value: Any) -> bool:
    """A text, or a list of parts: of text, or of media, which the engine refuses with the reason."""
    parts = value if isinstance(value, list) else []
    return isinstance(value, str) or (bool(parts) and all(isinstance(part, dict) and is_part(part) for part in parts))


def is_part(part: Row) -> bool:
    return isinstance(part.get("type"), str) and (part["type"] != "text" or isinstance(part.get("text"), str))


class Rows:
    """Answers rows of a job with an engine."""

    def __init__(self, engine: "Engine", job: Job, pruning: Pruning, decoding: Decoding) -> None:
        self.engine, self.job, self.pruning, self.decoding = engine, job, pruning, decoding

    def answer(self, rows: list[Row], results: Results) -> None:
        """Answer what is not in `results` yet, in batches that are cut from all rows: the same ones after a stop."""
        prompts = [self.encode(row) for row in rows]
        if isinstance(prompts[0], BudgetError) and all(isinstance(prompt, BudgetError) for prompt in prompts):
            raise prompts[0]  # the options are at fault, not the rows
        size = self.job.batch_size
        batches = [range(begin, min(begin + size, len(rows))) for begin in range(0, len(rows), size)]
        fitting = [{i: ids for i in batch if isinstance(ids := prompts[i], list)} for batch in batches]
        for fit in fitting:
            if fit:  # a batch that is too big for the memory is refused before the first is answered
                per_prompt = self.job.per_prompt and len(fit) > 1
                self.check_plan(max(map(len, fit.values())), sequences=len(fit), per_prompt=per_prompt)
        with Pace(results, len(rows), "prompts") as pace:
            for batch, fit in zip(batches, fitting, strict=True):
                if all(results.has(rows[i]) for i in batch):
                    continue
                answered: dict[int, Row] = {i: {"error": str(prompts[i])} for i in batch if i not in fit}
                with console.layer_progress(f"Prompt {batch[0] + 1} of {len(rows)}") as on_layer:
                    answered |= self.answer_batch(fit, on_layer)
                for i in batch:
                    if not results.has(rows[i]):
                        results.add({"id": rows[i]["id"], **answered[i]})
                pace.step()

    def encode(self, row: Row) -> list[int] | GriffinError:
        """Token ids of a row's prompt, or why it cannot be answered: empty, too long, too big for the memory."""
        system = self.job.form.system
        try:
            if "messages" in row:
                has_system = row["messages"][0]["role"] == "system"
                head = [{"role": "system", "content": system}] if system and not has_system else []
                ids = self.engine.encode_chat([*head, *row["messages"]])
            else:
                ids = PromptForm(row.get("system", system), self.job.form.raw).encode(self.engine, row["prompt"])
            self.check_plan(len(ids))
        except (PromptError, BudgetError) as error:
            return error
        return ids

    def check_plan(self, tokens: int, **together: Any) -> None:
        """Raises PromptError for a prompt beyond the context, BudgetError for what the memory does not hold."""
        self.engine.plan(tokens, self.decoding.max_new_tokens, self.pruning, **together)

    def answer_batch(self, prompts: dict[int, list[int]], on_layer: OnLayer) -> dict[int, Row]:
        """The rows to write for the prompts. A number that overflows in a batch is the error of all its prompts."""
        if not prompts:
            return {}
        options: dict[str, Any] = {"per_prompt": self.job.per_prompt, "on_layer": on_layer}
        try:
            found = self.engine.generate_batch(list(prompts.values()), self.pruning, self.decoding, **options)
        except NumericError as error:
            return {i: {"error": str(error)} for i in prompts}
        if any(answer.finish_reason == "interrupted" for answer in found):
            raise KeyboardInterrupt  # half an answer is none
        return {i: to_row(answer) for i, answer in zip(prompts, found, strict=True)}


def to_row(answer: "Answer") -> Row:
    """The timings are the batch's."""
    values = answer.to_json()
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt_token_ids),
        "tokens": len(answer.token_ids),
        "sparsity": values["sparsity"],
        "timings": {name: round(values["timings"][name], 3) for name in ("prompt_s", "decode_s")},
    }

"""`griffin generate --input --output`: answer a file of prompts, one row each; a stopped run continues."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, GriffinError, OptionError
from ..jsonl import Results, Row, read_content, read_rows
from ..many.batches import Batch, cut
from ..many.rows import PromptForm, fault
from ..options import AUTO, OFF, Decoding, Pruning
from ..paths import cache_folder
from ..sources.resolve import resolve
from . import _console as console
from ._options import Opening, open_engine
from ._print import echo
from ._signals import Stopped

if TYPE_CHECKING:
    from ..many.workers import Answerers


@dataclass(frozen=True)
class Job:
    """A file of prompts and the file of their answers. `batch_size` prompts share one reading of the model, and their
    kept neurons unless `per_prompt`. `workers`: processes that answer; None: one for each GPU, one on the CPU.
    `cluster`: the address of the Ray whose nodes have them."""

    source: Path
    output: Path
    form: PromptForm = field(default_factory=PromptForm)
    batch_size: int = 1
    workers: int | None = None
    cluster: str | None = None
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


def generate_many(job: Job, opening: Opening, pruning: Pruning, decoding: Decoding) -> None:
    """Answer every row of `job.source`. A row that cannot be answered gets its "error", and the run fails at its end.

    Rows are {"prompt"} or {"messages"}, with optional "id" and "system"; they are checked before the model opens."""
    if pruning.skip.share and job.batch_size > 1:
        raise OptionError(f"--ffn-skip is for one prompt at a time: leave out --batch-size {job.batch_size}")
    content = read_content(job.source)
    rows = read_rows(job.source, lambda row: fault(row, job.form.raw), content=content)
    with answerers(job, opening, pruning, decoding) as answers:
        facts = answers.call("facts")
        settings = {
            "model": facts.path,
            "dtype": facts.dtype,
            **asdict(job.form),
            "batch_size": 1 if job.per_prompt else job.batch_size,  # where a batch's prompts share their kept neurons
            **recorded(replace(pruning, allocation=facts.allocation), decoding),
        }
        given: dict[str, Any] = {"source": job.source, "content": content, "force": job.force}
        with Results(job.output, settings, **given, memory=cache_folder() / "finished") as results:
            if not results.finished:
                answer_rows(answers, job, rows, results)
                results.sort(row["id"] for row in rows)
            failed = sum("error" in row for row in results.rows)
    if job.as_json:
        echo(json.dumps({"output": str(job.output), "rows": len(rows), "failed": failed}))
    if failed:
        raise GriffinError(f'{failed} of {len(rows)} prompts have no answer: see "error" in {job.output}')
    done = "are answered already in" if results.finished else "answered in"
    console.note(f"{len(rows)} prompts {done} {job.output}" + "; --force answers them again" * results.finished)


@contextmanager
def answerers(job: Job, opening: Opening, pruning: Pruning, decoding: Decoding) -> "Iterator[Answerers]":
    """What answers: an engine of this process, or workers with one each, here or on a cluster."""
    from ..many.cluster import Cluster
    from ..many.places import places
    from ..many.workers import InProcess, Work, Workers

    work = Work(opening.model, pruning, decoding, job.per_prompt)
    if job.cluster:
        with Cluster(work, opening.placement, job.cluster, job.workers) as cluster:
            console.note(cluster.told)
            yield cluster
        return
    where = places(opening.placement, job.workers)
    if len(where) == 1:
        yield InProcess(work.by(open_engine(opening.model, opening.placement)))
        return
    with console.progress_bytes("Fetching") as on_progress:  # once, before several processes ask for it
        resolve(opening.model, on_progress=on_progress)
    with Workers(work, where) as workers:
        console.note(f"{len(where)} workers: {'; '.join(place.told for place in where)}")
        yield workers


def answer_rows(answers: "Answerers", job: Job, rows: Sequence[Row], results: Results) -> None:
    """Answer what is not in `results` yet, in batches that are cut from all rows: the same ones after a stop."""
    prompts = answers.call("encode", rows, job.form)
    lengths = [len(ids) if isinstance(ids, list) else 0 for ids in prompts]
    alone = iter(answers.call("refusals", [tokens for tokens in lengths if tokens]))
    refused = {row: next(alone) if lengths[row] else prompts[row] for row in range(len(rows))}
    batches = cut(lengths, job.batch_size, alike=job.per_prompt)
    if all(isinstance(error, BudgetError) for error in refused.values()):  # the options are at fault, not the rows
        answers.call("check", max(lengths), len(batches[0]))
    for batch in batches:  # one that is too big for the memory is refused before the first is answered
        if fit := [row for row in batch if not refused[row]]:
            answers.call("check", max(lengths[row] for row in fit), len(fit))
    missing = {batch for batch in batches if not all(results.has(rows[row]) for row in batch)}
    work = {batch: {row: prompts[row] for row in batch if not refused[row]} for batch in batches if batch in missing}
    with Pace(results, len(rows), "prompts") as pace:

        def write(batch: Batch, answered: Mapping[int, Row]) -> None:
            for row in batch:
                if not results.has(rows[row]):
                    error = refused[row]
                    results.add({"id": rows[row]["id"], **({"error": str(error)} if error else answered[row])})
            pace.step()

        for batch, prompts_of in work.items():
            if not prompts_of:
                write(batch, {})
        with console.layer_progress(f"{len(rows)} prompts") as on_layer:
            found = answers.answer_all({batch: each for batch, each in work.items() if each}, on_layer, console.note)
            for batch, answered in found:
                write(batch, answered)


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

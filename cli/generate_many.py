"""`griffin generate --input --output`: answer a file of prompts, one row each; a stopped run continues."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, GriffinError, OptionError
from ..jsonl import Results, Row, begun_with, read_content, read_rows
from ..many.batches import Batch, Fitting, cut
from ..many.rows import PromptForm, fault
from ..many.took import Throughput, Took
from ..options import AUTO, MOST, OFF, Decoding, Pruning
from ..paths import cache_folder
from ..sources.resolve import resolve
from . import _console as console
from ._opening import Opening, open_engine
from ._pace import Pace
from ._print import echo

if TYPE_CHECKING:
    from ..many.workers import Answerers


@dataclass(frozen=True)
class Job:
    """A file of prompts and the file of their answers. `batch_size` prompts share one reading of the model, and their
    kept neurons unless `per_prompt`; AUTO: as many as fit, None: that if `per_prompt`, or else 1. `workers`: processes
    that answer; None: one for each GPU, one on the CPU. `cluster`: the address of the Ray whose nodes have them.
    `content`: what was read of `source`, where it is no file of rows."""

    source: Path | str
    output: Path
    form: PromptForm = field(default_factory=PromptForm)
    batch_size: int | str | None = None
    workers: int | None = None
    cluster: str | None = None
    per_prompt: bool = False
    force: bool = False
    as_json: bool = False
    content: bytes | None = None


def generate_many(job: Job, opening: Opening, pruning: Pruning, decoding: Decoding) -> None:
    """Answer every row of `job.source`. A row that cannot be answered gets its "error", and the run fails at its end.

    Rows are {"prompt"} or {"messages"}, with optional "id" and "system"; they are checked before the model opens."""
    if pruning.skip.share and isinstance(job.batch_size, int) and job.batch_size > 1:
        raise OptionError(f"--ffn-skip is for one prompt at a time: leave out --batch-size {job.batch_size}")
    content = read_content(job.source) if job.content is None else job.content
    rows = read_rows(job.source, lambda row: fault(row, job.form.raw), content=content)
    with answerers(job, opening, pruning, decoding) as answers:
        facts = answers.call("facts")
        prompts = Prompts(answers, rows, job.form)
        grouping = grouped(answers, job, prompts)
        settings = {
            "model": facts.path,
            "dtype": facts.dtype,
            **asdict(job.form),
            "batch_size": grouping.recorded,
            **recorded(replace(pruning, allocation=facts.allocation), decoding),
        }
        given: dict[str, Any] = {"source": job.source, "content": content, "force": job.force}
        with Results(job.output, settings, **given, memory=cache_folder() / "finished") as results:
            done: Throughput | None = None
            if not results.finished:
                done = answer_rows(answers, prompts, grouping, results)
                results.sort(row["id"] for row in rows)
            failed = sum("error" in row for row in results.rows)
    if job.as_json:
        run = done and done.to_json()
        echo(json.dumps({"output": str(job.output), "rows": len(rows), "failed": failed, "run": run}))
    if done and done.took.prompts:
        console.note(str(done))
        if done.took.why_not_shared:
            console.note(f"what prompts begin with alike was computed for each: {done.took.why_not_shared}")
    if failed:
        raise GriffinError(f'{failed} of {len(rows)} prompts have no answer: see "error" in {job.output}')
    told = "are answered already in" if results.finished else "answered in"
    console.note(f"{len(rows)} prompts {told} {job.output}" + "; --force answers them again" * results.finished)


@contextmanager
def answerers(job: Job, opening: Opening, pruning: Pruning, decoding: Decoding) -> "Iterator[Answerers]":
    """What answers: an engine of this process, or workers with one each, here or on a cluster."""
    from ..many.cluster import Cluster
    from ..many.places import places
    from ..many.workers import InProcess, Work, Workers

    work = Work(opening.model, pruning, decoding, job.per_prompt)
    if job.cluster is not None:
        with closing(Cluster(work, opening.placement, job.cluster, job.workers)) as cluster:
            console.note(cluster.told)
            yield cluster
        return
    where = places(opening.placement, job.workers)
    if len(where) == 1:
        yield InProcess(work.by(open_engine(opening.model, opening.placement)))
        return
    with console.progress_bytes("Fetching") as on_progress:  # once, before several processes ask for it
        resolve(opening.model, on_progress=on_progress)
    with closing(Workers(work, where)) as workers:
        console.note(f"{len(where)} workers: {'; '.join(place.told for place in where)}")
        yield workers


class Prompts:
    """The prompts of a file's rows, encoded when they are first asked for."""

    def __init__(self, answers: "Answerers", rows: Sequence[Row], form: PromptForm) -> None:
        self.rows = rows
        self._answers, self._form = answers, form

    @cached_property
    def ids(self) -> list[Any]:
        """Token ids of each row, or the GriffinError that says why it has none."""
        found: list[Any] = self._answers.call("encode", self.rows, self._form)
        return found

    @cached_property
    def lengths(self) -> list[int]:
        """In tokens, 0 for a row that has none."""
        return [len(ids) if isinstance(ids, list) else 0 for ids in self.ids]

    @cached_property
    def refused(self) -> list[GriffinError | None]:
        """Why a row cannot be answered even alone; None where it can."""
        alone = iter(self._answers.call("refusals", [len(ids) for ids in self.ids if isinstance(ids, list)]))
        return [ids if isinstance(ids, GriffinError) else next(alone) for ids in self.ids]

    @cached_property
    def that_fit(self) -> list[Sequence[int]]:
        """Token ids; () for a row that is refused."""
        return [() if error else ids for ids, error in zip(self.ids, self.refused, strict=True)]


@dataclass(frozen=True)
class Grouping:
    """How rows are put in batches: of how many prompts; `alike`: by length, where the answers do not depend on it."""

    size: int | Fitting
    alike: bool

    @property
    def recorded(self) -> int:
        """What the answers depend on, for a stopped run to go on with."""
        return 1 if self.alike or not isinstance(self.size, int) else self.size


def grouped(answers: "Answerers", job: Job, prompts: Prompts) -> Grouping:
    """As the job says; where that is AUTO, by the plan. Answers that depend on the size of a batch go on with the one
    that they were begun with."""
    asked = job.batch_size or (AUTO if job.per_prompt else 1)
    if isinstance(asked, int):
        return Grouping(asked, job.per_prompt)
    begun = {} if job.force or job.per_prompt else begun_with(job.output, cache_folder() / "finished")
    size = begun.get("batch_size")
    if type(size) is int and 1 < size <= MOST:
        return Grouping(size, False)
    longest = max(map(len, prompts.that_fit))
    if not longest:
        return Grouping(1, job.per_prompt)
    most = -(-len(prompts.rows) // answers.count)
    if answers.call("apart", longest):
        return Grouping(lambda tokens: answers.call("fitting", tokens, most) if tokens else most, True)
    return Grouping(1 if size == 1 else answers.call("fitting", longest, most), False)


def answer_rows(answers: "Answerers", prompts: Prompts, grouping: Grouping, results: Results) -> Throughput:
    """Answer what is not in `results` yet, in batches that are cut from all rows: the same ones after a stop."""
    rows, lengths, refused = prompts.rows, prompts.lengths, prompts.refused
    batches = cut(prompts.that_fit, grouping.size, alike=grouping.alike)
    if all(isinstance(error, BudgetError) for error in refused):  # the options are at fault, not the rows
        answers.call("check", max(lengths), len(batches[0]))
    fitting = {batch: [row for row in batch if not refused[row]] for batch in batches}
    for tokens, count in {(max(lengths[row] for row in fit), len(fit)) for fit in fitting.values() if fit}:
        answers.call("check", tokens, count)  # what is too big for the memory is refused before the first is answered
    missing = {batch for batch in batches if not all(results.has(rows[row]) for row in batch)}
    work = {batch: {row: prompts.ids[row] for row in fitting[batch]} for batch in batches if batch in missing}
    done, start = Took(), time.perf_counter()
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
        batches_of = {batch: each for batch, each in work.items() if each}
        on_layer = pace.on_layer if answers.count == 1 else lambda done, total: None
        for batch, answered in answers.answer_all(batches_of, on_layer, console.note):
            write(batch, answered)
            done += getattr(answered, "took", None) or Took()
    return Throughput(done, time.perf_counter() - start)


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

"""How an answer is made: prepare, prefill, decode, report.

options -> plan -> prompt pass -> kept neurons, resident -> tokens -> report"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from .checkpoint.reader import Reader
from .errors import OptionError
from .memory.capture import Capture
from .memory.measure import PeakMeter, bytes_read
from .memory.out_of_memory import planned
from .model.compiled import why_not_compiled
from .model.format_speeds import doubt_speeds
from .model.rotary import no_switch, reaching, switch_length
from .model.static_step import Steps, static_decoding, why_dynamic
from .model_prior import with_known_prior
from .offload.earlier_turns import Answered
from .offload.fidelity_meter import FidelityMeter
from .offload.first_logits import FirstLogits
from .offload.plan_turn import plan_turn
from .offload.resident_model import ResidentModel
from .offload.skip_by_prompt import check_skip, emptied_blocks
from .offload.skip_by_token import TokenSkipper
from .offload.sweep import Sweep
from .open_model import OpenModel
from .options import Decoding, OnLayer, Pruning
from .planning.plan import Plan, with_kept
from .planning.turn import Turn
from .pruning.ffn_skip import SkippedBlocks
from .pruning.fidelity import Fidelity
from .pruning.selection import Selection
from .report import Report
from .row_ends import row_options
from .text_stream import BatchStreamer, OnToken, Streamer


@dataclass(frozen=True)
class Answer:
    """An answer. finish_reason: 'stop' (the model ended it), 'length', or 'interrupted' (Ctrl-C, or cancelled).

    `reply`: the text without thinking that the model wrote in a channel of its own, as gpt-oss does."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    report: Report
    reply: str

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "reply": self.reply,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            **self.report.to_json(),
        }


@dataclass(frozen=True)
class Asked:
    """What is asked for: prompts as token ids, and how to answer them, together or (`per_prompt`) each with neurons of
    its own. `on_layer(done, total)` hears of the prompt pass, `on_token` of the answers, `on_plan` of the plan.
    `continues`: the one prompt is a turn of a conversation that goes on."""

    prompts: Sequence[list[int]]
    pruning: Pruning
    decoding: Decoding
    per_prompt: bool = False
    on_layer: OnLayer | None = None
    on_token: OnToken | None = None
    on_plan: Callable[[Plan], None] | None = None
    continues: bool = False


@dataclass(frozen=True)
class Run:
    """What answering takes, once it is planned. `streamers`: one for each prompt; `options`: transformers'; `steps`:
    how tokens are to be decoded by static steps; None: they are not. `prior_s`: seconds that measuring the model's
    prior took, once. `turn`: of a conversation."""

    asked: Asked
    start: float
    plan: Plan
    selection: Selection
    reader: Reader
    streamers: list[Streamer]
    options: dict[str, Any]
    skipper: TokenSkipper | None
    steps: Steps | None
    prior_s: float = 0.0
    turn: Turn | None = None

    @property
    def changes(self) -> bool:
        """Whether tokens of the answer run through less than the prompt did."""
        return self.plan.reads_again or self.skipper is not None


@dataclass
class Measured:
    """What a run took: seconds, and bytes; and how its tokens were decoded (None: by the model's own forward)."""

    meter: PeakMeter
    read_before: int | None = field(default_factory=bytes_read)
    begin: float = field(default_factory=time.perf_counter)
    peak: int = 0
    bytes_read: int = 0
    interrupted: bool = False
    steps: Steps | None = None
    fidelity: Fidelity | None = None

    def end(self, reader: Reader) -> None:
        read_after = bytes_read()
        known = self.read_before is not None and read_after is not None
        if self.steps and self.steps.compiled:
            known = False  # the compiler reads too
        self.peak = self.meter.peak()
        self.bytes_read = read_after - self.read_before if known else reader.bytes  # type: ignore[operator]


def answer(opened: OpenModel, resident: ResidentModel, asked: Asked) -> list[Answer]:
    """An answer for each prompt, from one reading of the model. All of them share one report.

    A KeyboardInterrupt after the first token ends the answers; before it, it is raised."""
    run = with_prior(opened, resident, prepare(opened, resident, asked))
    if run.plan.earlier_tokens and resident.turns.cache is None:  # measuring the prior took the memory
        run.reader.close()
        run = replace(prepare(opened, resident, asked), selection=run.selection, prior_s=run.prior_s)
    opened.skeleton.threads.used.clear()
    with planned(opened.device, unload=resident.unload):
        resident.match(run.plan)  # before the peak is measured: what the last plan held is not this one's
    measured = Measured(PeakMeter(opened.device))
    if asked.decoding.seed is not None:
        set_seed(asked.decoding.seed)
    try:
        with (
            opened.skeleton.threads.kept(),
            planned(opened.device, run.plan.peak, resident.unload),
            no_switch(opened.skeleton.model) if run.changes else nullcontext(),
        ):
            if asked.per_prompt and len(asked.prompts) > 1 and run.plan.reads_again:
                answer_each(opened, resident, run, measured)
            else:
                answer_together(opened, resident, run, measured)
    except KeyboardInterrupt:
        if not all(streamer.times for streamer in run.streamers):
            raise
        measured.interrupted = True
        for streamer in run.streamers:
            streamer.end()
    finally:
        run.reader.close()
    measured.end(run.reader)
    return report(opened, resident, run, measured)


def prepare(opened: OpenModel, resident: ResidentModel, asked: Asked) -> Run:
    """Check the options and make the plan, before anything is read."""
    start = time.perf_counter()
    pruning, decoding, prompts = asked.pruning, asked.decoding, asked.prompts
    options = decoding.generate_options(pruning.selection)
    opened.check_generation(options)
    for ids in prompts:
        opened.check_tokens(ids)
    if pruning.skip.share:
        check_skip(opened.skeleton.layout, pruning.skip, len(prompts))
    make_plan = partial(
        opened.plan,
        max(map(len, prompts), default=0) if all(prompts) else 0,
        decoding.max_new_tokens,
        pruning,
        sequences=max(1, len(prompts)),
        per_prompt=asked.per_prompt and len(prompts) > 1,
        fidelity=not decoding.no_fidelity,
    )
    plan, turn = plan_turn(resident, asked.continues, prompts, pruning, opened.skeleton.layout, make_plan)
    selection = opened.selection(pruning, decoding.seed, plan)
    if asked.on_plan:
        asked.on_plan(plan)
    skips = bool(pruning.skip.share) and not pruning.skip.by_prompt
    return Run(
        asked=asked,
        start=start,
        plan=plan,
        selection=selection,
        reader=opened.reader(),
        streamers=[Streamer(opened.tokenizer, opened.eos_token_ids, asked.on_token) for _ in prompts],
        options=options,
        skipper=TokenSkipper(opened.skeleton, pruning.skip, plan) if skips else None,
        steps=_planned_steps(opened, decoding.compile, skips),
        turn=turn,
    )


def with_prior(opened: OpenModel, resident: ResidentModel, run: Run) -> Run:
    """The run, with the model's own prior where that has a say: measured now, if no earlier run has."""
    start, asked = time.perf_counter(), run.asked
    selection = with_known_prior(opened, resident.unload, run.selection, asked.pruning, run.plan, asked.on_layer)
    if selection is run.selection:
        return run
    return replace(run, selection=selection, prior_s=time.perf_counter() - start)


def prior_facts(run: Run) -> dict[str, Any] | None:
    """Of the prior that chose neurons, beside the prompts that they were chosen by: for the report."""
    lengths = [len(ids) for ids in run.asked.prompts]
    facts = run.selection.prior_facts(sum(lengths) / (len(lengths) if run.asked.per_prompt else 1))
    return {**facts, "measured_s": run.prior_s} if facts and run.prior_s else facts


def _planned_steps(opened: OpenModel, compiles: bool, skips: bool) -> Steps | None:
    if not opened.static:
        return Steps(why_dynamic=f"nothing is compiled on {opened.device}") if compiles else None
    why = "ffn-skip by token decides on the host" if skips else why_dynamic(opened.skeleton)
    return Steps(compiled=compiles, why_dynamic=why)


def answer_together(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> None:
    """Prefill and decode all prompts in one call of transformers' generate, with one set of kept neurons."""
    ids, mask = opened.batch(list(run.asked.prompts))
    prefill = resident.prepare(run.plan, run.selection, run.reader, run.asked.on_layer, mask)
    cache = resident.turns.cache if run.plan.earlier_tokens else opened.kv_cache(run.plan, len(ids))
    resident.turns.mark(cache, run.plan)
    again = resident.turns.answered if run.plan.repeats else None
    first = FirstLogits(opened.skeleton.model, again.logits if again else None)
    try:
        with (
            prefill,
            first if run.plan.continues else nullcontext(),
            run.skipper or nullcontext(),
            decoding_steps(opened, run, measured),
            measuring(opened, run, measured),
        ):
            if len(ids) == 1 or run.changes or switch_length(opened.config) is None:
                decode(opened, run, ids, mask, run.streamers, cache)
            else:  # where rows are read again, each at its own length
                for prompt, streamer in zip(run.asked.prompts, run.streamers, strict=True):
                    decode(opened, run, *opened.batch([prompt]), [streamer], opened.kv_cache(run.plan))
    except (ValueError, TypeError) as error:
        if isinstance(prefill, Sweep) and not prefill.started:  # generate refused an option, before the first layer
            raise OptionError(" ".join(str(error).split())) from error
        raise
    finally:
        if run.plan.continues and run.streamers[0].times:
            resident.keep_turn(run.plan, cache, run.asked.prompts[0], run.streamers[0].token_ids, run.asked.pruning)
            if again and again.fidelity and not run.asked.decoding.no_fidelity:
                measured.fidelity = replace(again.fidelity, seconds=0.0)
            if first.logits is not None:
                fidelity = again.fidelity if again else measured.fidelity
                resident.turns.answered = Answered(run.plan, run.asked.pruning, first.logits, fidelity)


def answer_each(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> None:
    """Prefill the prompts in one sweep, layer by layer in turn; then decode each from its own neurons."""

    def job(prompt_ids: list[int], streamer: Streamer) -> Callable[[], None]:
        return lambda: decode(opened, run, *opened.batch([prompt_ids]), [streamer], opened.kv_cache(run.plan))

    prompts = run.asked.prompts
    jobs = [job(ids, streamer) for ids, streamer in zip(prompts, run.streamers, strict=True)]
    seed = run.asked.decoding.seed
    try:
        with (
            resident.prepare_each(
                run.plan, run.selection, run.reader, run.asked.on_layer, [len(ids) for ids in prompts], seed
            ) as lockstep,
            decoding_steps(opened, run, measured),
            measuring(opened, run, measured, len(prompts)),
        ):
            lockstep.run(jobs)
    except (ValueError, TypeError) as error:
        if not any(streamer.times for streamer in run.streamers):
            raise OptionError(" ".join(str(error).split())) from error
        raise
    finally:
        resident.unload(keep_tier=True)


@contextmanager
def decoding_steps(opened: OpenModel, run: Run, measured: Measured) -> Iterator[None]:
    """Decode by static steps, where they were planned. The lm_head and the embedding must be there."""
    measured.steps = run.steps
    if not run.steps or run.steps.why_dynamic:
        yield
        return
    skeleton = opened.skeleton
    plan, per_prompt = run.plan, run.asked.per_prompt
    why_not = why_not_compiled(plan.precision.quantized, per_prompt, plan.kept) if run.steps.compiled else ""
    compiled = skeleton.compiled if run.steps.compiled and not why_not else None
    with static_decoding(skeleton, Capture(opened.device), compiled) as step:
        try:
            yield
        finally:
            measured.steps = replace(step.steps, why_not_compiled=why_not or step.steps.why_not_compiled)


@contextmanager
def measuring(opened: OpenModel, run: Run, measured: Measured, prompts: int = 1) -> Iterator[None]:
    """Measure the fidelity, where it is planned, of the next forwards over `prompts` prompts."""
    if not run.plan.read_again:
        if not run.asked.decoding.no_fidelity and (run.plan.reads_again or run.skipper):
            why_not = "each token skips blocks for itself" if run.skipper else "the budget has no room for it"
            measured.fidelity = Fidelity(why_not=why_not)
        yield
        return
    with FidelityMeter(opened.skeleton, run.plan.read_again, prompts) as meter:
        try:
            yield
        finally:
            measured.fidelity = meter.result()


def decode(
    opened: OpenModel, run: Run, ids: torch.Tensor, mask: torch.Tensor, streamers: list[Streamer], cache: Any
) -> None:
    """transformers' generate over ids (B, T), of which the cache may hold the first: the prompt pass, then tokens."""
    ends = [int(length) + run.plan.max_new_tokens for length in mask.sum(-1).tolist()]
    with reaching(ends if run.changes and switch_length(opened.config) is not None else ()):
        opened.skeleton.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            streamer=BatchStreamer(streamers),
            max_new_tokens=run.plan.max_new_tokens,
            tokenizer=opened.tokenizer,
            **row_options(run.options, opened.skeleton.model.generation_config, mask, streamers, opened.tokenizer),
        )


def report(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> list[Answer]:
    """The answers, with what was predicted and measured."""
    plan, skipped = _skipped(opened, resident, run)
    times = sorted(moment for streamer in run.streamers for moment in streamer.times)
    tokens = sum(len(streamer.token_ids) for streamer in run.streamers)
    begin, prepared = measured.begin, measured.begin - run.start - run.prior_s
    made = Report(
        model=opened.name,
        model_path=opened.path,
        dtype=opened.dtype,
        device=opened.device,
        plan=plan,
        measured_peak=measured.peak,
        checkpoint_bytes=opened.checkpoint.bytes,
        bytes_read=measured.bytes_read,
        plan_s=prepared,
        prompt_s=times[0] - begin,
        read_s=run.reader.seconds,
        stages=run.reader.clock.stages(),
        measured_host=resident.host_bytes + run.reader.clock.host_bytes,
        decode_s=times[-1] - times[0] - (measured.fidelity.seconds if measured.fidelity else 0.0),
        time_to_first_token_s=times[0] - run.start,
        tokens=tokens,
        memory_bandwidth=resident.bandwidth() if tokens > 1 and resident.layers else 0.0,
        prior=prior_facts(run),
        skipped=skipped,
        steps=measured.steps,
        fidelity=measured.fidelity,
        helps=_what_helps(opened, run, measured),
        overridden=opened.overridden,
        threads=max(used, key=used.__getitem__) if (used := opened.skeleton.threads.used) else None,
        turn=run.turn,
    )
    if plan.tokens_per_s and tokens > 16 and len(run.streamers) == 1 and skipped is None:
        doubt_speeds(opened.device, opened.skeleton.layout.dtype, plan.tokens_per_s, made.decode_tokens_per_s)
    return [
        Answer(
            streamer.text,
            list(ids),
            streamer.token_ids,
            _finish_reason(opened, plan, streamer, measured),
            made,
            streamer.reply,
        )
        for ids, streamer in zip(run.asked.prompts, run.streamers, strict=True)
    ]


def _what_helps(opened: OpenModel, run: Run, measured: Measured) -> tuple[str, ...]:
    """Options that would keep more of the full model, where little of it is kept."""
    if not measured.fidelity or not measured.fidelity.is_low:
        return ()
    prompts = len(run.asked.prompts)
    per_prompt = run.asked.per_prompt and prompts > 1
    return tuple(opened.what_helps(run.plan, run.asked.pruning, prompts, per_prompt))


def _skipped(opened: OpenModel, resident: ResidentModel, run: Run) -> tuple[Plan, SkippedBlocks | None]:
    """The plan, corrected to the neurons that were kept, and the blocks that were skipped."""
    skip = run.asked.pruning.skip
    if skip.share and skip.by_prompt and resident.layers:
        plan = with_kept(run.plan, opened.sizes, tuple(layer.kept for layer in resident.layers))
        return plan, emptied_blocks(skip, plan.kept)
    return run.plan, run.skipper.result() if run.skipper else None


def _finish_reason(opened: OpenModel, plan: Plan, streamer: Streamer, measured: Measured) -> str:
    if measured.interrupted:
        return "interrupted"
    ended = (
        streamer.stopped
        or len(streamer.token_ids) < plan.max_new_tokens
        or streamer.token_ids[-1] in opened.eos_token_ids
    )
    return "stop" if ended else "length"

"""One run: what is asked, what is planned for it, what it takes, and the answers with their report."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checkpoint.reader import Reader
from .memory.measure import PeakMeter, bytes_read
from .memory.stage_clock import Stages
from .model.format_speeds import doubt_speeds
from .model.static_step import Steps
from .offload.resident_model import ResidentModel
from .offload.skip_by_prompt import emptied_blocks
from .offload.skip_by_token import TokenSkipper
from .open_model import OpenModel
from .options import Decoding, OnLayer, Pruning
from .planning.lossless import Lossless
from .planning.plan import Plan, with_kept
from .planning.turn import Shared, Turn
from .pruning.ffn_skip import SkippedBlocks
from .pruning.fidelity import Fidelity
from .pruning.selection import Selection
from .report import Report
from .text_stream import OnToken, Streamer


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
    `continues`: the one prompt is a turn of a conversation that goes on. `shared`: how many tokens the prompts begin
    with alike that are in memory; None: that was not asked for. `prefix_pass`: what computing them took just now."""

    prompts: Sequence[list[int]]
    pruning: Pruning
    decoding: Decoding
    per_prompt: bool = False
    on_layer: OnLayer | None = None
    on_token: OnToken | None = None
    on_plan: Callable[[Plan], None] | None = None
    continues: bool = False
    shared: Shared | None = None
    prefix_pass: Report | None = None


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
        return (self.plan.reads_again and not self.plan.drafts) or self.skipper is not None


@dataclass
class Measured:
    """What a run took: seconds, and bytes; and how its tokens were decoded (None: by the model's own forward).
    `meters`, `peaks`: by device."""

    meters: Mapping[str, PeakMeter]
    read_before: int | None = field(default_factory=bytes_read)
    begin: float = field(default_factory=time.perf_counter)
    peaks: Mapping[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    interrupted: bool = False
    steps: Steps | None = None
    fidelity: Fidelity | None = None
    lossless: Lossless | None = None
    stages: Stages | None = None

    def end(self, reader: Reader) -> None:
        read_after = bytes_read()
        known = self.read_before is not None and read_after is not None
        if self.steps and self.steps.compiled:
            known = False  # the compiler reads too
        self.peaks = {device: meter.peak() for device, meter in self.meters.items()}
        self.bytes_read = read_after - self.read_before if known else reader.bytes  # type: ignore[operator]


def report(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> list[Answer]:
    """The answers, with what was predicted and measured."""
    plan, skipped = _skipped(opened, resident, run)
    times = sorted(moment for streamer in run.streamers for moment in streamer.times)
    tokens = sum(len(streamer.token_ids) for streamer in run.streamers)
    begin, prepared, before = measured.begin, measured.begin - run.start - run.prior_s, run.asked.prefix_pass
    made = Report(
        model=opened.name,
        model_path=opened.path,
        dtype=opened.dtype,
        device=opened.device,
        plan=plan,
        measured_peak=max(sum(measured.peaks.values()), before.measured_peak if before else 0),
        measured_on_each=tuple(measured.peaks[card.card.device] for card in plan.cards),
        checkpoint_bytes=opened.checkpoint.bytes,
        bytes_read=measured.bytes_read + (before.bytes_read if before else 0),
        plan_s=prepared,
        prompt_s=times[0] - begin + (before.prompt_s if before else 0.0),
        read_s=run.reader.seconds,
        stages=measured.stages or run.reader.clock.stages(),
        measured_host=resident.host_bytes + run.reader.clock.host_bytes,
        locked_host=resident.locked_bytes,
        decode_s=times[-1] - times[0] - (measured.fidelity.seconds if measured.fidelity else 0.0),
        time_to_first_token_s=times[0] - run.start,
        tokens=tokens,
        memory_bandwidth=resident.bandwidth() if tokens > 1 and resident.layers else 0.0,
        prior=_prior_facts(run),
        skipped=skipped,
        steps=measured.steps,
        fidelity=measured.fidelity,
        helps=_what_helps(opened, run, measured),
        overridden=opened.overridden,
        threads=max(used, key=used.__getitem__) if (used := opened.skeleton.threads.used) else None,
        turn=run.turn,
        shared=run.asked.shared,
        lossless=measured.lossless,
    )
    if plan.tokens_per_s and tokens > 16 and len(run.streamers) == 1 and skipped is None and not plan.drafts:
        doubt_speeds(opened.device, opened.skeleton.layout.dtype, plan.tokens_per_s, made.decode_tokens_per_s)
    return [
        Answer(
            streamer.text,
            list(ids),
            streamer.token_ids,
            _finish_reason(opened, run, streamer, measured),
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


def _finish_reason(opened: OpenModel, run: Run, streamer: Streamer, measured: Measured) -> str:
    if measured.interrupted:
        return "interrupted"
    ended = (
        streamer.stopped
        or len(streamer.token_ids) < run.plan.max_new_tokens
        or streamer.token_ids[-1] in opened.end_tokens(run.options)
    )
    return "stop" if ended else "length"


def _prior_facts(run: Run) -> dict[str, Any] | None:
    """Of the prior that chose neurons, beside the prompts that they were chosen by: for the report."""
    lengths = [len(ids) for ids in run.asked.prompts]
    facts = run.selection.prior_facts(sum(lengths) / (len(lengths) if run.asked.per_prompt else 1))
    return {**facts, "measured_s": run.prior_s} if facts and run.prior_s else facts

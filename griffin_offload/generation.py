"""How an answer is made: prepare, prefill, decode, report.

options -> plan -> prompt pass -> kept neurons, resident -> tokens -> report"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import set_seed

from .checkpoint.key import checkpoint_key
from .errors import NumericError, OptionError, one_line
from .memory.capture import Capture
from .memory.measure import PeakMeter
from .memory.out_of_memory import planned
from .model.compiled import why_not_compiled
from .model.config_facts import rope_changes
from .model.kv_cache import why_no_crop
from .model.rotary import no_switch, reaching, switch_length
from .model.static_step import StaticStep, Steps, static_decoding, why_dynamic
from .model_prior import with_known_prior
from .offload.drafter import Drafter
from .offload.earlier_turns import Answered
from .offload.fidelity_meter import FidelityMeter
from .offload.first_logits import FirstLogits
from .offload.layer_stream import LayerStream
from .offload.plan_turn import plan_turn
from .offload.resident_model import ResidentModel
from .offload.skip_by_prompt import check_skip
from .offload.skip_by_token import TokenSkipper
from .offload.sweep import Sweep
from .open_model import OpenModel
from .options import Pruning
from .planning.lossless import Lossless
from .planning.plan import Plan
from .planning.request import Earlier
from .pruning.fidelity import Fidelity
from .row_ends import DraftedRow, StopText, row_options
from .run import Answer, Asked, Measured, Run, report
from .text_stream import BatchStreamer, Streamer

OUTPUTS = (
    "return_dict_in_generate",
    *(f"output_{what}" for what in ("scores", "logits", "attentions", "hidden_states")),
)


def answer(opened: OpenModel, resident: ResidentModel, asked: Asked) -> list[Answer]:
    """An answer for each prompt, from one reading of the model. All of them share one report.

    A KeyboardInterrupt after the first token ends the answers; before it, it is raised."""
    run = with_prior(opened, resident, prepare(opened, resident, asked))
    kept = resident.prefix if run.plan.shares else resident.turns.cache
    if run.plan.earlier_tokens and kept is None:  # measuring the prior took the memory
        run.reader.close()
        again = prepare(opened, resident, replace(asked, shared=None))
        run = replace(again, selection=run.selection, prior_s=run.prior_s)
    opened.skeleton.threads.used.clear()
    with planned(opened.device, unload=resident.unload):
        resident.match(run.plan)  # before the peak is measured: what the last plan held is not this one's
    devices = run.plan.peaks or {opened.device: 0}
    measured = Measured({device: PeakMeter(device) for device in devices})
    if asked.decoding.seed is not None:
        set_seed(asked.decoding.seed)
    try:
        with (
            opened.skeleton.threads.kept(),
            planned(opened.device, run.plan.peak, resident.unload, run.plan.peaks),
            no_switch(opened.skeleton.model) if run.changes else nullcontext(),
        ):
            if asked.per_prompt and len(asked.prompts) > 1 and run.plan.reads_again:
                answer_each(opened, resident, run, measured)
            else:
                answer_together(opened, resident, run, measured)
    except (OverflowError, RuntimeError) as error:
        if not isinstance(error, OverflowError) and "probability tensor" not in str(error):
            raise
        told = "the predictions become infinite by the sampling options or penalties, or by the generation config"
        raise NumericError(f"{opened.name} draws no token: {told} ({one_line(error)})") from None
    except KeyboardInterrupt:
        if not all(streamer.times for streamer in run.streamers):
            raise
        measured.interrupted = True
        for streamer in run.streamers:
            streamer.end()
    finally:
        run.reader.close()
    measured.end(run.reader)
    answers = report(opened, resident, run, measured)
    resident.answered()
    return answers


def prepare(opened: OpenModel, resident: ResidentModel, asked: Asked) -> Run:
    """Check the options and make the plan, before anything is read."""
    start = time.perf_counter()
    pruning, decoding, prompts = asked.pruning, asked.decoding, asked.prompts
    options = decoding.generate_options(pruning.selection)
    opened.check_generation(options)
    checkpoint_key(opened.checkpoint)  # of the weights as they are now: a session that is saved later is theirs
    for ids in prompts:
        opened.check_tokens(ids)
    if pruning.skip.share:
        check_skip(opened.skeleton.layout, pruning.skip, len(prompts), cards=len(opened.cards))
    if decoding.lossless:
        check_lossless(opened.skeleton.model, pruning, len(prompts), options)
    make_plan = make_plan_of(opened, asked)
    if asked.shared and asked.shared.tokens:
        make_plan = partial(make_plan, earlier=Earlier(asked.shared.tokens, shared=True))
    plan, turn = plan_turn(resident, asked.continues, prompts, pruning, opened.skeleton.layout, make_plan)
    selection = opened.selection(pruning, decoding.seed, plan)
    if asked.on_plan:
        asked.on_plan(plan)
    skips = bool(pruning.skip.share) and not pruning.skip.by_prompt
    why_not = "drafts are verified together" if plan.drafts else ""
    why_not = "ffn-skip by token decides on the host" if skips else why_not
    why_not = "the layers are on several devices" if len(set(plan.devices)) > 1 else why_not
    return Run(
        asked=asked,
        start=start,
        plan=plan,
        selection=selection,
        reader=opened.reader(plan),
        streamers=[
            Streamer(opened.tokenizer, opened.end_tokens(options), asked.on_token, decoding.stop) for _ in prompts
        ],
        options=options,
        skipper=TokenSkipper(opened.skeleton, pruning.skip, plan) if skips else None,
        steps=_planned_steps(opened, decoding.compile, why_not),
        turn=turn,
    )


def make_plan_of(opened: OpenModel, asked: Asked) -> Callable[..., Plan]:
    """What makes the plan of that which is asked; as a keyword it takes `earlier` (see Request)."""
    prompts, decoding = asked.prompts, asked.decoding
    return partial(
        opened.plan,
        max(map(len, prompts), default=0) if all(prompts) else 0,
        decoding.max_new_tokens,
        asked.pruning,
        sequences=max(1, len(prompts)),
        per_prompt=asked.per_prompt and len(prompts) > 1,
        fidelity=not decoding.no_fidelity and not decoding.lossless,
        lossless=decoding.lossless,
    )


def check_lossless(model: Any, pruning: Pruning, prompts: int, options: Mapping[str, Any]) -> None:
    """Raises OptionError where the full model cannot verify drafts."""
    if prompts > 1:
        raise OptionError(f"lossless answers one prompt at a time: {prompts} are given")
    found = (
        "ffn-skip leaves blocks out" if pruning.skip.share else "",
        why_no_crop(model.config),
        "its state cannot go back" if model._is_stateful else "",
        "its rotary embedding changes with the length" if rope_changes(model.config) else "",
        "SynthID's watermark has a state, which drafts would change" if _has_synthid(model, options) else "",
    )
    if why_not := next(filter(None, found), ""):
        raise OptionError(f"lossless is not for this model as it runs: {why_not}; leave it out")


def _has_synthid(model: Any, options: Mapping[str, Any]) -> bool:
    given = options.get("watermarking_config") or model.generation_config.watermarking_config
    return type(given).__name__.startswith("SynthID")


def with_prior(opened: OpenModel, resident: ResidentModel, run: Run) -> Run:
    """The run, with the model's own prior where that has a say: measured now, if no earlier run has."""
    start, asked = time.perf_counter(), run.asked
    selection = with_known_prior(opened, resident.unload, run.selection, asked.pruning, run.plan, asked.on_layer)
    if selection is run.selection:
        return run
    return replace(run, selection=selection, prior_s=time.perf_counter() - start)


def _planned_steps(opened: OpenModel, compiles: bool, why_not: str) -> Steps | None:
    if not opened.static:
        return Steps(why_dynamic=f"nothing is compiled on {opened.device}") if compiles else None
    return Steps(compiled=compiles, why_dynamic=why_not or why_dynamic(opened.skeleton))


def answer_together(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> None:
    """Prefill and decode all prompts in one call of transformers' generate, with one set of kept neurons."""
    ids, mask = opened.batch(list(run.asked.prompts))
    prefill = resident.prepare(run.plan, run.selection, run.reader, run.asked.on_layer, mask)
    goes_on = run.plan.continues and run.plan.earlier_tokens > 0
    at_own_length = switch_length(opened.config) is not None and not run.changes  # no row is read again
    by_own_draws = run.asked.per_prompt and run.asked.decoding.seed is not None
    apart = len(ids) > 1 and (at_own_length or by_own_draws)
    cache = resident.turns.cache if goes_on else None if apart else new_cache(opened, resident, run, mask)
    resident.turns.mark(cache, run.plan)
    again = resident.turns.answered if run.plan.repeats else None
    first = FirstLogits(opened.skeleton.model, again.logits if again else None)
    try:
        with (
            prefill,
            first if run.plan.continues else nullcontext(),
            run.skipper or nullcontext(),
            decoding_steps(opened, run, measured) as step,
            measuring(opened, run, measured),
            drafting(opened, resident, run, measured),
        ):
            if not apart:
                decode(opened, run, ids, mask, run.streamers, cache, step)
            for prompt, streamer in zip(run.asked.prompts, run.streamers, strict=True) if apart else ():
                if by_own_draws:
                    set_seed(run.asked.decoding.seed)
                row, own = opened.batch([prompt])
                decode(opened, run, row, own, [streamer], new_cache(opened, resident, run, own), step)
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


def new_cache(opened: OpenModel, resident: ResidentModel, run: Run, mask: torch.Tensor) -> Any:
    """A KV cache for prompts with this mask (B, T), filled with what they share."""
    cache = opened.kv_cache(run.plan, len(mask))
    if run.plan.shares:
        assert resident.prefix
        resident.prefix.lay_in(cache, mask)
    return cache


def answer_each(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> None:
    """Prefill the prompts in one sweep, layer by layer in turn; then decode each from its own neurons."""

    def job(prompt_ids: list[int], streamer: Streamer) -> Callable[[], None]:
        def run_it() -> None:
            ids, mask = opened.batch([prompt_ids])
            decode(opened, run, ids, mask, [streamer], new_cache(opened, resident, run, mask), step)

        return run_it

    prompts = run.asked.prompts
    jobs = [job(ids, streamer) for ids, streamer in zip(prompts, run.streamers, strict=True)]
    seed = run.asked.decoding.seed
    try:
        with (
            resident.prepare_each(
                run.plan, run.selection, run.reader, run.asked.on_layer, [len(ids) for ids in prompts], seed
            ) as lockstep,
            decoding_steps(opened, run, measured) as step,
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
def decoding_steps(opened: OpenModel, run: Run, measured: Measured) -> Iterator[StaticStep | None]:
    """Decode by static steps, where they were planned. The lm_head and the embedding must be there."""
    measured.steps = run.steps
    if not run.steps or run.steps.why_dynamic:
        yield None
        return
    skeleton = opened.skeleton
    plan, per_prompt = run.plan, run.asked.per_prompt
    why_not = why_not_compiled(plan.precision.quantized, per_prompt, plan.kept) if run.steps.compiled else ""
    compiled = skeleton.compiled if run.steps.compiled and not why_not else None
    with static_decoding(skeleton, Capture(opened.device), compiled) as step:
        try:
            yield step
        finally:
            measured.steps = replace(step.steps, why_not_compiled=why_not or step.steps.why_not_compiled)


@contextmanager
def measuring(opened: OpenModel, run: Run, measured: Measured, prompts: int = 1) -> Iterator[None]:
    """Measure the fidelity, where it is planned, of the next forwards over `prompts` prompts."""
    if not run.plan.read_again:
        if not run.asked.decoding.no_fidelity and run.changes:
            why_not = "each token skips blocks for itself" if run.skipper else "the budget has no room for it"
            measured.fidelity = Fidelity(why_not=why_not)
        yield
        return
    with FidelityMeter(opened.skeleton, run.plan.read_again, prompts) as meter:
        try:
            yield
        finally:
            measured.fidelity = meter.result()


@contextmanager
def drafting(opened: OpenModel, resident: ResidentModel, run: Run, measured: Measured) -> Iterator[None]:
    """Let the resident model draft, and the full model verify, where that is planned."""
    if not run.plan.drafts:
        if run.asked.decoding.lossless:
            measured.lossless = Lossless(why_not="the whole model is resident: nothing is drafted")
        yield
        return

    def open_stream() -> LayerStream:
        measured.stages = run.reader.clock.stages()  # of the prompt pass alone
        return resident.stream_again(run.plan, run.reader)

    seeded = run.asked.decoding.seed is not None
    drafter = Drafter(opened.skeleton, run.plan, open_stream, repeats=seeded)
    with drafter.attached():
        try:
            yield
        finally:
            measured.lossless = drafter.done


def decode(
    opened: OpenModel,
    run: Run,
    ids: torch.Tensor,
    mask: torch.Tensor,
    streamers: list[Streamer],
    cache: Any,
    step: StaticStep | None,
) -> None:
    """transformers' generate over ids (B, T), of which the cache may hold the first: the prompt pass, then tokens."""
    ends = [int(length) + run.plan.max_new_tokens for length in mask.sum(-1).tolist()]
    options = row_options(run.options, opened.skeleton.model.generation_config, mask, streamers, opened.tokenizer)
    streamer: Any = BatchStreamer(streamers)
    following = step.followed_by(streamer, cache) if step else nullcontext()
    if run.plan.drafts:
        streamer = DraftedRow(ids, streamers[0], options.get("stopping_criteria") or [])
        options |= {"stopping_criteria": [StopText(streamers)], "prompt_lookup_num_tokens": 1}  # asks for candidates
        options |= dict.fromkeys(OUTPUTS, False)  # of each pass they would keep all drafts'
    with following, reaching(ends if run.changes and switch_length(opened.config) is not None else ()):
        opened.skeleton.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            streamer=streamer,
            max_new_tokens=run.plan.max_new_tokens,
            tokenizer=opened.tokenizer,
            **options,
        )

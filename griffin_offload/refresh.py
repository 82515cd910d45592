"""A long answer in parts: after each, the full model computes its tokens, and the neurons are chosen again.

Each part is a turn of a conversation that goes on (offload/earlier_turns.py): what the full model has computed stays,
the part's own tokens are computed again in one pass, and their statistics are added to those before."""

from dataclasses import replace
from typing import Any

from .errors import OptionError
from .generation import answer
from .offload.resident_model import ResidentModel
from .open_model import OpenModel
from .options import Decoding
from .planning.refresh import Refreshes
from .row_ends import StopText
from .run import Answer, Asked
from .text_stream import Streamer, Token

# Options of transformers' `generate` that count from the prompt, or over the whole answer.
WHOLE = (
    *("forced_eos_token_id", "begin_suppress_tokens", "exponential_decay_length_penalty", "max_time", "min_length"),
    *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
)
NONE = (None, 0, 1.0)


def answer_refreshed(opened: OpenModel, resident: ResidentModel, asked: Asked) -> Answer:
    """The answer to one prompt, refreshed every so many tokens as its decoding asks. Raises what `answer` does.

    A KeyboardInterrupt after the first token ends it; before it, it is raised."""
    decoding = asked.decoding
    _check(opened, asked)
    (prompt,) = asked.prompts
    # Refuses at once what the last part would not have room for.
    opened.plan(len(prompt), decoding.max_new_tokens, asked.pruning, fidelity=not decoding.no_fidelity)
    ends = opened.end_tokens(decoding.generate_options(asked.pruning.selection))
    whole = Streamer(opened.tokenizer, ends, asked.on_token, decoding.stop)

    def on_token(token: Token) -> None:
        if token.id is not None:
            whole.put(token.id)

    parts: list[Answer] = []
    every = decoding.refresh or decoding.max_new_tokens
    try:
        while not parts or (parts[-1].finish_reason == "length" and len(whole.token_ids) < decoding.max_new_tokens):
            part = _part(decoding, len(parts), every, whole)
            now = replace(
                asked, prompts=[[*prompt, *whole.token_ids]], decoding=part, on_token=on_token, continues=True
            )
            parts.append(answer(opened, resident, replace(now, on_plan=None) if parts else now)[0])
            if not parts[-1].report.plan.reads_again:  # the full model made the part: go on to the end
                every = decoding.max_new_tokens
    except KeyboardInterrupt:
        if not parts:
            raise
        parts[-1] = replace(parts[-1], finish_reason="interrupted")
    finally:
        if not asked.continues:
            resident.turns.clear()
    whole.end()
    return _joined(parts, prompt, whole, decoding.refresh or every)


def _check(opened: OpenModel, asked: Asked) -> None:
    """Raises OptionError for what does not go with parts."""
    if len(asked.prompts) != 1:
        raise OptionError(f"refresh is for one prompt at a time: {len(asked.prompts)} are given")
    if asked.decoding.lossless:
        raise OptionError("lossless tokens are the full model's already: leave out refresh, or lossless")
    more, settings = asked.decoding.more, opened.skeleton.model.generation_config
    for name in WHOLE:
        given = more.get(name, getattr(more.get("generation_config"), name, None) or getattr(settings, name, None))
        if given not in NONE:
            raise OptionError(f"refresh makes an answer in parts, and {name} is of the whole: leave one of them out")


def _part(decoding: Decoding, number: int, every: int, whole: Streamer) -> Decoding:
    """How the next part is decoded, `whole` the answer so far."""
    done, more = len(whole.token_ids), dict[str, Any](decoding.more)
    more["stopping_criteria"] = [*(more.get("stopping_criteria") or ()), StopText([whole])]
    longest = min(every, decoding.max_new_tokens - done)
    if least := more.get("min_new_tokens"):
        more["min_new_tokens"] = min(longest, max(0, least - done))
    return replace(
        decoding,
        refresh=None,
        stop=(),
        max_new_tokens=longest,
        seed=None if decoding.seed is None else (decoding.seed + number) % 2**32,
        no_fidelity=decoding.no_fidelity or number > 0,
        more=more,
    )


def _joined(parts: list[Answer], prompt: list[int], whole: Streamer, every: int) -> Answer:
    """One answer of several parts. Its report is the first part's, with what all of them took."""
    first, *others = [part.report for part in parts]
    passes = [each for each in others if each.plan.reads_again]
    refreshes = Refreshes(
        every, len(passes), sum(each.prompt_s for each in passes), sum(each.bytes_read for each in passes)
    )
    report = replace(
        first,
        plan=max((part.report.plan for part in parts), key=lambda plan: plan.peak),
        measured_peak=max(part.report.measured_peak for part in parts),
        bytes_read=first.bytes_read + refreshes.bytes_read,
        read_s=sum(part.report.read_s for part in parts),
        decode_s=sum(part.report.decode_s for part in parts),
        tokens=len(whole.token_ids),
        refreshes=refreshes,
    )
    end = "stop" if whole.stopped else parts[-1].finish_reason
    return Answer(whole.text, list(prompt), whole.token_ids, end, report, whole.reply)

"""A long answer in parts: after each, the full model computes its tokens, and the neurons are chosen again.

Each part is a turn of a conversation that goes on (offload/earlier_turns.py): what the full model has computed stays,
the part's own tokens are computed again in one pass, and their statistics are added to those before."""

from dataclasses import replace

from .errors import OptionError
from .generation import answer
from .offload.resident_model import ResidentModel
from .open_model import OpenModel
from .planning.refresh import Refreshes
from .run import Answer, Asked
from .text_stream import Streamer, Token


def answer_refreshed(opened: OpenModel, resident: ResidentModel, asked: Asked) -> Answer:
    """The answer to one prompt, refreshed every so many tokens as its decoding asks. Raises what `answer` does."""
    decoding, every = asked.decoding, asked.decoding.refresh
    assert every
    if len(asked.prompts) != 1:
        raise OptionError(f"refresh is for one prompt at a time: {len(asked.prompts)} are given")
    if decoding.lossless:
        raise OptionError("lossless tokens are the full model's already: leave out refresh, or lossless")
    (prompt,) = asked.prompts
    # Refuses at once what the last part would not have room for.
    opened.plan(len(prompt), decoding.max_new_tokens, asked.pruning, fidelity=not decoding.no_fidelity)
    whole = Streamer(opened.tokenizer, opened.eos_token_ids, asked.on_token)

    def on_token(token: Token) -> None:
        if token.id is not None:
            whole.put(token.id)

    parts: list[Answer] = []
    left = decoding.max_new_tokens
    while not parts or (parts[-1].finish_reason == "length" and left > 0):
        number = len(parts)
        seed = None if decoding.seed is None else (decoding.seed + number) % 2**32
        part = replace(decoding, refresh=None, max_new_tokens=min(every, left), seed=seed)
        part = replace(part, no_fidelity=part.no_fidelity or number > 0)
        ids = [*prompt, *whole.token_ids]
        now = replace(asked, prompts=[ids], decoding=part, on_token=on_token, continues=True)
        parts.append(answer(opened, resident, now if not number else replace(now, on_plan=None))[0])
        left -= len(parts[-1].token_ids)
        if not parts[-1].report.plan.reads_again and left > 0:  # the full model made the part: go on to the end
            every = left
    whole.end()
    if not asked.continues:
        resident.turns.clear()
    return _joined(parts, prompt, whole, decoding.refresh or every)


def _joined(parts: list[Answer], prompt: list[int], whole: Streamer, every: int) -> Answer:
    """One answer of several parts. Its report is the first part's, with what all of them took."""
    first, *others = [part.report for part in parts]
    last = parts[-1]
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
    return Answer(whole.text, list(prompt), whole.token_ids, last.finish_reason, report, whole.reply)

"""Multiple choice by log-likelihood: the answer is the choice that the model finds most likely after the context.

Two modes. 'gen', the honest one: the context is the prompt, and the kept neurons alone read the choice. 'class', the
paper's: all but the last token that the model reads is the prompt, choice included, and the kept neurons read that last
one alone. Of a choice of several tokens only the last one's probability is then a pruned model's. Texts are tokenized
and lengths counted as in lm-eval."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import PromptError
from ..jsonl import Row, read_rows
from ..options import MODES, OnLayer, check
from .scoring.score import OnPair, check_pairs, score
from .scoring.scored import Pair, Scored, mean_and_error
from .scoring.variant import FULL, Variant

CONTEXT_KEYS = ("context", "question", "query")


@dataclass(frozen=True)
class Question:
    """`answer`: index of the right choice. A space joins context and choice where neither has white space there."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def continuations(self) -> list[str]:
        spaced = self.context[-1:].isspace()
        return [choice if spaced or choice[:1].isspace() else f" {choice}" for choice in self.choices]


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of a whole continuation, nats. `greedy`: each of its tokens is the model's likeliest one."""

    total: float
    greedy: bool


@dataclass(frozen=True)
class Answers:
    """Results of one variant. For each question: the log-likelihood of every choice (nats), the index of the likeliest
    choice (`taken`), and of the likeliest by log-likelihood per character (`taken_normalised`). Accuracies are shares
    of right answers, with their standard errors."""

    label: str
    sparsity: float | tuple[float, ...]
    selection: str
    allocation: str
    seed: int
    accuracy: float
    standard_error: float
    accuracy_normalised: float
    standard_error_normalised: float
    log_likelihoods: tuple[tuple[float, ...], ...]
    taken: tuple[int, ...]
    taken_normalised: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Without the lists by question."""
        by_question = ("log_likelihoods", "taken", "taken_normalised")
        return {name: value for name, value in asdict(self).items() if name not in by_question}


def read_questions(path: Path, content: bytes | None = None) -> list[Question]:
    """Questions of a JSONL file, with the keys context (or question, or query), choices and answer. `content`: what
    it has, where it was read before. Raises GriffinError that names line and key."""
    rows = read_rows(path, _fault, content=content)
    return [Question(row[_context_key(row)], tuple(row["choices"]), row["answer"]) for row in rows]


def _context_key(row: Row) -> str:
    return next((key for key in CONTEXT_KEYS if key in row), CONTEXT_KEYS[0])


def _fault(row: Row) -> str | None:
    """What is wrong with a row, in words."""
    key = _context_key(row)
    context, choices, right = row.get(key), row.get("choices"), row.get("answer")
    if not isinstance(context, str) or not context.strip():
        return f'"{key}" is not a text'
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        return '"choices" is not a list of texts'
    if type(right) is not int or not 0 <= right < len(choices):  # true and false are ints too
        return f'"answer" is not a number from 0 to {len(choices) - 1}, the index of the right choice'
    return None


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> Pair:
    """Token ids of both. White space at the end of the context belongs to the continuation. The continuation's tokens
    are those of the whole text beyond the context's. Raises PromptError if there are none."""
    text = context.rstrip()
    before, whole = encode(text), encode(context + continuation)
    if len(whole) <= len(before):
        raise PromptError(f"{continuation.strip()!r} is no token of its own after {text[-20:]!r}")
    return before, whole[len(before) :]


def log_likelihoods(
    engine: Engine,
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    mode: str = "gen",
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[list[LogLikelihood]]:
    """Log-likelihoods of the continuations: [pair][variant]. Raises OptionError, and what `score` raises."""
    check(mode, MODES, "mode")
    check_pairs(engine, pairs)
    if mode == "gen":
        return [[_sum(one) for one in of_pair] for of_pair in score(engine, pairs, variants, on_pair, on_layer)]
    # Input x_0 .. x_(n-2) predicts x_1 .. x_(n-1). The neurons kept for the others read its last token, x_(n-2).
    last = [((context + continuation)[:-2], (context + continuation)[-2:]) for context, continuation in pairs]
    earlier = [(context, continuation[:-1]) for context, continuation in pairs if len(continuation) > 1]
    pruned = score(engine, last, variants, on_pair, on_layer)
    full = iter(score(engine, earlier, [FULL], on_pair, on_layer))
    results = []
    for (_, continuation), of_pair in zip(pairs, pruned, strict=True):
        before = _sum(next(full)[0]) if len(continuation) > 1 else LogLikelihood(0.0, True)
        results.append([_and_last(before, one) for one in of_pair])
    return results


def _sum(scored: Scored) -> LogLikelihood:
    return LogLikelihood(scored.log_probability.sum().item(), bool(scored.greedy.all()))


def _and_last(before: LogLikelihood, scored: Scored) -> LogLikelihood:
    total = before.total + scored.log_probability[-1].item()
    return LogLikelihood(total, before.greedy and bool(scored.greedy[-1]))


def answer(
    engine: Engine,
    questions: Sequence[Question],
    variants: Sequence[Variant],
    mode: str = "gen",
    on_pair: OnPair | None = None,
    on_layer: OnLayer | None = None,
) -> list[Answers]:
    """An Answers for each variant. Raises PromptError for a question beyond the context, and what a sweep raises."""

    def encode(text: str) -> list[int]:
        return engine.encode(text, raw=True)

    pairs = [encode_pair(encode, question.context, text) for question in questions for text in question.continuations()]
    found = log_likelihoods(engine, pairs, variants, mode, on_pair, on_layer)
    return [
        summed(variant, questions, [of_pair[index].total for of_pair in found])
        for index, variant in enumerate(variants)
    ]


def summed(variant: Variant, questions: Sequence[Question], totals: Iterable[float]) -> Answers:
    """The results of a variant. `totals`: log-likelihoods of all choices of all questions, in their order."""
    left = iter(totals)
    rows = [tuple(next(left) for _ in question.choices) for question in questions]
    taken = [_best(row) for row in rows]
    per_character = [
        [total / len(choice.strip()) for total, choice in zip(row, question.choices, strict=True)]
        for row, question in zip(rows, questions, strict=True)
    ]
    taken_normalised = [_best(row) for row in per_character]
    right = [question.answer for question in questions]
    accuracy, error = mean_and_error([float(a == b) for a, b in zip(taken, right, strict=True)])
    normalised, error_normalised = mean_and_error([float(a == b) for a, b in zip(taken_normalised, right, strict=True)])
    return Answers(
        label=variant.label(),
        **variant.facts("sparsity", "selection", "allocation", "seed"),
        accuracy=accuracy,
        standard_error=error,
        accuracy_normalised=normalised,
        standard_error_normalised=error_normalised,
        log_likelihoods=tuple(rows),
        taken=tuple(taken),
        taken_normalised=tuple(taken_normalised),
    )


def _best(values: Sequence[float]) -> int:
    """Index of the largest, the first one among equals."""
    return max(range(len(values)), key=lambda index: values[index])

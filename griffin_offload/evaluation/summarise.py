"""ROUGE of one-sentence summaries (arXiv:2404.01365, table 1: XSum, one worked example in the prompt).

The prompt is continued as it is, without a chat template, and the answer ends before the stop text. Scores are
F-measures of rouge-score with stemming, times 100.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..engine import Engine
from ..errors import OptionError, PromptError
from ..jsonl import Row
from ..options import OnLayer
from .scoring.scored import mean_and_error
from .scoring.variant import Variant

ROUGE = ("rouge1", "rouge2", "rougeL")
KEYS = ("id", "sparsity", "selection", "allocation", "resident_dtype", "rest")
STOP = ("###",)
SAMPLED = {"do_sample": True, "temperature": 0.3, "top_p": 1.0, "top_k": 0}  # the paper's; greedy is the other way


@dataclass(frozen=True)
class Summary:
    """Means of a variant's rows. `scores`: of each of ROUGE the mean and its standard error over rows, 0 to 100;
    `too_long`: rows that the model's context does not hold, which are left out."""

    variant: Variant
    rows: int
    too_long: int
    scores: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        values = {**named(self.variant), "rows": self.rows, "too_long": self.too_long}
        for name, (mean, error) in self.scores.items():
            values |= {name: mean, f"{name}_standard_error": error}
        return values


def fault(row: Row) -> str | None:
    """What makes a row unfit: it has "article", the whole prompt, "summary_gt", and may have "stop", texts."""
    for name in ("article", "summary_gt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f'no text "{name}"'
    stop = row.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        return '"stop" is not a list of texts'
    return None


def summarise(
    engine: Engine,
    rows: Sequence[Row],
    variants: Sequence[Variant],
    *,
    sampled: bool = False,
    seed: int = 0,
    max_new_tokens: int = 64,
    skip: Callable[[Row], bool] | None = None,
    on_layer: OnLayer | None = None,
) -> Iterator[Row]:
    """A prediction with its scores for every row under every variant, but for those to `skip`, by `KEYS`.

    Each row draws with a seed of its own, `seed` plus its place: what was skipped before it changes nothing.
    A row beyond the model's context has an "error" instead. A Ctrl-C raises KeyboardInterrupt, whatever was made.
    Raises OptionError without rouge-score, and what Engine.generate raises."""
    scorer = rouge_scorer()
    for variant in variants:
        for place, row in enumerate(rows):
            name = {"id": row["id"], **named(variant)}
            if skip and skip(name):
                continue
            drawn = {"seed": (seed + place) % 2**32, **(SAMPLED if sampled else {"do_sample": False})}
            yield name | answer_row(engine, row, variant, scorer, max_new_tokens, on_layer, **drawn)


def answer_row(
    engine: Engine,
    row: Row,
    variant: Variant,
    scorer: Any,
    max_new_tokens: int = 64,
    on_layer: OnLayer | None = None,
    **drawn: Any,
) -> Row:
    """The summary of an article, and its scores (of `rouge_scorer`); or an "error" where the context is too short."""
    try:
        answer, tokens = _answer(engine, row, variant, max_new_tokens, on_layer, variant.options() | drawn)
    except PromptError as error:
        return {"error": str(error)}
    scores = scorer.score(row["summary_gt"], answer)
    rouge = {kind: 100 * scores[kind].fmeasure for kind in ROUGE}
    return {"prediction": answer, "reference": row["summary_gt"], "tokens": tokens, **rouge}


def named(variant: Variant) -> Row:
    """A variant, as rows name it."""
    return {"sparsity": variant.shares, "selection": variant.selection, **variant.plan_options()}


def mean_scores(predictions: Sequence[Row], variant: Variant) -> Summary:
    """Of what `summarise` made under one variant. Raises PromptError where every row was too long."""
    ours = [row for row in predictions if all(row[key] == value for key, value in named(variant).items())]
    good = [row for row in ours if "error" not in row]
    if not good:
        raise PromptError(f"no row has a summary: {ours[0]['error']}")
    scores = {kind: mean_and_error([row[kind] for row in good]) for kind in ROUGE}
    return Summary(variant, len(good), len(ours) - len(good), scores)


def rouge_scorer() -> Any:
    """Raises OptionError where rouge-score is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError(f"rouge-score is missing ({error}): pip install 'griffin-offload[eval]'") from error
    return RougeScorer(list(ROUGE), use_stemmer=True)


def encode_article(engine: Engine, text: str) -> list[int]:
    """Token ids with the tokenizer's BOS before them where there is one: once, also if it is added anyway."""
    ids = engine.encode(text, raw=True)
    bos = engine.tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`, all of it where there is none, without white space around it."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _answer(
    engine: Engine,
    row: Row,
    variant: Variant,
    max_new_tokens: int,
    on_layer: OnLayer | None,
    options: dict[str, Any],
) -> tuple[str, int]:
    """The summary, and how many tokens were made, those of the stop text too."""
    ids = encode_article(engine, row["article"])
    stops = row.get("stop") or STOP

    def stopped(answer: list[int]) -> bool:
        text = engine.tokenizer.decode(answer, skip_special_tokens=True)
        return any(stop in text for stop in stops)

    generation = engine.generate(
        ids,
        sparsity=variant.shares,
        max_new_tokens=max_new_tokens,
        on_layer=on_layer,
        stopping_criteria=StoppingCriteriaList([_Stop(len(ids), stopped)]),
        **options,
    )
    if generation.finish_reason == "interrupted":
        raise KeyboardInterrupt
    return until_stop(generation.text, stops), len(generation.token_ids)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """transformers' own stop_strings go over the whole vocabulary first: seconds, with 262144 entries."""

    def __init__(self, prompt_tokens: int, stopped: Callable[[list[int]], bool]) -> None:
        self._prompt_tokens, self._stopped = prompt_tokens, stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = [self._stopped(row[self._prompt_tokens :].tolist()) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)

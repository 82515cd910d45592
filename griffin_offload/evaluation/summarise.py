"""ROUGE of one-sentence summaries (arXiv:2404.01365, table 1: XSum, one worked example in the prompt).

The prompt is continued as it is, without a chat template, and the answer ends before the stop text. Scores are
rouge-score's F-measures with stemming, times 100."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..engine import Engine
from ..errors import OptionError, PromptError
from ..jsonl import Row
from ..model.long_texts import first_tokens
from ..options import DRAWN, Decoding, OnLayer
from .scoring.scored import mean_and_error
from .scoring.variant import Variant

ROUGE = ("rouge1", "rouge2", "rougeL")
VARIANT = ("sparsity", "selection", "allocation", "resident_dtype", "rest", "folds")
KEYS = ("id", *VARIANT)
STOP = ("###",)
GREEDY = Decoding(max_new_tokens=64, greedy=True)
SAMPLED = Decoding(temperature=0.3, top_p=1.0, top_k=0)  # as in the paper


@dataclass(frozen=True)
class Summary:
    """Means of a variant's rows. `scores`: for each of ROUGE the mean and its standard error over rows, 0 to 100;
    `too_long`: rows beyond the model's context, which do not count."""

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
    """What is wrong with a row, or None. It needs "article" (the whole prompt) and "summary_gt"; "stop" is optional."""
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
    """A prediction with its scores for every row under every variant, except those that `skip` knows by their KEYS.

    Each row draws with a seed of its own, `seed` plus its place, so that a resumed run makes the same answers. A row
    beyond the model's context has an "error" instead. Ctrl-C raises KeyboardInterrupt, whatever was made so far.
    Raises OptionError without rouge-score, and what Engine.generate raises."""
    scorer = rouge_scorer()
    for variant in variants:
        for place, row in enumerate(rows):
            name = {"id": row["id"], **named(variant)}
            if skip and skip(name):
                continue
            decoding = replace(SAMPLED if sampled else GREEDY, max_new_tokens=max_new_tokens)
            if sampled or variant.selection in DRAWN:
                decoding = replace(decoding, seed=(seed + place) % 2**32)
            yield name | answer_row(engine, row, variant, scorer, decoding, on_layer)


def answer_row(
    engine: Engine,
    row: Row,
    variant: Variant,
    scorer: Any,
    decoding: Decoding = GREEDY,
    on_layer: OnLayer | None = None,
) -> Row:
    """The summary of an article with its scores (by `rouge_scorer`), or an "error" where it is beyond the context."""
    try:
        answer, tokens = _answer(engine, row, variant, decoding, on_layer)
    except PromptError as error:
        return {"error": str(error)}
    scores = scorer.score(row["summary_gt"], answer)
    rouge = {kind: 100 * scores[kind].fmeasure for kind in ROUGE}
    return {"prediction": answer, "reference": row["summary_gt"], "tokens": tokens, **rouge}


def named(variant: Variant) -> Row:
    """A variant, as rows name it: of what JSON knows."""
    facts = variant.facts(*VARIANT)
    return facts if isinstance(variant.sparsity, int | float) else {**facts, "sparsity": list(variant.shares)}


def mean_scores(predictions: Sequence[Row], variant: Variant) -> Summary:
    """Means of what `summarise` made under one variant. Raises PromptError where every row was too long."""
    ours = [row for row in predictions if all(row[key] == value for key, value in named(variant).items())]
    good = [row for row in ours if "error" not in row]
    if not good:
        raise PromptError(f"no row has a summary: {ours[0]['error']}")
    scores = {kind: mean_and_error([row[kind] for row in good]) for kind in ROUGE}
    return Summary(variant, len(good), len(ours) - len(good), scores)


def rouge_scorer() -> Any:
    """rouge-score's scorer. Raises OptionError where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError(f"rouge-score is missing ({error}): pip install 'griffin-offload[eval]'") from error
    return RougeScorer(list(ROUGE), use_stemmer=True)


def encode_article(engine: Engine, text: str) -> list[int]:
    """Token ids that begin with the tokenizer's BOS where it has one: once, even if the tokenizer adds it too."""
    ids = first_tokens(lambda part: engine.encode(part, raw=True, cut=True), text, engine.context_length)
    bos = engine.tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` (or all of it), without white space around it."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _answer(
    engine: Engine,
    row: Row,
    variant: Variant,
    decoding: Decoding,
    on_layer: OnLayer | None,
) -> tuple[str, int]:
    """The summary, and how many tokens were made, including those of the stop text."""
    ids = encode_article(engine, row["article"])
    stops = row.get("stop") or STOP

    def stopped(answer: list[int]) -> bool:
        text = engine.tokenizer.decode(answer, skip_special_tokens=True)
        return any(stop in text for stop in stops)

    made = engine.generate(
        ids,
        variant,
        decoding,
        on_layer=on_layer,
        stopping_criteria=StoppingCriteriaList([_Stop(len(ids), stopped)]),
    )
    if made.finish_reason == "interrupted":
        raise KeyboardInterrupt
    return until_stop(made.text, stops), len(made.token_ids)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """transformers' own stop_strings first walk the whole vocabulary, which takes seconds for 262144 entries."""

    def __init__(self, prompt_tokens: int, stopped: Callable[[list[int]], bool]) -> None:
        self._prompt_tokens, self._stopped = prompt_tokens, stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = [self._stopped(row[self._prompt_tokens :].tolist()) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)

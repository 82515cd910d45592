"""Many pairs under many ways of pruning, by one reading of the weights.

The forwards run in lock-step. A prompt's is the full model's and chooses the neurons of every row; a continuation's
has a row for each way of pruning, in which all but the chosen neurons are zeroed (see jobs.py)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...engine import Engine
from ...options import OnLayer
from ...planning.scoring import rows_at_once
from .jobs import ContinuationJob, PromptJob
from .scored import Comparison, Pair, Scored, join
from .variant import ScoredRow

Context = tuple[int, ...]


class Passage:
    """Pairs over one reading: for every context a forward, then one or more for each continuation."""

    def __init__(
        self,
        engine: Engine,
        pairs: Sequence[Pair],
        rows: Sequence[ScoredRow],
        similarities: Mapping[Context, Tensor] | None = None,
    ) -> None:
        """The first of `rows` is the full model. `similarities`: of every context, where a row skips blocks."""
        self._engine, self._pairs, self._rows = engine, pairs, rows
        self._similarities = similarities or {}
        self._comparison = Comparison(engine.sizes.vocabulary, engine.device)
        self._prompts: dict[Context, list[PromptJob]] = {}
        self._continuations: list[list[ContinuationJob]] = []  # of each pair
        self._jobs: list[PromptJob | ContinuationJob] = []  # each behind what it reads
        for context, continuation in pairs:
            if tuple(context) not in self._prompts:
                self._prompts[tuple(context)] = prompts = self._read_prompt(context)
                self._jobs += prompts
            self._continuations.append(self._continue(tuple(context), continuation))
            self._jobs += self._continuations[-1]

    def run(self, tokens: int, waiting: int, on_layer: OnLayer) -> list[list[Scored]]:
        """Scores by pair and row. `tokens`, `waiting`: as Engine.passage has them."""
        with self._engine.passage(tokens, waiting, on_layer, self._jobs) as lockstep:
            lockstep.run(self._jobs)
        return [
            self._collect(self._prompts[tuple(context)], jobs, continuation[0])
            for (context, continuation), jobs in zip(self._pairs, self._continuations, strict=True)
        ]

    def _read_prompt(self, context: list[int]) -> list[PromptJob]:
        """One forward for the full model and all rows that continue it, and one for each static row."""
        static = [number for number, row in enumerate(self._rows) if row.static]
        shared = [number for number in range(len(self._rows)) if number not in static]
        groups = [shared, *([number] for number in static)]
        return [PromptJob(self._engine, context, group, [self._rows[n] for n in group]) for group in groups]

    def _continue(self, context: Context, continuation: list[int]) -> list[ContinuationJob]:
        """Forwards over a continuation, each of as many rows as its logits have room for. A single token needs none: it
        is predicted by the prompt."""
        if len(continuation) == 1:
            return []
        together = rows_at_once(self._engine.sizes, len(continuation) - 1)
        return [
            ContinuationJob(
                self._engine,
                prompt,
                continuation,
                slice(first, first + together),
                self._comparison,
                self._similarities.get(context),
            )
            for prompt in self._prompts[context]
            for first in range(0, len(prompt.numbers), together)
        ]

    def _collect(self, prompts: list[PromptJob], jobs: list[ContinuationJob], first: int) -> list[Scored]:
        """Each row's scores: the first token's from its prompt, the others' from its continuation."""
        found: dict[int, list[Scored]] = {}
        for prompt in prompts:
            predicted = prompt.predict(first, prompts[0])
            found |= {number: [predicted] for number in prompt.numbers}
        for job in jobs:
            for number, scored in zip(job.numbers, job.scored, strict=True):
                found[number].append(scored)
        return [join(found[number]) for number in range(len(self._rows))]

"""One engine that answers rows of a file: encodes their prompts, checks that batches fit, and answers them."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BudgetError, GriffinError, NumericError, PromptError
from ..jsonl import Row
from ..options import AUTO, Decoding, OnLayer, Pruning
from .batches import largest, shared_tokens
from .rows import PromptForm, to_row
from .took import Took, took

if TYPE_CHECKING:
    from ..engine import Engine
    from ..planning.plan import Plan

Prompts = Mapping[int, list[int]]  # by the number of the row, token ids
MOST = {"cpu": 32}  # prompts that are chosen to come together: there more are no faster, and a stop loses more
MOST_ELSEWHERE = 256


class Answered(dict[int, Row]):
    """What is written of each row of a batch, and what the batch took."""

    took: Took | None = None


class Facts(NamedTuple):
    """What the answers depend on beside the options: the model's `path` and `dtype`; `allocation` is what 'auto' stands
    for now, since a calibration may come before a stopped run goes on."""

    path: str
    dtype: str
    allocation: str


class Answers:
    """Answers rows with an engine. `per_prompt`: each prompt of a batch keeps its own neurons."""

    def __init__(self, engine: "Engine", pruning: Pruning, decoding: Decoding, per_prompt: bool = False) -> None:
        self._engine, self._pruning, self._decoding, self._per_prompt = engine, pruning, decoding, per_prompt
        self._beginning: list[int] = []  # what the prompts of the last batch begin with alike

    def facts(self) -> Facts:
        allocation = self._pruning.allocation
        if allocation == AUTO:
            calibrated = self._engine.opened.allocation_curves(self._pruning) is not None
            allocation = "sensitivity" if calibrated else "uniform"
        return Facts(os.path.realpath(self._engine.path), self._engine.dtype, allocation)

    def bytes_read(self) -> int:
        """Bytes of the checkpoint that the engine has made the disk read so far."""
        return self._engine.bytes_from_disk

    def encode(self, rows: Sequence[Row], form: PromptForm) -> list[list[int] | GriffinError]:
        """Token ids of each row's prompt, or why it has none."""

        def encoded(row: Row) -> list[int] | GriffinError:
            try:
                return form.encode_row(self._engine, row)
            except PromptError as error:
                return error

        return [encoded(row) for row in rows]

    def refusals(self, lengths: Sequence[int]) -> list[GriffinError | None]:
        """Why a prompt of so many tokens cannot be answered even alone, for each: too long, or too big."""

        def refusal(tokens: int) -> GriffinError | None:
            try:
                self.check(tokens, 1)
            except (PromptError, BudgetError) as error:
                return error
            return None

        known = {tokens: refusal(tokens) for tokens in set(lengths)}
        return [known[tokens] for tokens in lengths]

    def check(self, tokens: int, prompts: int) -> None:
        """Raises BudgetError unless `prompts` prompts, the longest of `tokens`, fit the memory together."""
        self._plan(tokens, prompts)

    def fitting(self, tokens: int, most: int) -> int:
        """How many prompts, the longest of `tokens`, are best answered together, `most` at most: as many as fit the
        memory with the neurons and the formats that one alone gets, up to where more are no faster."""
        decoding, together = self._decoding, MOST.get(self._engine.device, MOST_ELSEWHERE)
        if self._pruning.skip.share or decoding.lossless or decoding.refresh:  # of which each is answered alone
            return 1
        alone = self._plan(tokens, 1)

        def fits(prompts: int) -> bool:
            try:
                plan = self._plan(tokens, prompts)
            except BudgetError:
                return False
            return (plan.kept, plan.precision, plan.fold) == (alone.kept, alone.precision, alone.fold)

        return largest(fits, max(1, min(most, together)))

    def apart(self, tokens: int) -> bool:
        """Whether answers to prompts of at most `tokens` do not depend on which are answered together: each keeps its
        own neurons, or all keep all and nothing is drawn from one seed."""
        return self._per_prompt or (self._decoding.seed is None and not self._plan(tokens, 1).reads_again)

    def _plan(self, tokens: int, prompts: int) -> "Plan":
        apart, most = self._per_prompt and prompts > 1, self._decoding.max_new_tokens
        return self._engine.plan(tokens, most, self._pruning, sequences=prompts, per_prompt=apart)

    def answer(self, prompts: Prompts, on_layer: OnLayer | None = None) -> dict[int, Row]:
        """What is written of each prompt's answer. A number that overflows in a batch is the error of all its prompts;
        where answers do not depend on which come together, the batch is answered again by halves, to find whose it is.

        Raises KeyboardInterrupt for an answer that was interrupted, BudgetError, CheckpointError."""
        ids, before = list(prompts.values()), self.bytes_read()
        shared = shared_tokens(ids, self._beginning) if len(ids) > 1 else 0
        self._beginning = ids[0][:shared]
        options: dict[str, Any] = {"per_prompt": self._per_prompt, "on_layer": on_layer, "shared": shared}
        try:
            found = self._engine.generate_batch(ids, self._pruning, self._decoding, **options)
        except NumericError as error:
            if len(ids) == 1 or not self.apart(max(map(len, ids))):
                return {row: {"error": str(error)} for row in prompts}
            rows, half = list(prompts.items()), len(ids) // 2
            parts = [self.answer(dict(part), on_layer) for part in (rows[:half], rows[half:])]
            answered = Answered(parts[0] | parts[1])
            answered.took = sum((getattr(part, "took", None) or Took() for part in parts), Took())
            return answered
        if any(answer.finish_reason == "interrupted" for answer in found):
            raise KeyboardInterrupt  # half an answer is none
        answered = Answered({row: to_row(answer) for row, answer in zip(prompts, found, strict=True)})
        answered.took = took(found, self._per_prompt, self.bytes_read() - before)
        return answered

"""One engine that answers rows of a file: encodes their prompts, checks that batches fit, and answers them."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import BudgetError, GriffinError, NumericError, PromptError
from ..jsonl import Row
from ..options import AUTO, Decoding, OnLayer, Pruning
from .rows import PromptForm, to_row

if TYPE_CHECKING:
    from ..engine import Engine

Prompts = Mapping[int, list[int]]  # by the number of the row, token ids


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

    def facts(self) -> Facts:
        allocation = self._pruning.allocation
        if allocation == AUTO:
            calibrated = self._engine.opened.allocation_curves(self._pruning) is not None
            allocation = "sensitivity" if calibrated else "uniform"
        return Facts(os.path.realpath(self._engine.path), self._engine.dtype, allocation)

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
        apart = self._per_prompt and prompts > 1
        most = self._decoding.max_new_tokens
        self._engine.plan(tokens, most, self._pruning, sequences=prompts, per_prompt=apart)

    def answer(self, prompts: Prompts, on_layer: OnLayer | None = None) -> dict[int, Row]:
        """What is written of each prompt's answer. A number that overflows in a batch is the error of all its prompts.

        Raises KeyboardInterrupt for an answer that was interrupted, BudgetError, CheckpointError."""
        options: dict[str, Any] = {"per_prompt": self._per_prompt, "on_layer": on_layer}
        try:
            found = self._engine.generate_batch(list(prompts.values()), self._pruning, self._decoding, **options)
        except NumericError as error:
            return {row: {"error": str(error)} for row in prompts}
        if any(answer.finish_reason == "interrupted" for answer in found):
            raise KeyboardInterrupt  # half an answer is none
        return {row: to_row(answer) for row, answer in zip(prompts, found, strict=True)}

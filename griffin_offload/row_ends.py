"""Stop strings, other criteria and a least length, for each row of a batch as if it were alone.

transformers goes on with a row that has ended until the last one has, and fills it up: which rows have ended, and by
what, only the criteria know."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from .text_stream import Streamer


def row_options(
    options: Mapping[str, Any], settings: Any, mask: Tensor, streamers: Sequence[Streamer], tokenizer: Any
) -> dict[str, Any]:
    """Keywords of transformers' `generate`, changed so that rows (B, T of `mask`) end by themselves and their
    streamers hear of it. `settings`: the model's generation config."""
    changed = dict(options)
    given = options.get("generation_config")

    def asked(field: str) -> Any:
        found = (options.get(field), getattr(given, field, None), getattr(settings, field, None))
        return next((value for value in found if value is not None), None)

    criteria = list(options.get("stopping_criteria") or ())
    if strings := asked("stop_strings"):
        criteria.append(StopStringCriteria(tokenizer, strings))
        changed["stop_strings"] = None
    watched: list[Any] = [_Watched(each, streamers, mask.shape[1]) for each in criteria]
    watched += [StopText(streamers)] if any(streamer.searches for streamer in streamers) else []
    if watched:
        changed["stopping_criteria"] = watched
    least, padding = asked("min_length"), (mask == 0).sum(-1)
    if least and asked("min_new_tokens") is None and padding.any():
        ends = asked("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        own = _OwnLeastLength(int(least), ends, padding)
        changed |= {"min_length": 0, "logits_processor": [own, *(options.get("logits_processor") or ())]}
    return changed


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """A criterion that tells the streamers of the rows that it ends."""

    def __init__(self, criterion: Any, streamers: Sequence[Streamer], prompt: int) -> None:
        """`prompt`: its tokens, padding included."""
        self._criterion, self._streamers, self._prompt = criterion, streamers, prompt
        if hasattr(criterion, "eos_token_id"):  # by which transformers knows that ended rows are to be filled up
            self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = self._criterion(input_ids, scores, **kwargs)
        if not isinstance(done, Tensor) or not done.ndim:
            done = torch.full((len(input_ids),), bool(done), dtype=torch.bool, device=input_ids.device)
        for streamer, ended in zip(self._streamers, done.tolist(), strict=True):
            if ended:
                streamer.stop(input_ids.shape[1] - self._prompt)
        return done


class StopText(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose streamers have stopped, by a stop string in their text for one. transformers' own criterion
    first searches the whole vocabulary: with 262144 entries that takes seconds and hundreds of MiB.

    While none has stopped, nothing is copied to the device: the host would wait for that."""

    def __init__(self, streamers: Sequence[Streamer]) -> None:
        self._streamers = streamers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = [streamer.stopped for streamer in self._streamers]
        if not any(stopped):
            return torch.zeros(len(stopped), dtype=torch.bool, device=input_ids.device)
        return torch.tensor(stopped, device=input_ids.device)


class DraftedRow(BaseStreamer):  # type: ignore[misc]
    """Hands the tokens of one row to its streamer, one by one, where several arrive together: criteria that would have
    ended the row before the last of them do."""

    def __init__(self, prompt: Tensor, streamer: Streamer, criteria: Sequence[Any]) -> None:
        """`prompt` (1, T); `criteria`: as `row_options` made them."""
        self._ids, self._streamer, self._criteria = prompt, streamer, criteria
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.flatten():
            if self._streamer.stopped:
                return
            self._ids = torch.cat([self._ids, token.to(self._ids.device).view(1, 1)], dim=1)
            self._streamer.put(int(token))
            for criterion in self._criteria:
                criterion(self._ids, None)

    def end(self) -> None:
        self._streamer.end()


class _OwnLeastLength(LogitsProcessor):  # type: ignore[misc]
    """No end before a row has `least` tokens, its `padding` (B,) not counted."""

    def __init__(self, least: int, ends: Sequence[int], padding: Tensor) -> None:
        self._least, self._ends, self._padding = least, list(ends), padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        short = input_ids.shape[1] - self._padding.to(input_ids.device) < self._least
        changed = scores.clone()
        for end in (end for end in self._ends if 0 <= end < scores.shape[1]):
            changed[short, end] = -torch.inf
        return changed

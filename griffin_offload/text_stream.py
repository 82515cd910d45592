"""From the tokens that transformers' generate hands out to answers: token ids, the times they came at, and text."""

import time
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .options import OnText


class Streamer:
    """Collects an answer's tokens and their times, and passes its text on as soon as characters are whole."""

    def __init__(self, tokenizer: Any, ends: set[int], on_text: OnText | None) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._tokenizer, self._ends, self._on_text = tokenizer, ends, on_text
        self._told = ""
        self._begin = self._read = 0  # tokens [begin, read) give the text just told: context for the next ones

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def put(self, token: int) -> None:
        if self.token_ids and self.token_ids[-1] in self._ends:
            return  # the rest of the batch goes on; this row is filled up
        self.times.append(time.perf_counter())
        self.token_ids.append(token)
        if not self._on_text:
            return
        before = self._decode(self._begin, self._read)
        now = self._decode(self._begin, len(self.token_ids))
        if len(now) > len(before) and not now.endswith("\ufffd"):  # an unfinished character waits for its end
            self._tell(now[len(before) :])
            self._begin, self._read = self._read, len(self.token_ids)

    def end(self) -> None:
        if self._on_text and self.text.startswith(self._told):
            self._tell(self.text[len(self._told) :])

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self.token_ids[begin:end], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if text and self._on_text:
            self._told += text
            self._on_text(text)


class BatchStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands every new token to the streamer of its row in the batch."""

    def __init__(self, streamers: list[Streamer]) -> None:
        self._streamers = streamers
        self._prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_passed:
            for streamer, token in zip(self._streamers, value.flatten().tolist(), strict=True):
                streamer.put(token)
        self._prompt_passed = True

    def end(self) -> None:
        for streamer in self._streamers:
            streamer.end()

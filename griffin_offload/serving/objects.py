"""Events -> the JSON of OpenAI's objects, whole or in chunks."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ..report import Report
from .asked import Request
from .processors import Logprob
from .reply import Piece
from .respond import Delta, Ended, Event


class Objects:
    """Makes the objects of one answer to one request. All have one id and time."""

    def __init__(self, request: Request, model: str, tokenizer: Any) -> None:
        kind = "chat.completion" if request.chat else "text_completion"
        self._request, self._tokenizer = request, tokenizer
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._calls: dict[int, int] = {}  # by answer: how many it has had
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # characters of an answer, for older completions' logprobs

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The object of a finished answer."""
        ended = [event for event in events if isinstance(event, Ended)]
        choices = [
            self._choice(end, [e for e in events if isinstance(e, Delta) and e.index == end.index]) for end in ended
        ]
        return {**self._head, "choices": choices, "usage": usage(ended), "griffin": facts(ended[-1].report)}

    def chunks(self, event: Event) -> Iterable[dict[str, Any]]:
        """The chunks that an event of a stream is."""
        chat = self._request.chat
        if chat and event.index not in self._begun:
            self._begun.add(event.index)
            yield self._chunk(event.index, {"role": "assistant", "content": ""}, (), None)
        if isinstance(event, Delta):
            content = self._delta(event.index, event.piece) if chat else event.piece.text
            yield self._chunk(event.index, content, event.logprobs, None)
        else:
            yield self._chunk(event.index, {} if chat else "", event.logprobs, event.reason)

    def last(self, ended: Sequence[Ended]) -> Iterable[dict[str, Any]]:
        """What follows the last chunk, where usage is asked for."""
        if self._request.include_usage:
            head = {**self._head, "object": self._chunk_kind, "choices": []}
            yield {**head, "usage": usage(ended), "griffin": facts(ended[-1].report)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._request.chat else "text_completion"

    def _chunk(self, index: int, content: Any, logprobs: Sequence[Logprob], reason: str | None) -> dict[str, Any]:
        key = "delta" if self._request.chat else "text"
        told = self._logprobs(index, logprobs)
        choice = {"index": index, key: content, "logprobs": told, "finish_reason": reason}
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._request.include_usage else chunk

    def _delta(self, index: int, piece: Piece) -> dict[str, Any]:
        if piece.call:
            number = self._calls.get(index, 0)
            self._calls[index] = number + 1
            return {"tool_calls": [{"index": number, **_call(piece)}]}
        return {"reasoning_content" if piece.thinking else "content": piece.text}

    def _choice(self, end: Ended, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One answer of a finished object."""
        logprobs = self._logprobs(end.index, [*(one for delta in deltas for one in delta.logprobs), *end.logprobs])
        common = {"index": end.index, "logprobs": logprobs, "finish_reason": end.reason}
        text = "".join(delta.piece.text for delta in deltas if not delta.piece.thinking)
        if not self._request.chat:
            return {**common, "text": text}
        calls = [_call(delta.piece) for delta in deltas if delta.piece.call]
        thinking = "".join(delta.piece.text for delta in deltas if delta.piece.thinking)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {**common, "message": message}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if self._request.asks[index].top_logprobs is None:
            return None
        if self._request.chat:
            return {"content": [self._chat_logprob(one) for one in logprobs], "refusal": None}
        texts = [self._text(one.token) for one in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.value for one in logprobs],
            "top_logprobs": [{self._text(token): value for token, value in one.top} for one in logprobs],
            "text_offset": offsets,
        }

    def _chat_logprob(self, one: Logprob) -> dict[str, Any]:
        return {**self._told(one.token, one.value), "top_logprobs": [self._told(*each) for each in one.top]}

    def _told(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # else a part of a character, of which the bytes are not known
        return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def _call(piece: Piece) -> dict[str, Any]:
    """A call, with an id as all templates take it: Mistral's want nine letters and digits."""
    assert piece.call
    function = {"name": piece.call.name, "arguments": piece.call.arguments}
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}


def usage(ended: Sequence[Ended]) -> dict[str, Any]:
    """Tokens of a request. Each answer of one prompt (`n`) counts it, since each computes or takes over all of it."""
    prompt = sum(e.prompt_tokens for e in ended)
    tokens = sum(e.tokens for e in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": sum(e.cached for e in ended)},
        "completion_tokens_details": {"reasoning_tokens": sum(e.thinking for e in ended)},
    }


def facts(report: Report) -> dict[str, Any]:
    """What Griffin tells beside OpenAI's fields: memory, speed, and what of the prompt was computed."""
    told = report.to_json()
    names = ("sparsity", "precision", "rest", "timings", "memory", "fidelity", "lossless", "refreshes", "turn")
    return {**{name: told[name] for name in names}, "bytes_read": told["io"]["bytes_read"]}


def models(names: Sequence[str], created: int, context: int) -> dict[str, Any]:
    """Of /v1/models."""
    return {"object": "list", "data": [model(name, created, context) for name in names]}


def model(name: str, created: int, context: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "griffin", "max_model_len": context}

"""200 requests of 8 clients over the loopback, some cancelled, some malformed: nothing is lost, nothing grows, and
every answer is that of the same request alone."""

import itertools
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import PYTHON
from servers import WEATHER

from griffin_offload import Engine
from griffin_offload.options import Decoding
from griffin_offload.serving.asked import read_chat, read_completion
from griffin_offload.serving.objects import Objects
from griffin_offload.serving.respond import Responder
from griffin_offload.serving.served import Served

CLIENTS, REQUESTS = 8, 200
GROWTH = 0.02
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXTS = ("Hello", "Tell me of the sea", "One two three four five six seven", "def add(a, b):")
THING = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"],
         "additionalProperties": False}  # fmt: skip
FORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 11},
    {"sparsity": 0.5, "rest": "drop", "prior": "off", "fold": False},
    {"sparsity": 0.5, "rest": "drop", "prior": "off", "reuse": False},  # folded by the tokens that are computed: all
    {"sparsity": 0.5},
    {"sparsity": 0.5, "rest": "drop", "lossless": True},
    {"resident_dtype": "int8"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": THING}}},
    {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 60},
    {"stop": ["e", "a"]},
    {"logprobs": True, "top_logprobs": 3},
]
WRONG = [b"{", b'{"messages": 5}', b'{"messages": [{"role": "user", "content": "x"}], "sparsity": 7}', b"\xff"]
Asked = tuple[str, dict[str, Any]]


def kinds() -> list[Asked]:
    """Every request that is made, without how it is delivered."""
    chats = [(CHAT, {"messages": [{"role": "user", "content": text}], **form}) for text in TEXTS for form in FORMS]
    return [*chats, *((COMPLETIONS, {"prompt": text, "max_tokens": 8}) for text in TEXTS)]


def said(answer: dict[str, Any]) -> Any:
    """What an answer says: its text or calls, why it ended, its tokens."""
    (choice,) = answer["choices"]
    message = choice.get("message", {})
    calls = [call["function"] for call in message.get("tool_calls", ())]
    logprobs = choice["logprobs"] and [one["token"] for one in choice["logprobs"]["content"]]
    text = choice.get("text", message.get("content"))
    return text, calls, choice["finish_reason"], answer["usage"]["completion_tokens"], logprobs


def alone(folder: Path) -> dict[str, Any]:
    """What each request says on an engine that holds nothing of another one."""
    engine = Engine(folder)
    served = Served(engine, decoding=Decoding(greedy=True, max_new_tokens=12))
    told = {}
    for path, body in kinds():
        engine.unload()
        request = (read_chat if path == CHAT else read_completion)(body, served)
        events = list(Responder(served).respond(request, lambda: False))
        told[json.dumps([path, body])] = said(Objects(request, served.name, engine.tokenizer).whole(events))
    return told


@pytest.fixture
def served_folder(folder: Path, tmp_path: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Port and process of a server of its own."""
    arguments = ["serve", "--model", str(folder), "--port", "0", "--greedy", "--max-new-tokens", "12"]
    with open(tmp_path / "log", "w+") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*PYTHON, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr
        found = re.search(r":(\d+)/v1", first := process.stderr.readline())
        assert found, first + process.stderr.read()
        drain = ThreadPoolExecutor(1)
        drain.submit(lambda: log.writelines(process.stderr or ()))
        yield int(found[1]), psutil.Process(process.pid)
        process.terminate()
        assert process.wait(30) == 0
        drain.shutdown()
        process.stderr.close()


def post(port: int, path: str, body: bytes, leaves: bool = False) -> tuple[int, Any]:
    """Status and answer, a stream's put together. `leaves`: after the first bytes."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    try:
        response = connection.getresponse()
        if leaves:
            response.read(1)
            return response.status, None
        content = response.read()
    finally:
        connection.close()
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return response.status, joined([json.loads(line) for line in lines])
    return response.status, json.loads(content)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole object of a stream's chunks."""
    *chunks, last = chunks
    choices = [chunk["choices"][0] for chunk in chunks]
    told = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
    whole = {"finish_reason": choices[-1]["finish_reason"], "logprobs": {"content": told} if told else None}
    if "text" in choices[0]:
        whole["text"] = "".join(choice["text"] for choice in choices)
    else:
        deltas = [choice["delta"] for choice in choices]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        text = "".join(delta.get("content", "") for delta in deltas)
        whole["message"] = {"content": text if text or not calls else None, "tool_calls": calls}
    return {"choices": [whole], "usage": last["usage"], "griffin": last["griffin"]}


def test_a_soak(served_folder: tuple[int, psutil.Process], folder: Path) -> None:
    port, process = served_folder
    expected = alone(folder)
    draw = random.Random(0)
    number = itertools.count()
    outcomes: Counter[str] = Counter()

    def request(kind: Asked) -> None:
        path, body = kind
        key = json.dumps([path, body])
        which = next(number) % 20
        if which in (3, 13):
            status, answer = post(port, path, WRONG[draw.randrange(len(WRONG))])
            assert (status, set(answer)) == (400, {"error"})
            outcomes["malformed"] += 1
        elif which in (7, 17):
            long = {**body, "stream": True, "max_tokens": 500, "logit_bias": {"2": -100}}
            post(port, path, json.dumps(long).encode(), leaves=True)
            outcomes["cancelled"] += 1
        else:
            streams = {"stream": True, "stream_options": {"include_usage": True}} if which % 2 else {}
            status, answer = post(port, path, json.dumps({**body, **streams}).encode())
            assert status == 200, answer
            assert said(answer) == expected[key], (kind, streams)
            memory = answer["griffin"]["memory"]
            assert memory["measured_peak_bytes"] <= memory["planned_peak_bytes"]
            outcomes["answered"] += 1

    def ask(requests: int) -> int:
        """So many requests of all clients; resident bytes afterwards."""
        each = [draw.choice(kinds()) for _ in range(requests)]
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(request, each))
        return int(process.memory_info().rss)

    for kind in kinds():  # each has been there once before memory is compared
        post(port, kind[0], json.dumps(kind[1]).encode())
    before = ask(REQUESTS // 4)
    outcomes.clear()
    after = ask(REQUESTS)
    assert outcomes == {"answered": REQUESTS * 16 // 20, "malformed": REQUESTS // 10, "cancelled": REQUESTS // 10}
    print(f"resident: {before} bytes, then {after}: {after / before - 1:+.2%}")
    assert after < before * (1 + GROWTH), f"{before} -> {after} bytes"

"""HTTP itself: who may ask, sizes, errors, streams, clients that leave."""

import json
import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
from servers import Server

JSON = {"Content-Type": "application/json"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
LONG = {**HELLO, "max_tokens": 3000, "temperature": 1, "logit_bias": {"2": -100}, "stream": True}


def ask(
    server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[HTTPResponse, Any]:
    host, port = server.root.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=60)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection.request(method, path, raw, JSON if headers is None else headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["content-type"].startswith("application/json")
    return response, json.loads(content) if is_json else content.decode()


def error(server: Server, *arguments: Any, **keywords: Any) -> tuple[int, dict[str, Any]]:
    response, content = ask(server, *arguments, **keywords)
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    return response.status, content["error"]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def state(server: Server) -> dict[str, Any]:
    return dict(ask(server, "GET", "/health")[1])


def metric(server: Server, name: str) -> float:
    """The sum over the labels of a counter."""
    _, text = ask(server, "GET", "/metrics")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.partition("{")[0].split(" ")[0] == name)


def open_stream(server: Server, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
    """A request on a socket of its own, of which the first bytes of the answer have come."""
    host, port = server.root.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


def test_the_pages(server: Server) -> None:
    response, models = ask(server, "GET", "/v1/models")
    assert response.status == 200
    assert [each["id"] for each in models["data"]] == ["tiny-llama", "gpt-tiny"]
    assert ask(server, "GET", "/v1/models/tiny-llama")[1]["object"] == "model"
    assert state(server) == {"status": "ok", "running": False, "waiting": 0}
    before = metric(server, "griffin_generated_tokens_total")
    ask(server, "POST", "/v1/chat/completions", {**HELLO, "max_tokens": 3})
    assert metric(server, "griffin_generated_tokens_total") == before + 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("GET", "/v1/models/../../etc/passwd", None, 404, "no model"),
        ("GET", "/v1/chat/completions", None, 405, "Method Not Allowed"),
        ("POST", "/v1/chat/completions", b"{", 400, "not JSON"),
        ("POST", "/v1/chat/completions", {"messages": 5}, 400, "messages must be a list"),
        ("POST", "/v1/chat/completions", {**HELLO, "model": "/etc/passwd"}, 404, "no model"),
        ("POST", "/v1/chat/completions", {**HELLO, "response_format": {"type": "json_schema", "json_schema":
            {"name": "x", "schema": {"type": "wizard"}}}}, 400, "JSON schema"),
        ("POST", "/v1/chat/completions", {**HELLO, "response_format": {"type": "json_schema", "json_schema":
            {"name": "x", "schema": {"$ref": "file:///etc/passwd"}}}, "stream": True}, 400, "JSON schema"),
        ("POST", "/v1/completions", {"prompt": "x " * 5000}, 400, "tokens"),
    ],
)  # fmt: skip
def test_errors_have_a_status_and_openais_form(
    server: Server, method: str, path: str, body: Any, status: int, words: str
) -> None:
    found, told = error(server, method, path, body)
    assert found == status, told
    assert words in told["message"]


def test_other_types_and_hosts_are_refused(server: Server) -> None:
    """A page of another site can make a browser send these."""
    assert error(server, "POST", "/v1/completions", {"prompt": "x"}, {"Content-Type": "text/plain"})[0] == 415
    host = {**JSON, "Host": "evil.example:80"}
    assert error(server, "POST", "/v1/completions", {"prompt": "x"}, host)[0] == 403
    assert ask(server, "GET", "/v1/models", None, {"Host": "[::1]:80"})[0].status == 200


def test_the_key(starts: Callable[..., Server]) -> None:
    server = starts(api_key="sesame é")
    for headers in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "Basic sesame"}, {"Authorization": "x"}):
        for path in ("/v1/models", "/metrics"):
            assert error(server, "GET", path, None, headers)[0] == 401
    assert error(server, "POST", "/v1/completions", {"prompt": "x"})[0] == 401
    right = {**JSON, "Authorization": "Bearer sesame é".encode().decode("latin-1"), "Host": "somewhere.example"}
    assert ask(server, "GET", "/v1/models", None, right)[0].status == 200
    assert ask(server, "POST", "/v1/completions", {"prompt": "x"}, right)[0].status == 200
    assert ask(server, "GET", "/health", None, {})[0].status == 200


def test_the_size_of_a_request(starts: Callable[..., Server]) -> None:
    server = starts(body=1000)
    large = json.dumps({"prompt": "x" * 1000}).encode()
    assert error(server, "POST", "/v1/completions", large)[0] == 413
    host, port = server.root.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=60)
    pieces = iter([large[:500], large[500:]])  # which does not say its length
    connection.request("POST", "/v1/completions", pieces, JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    body = {**HELLO, "max_tokens": 20}
    _, whole = ask(server, "POST", "/v1/chat/completions", body)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    response, text = ask(server, "POST", "/v1/chat/completions", {**body, **usage})
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines]
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [chunks[-1]["usage"][name] for name in counted] == [whole["usage"][name] for name in counted]
    assert chunks[-1]["griffin"]["turn"]["computed_tokens"] == 0  # the same prompt again


def test_the_next_request_of_a_conversation_computes_what_is_new(server: Server) -> None:
    messages = [{"role": "user", "content": "Tell me of the sea and of all that lives in it."}]
    _, first = ask(server, "POST", "/v1/chat/completions", {"messages": messages})
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    more = [*messages, said, {"role": "user", "content": "And of the sky?"}]
    _, second = ask(server, "POST", "/v1/chat/completions", {"messages": more})
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused == first["usage"]["prompt_tokens"]
    assert second["griffin"]["turn"]["computed_tokens"] == second["usage"]["prompt_tokens"] - reused


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(server: Server, stream: bool) -> None:
    connection = open_stream(server, {**LONG, "stream": stream})
    until(lambda: state(server)["running"])
    if stream:
        assert connection.recv(10)
    connection.close()
    start = time.monotonic()
    until(lambda: not state(server)["running"])
    assert time.monotonic() - start < 10
    assert ask(server, "POST", "/v1/chat/completions", HELLO)[0].status == 200


def test_more_than_may_wait_are_told_when_to_come_again(starts: Callable[..., Server]) -> None:
    server = starts(waiting=1)
    streams = [open_stream(server, LONG)]
    until(lambda: state(server)["running"])
    streams.append(open_stream(server, LONG))
    until(lambda: state(server)["waiting"] == 1)
    response, content = ask(server, "POST", "/v1/chat/completions", HELLO)
    assert response.status == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert content["error"]["code"] == "queue_full"
    streams.pop().close()  # the one that waits
    until(lambda: state(server)["waiting"] == 0)
    streams.pop().close()
    until(lambda: not state(server)["running"])
    assert metric(server, "griffin_cancelled_total") >= 1


def test_a_slow_answer_says_that_it_comes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin_offload.serving.app.PATIENCE", 0.001)
    body = {**HELLO, "max_tokens": 30, "stream": True}
    _, text = ask(server, "POST", "/v1/chat/completions", body)
    lines = [line for line in text.split("\n\n") if line]
    assert ": still here" in lines
    assert lines[-1] == "data: [DONE]"
    _, whole = ask(server, "POST", "/v1/chat/completions", {**body, "stream": False})
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert content == whole["choices"][0]["message"]["content"]


def test_stopping_ends_a_stream_with_an_error(starts: Callable[..., Server]) -> None:
    server = starts()
    connection = open_stream(server, {**LONG, "max_tokens": 4000})
    assert connection.recv(10)
    server.api.stop()
    server.api.stop()  # the second time: at once
    text = b""
    while piece := connection.recv(100_000):
        text += piece
    assert b"the server is stopping" in text
    connection.close()

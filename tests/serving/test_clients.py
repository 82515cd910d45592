"""The clients that people use, over the loopback: OpenAI's own, the hub's, and pydantic-ai's agents."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import WEATHER, Server

openai = pytest.importorskip("openai", reason="the client openai is not installed (the extra 'dev' has it)")

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(client: Any, server: Server) -> None:
    answer = client.chat.completions.create(model="tiny-llama", messages=HELLO, max_tokens=9)
    engine = server.served.engine
    own = engine.generate(engine.encode("Hello"), max_new_tokens=9, greedy=True)
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(own.prompt_token_ids), 9)
    assert answer.griffin["memory"]["measured_peak_bytes"] > 0


def test_a_stream_and_leaving_it(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny-llama", messages=HELLO)
    stream = client.chat.completions.create(model="tiny-llama", messages=HELLO, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 3
    with client.chat.completions.create(
        model="tiny-llama", messages=HELLO, stream=True, max_tokens=3000, logit_bias={"2": -100}
    ) as stream:
        next(iter(stream))
    start = time.monotonic()
    assert client.chat.completions.create(model="tiny-llama", messages=HELLO).choices == whole.choices
    assert time.monotonic() - start < 10


def test_stop_seed_and_choices(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny-llama", messages=HELLO).choices[0].message.content
    stop = whole[4:6]
    cut = client.chat.completions.create(model="tiny-llama", messages=HELLO, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    drawn = {"model": "tiny-llama", "messages": HELLO, "temperature": 1.0, "seed": 7, "n": 3}
    first, second = (client.chat.completions.create(**drawn).choices for _ in range(2))
    texts = [choice.message.content for choice in first]
    assert texts == [choice.message.content for choice in second]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first] == [0, 1, 2]


def test_logprobs(client: Any) -> None:
    choice = client.chat.completions.create(model="tiny-llama", messages=HELLO, logprobs=True, top_logprobs=2).choices[
        0
    ]
    told = choice.logprobs.content
    assert len(told) == 12
    for token in told:
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0  # greedy
        assert len(token.top_logprobs) == 2
    older = client.completions.create(model="tiny-llama", prompt="Hello", max_tokens=4, logprobs=1).choices[0]
    assert len(older.logprobs.tokens) == len(older.logprobs.token_logprobs) == 4


def test_older_completions(client: Any, server: Server) -> None:
    engine = server.served.engine
    own = engine.generate(engine.encode("Hello", raw=True), max_new_tokens=16, greedy=True).text
    answer = client.completions.create(model="tiny-llama", prompt=["Hello", engine.encode("Hello", raw=True)][:1])
    assert answer.choices[0].text == own
    stream = client.completions.create(model="tiny-llama", prompt="Hello", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == own


def test_penalties_and_bias(client: Any) -> None:
    def tokens(**body: Any) -> list[str]:
        told = client.chat.completions.create(
            model="tiny-llama", messages=HELLO, logprobs=True, max_tokens=20, **body
        ).choices[0]
        return [token.token for token in told.logprobs.content]

    assert len(set(tokens(presence_penalty=2, frequency_penalty=2))) >= len(set(tokens()))
    assert set(tokens(logit_bias={"100": 100})) == {tokens(logit_bias={"100": 100})[0]}


def test_a_json_schema_is_kept_to(client: Any) -> None:
    for stream in (False, True):
        body = {"model": "tiny-llama", "messages": HELLO, "response_format": FORM, "max_tokens": 100, "stream": stream}
        answer = client.chat.completions.create(**body)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
            assert answer.choices[0].finish_reason == "stop"
        thing = json.loads(text)
        assert thing["colour"] in ("red", "blue")
        assert 1 <= thing["count"] <= 99


def test_a_forced_call(client: Any) -> None:
    body = {"model": "tiny-llama", "messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 100}
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["city"] in ("Paris", "Rome")
    chunks = list(client.chat.completions.create(**body, stream=True))
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [each.function.arguments for each in streamed] == [call.function.arguments]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    messages = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(model="tiny-llama", messages=messages, tools=[WEATHER]).choices


def test_pruning_by_request(client: Any, server: Server) -> None:
    engine = server.served.engine
    own = engine.generate(engine.encode("Hello"), max_new_tokens=12, greedy=True, sparsity=0.5, method="griffin")
    answer = client.chat.completions.create(
        model="tiny-llama", messages=HELLO, extra_body={"sparsity": 0.5, "method": "griffin"}
    )
    assert answer.choices[0].message.content == own.text
    assert answer.griffin["sparsity"] == pytest.approx(own.report.plan.sparsity)
    assert answer.griffin["fidelity"]["kept"] == pytest.approx(own.report.fidelity.kept, abs=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("more", [{}, {"response_format": FORM}, {"presence_penalty": 1.5}, {"stop": ["e"]}])
def test_lossless_is_the_full_models_answer(client: Any, more: dict[str, Any]) -> None:
    """Drafted tokens, some of them taken back, go through the same processors."""
    body = {"model": "tiny-llama", "messages": HELLO, "max_tokens": 60, "logprobs": True, "top_logprobs": 2, **more}
    full = client.chat.completions.create(**body, extra_body={"sparsity": 0})
    own = client.chat.completions.create(**body, extra_body={"sparsity": 0.5, "rest": "drop", "lossless": True})
    assert own.choices[0].message == full.choices[0].message
    assert own.choices[0].finish_reason == full.choices[0].finish_reason
    assert own.griffin["lossless"]["passes"] > 1
    for mine, theirs in zip(own.choices[0].logprobs.content, full.choices[0].logprobs.content, strict=True):
        assert mine.token == theirs.token
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [top.logprob for top in mine.top_logprobs] == pytest.approx(
            [top.logprob for top in theirs.top_logprobs], abs=1e-4
        )


def test_refreshed_answers_have_a_logprob_for_each_token(client: Any) -> None:
    refreshed = {"sparsity": 0.5, "rest": "drop", "refresh": 4}
    body = {"model": "tiny-llama", "messages": HELLO, "max_tokens": 20, "logprobs": True, "extra_body": refreshed}
    answer = client.chat.completions.create(**body)
    assert answer.griffin["refreshes"]["every"] == 4
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == 20
    thing = client.chat.completions.create(**body | {"response_format": FORM, "max_tokens": 100})
    assert json.loads(thing.choices[0].message.content)["colour"] in ("red", "blue")


def test_errors_are_openais(client: Any, starts: Callable[..., Server]) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="sparsity 3"):
        create(model="tiny-llama", messages=HELLO, extra_body={"sparsity": 3})
    with pytest.raises(openai.BadRequestError, match="n must be"):
        create(model="tiny-llama", messages=HELLO, n=1000)
    locked = starts(api_key="right")
    with (
        openai.OpenAI(base_url=locked.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    with openai.OpenAI(base_url=locked.url, api_key="right", max_retries=0) as other:
        assert other.models.list().data[0].id == "tiny-llama"


def test_the_hubs_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else it does not ask the loopback either
    client = hub.InferenceClient(base_url=server.url, api_key="none", timeout=60)
    whole = client.chat_completion(HELLO, model="tiny-llama", max_tokens=9).choices[0].message.content
    stream = client.chat_completion(HELLO, model="tiny-llama", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    told = client.chat_completion(HELLO, model="tiny-llama", max_tokens=100, response_format=form)
    assert set(json.loads(told.choices[0].message.content)) == {"colour", "count"}
    called = client.chat_completion(HELLO, model="tiny-llama", max_tokens=100, tools=[WEATHER], tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    with pytest.raises(hub.errors.HfHubHTTPError, match="no model"):
        client.chat_completion(HELLO, model="other")


def test_pydantic_ais_agents(server: Server) -> None:
    """Structured output is a forced call there; a stream, a text."""
    ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed (the extra 'dev' has it)")
    from pydantic import BaseModel
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Thing(BaseModel):
        ready: bool
        number: int

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            model = OpenAIChatModel("tiny-llama", provider=OpenAIProvider(openai_client=client))
            settings = {"max_tokens": 200}
            answer = await ai.Agent(model, model_settings=settings).run("Hello")
            assert answer.output
            async with ai.Agent(model, model_settings=settings).run_stream("Hello") as stream:
                assert await stream.get_output() == answer.output
            thing = await ai.Agent(model, output_type=Thing, model_settings=settings).run("Hello")
            assert isinstance(thing.output, Thing)

    asyncio.run(ask())

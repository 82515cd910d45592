"""The JSON of a request -> prompts as token ids, and how to answer them.

A field that would change the answer is acted on or refused by name; those of OpenAI's that change none are ignored."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..options import (
    COLD,
    OFF,
    Decoding,
    Option,
    Pruning,
    as_dict,
    build,
    declared,
    parse_pair,
    parse_shares,
    parse_switch,
)
from .api_error import invalid
from .fields import Fields, check_text, is_a
from .messages import read_messages, read_tool_choice, read_tools
from .processors import Penalties
from .served import Served
from .tools import CallForm

COMPLETION_TOKENS = 16  # of OpenAI's older completions, where nobody asks for more
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "verbosity",
)  # fmt: skip
REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "only text is written",
    "web_search_options": "there is no search",
    "suffix": "text is only written at the end",
    "echo": "the prompt is not repeated",
}
# What templates are told beside the conversation. Never the template itself.
TEMPLATE_OPTIONS = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}
NEVER_ASKED = ("compile",)  # options that a request may not change
OURS = {
    name: (group, told)
    for group in (Pruning, Decoding)
    for name, told, _ in declared(group)
    if name not in NEVER_ASKED
    and not (group is Decoding and name in ("max_new_tokens", "temperature", "top_p", "seed", "stop"))
}


@dataclass(frozen=True)
class Ask:
    """One answer: its prompt, its options, what ends it and what acts on its logits. `top_logprobs`: how many are told
    with each token, None: not even its own; `schema`: a JSON schema that it keeps to; `reuse`: what earlier requests
    have computed of its prompt is taken over."""

    prompt_ids: list[int]
    pruning: Pruning
    decoding: Decoding
    top_logprobs: int | None = None
    schema: Any = None
    penalties: Penalties = field(default_factory=Penalties)
    reuse: bool = True


@dataclass(frozen=True)
class Request:
    """What one request asks for: an answer to each of `asks`. `calls`: how tools may be called in it (None: they may
    not), of the names `tools`; `one_call`: once; `forced`: it is one; `closes`: the mark that ends thinking which the
    prompt has begun."""

    chat: bool
    asks: tuple[Ask, ...]
    stream: bool = False
    include_usage: bool = False
    calls: CallForm | None = None
    tools: tuple[str, ...] = ()
    one_call: bool = False
    forced: bool = False
    closes: str = ""


def read_chat(body: dict[str, Any], served: Served) -> Request:
    """Of /v1/chat/completions. Raises ApiError, PromptError, OptionError."""
    fields = Fields(body)
    served.check_model(fields.get("model", str))
    messages = read_messages(fields.need("messages", list))
    mode, tools = read_tool_choice(fields.raw("tool_choice"), read_tools(fields.get("tools", list) or []))
    offered = read_tools(fields.get("tools", list) or []) if mode != "none" else []
    if offered and not served.calls:
        raise invalid("tools", "this model's chat template takes no tools, or has calls in a form that is not known")
    one_call = fields.get("parallel_tool_calls", bool) is False
    schema = _response_schema(fields)
    top = _chat_logprobs(fields)
    if fields.get("modalities", list) not in (None, ["text"]):
        raise fields.wrong("modalities", 'can only be ["text"]')
    options = _template_options(fields)
    rest = _common(fields, served)
    if offered:
        options["tools"] = offered
    ids = served.encode_chat(messages, options)
    if mode == "required":
        if schema is not None:
            raise invalid("tool_choice", "a call is asked for, and response_format too: leave one of them out")
        assert served.calls
        opens, schema = served.calls.force(tools)
        ids = [*ids, *served.encode_more(opens)]
    older, newer = (fields.get(name, int, least=1) for name in ("max_tokens", "max_completion_tokens"))
    asks = _asks(fields, served, [ids], (newer or older, served.decoding.max_new_tokens), (top, schema))
    fields.close(OURS)
    return Request(
        chat=True,
        asks=asks,
        calls=served.calls if offered else None,
        tools=tuple(tool["function"]["name"] for tool in offered),
        one_call=one_call,
        forced=mode == "required",
        closes="" if mode == "required" else served.thinks_already(ids),
        **rest,
    )


def read_completion(body: dict[str, Any], served: Served) -> Request:
    """Of /v1/completions. Raises ApiError, PromptError, OptionError."""
    fields = Fields(body)
    served.check_model(fields.get("model", str))
    prompts = _prompts(fields, served)
    top = fields.get("logprobs", int, least=0, most=20)
    schema = _response_schema(fields)
    if (best := fields.get("best_of", int)) is not None and best != (fields.get("n", int) or 1):
        raise fields.wrong("best_of", "is not supported: leave it out")
    rest = _common(fields, served)
    asked = fields.get("max_tokens", int, least=1)
    asks = _asks(fields, served, prompts, (asked, COMPLETION_TOKENS), (top, schema))
    fields.close(OURS)
    return Request(chat=False, asks=asks, **rest)


def _common(fields: Fields, served: Served) -> dict[str, Any]:
    """What both kinds of requests have of the Request itself."""
    fields.refuse(REFUSED)
    fields.ignore(*IGNORED)
    stream = fields.get("stream", bool) or False
    options = fields.get("stream_options", dict)
    usage = False
    if options is not None:
        inner = Fields(options, "stream_options")
        usage = inner.get("include_usage", bool) or False
        inner.ignore("include_obfuscation")
        inner.close()
    return {"stream": stream, "include_usage": usage}


def _asks(
    fields: Fields,
    served: Served,
    prompts: Sequence[list[int]],
    tokens: tuple[int | None, int],
    form: tuple[int | None, Any],
) -> tuple[Ask, ...]:
    """An Ask for each prompt and choice. `tokens`: of an answer, asked for and by default; `form`: top logprobs and
    schema."""
    choices = fields.get("n", int, least=1, most=served.limits.choices) or 1
    if choices * len(prompts) > served.limits.choices:
        raise invalid("n", f"{choices * len(prompts)} answers are asked for: at most {served.limits.choices} at a time")
    pruning, decoding = read_options(fields, served.pruning, served.decoding)
    stop, penalties = _stop(fields), _penalties(fields, served)
    reuse = fields.get("reuse", bool)
    reuse = served.reuse if reuse is None else reuse
    asks = []
    for ids in prompts:
        longest = served.answer_tokens(ids, *tokens)
        for choice in range(choices):
            own = replace(decoding, max_new_tokens=longest, stop=(*decoding.stop, *stop))
            if own.seed is not None:
                own = replace(own, seed=(own.seed + choice) % 2**32)
            own.generate_options(pruning.selection)  # refuses greedy beside sampling
            asks.append(Ask(ids, pruning, own, *form, penalties, reuse))
    return tuple(asks)


def read_options(fields: Fields, pruning: Pruning, decoding: Decoding) -> tuple[Pruning, Decoding]:
    """The server's options, changed by what a request says. Raises ApiError, OptionError."""
    given: dict[type, dict[str, Any]] = {Pruning: {}, Decoding: {}}
    for name, (group, told) in OURS.items():
        if (value := fields.raw(name)) is not None:
            given[group][name] = _typed(fields, name, told, value)
    if given[Pruning].get("prior") not in (None, "auto", OFF):
        raise fields.wrong("prior", "can be auto or off: a request names no file")
    given[Decoding] |= _sampling(fields, decoding)
    changed = build(Decoding, {**as_dict(decoding), **given[Decoding]})
    return build(Pruning, {**as_dict(pruning), **given[Pruning]}), replace(changed, more=decoding.more)


def _sampling(fields: Fields, decoding: Decoding) -> dict[str, Any]:
    """OpenAI's own: temperature 0 is greedy, and then a seed has nothing to repeat."""
    given: dict[str, Any] = {
        "temperature": fields.get("temperature", float, least=0, most=100),
        "top_p": fields.get("top_p", float, least=0, most=1),
        "seed": fields.get("seed", int),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if "seed" in given:
        given["seed"] %= 2**32
    asked = fields.raw("greedy")
    if given.get("temperature", 1.0) < COLD or (asked is None and decoding.greedy and "temperature" not in given):
        return {"greedy": True, **dict.fromkeys(("temperature", "top_p", "top_k", "seed"))}
    if given.get("top_p") == 0:
        raise fields.wrong("top_p", "must be above 0")
    return {"greedy": False, **given} if given and asked is None else given


def _typed(fields: Fields, name: str, told: Option, value: Any) -> Any:
    """The value of one of our options, of the type that it has in options/. Raises ApiError."""
    if told.parse is parse_switch:
        kind: type = bool
    elif told.parse is parse_shares:
        if value == "auto":
            return None
        if isinstance(value, list) and value and all(is_a(each, float) for each in value):
            return tuple(value)
        kind = float
    elif told.parse is parse_pair:
        if not isinstance(value, list) or len(value) != 2 or not all(is_a(each, int) for each in value):
            raise fields.wrong(name, "must be a list of two whole numbers")
        return tuple(value)
    else:
        kind = told.parse if isinstance(told.parse, type) else str
    return fields.get(name, kind)


def _prompts(fields: Fields, served: Served) -> list[list[int]]:
    """Of /v1/completions: a text, token ids, or a list of either."""
    prompt = fields.raw("prompt")
    if prompt is None:
        raise invalid("prompt", "prompt is missing", "missing_required_parameter")
    many = prompt if isinstance(prompt, list) and not all(is_a(each, int) for each in prompt) else [prompt]
    if not prompt or len(many) > served.limits.choices:
        raise fields.wrong("prompt", f"must be 1 to {served.limits.choices} prompts that are not empty")
    prompts = []
    for one in many:
        if isinstance(one, str):
            prompts.append(served.engine.encode(check_text(one, "prompt"), raw=True))
        elif isinstance(one, list) and one and all(is_a(each, int) and 0 <= each < 2**31 for each in one):
            prompts.append(served.engine.opened.check_tokens(one))
        else:
            raise fields.wrong("prompt", "must be a text, token ids, or a list of either")
    return prompts


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.raw("stop")
    marks = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(marks, list) or len(marks) > 16 or not all(isinstance(mark, str) and mark for mark in marks):
        raise fields.wrong("stop", "must be a text, or a list of at most 16 texts that are not empty")
    return tuple(check_text(mark, "stop") for mark in marks)


def _penalties(fields: Fields, served: Served) -> Penalties:
    rows = served.engine.skeleton.rows_of_table
    bias = {}
    for token, value in (fields.get("logit_bias", dict) or {}).items():
        if not token.isdecimal() or int(token[:20]) >= rows or not is_a(value, float) or not -100 <= value <= 100:
            raise fields.wrong("logit_bias", f"must map tokens, 0 to {rows - 1}, to numbers from -100 to 100")
        bias[int(token)] = float(value)
    presence, frequency = (
        fields.get(name, float, least=-2, most=2) or 0.0 for name in ("presence_penalty", "frequency_penalty")
    )
    return Penalties(presence, frequency, bias)


def _response_schema(fields: Fields) -> Any:
    """The JSON schema that an answer keeps to; None where it need not."""
    form = fields.get("response_format", dict)
    if form is None:
        return None
    inner = Fields(form, "response_format")
    kind = inner.need("type", str)
    if kind == "text":
        return None
    if kind == "json_object":  # "value": as the hub's client writes a schema
        return inner.get("value", dict) or {"type": "object"}
    if kind == "json_schema":
        told = Fields(inner.need("json_schema", dict), "response_format.json_schema")
        return told.need("schema", dict)
    raise inner.wrong("type", "must be text, json_object or json_schema")


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.get("logprobs", bool)
    top = fields.get("top_logprobs", int, least=0, most=20)
    if top is not None and not wanted:
        raise fields.wrong("top_logprobs", "needs logprobs true")
    return (top or 0) if wanted else None


def _template_options(fields: Fields) -> dict[str, Any]:
    """Of the chat template: `chat_template_kwargs`, as other servers have them, and reasoning_effort."""
    inner = Fields(fields.get("chat_template_kwargs", dict) or {}, "chat_template_kwargs")
    options: dict[str, Any] = {name: inner.get(name, kind) for name, kind in TEMPLATE_OPTIONS.items()}
    inner.close()
    effort = fields.get("reasoning_effort", str)
    options["reasoning_effort"] = effort or options["reasoning_effort"]
    return {name: value for name, value in options.items() if value is not None}

"""OpenAI's messages -> those that a chat template takes."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .api_error import invalid
from .fields import Fields, is_a

ROLES = ("system", "developer", "user", "assistant", "tool")
NAME = re.compile(r"[\w.-]{1,64}")
ECHOED = ("refusal", "annotations", "audio", "function_call", "id", "status", "type", "griffin")  # of an earlier answer


def read_messages(values: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a conversation. A call's arguments, JSON in a text, become what they mean: templates write them
    as JSON themselves. Raises ApiError."""
    if not values:
        raise invalid("messages", "messages is empty: give at least one")
    return [_message(Fields(value, f"messages[{index}]")) for index, value in enumerate(values)]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.need("role", str)
    if role not in ROLES:
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(fields)}
    if name := fields.get("name", str):
        message["name"] = name
    if role == "assistant":
        told, also = (fields.get(name, str) for name in ("reasoning_content", "reasoning"))
        if thinking := told or also:
            message["reasoning_content"] = thinking
        if calls := fields.get("tool_calls", list):
            each = enumerate(calls)
            message["tool_calls"] = [_call(Fields(call, fields.name(f"tool_calls[{i}]"))) for i, call in each]
        fields.ignore(*ECHOED)
    if role == "tool":
        message["tool_call_id"] = fields.need("tool_call_id", str)
    if message["content"] is None and "tool_calls" not in message:
        if role != "assistant":
            raise fields.wrong("content", "is missing")
        message["content"] = ""
    fields.close()
    return message


def _content(fields: Fields) -> Any:
    """A text, or a list of parts that are texts; None."""
    content = fields.raw("content")
    if content is None or isinstance(content, str):
        return fields.get("content", str)
    if not isinstance(content, list):
        raise fields.wrong("content", "must be a text, or a list of parts")
    parts = []
    for index, value in enumerate(content):
        part = Fields(value, fields.name(f"content[{index}]"))
        if (kind := part.need("type", str)) != "text":
            raise part.wrong("type", f"is {kind!r}: Griffin runs the text model of a checkpoint and reads texts only")
        parts.append({"type": "text", "text": part.need("text", str)})
    return parts


def _call(fields: Fields) -> dict[str, Any]:
    function = Fields(fields.need("function", dict), fields.name("function"))
    arguments: Any = function.get("arguments", str) or "{}"
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    called = {"name": function.need("name", str), "arguments": arguments}
    return {"type": "function", "id": fields.get("id", str) or "", "function": called}


def read_tools(values: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools that a model may call, as a chat template takes them. Raises ApiError."""
    tools = []
    for index, value in enumerate(values):
        fields = Fields(value, f"tools[{index}]")
        fields.choice("type", ("function",), "function")
        function = Fields(fields.need("function", dict), fields.name("function"))
        name = function.need("name", str)
        if not NAME.fullmatch(name):
            raise function.wrong("name", "must be letters, digits, _ . and -, at most 64")
        told: dict[str, Any] = {"name": name}
        if description := function.get("description", str):
            told["description"] = description
        told["parameters"] = function.get("parameters", dict) or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": told})
    return tools


def read_tool_choice(choice: Any, tools: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """tool_choice -> 'none', 'auto' or 'required', and the tools that may be called. Raises ApiError."""
    if choice is None:
        return ("auto" if tools else "none"), list(tools)
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise invalid("tool_choice", "tool_choice must be none, auto, required, or name a function")
        if choice == "required" and not tools:
            raise invalid("tool_choice", "tool_choice is required, and there are no tools")
        return (choice if tools else "none"), list(tools)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    found = [tool for tool in tools if is_a(name, str) and tool["function"]["name"] == name]
    if not found:
        raise invalid("tool_choice", "tool_choice names no function of tools")
    return "required", found

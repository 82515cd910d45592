"""The forms in which chat templates have tools called: which one a template has, what it looks like in an answer, and
how an answer is made to be a call.

- Hermes, Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>; newer Qwens write XML inside it.
- Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name{...}.
- Llama 3: {"name": ..., "parameters": {...}} as the whole answer, several with a semicolon between them.

Small models of all kinds leave the marks out: an answer that is nothing but JSON of a tool's call is one."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .api_error import invalid

XML = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*)?\Z", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?={)")
BETWEEN = re.compile(r"[\s;,]*")


class Call(NamedTuple):
    """A call of a tool; `arguments`: JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallForm:
    """How a template has tools called: between `opens` and `closes` ('': up to the end). `arguments`: their key.
    `forced`: an answer can be made to be a call; of a JSON list of them where `many`."""

    opens: str
    closes: str = ""
    arguments: str = "arguments"
    many: bool = False
    forced: bool = True

    def parse(self, text: str, known: Collection[str] = ()) -> list[Call]:
        """The calls that a text between the marks is; [] if it is none. `known`: the only names that a call may have,
        where the marks are not there."""
        if found := XML.match(text):
            return [Call(found[1], _as_json(dict(PARAMETER.findall(found[2]))))]
        text = text if self.closes else text.replace(self.opens, " ")  # which may stand before each call
        calls, at = [], BETWEEN.match(text).end()  # type: ignore[union-attr]
        while at < len(text):
            named = NAMED.match(text, at)
            try:
                value, at = json.JSONDecoder().raw_decode(text, named.end() if named else at)
            except (ValueError, RecursionError):
                return []
            if named:
                value = {"name": named[1], "arguments": value}
            for each in value if isinstance(value, list) else [value]:
                call = _call(each)
                if call is None or (known and call.name not in known):
                    return []
                calls.append(call)
            at = BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        return calls

    def force(self, tools: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        """How an answer that is a call of one of the tools begins, and the JSON schema of what follows.

        Raises ApiError."""
        if not self.forced:
            raise invalid("tool_choice", "this model's form of calls cannot be forced: use tool_choice auto")
        each = [
            {
                "type": "object",
                "properties": {"name": {"const": f["name"]}, self.arguments: f["parameters"]},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for f in (tool["function"] for tool in tools)
        ]
        one: dict[str, Any] = each[0] if len(each) == 1 else {"anyOf": each}
        schema = {"type": "array", "items": one, "minItems": 1, "maxItems": 1} if self.many else one
        return self.opens, schema


HERMES = CallForm("<tool_call>", "</tool_call>")
HERMES_XML = CallForm("<tool_call>", "</tool_call>", forced=False)
MISTRAL = CallForm("[TOOL_CALLS]", many=True)
MISTRAL_NAMED = CallForm("[TOOL_CALLS]", forced=False)
LLAMA = CallForm("<|python_tag|>", arguments="parameters")


def find_form(template: str) -> CallForm | None:
    """The form of a chat template's calls; None where it takes no tools, or has calls in a form that is not known."""
    if "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return HERMES_XML if "<function=" in template else HERMES
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return LLAMA
    return None


def _call(value: Any) -> Call | None:
    """{"name": ..., "arguments": {...}}; some models write "parameters"."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return Call(name, json.dumps(arguments or {}, ensure_ascii=False)) if isinstance(arguments or {}, dict) else None


def _as_json(texts: dict[str, str]) -> str:
    """Values that are JSON as what they mean, all others as texts."""
    values: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            values[name] = json.loads(text)
        except (ValueError, RecursionError):
            values[name] = text
    return json.dumps(values, ensure_ascii=False)

"""A server under test, in a thread of this process, and what it is asked with."""

import threading

from tiny import CHAT_TEMPLATE

from griffin_offload.serving.served import Served
from griffin_offload.serving.server import Address, ApiServer

TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    '{{ \'Call them as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|end|>\' }}{% endif %}'
    + CHAT_TEMPLATE.replace("message['content']", "(message['content'] or '')")
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Server:
    """A server that runs, in a thread."""

    def __init__(self, served: Served, api_key: str | None = None) -> None:
        self.served = served
        self.answers: list[str] = []
        self.api = ApiServer(served, Address(port=0).bind(), api_key, on_answer=self.answers.append)
        self.url, self.root = self.api.url, self.api.url.removesuffix("/v1")
        ready = threading.Event()
        self._thread = threading.Thread(target=self.api.run, args=(ready.set,))
        self._thread.start()
        assert ready.wait(60)

    def stop(self) -> None:
        self.api.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

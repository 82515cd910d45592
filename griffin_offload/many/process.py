"""Another process of this program, and the pipe to it. A request is (method, arguments), a reply (kind, value), of
which ("failed", error) is raised here."""

import signal
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any


class Process:
    """Runs target(*arguments, pipe). `patience`: seconds to end in when it is told to; then it is killed."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], name: str, patience: float) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._patience = patience
        self.process = context.Process(target=target, args=(*arguments, theirs), name=name)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> None:
        """Raises OSError where the process has ended."""
        self.pipe.send((method, arguments))

    def reply(self) -> tuple[str, Any]:
        """Waits for it. Raises what failed, EOFError or OSError where the process ended."""
        kind, value = self.pipe.recv()
        if kind == "failed":
            raise value
        return kind, value

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(self._patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    @property
    def how_it_ended(self) -> str:
        self.process.join(self._patience)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

"""A process that has imported everything, and forks one for each command: a target for signals that is ready at once.

It is told of commands by lines of JSON on stdin: arguments, and a folder. It answers with the process's number, then
with its exit code, or the negative number of the signal that killed it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]


class Forks:
    """A context manager: `start` and `wait` for commands."""

    def __enter__(self) -> "Forks":
        paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "tests"))))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def start(self, arguments: tuple[str, ...], place: Path) -> int:
        """The process's number. Its cache, state and temporary files, and what it says, are in `place`."""
        self._place = place
        assert self._process.stdin
        print(json.dumps([arguments, str(place)]), file=self._process.stdin, flush=True)
        return int(self._read())

    def wait(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = int(self._read())
        return code, (self._place / "stdout").read_text(), (self._place / "stderr").read_text()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def child(arguments: list[str], place: str) -> int:
    """The command in this process; returns its exit code."""
    from griffin_offload.cli import main

    def griffin() -> None:
        (Path(place) / "begun").touch()  # from here on signals are the command's
        command()

    command, main.griffin = main.griffin, griffin  # type: ignore[assignment]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(place) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in ("GRIFFIN_CACHE", "GRIFFIN_STATE", "TMPDIR"):
        os.makedirs(Path(place) / name, exist_ok=True)
        os.environ[name] = str(Path(place) / name)
    sys.argv = ["griffin", *arguments]
    try:
        main.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    import griffin_offload.cli.calibrate
    import griffin_offload.cli.export_pruned
    import griffin_offload.cli.generate
    import torch
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    import griffin_offload.engine
    import griffin_offload.evaluation.calibrate  # noqa: F401

    torch.set_num_threads(1)
    told = os.fdopen(os.dup(1), "w")
    print("ready", file=told, flush=True)
    for line in sys.stdin:
        arguments, place = json.loads(line)
        if not (number := os.fork()):
            os._exit(child(arguments, place))
        print(number, file=told, flush=True)
        status = os.waitpid(number, 0)[1]
        print(os.waitstatus_to_exitcode(status), file=told, flush=True)


# What is signalled


SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGKILL": -signal.SIGKILL}


class Signalled:
    """Trials of a command of commands.py: a signal at a random moment, then the same command again."""

    def __init__(self, name: str, inputs: Any, scratch: Path, forks: Forks) -> None:
        from faults.commands import COMMANDS

        self.command, self.inputs, self._scratch, self._forks = COMMANDS[name], inputs, scratch, forks
        self._number = 0
        place = self._place()
        begin = os.times().elapsed
        code, stdout, stderr = self._run(place)
        self.seconds = os.times().elapsed - begin
        assert code == 0, stderr
        self.right = self.command.read(place, stdout)

    def trial(self, name: str, random: Random) -> str | None:
        """What is wrong after a signal; None for nothing."""
        import time

        from faults.commands import hashes, leftovers

        place, wrong = self._place(), []
        before, inputs = hashes(place), hashes(self.inputs.folder)
        number = self._forks.start(self.command.arguments(self.inputs, place), place)
        while not (place / "begun").exists():
            time.sleep(0.001)
        after = random.uniform(0, self.seconds)
        time.sleep(after)
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(number, getattr(signal, name))
        code, stdout, stderr = self._forks.wait()
        if code not in (0, SIGNALS[name]) or "Traceback" in stderr:
            wrong.append(f"exit {code}, {stderr[-300:]!r}")
        if name != "SIGKILL" and (left := leftovers(place)):
            wrong.append(f"left {left}, exit {code}, {stderr[-300:]!r}")
        if lost := [
            path for path, sha in before.items() if path.startswith("out/") and not self._is_there(place, path)
        ]:
            wrong.append(f"lost {lost[:3]}")
        code, stdout, stderr = self._run(place)
        if code:
            wrong.append(f"the same command again: exit {code}, {stderr[-300:]!r}")
        elif self.command.read(place, stdout) != self.right:
            wrong.append("the same command again made something else")
        if left := leftovers(place):
            wrong.append(f"left by both: {left}")
        if hashes(self.inputs.folder) != inputs:
            wrong.append("an input has changed")
        return f"{name} after {after:.3f} s of {self.seconds:.3f}: {'; '.join(wrong)}" if wrong else None

    def _is_there(self, place: Path, path: str) -> bool:
        """In its place, or, while one export takes another's, under the name of a backup."""
        return any((folder / path.partition("/")[2]).exists() for folder in place.glob("out*"))

    def _run(self, place: Path) -> tuple[int, str, str]:
        self._forks.start(self.command.arguments(self.inputs, place), place)
        return self._forks.wait()

    def _place(self) -> Path:
        from faults.commands import places, run_line

        self._number += 1
        place = self._scratch / f"place{self._number}"
        place.mkdir(parents=True)
        if self.command.before:
            with places(place):
                assert run_line(self.command.before(self.inputs, place)).code == 0
        return place


if __name__ == "__main__":
    serve()

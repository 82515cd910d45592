"""The command line under test."""

import sys
from collections.abc import Callable

from click.testing import Result

PYTHON = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()"]
ANSWER = ("--max-new-tokens", "8", "--greedy")
Run = Callable[..., Result]
KEYS = {
    "timings": {"plan_s", "prompt_s", "decode_s", "time_to_first_token_s", "decode_tokens_per_s"},
    "memory": {"full_bytes", "resident_bytes", "planned_peak_bytes", "measured_peak_bytes", "budget_bytes"},
    "io": {"checkpoint_bytes", "bytes_read"},
    "experts": {"kept_per_layer", "layers"},
    "precision": {"experts", "others", "head", "rest"},
    "rest": {"taken", "why"},
}


def failed(result: Result, code: int, *words: str) -> None:
    """Exactly one line on stderr, nothing on stdout, the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr

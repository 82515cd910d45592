"""What serving costs: engine.stream in this process and `griffin serve` in another, in turn, on the same prompt.

    python scripts/serve-cost.py smollm2-135m 96

Prints tokens/s and the time to the first token of each, and the medians of the ratios of neighbours."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from http.client import HTTPConnection

from griffin_offload import Engine

MESSAGES = [{"role": "user", "content": "Write a long story about a fox and a raven who live in a forest."}]
SERVE = [sys.executable, "-c", "from griffin_offload.cli.main import main; main()", "serve", "--port", "0", "--greedy"]


def paced(start: float, tokens: Iterable[object]) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s after it."""
    times = [time.perf_counter() for _ in tokens]
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def direct(engine: Engine, tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    ids = engine.encode_chat(MESSAGES)
    return paced(start, engine.stream(ids, greedy=True, max_new_tokens=tokens, continues=True))


def served(port: int, tokens: int) -> tuple[float, float]:
    body = json.dumps({"messages": MESSAGES, "max_tokens": tokens, "stream": True})
    with closing(HTTPConnection("127.0.0.1", port)) as connection:
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        lines = connection.getresponse()
        return paced(start, (line for line in lines if b'"delta": {"content": "' in line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--pairs", type=int, default=16)
    asked = parser.parse_args()
    process = subprocess.Popen([*SERVE, "--model", asked.model], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    found = re.search(r":(\d+)/v1", process.stderr.readline())
    assert found
    port, engine = int(found[1]), Engine(asked.model)
    pairs = []
    for pair in range(asked.pairs + 1):
        if pair % 2:
            over = served(port, asked.tokens)
            pairs.append((direct(engine, asked.tokens), over))
        else:
            pairs.append((direct(engine, asked.tokens), served(port, asked.tokens)))
    process.terminate()
    for (first, pace), (first_over, pace_over) in pairs[1:]:  # the first pair reads the weights
        own, other = f"{pace:5.1f} tokens/s, first {first * 1e3:4.0f} ms", f"{pace_over:5.1f}, {first_over * 1e3:4.0f}"
        print(f"direct {own}; served {other}")
    print(f"tokens/s served / direct: {statistics.median(over[1] / own[1] for own, over in pairs[1:]):.3f}")
    print(f"first token served / direct: {statistics.median(over[0] / own[0] for own, over in pairs[1:]):.2f}")
    print(f"first token served - direct: {statistics.median(over[0] - own[0] for own, over in pairs[1:]) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

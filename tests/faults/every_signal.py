"""Signals at many random moments: `make faults`, or python tests/faults/every_signal.py MOMENTS."""

import os
import sys
import tempfile
import time
from pathlib import Path
from random import Random

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GRIFFIN_DEVICE": "cpu"}
os.environ["GRIFFIN_CONFIG"] = os.devnull
sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from faults.commands import make_inputs
from faults.forks import SIGNALS, Forks, Signalled

NAMES = ("export", "export --force", "export gguf", "generate --input", "calibrate", "eval summarise")


def main(moments: int) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    begin, trials, wrong = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch, Forks() as forks:
        inputs = make_inputs(Path(scratch) / "inputs", layers=24)
        for name in NAMES:
            made = Signalled(name, inputs, Path(scratch) / name.replace(" ", ""), forks)
            random = Random(name)
            for signal in SIGNALS:
                for _ in range(moments):
                    trials += 1
                    if said := made.trial(signal, random):
                        wrong += 1
                        print(f"{name}: {said}", flush=True)
            print(f"{name}: {trials} trials so far, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{trials} trials, {wrong} of them wrong, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))

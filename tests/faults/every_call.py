"""Every call of every command fails once with every error: `make faults`, or python tests/faults/every_call.py COMMAND.

Prints what went wrong, and how many trials there were. Exit code 1 where anything did."""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GRIFFIN_DEVICE": "cpu"}
os.environ["GRIFFIN_CONFIG"] = os.devnull
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from faults.commands import COMMANDS, Trials, make_inputs
from faults.injection import ERRNOS


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    begin, trials, wrong = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        inputs = make_inputs(Path(scratch) / "inputs")
        for name in names or COMMANDS:
            made = Trials(name, inputs, Path(scratch) / "trials")
            for error, number in ERRNOS.items():
                for everything in (False, True) if error == "ENOSPC" else (False,):
                    for at in range(1, made.calls + 1):
                        trials += 1
                        if said := made.trial(at, number, everything):
                            wrong += 1
                            print(f"{name}: {said}", flush=True)
            print(f"{name}: {made.calls} calls; {trials} trials so far, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{trials} trials, {wrong} of them wrong, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

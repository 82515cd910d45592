"""Griffin beside llama.cpp on one GGUF file, with the same threads: seconds of the prompt pass, and tokens a second.

python scripts/beside-llama-cpp.py FILE.gguf [--llama PYTHON_THAT_HAS_IT] [--threads 2] [--prompt 337] [--answer 40]
[--rounds 2] [--settings DTYPE:SPARSITY ...]. Griffin without AVX512: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
Every round runs each in turn, in processes of their own, with the file in the page cache; the best of each counts."""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

WORDS = "The engine reads one layer after the other while the pump, the valve and the old clock keep their own time. "


def llama(file: str, threads: int, prompt: int, answer: int) -> dict[str, float]:
    from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]

    model = Llama(file, n_ctx=prompt + answer + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = model.tokenize((WORDS * prompt).encode())[:prompt]
    model.eval(ids[:8])  # what is only done once
    model.reset()
    begin = time.perf_counter()
    tokens = model.generate(ids, temp=0.0)
    next(tokens)
    first = time.perf_counter()
    for _ in range(answer):
        next(tokens)
    return {"prompt": first - begin, "decoding": answer / (time.perf_counter() - first)}


def griffin(file: str, threads: int, prompt: int, answer: int, dtype: str, sparsity: float) -> dict[str, Any]:
    import torch

    from griffin_offload import Engine

    torch.set_num_threads(threads)
    engine = Engine(file, threads=threads)
    ids = engine.encode(WORDS * prompt)[:prompt]
    asked: dict[str, Any] = {
        "sparsity": sparsity,
        "resident_dtype": dtype,
        "max_new_tokens": answer + 1,
        "do_sample": False,
    }
    report = engine.generate(ids, **asked, min_new_tokens=answer + 1).report.to_json()
    return {"prompt": report["timings"]["prompt_s"], "decoding": report["timings"]["decode_tokens_per_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--llama", default=sys.executable)
    for name, default in (("threads", 2), ("prompt", 337), ("answer", 40), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--settings", nargs="*", default=["int4:0", "int4:0.5", "int8:0"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    numbers = (asked.file, asked.threads, asked.prompt, asked.answer)
    if asked.one:
        dtype, _, sparsity = asked.one.partition(":")
        print(json.dumps(llama(*numbers) if dtype == "llama" else griffin(*numbers, dtype, float(sparsity))))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(asked.rounds):
        for setting in ("llama", *asked.settings):
            python = asked.llama if setting == "llama" else sys.executable
            command = [python, __file__, *sys.argv[1:], "--one", setting]
            run = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            seen = best.setdefault(setting, run)
            seen["prompt"], seen["decoding"] = (
                min(seen["prompt"], run["prompt"]),
                max(seen["decoding"], run["decoding"]),
            )
    theirs = best["llama"]
    for setting, seen in best.items():
        print(
            f"{setting:10} prompt {seen['prompt']:6.2f} s ({seen['prompt'] / theirs['prompt']:.2f} x llama.cpp's), "
            f"decoding {seen['decoding']:6.1f} tokens/s ({seen['decoding'] / theirs['decoding']:.2f} x)"
        )


main()

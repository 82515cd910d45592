"""What the host does for a token beside the step that a GPU computes: steps of a tiny model are replayed as nothing.

    python scripts/host_time.py

Prints microseconds a token, medians: of all that the host does, its arithmetic on the logits included, which a GPU
would do; and of the part between a token's arrival on the host and the launch of the next step, when a GPU would have
nothing to do. Launching an operator on a GPU and waiting for it are not in it: tests/model/test_host_work_on_gpu.py
counts them."""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from griffin_offload.cli._answer_screen import AnswerScreen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from griffin_offload import Engine, generation
from griffin_offload.memory.capture import Capture
from griffin_offload.text_stream import BatchStreamer

VOCABULARY, PROMPT, NEW = 32000, 512, 128
WARM = 8  # tokens before the first that counts
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIALS = ["<pad>", "<s>", "</s>"]


class NoStep(Capture):
    """Records as on CUDA, but a replay computes nothing, so that the logits stay as they are."""

    def __init__(self, launches: list[float]) -> None:
        super().__init__("cuda")
        self._launches = launches

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        yield

    def _record(self, step: Callable[[], None]) -> Any:
        return self

    def replay(self) -> None:
        self._launches.append(time.perf_counter())


def checkpoint(folder: Path) -> Path:
    """A tiny Llama with as many words as the real one; it never ends an answer."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **SIZES, **tokens)
    ).bfloat16()
    model.lm_head.weight.data[: len(SPECIALS)] = 0
    model.save_pretrained(folder)
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġword{number}" for number in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    ).save_pretrained(folder)
    return folder


def measure(engine: Engine, prompts: int = 1, **options: Any) -> tuple[float, float]:
    """Seconds a token: in all, and between its arrival and the next launch."""
    launches, arrivals, put = list[float](), list[float](), BatchStreamer.put

    def arrived(streamer: BatchStreamer, tokens: torch.Tensor) -> None:
        arrivals.append(time.perf_counter())
        put(streamer, tokens)

    ids = [torch.randint(3, VOCABULARY, (PROMPT,)).tolist() for _ in range(prompts)]
    common: dict[str, Any] = {"sparsity": 0.5, "rest": "drop", "no_fidelity": True, "max_new_tokens": NEW}
    with (
        patch.object(generation, "Capture", lambda device: NoStep(launches)),
        patch.object(BatchStreamer, "put", arrived),
    ):
        engine.generate_batch(ids, **common, **options)
    counted = launches[WARM:]
    last = [max(moment for moment in arrivals if moment < launch) for launch in counted]
    each = [after - before for before, after in pairwise(counted)]
    return statistics.median(each), statistics.median(map(float.__sub__, counted, last))


def main() -> None:
    torch.set_num_threads(1)
    out = io.StringIO()
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"greedy": True},
        "greedy, text streamed": {"greedy": True, "on_text": out.write},
        "greedy, as griffin chat shows it": {"greedy": True, "on_text": AnswerScreen().reply, "continues": True},
        "greedy, a stop text": {"greedy": True, "on_text": out.write, "stop": ("\nUser:",)},
        "sampled, top_k 40, top_p 0.9": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 1},
        "8 prompts together, greedy": {"greedy": True, "prompts": 8},
    }
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(checkpoint(Path(folder)), copies=True, dtype="bfloat16")
        for name, options in ways.items():
            with redirect_stdout(out):
                found = [measure(engine, **options) for _ in range(5)][1:]  # the first one warms up
            whole, between = (statistics.median(each) * 1e6 for each in zip(*found, strict=True))
            print(f"{name:34} {whole:6.0f} us a token, {between:4.0f} of them before the next launch")


if __name__ == "__main__":
    main()

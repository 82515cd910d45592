"""The public API: plan, sweep, generate, export and report in one object.

engine = Engine("smollm2-135m")
answer = engine.generate(engine.encode("Why is the sky blue?"), sparsity=0.5)
print(answer.text, answer.report.measured_peak)
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from .cache import make_cache
from .errors import BudgetError, CheckpointError, GriffinError, OptionError, PromptError
from .export import Export, Source, export_checkpoint
from .folder import check_layers, load_config, load_generation_config, load_tokenizer, one_line
from .memory import (
    PeakMeter,
    best_device,
    bytes_read,
    check_device,
    device_budget,
    memory_bandwidth,
    resident_set,
    return_freed_memory,
)
from .models import DEFAULT_MODEL, resolve
from .plan import DEFAULT_SPARSITY, Plan, Request, choose_plan
from .prefill import OnLayer, ResidentLayer, Sweep, load_outside, resident_layers
from .report import Report
from .skeleton import Skeleton, compute_dtype
from .units import parse_bytes
from .weights.checkpoint import Checkpoint
from .weights.reader import Reader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """An answer. finish_reason: 'stop' (the model ended it), 'length', or 'interrupted' (Ctrl-C)."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    report: Report

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            **self.report.to_json(),
        }


class Engine:
    """One model on one device. Making it reads headers only; the first prompt reads the weights."""

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str | None = None,
        device_memory: int | str | None = None,
        dtype: str | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`device_memory`: bytes, or text such as '4GiB'; default: what is free, less a margin.

        `on_progress(what, done, total)` hears of a fetch. Raises ModelNotFound, CheckpointError,
        UnsupportedArchitecture or OptionError."""
        if dtype is not None and dtype not in DTYPES:
            raise OptionError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")
        return_freed_memory()  # before anything large is taken: what the heap has grown to stays in use
        self.name = str(model)
        self.device = check_device(device) if device else best_device()
        self.path = resolve(model, on_progress=on_progress)
        self.config = load_config(self.path)
        self.checkpoint = Checkpoint.open(self.path)
        native = compute_dtype(self.checkpoint)
        check_layers(self.path, self.config, self.checkpoint)
        try:
            self.skeleton = Skeleton(self.config, DTYPES[dtype] if dtype else native)
            self.skeleton.bind(self.checkpoint)  # first: a head that the files hold beside its table counts too
            self.sizes = self.skeleton.sizes()
        except GriffinError:
            raise
        except Exception as error:  # transformers' and torch's, of sizes that make no model
            raise CheckpointError(f"{self.path}/config.json does not describe a model: {one_line(error)}") from None
        self.skeleton.to_device(self.device)
        self.skeleton.model.generation_config = load_generation_config(self.path, self.config)
        self.tokenizer = load_tokenizer(self.path)
        self.dtype = str(self.skeleton.dtype).removeprefix("torch.")
        self._converts = any(info.dtype != self.skeleton.dtype for info in self.skeleton.tensors.values())
        self._runtime = resident_set() if self.device == "cpu" else 0
        self.budget = parse_bytes(device_memory) if device_memory is not None else device_budget(self.device)
        self._layers: list[ResidentLayer] | None = None
        self._outside_is_in = False
        self._bandwidth: float | None = None

    @property
    def context_length(self) -> int:
        return self.sizes.context

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, prompt: str, *, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids of one user turn in the chat template, or of the bare text (`raw`, or no template)."""
        if not prompt.strip():
            raise PromptError("the prompt is empty: give some text")
        if raw or not self.has_chat_template:
            if system:
                raise PromptError("--system needs a model with a chat template, and no --raw")
            return list(self.tokenizer(prompt)["input_ids"])
        turns = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*turns, {"role": "user", "content": prompt}])

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises PromptError without a chat template."""
        if not self.has_chat_template:
            raise PromptError(f"{self.name} has no chat template: use `griffin generate --raw`")
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # the template is the checkpoint's own program (jinja)
            raise PromptError(f"{self.name}'s chat template refused the conversation: {error}") from None
        return list(ids)

    def plan(self, prompt_tokens: int, max_new_tokens: int, sparsity: float | None = None) -> Plan:
        """The plan of a run. Raises PromptError, OptionError, and BudgetError if it does not fit."""
        return choose_plan(self.sizes, self._request(prompt_tokens, max_new_tokens), sparsity, self.name)

    def generate(
        self,
        prompt_ids: list[int],
        *,
        sparsity: float | None = None,
        max_new_tokens: int = 256,
        on_text: OnText | None = None,
        on_layer: OnLayer | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a prompt: the first forward is the sweep, the rest run the resident model.

        sparsity None: all neurons where the whole model fits, else half. `on_text` gets the answer as it is made,
        `on_layer(done, total)` the progress of the sweep. `options` go to transformers' `generate`.
        A KeyboardInterrupt after the first token ends the answer; before it, it is raised.
        """
        start = time.perf_counter()
        _check_options(max_new_tokens, options)
        plan = self.plan(len(prompt_ids), max_new_tokens, sparsity)
        plan_s = time.perf_counter() - start
        meter, read_before = PeakMeter(self.device), bytes_read()
        if seed is not None:
            set_seed(seed)
        reader, streamer = Reader(), _Streamer(self.tokenizer, on_text)
        begin = time.perf_counter()
        try:
            self._answer(prompt_ids, plan, reader, streamer, on_layer, options)
            interrupted = False
        except torch.OutOfMemoryError as error:  # a GPU that others use too
            raise BudgetError(f"{self.device} is out of memory, planned {plan.peak} bytes: {error}") from None
        except KeyboardInterrupt:
            if not streamer.times:
                raise
            interrupted = True
            streamer.end()
        finally:
            reader.close()
        peak, read_after = meter.peak(), bytes_read()
        first, last = streamer.times[0], streamer.times[-1]
        report = Report(
            model=self.name,
            model_path=self.path,
            dtype=self.dtype,
            device=self.device,
            plan=plan,
            measured_peak=peak,
            checkpoint_bytes=self.checkpoint.bytes,
            bytes_read=reader.bytes if read_before is None or read_after is None else read_after - read_before,
            plan_s=plan_s,
            prompt_s=first - begin,
            read_s=reader.seconds,
            decode_s=last - first,
            time_to_first_token_s=first - start,
            tokens=len(streamer.token_ids),
            memory_bandwidth=self._memory_bandwidth() if len(streamer.token_ids) > 1 else 0.0,
        )
        reason = "interrupted" if interrupted else self._finish_reason(streamer.token_ids, plan)
        return Generation(streamer.text, list(prompt_ids), streamer.token_ids, reason, report)

    def export(
        self,
        prompt_ids: list[int],
        out: Path,
        *,
        prompt_text: str,
        sparsity: float = DEFAULT_SPARSITY,
        force: bool = False,
        on_layer: OnLayer | None = None,
    ) -> Export:
        """Write the model pruned to a prompt as a folder that plain transformers loads; the engine is empty after it.

        Layers are written as the sweep passes, so that the pruned model is never held. `prompt_text` is hashed into
        the model card. Raises ExportError, BudgetError, and what a sweep raises."""
        request = replace(self._request(len(prompt_ids), 1), export=True)
        plan = choose_plan(self.sizes, request, sparsity, self.name)
        self.unload()
        source = Source(self.name, self.path, list(prompt_ids), prompt_text)
        reader = Reader()
        try:
            return export_checkpoint(self.skeleton, reader, plan, source, Path(out), force, on_layer)
        finally:
            reader.close()

    def unload(self) -> None:
        """Give the weights' memory back; the next prompt reads them again."""
        self.skeleton.unload()
        self._layers, self._outside_is_in = None, False

    def sweep(
        self,
        prompt_ids: list[int],
        sparsity: float | None = None,
        max_new_tokens: int = 1,
        on_layer: OnLayer | None = None,
    ) -> Any:
        """The prompt pass alone: transformers' output (logits of the last token, KV cache); the model stays resident.

        For programs that drive `engine.skeleton.model` themselves; the cache has room for `max_new_tokens` more."""
        plan, reader = self.plan(len(prompt_ids), max_new_tokens, sparsity), Reader()
        try:
            with self._resident(plan, reader, on_layer), torch.no_grad():
                ids, cache = self._batch(prompt_ids), self._cache(plan)
                return self.skeleton.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            reader.close()

    def _answer(
        self,
        prompt_ids: list[int],
        plan: Plan,
        reader: Reader,
        streamer: "_Streamer",
        on_layer: OnLayer | None,
        options: dict[str, Any],
    ) -> None:
        """One call of transformers' generate, whose first forward is the sweep where one is needed."""
        ids = self._batch(prompt_ids)
        sweep = self._resident(plan, reader, on_layer)
        try:
            with sweep:
                self.skeleton.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self._cache(plan),
                    streamer=streamer,
                    max_new_tokens=plan.max_new_tokens,
                    tokenizer=self.tokenizer,
                    **options,
                )
        except (ValueError, TypeError) as error:
            if isinstance(sweep, Sweep) and not sweep.started:  # generate refused an option, before the first layer
                raise OptionError(" ".join(str(error).split())) from error
            raise

    def _resident(self, plan: Plan, reader: Reader, on_layer: OnLayer | None) -> AbstractContextManager[Any]:
        """Memory for the plan, what is outside the layers read, and a sweep for the next forward if it needs one."""
        if not self._outside_is_in:
            load_outside(self.skeleton, reader, self.device)
            self._outside_is_in = True
        if self._layers is None or tuple(layer.kept for layer in self._layers) != plan.kept:
            self._layers = self._bandwidth = None
            self.skeleton.unload(self.skeleton.inside)  # before the new memory is taken
            self._layers = resident_layers(self.skeleton, plan.kept, self.device)
        if not plan.prunes and all(layer.complete for layer in self._layers):
            return nullcontext()
        return Sweep(
            self.skeleton,
            reader,
            self._layers,
            copies=self._copies,
            steady=plan.steady_heap,
            on_layer=on_layer,
        )

    def _cache(self, plan: Plan) -> Any:
        row = max(self.sizes.cache_per_token) // 2
        return make_cache(self.config, plan.prompt_tokens + plan.max_new_tokens, row, self.device)

    def _batch(self, prompt_ids: list[int]) -> torch.Tensor:
        return torch.tensor([prompt_ids], device=self.device)

    def _request(self, prompt_tokens: int, max_new_tokens: int) -> Request:
        return Request(
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            sparsity=0.0,
            budget=self.budget,
            runtime=self._runtime,
            converts=self._converts,
            copies=self._copies,
        )

    @property
    def _copies(self) -> bool:
        """Whether the device's memory is not what the reader writes to."""
        return self.device != "cpu"

    def _memory_bandwidth(self) -> float:
        """Measured once for what is resident; 0.0 where Ctrl-C ends it: the answer is there all the same."""
        if self._bandwidth is None:
            try:
                self._bandwidth = memory_bandwidth(self._read_by_a_token())
            except KeyboardInterrupt:
                return 0.0
        return self._bandwidth

    def _read_by_a_token(self) -> list[torch.Tensor]:
        """The weights that decoding one token reads: all but an embedding table that is not the head too."""
        model = self.skeleton.model
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        return [p.data for p in model.parameters() if p is head or p is not table]

    def _finish_reason(self, token_ids: list[int], plan: Plan) -> str:
        end = self.skeleton.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        return "stop" if len(token_ids) < plan.max_new_tokens or token_ids[-1] in ends else "length"


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Collects an answer's tokens and their times, and passes its text on as soon as characters are whole."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._tokenizer, self._on_text = tokenizer, on_text
        self._prompt_passed = False
        self._told = ""
        self._begin = self._read = 0  # tokens [begin, read) give the text just told: context for the next ones

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self.times.append(time.perf_counter())
        self.token_ids += value.flatten().tolist()
        if not self._on_text:
            return
        before = self._decode(self._begin, self._read)
        now = self._decode(self._begin, len(self.token_ids))
        if len(now) > len(before) and not now.endswith("\ufffd"):  # an unfinished character waits for its end
            self._tell(now[len(before) :])
            self._begin, self._read = self._read, len(self.token_ids)

    def end(self) -> None:
        if self._on_text and self.text.startswith(self._told):
            self._tell(self.text[len(self._told) :])

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self.token_ids[begin:end], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if text and self._on_text:
            self._told += text
            self._on_text(text)


def _check_options(max_new_tokens: int, options: dict[str, Any]) -> None:
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    if options.get("prefill_chunk_size"):
        raise OptionError("prefill_chunk_size would read the model once a chunk: leave it out")
    if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
        raise OptionError("one answer a prompt, without beams: they cannot be streamed")

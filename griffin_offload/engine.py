"""The public API: plan, sweep, generate, export and report in one object.

engine = Engine("smollm2-135m")
answer = engine.generate(engine.encode("Why is the sky blue?"), sparsity=0.5)
print(answer.text, answer.report.measured_peak)
"""

import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from .checkpoint.reader import Reader
from .errors import BudgetError, OptionError
from .export.pruned_model import Export, ExportSource
from .export.to_gguf import GGUF_MULTIPLE, Writing, export_gguf, require_gguf
from .export.to_safetensors import export_checkpoint
from .memory.measure import PeakMeter, bytes_read
from .offload.lockstep import Lockstep
from .offload.neuron_scores import find_room, sum_scores
from .offload.outer_weights import load_outer_weights
from .offload.resident_layer import another_set, passing_layers, resident_layers
from .offload.skip_by_prompt import check_skip, left_out
from .offload.skip_by_token import TokenSkipper
from .offload.sweep import Pruner, Sweep
from .open_model import Opened
from .options import EXPORT_FORMATS, GGUF_TYPES, FfnSkip, OnLayer, OnText, Sparsity, check
from .planning.plan import DEFAULT_SPARSITY, Plan, choose_plan, with_kept
from .pruning.calibration import Calibration
from .pruning.prior import WEIGHT, Prior
from .pruning.selection import Selection
from .report import Report
from .text_stream import BatchStreamer, Streamer
from .units import parse_bytes


@dataclass(frozen=True)
class Answer:
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


@dataclass(frozen=True)
class _Run:
    """What answering a batch takes. `streamers`: one for each of `prompts`; `options`: of transformers' `generate`."""

    prompts: list[list[int]]
    plan: Plan
    selection: Selection
    reader: Reader
    streamers: list[Streamer]
    on_layer: OnLayer | None
    seed: int | None
    options: dict[str, Any]
    skipper: TokenSkipper | None = None


class Engine(Opened):
    """One model on one device. Making it reads headers only; the first prompt reads the weights."""

    def generate(self, prompt_ids: list[int], *, on_text: OnText | None = None, **options: Any) -> Answer:
        """Answer a prompt: the first forward is the sweep, the rest run the resident model.

        `on_text` gets the answer as it is made. All else: see `generate_batch`.
        A KeyboardInterrupt after the first token ends the answer; before it, it is raised.
        """
        return self.generate_batch([prompt_ids], on_text=on_text, **options)[0]

    def generate_batch(
        self,
        prompts: list[list[int]],
        *,
        per_prompt: bool = False,
        sparsity: Sparsity | None = None,
        selection: str = "topk",
        allocation: str = "uniform",
        resident_dtype: str | None = None,
        rest: str | None = None,
        prior: Prior | None = None,
        prior_weight: float = WEIGHT,
        skip: FfnSkip | None = None,
        max_new_tokens: int = 256,
        on_text: OnText | None = None,
        on_layer: OnLayer | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer several prompts after one sweep: by one expert set, for which every prompt counts the same, or
        (`per_prompt`) each by its own, as if it were alone.

        `sparsity`: one number, or one for each layer. None: with `resident_dtype` and `rest` None too, the best that
        fits (see ladder.py).
        `allocation`: 'uniform', or 'sensitivity' as `griffin calibrate` measured it (uniform where it has not).
        `resident_dtype`: of what stays, 'int8' and 'int4' packed as layers pass, 'auto' the first that fits; `rest`:
        'drop' the other neurons, or keep them in 'int8' or 'int4' and add their part.
        `prior`: scores of other texts, which join the prompt's statistic with `prior_weight` (see selection.Selection).
        `skip`: whole blocks left out, of one prompt.
        `on_layer(done, total)` hears the sweep's progress. `options` go to transformers' `generate`.
        All answers share one report.
        """
        start = time.perf_counter()
        _check_options(max_new_tokens, options)
        chosen = self._selection(selection, seed, prior, prior_weight)
        skip = skip if skip and skip.share else None
        if skip:
            check_skip(self.skeleton, skip, len(prompts))
        per_prompt = per_prompt and len(prompts) > 1
        plan = self.plan(
            max(map(len, prompts), default=0) if all(prompts) else 0,
            max_new_tokens,
            sparsity,
            allocation=allocation,
            resident_dtype=resident_dtype,
            rest=rest,
            skip=skip,
            sequences=max(1, len(prompts)),
            per_prompt=per_prompt,
        )
        _check_prunes(plan, chosen)
        plan_s = time.perf_counter() - start
        self._let_go(plan)  # before the peak is measured: what the last plan held is not this one's
        meter, read_before = PeakMeter(self.device), bytes_read()
        if seed is not None:
            set_seed(seed)
        reader = self._reader()
        streamers = [Streamer(self.tokenizer, self._ends, on_text) for _ in prompts]
        begin = time.perf_counter()
        answer = self._answer_each if per_prompt and plan.reads_again else self._answer
        skipper = TokenSkipper(self.skeleton, skip, plan) if skip and not skip.by_prompt else None
        try:
            answer(_Run(prompts, plan, chosen, reader, streamers, on_layer, seed, options, skipper))
            interrupted = False
        except torch.OutOfMemoryError as error:  # a GPU that others use too
            raise BudgetError(f"{self.device} is out of memory, planned {plan.peak} bytes: {error}") from None
        except KeyboardInterrupt:
            if not all(streamer.times for streamer in streamers):
                raise
            interrupted = True
            for streamer in streamers:
                streamer.end()
        finally:
            reader.close()
        peak, read_after = meter.peak(), bytes_read()
        skipped = skipper.result() if skipper else None
        if skip and skip.by_prompt and self._layers:
            plan = with_kept(plan, self.sizes, tuple(layer.kept for layer in self._layers))
            skipped = left_out(skip, plan.kept)
        times = sorted(moment for streamer in streamers for moment in streamer.times)
        tokens = sum(len(streamer.token_ids) for streamer in streamers)
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
            prompt_s=times[0] - begin,
            read_s=reader.seconds,
            decode_s=times[-1] - times[0],
            time_to_first_token_s=times[0] - start,
            tokens=tokens,
            memory_bandwidth=self._memory_bandwidth() if tokens > 1 and self._layers else 0.0,
            prior=chosen.prior_facts,
            skipped=skipped,
        )
        return [
            Answer(
                streamer.text,
                list(ids),
                streamer.token_ids,
                "interrupted" if interrupted else self._finish_reason(streamer.token_ids, plan),
                report,
            )
            for ids, streamer in zip(prompts, streamers, strict=True)
        ]

    def export(
        self,
        prompt_ids: list[int],
        out: Path,
        *,
        prompt_text: str,
        sparsity: Sparsity | None = DEFAULT_SPARSITY,
        selection: str = "topk",
        allocation: str = "uniform",
        skip: FfnSkip | None = None,
        seed: int = 0,
        force: bool = False,
        format: str = "safetensors",
        gguf_type: str = "bf16",
        multiple_of: int | None = None,
        prior: Prior | None = None,
        prior_weight: float = WEIGHT,
        on_layer: OnLayer | None = None,
    ) -> Export:
        """Write the model pruned to a prompt: as a folder that plain transformers loads, or, with the format "gguf", as
        a file for llama.cpp, its matrices in `gguf_type`. The engine is empty after it.

        Layers are written as the sweep passes, so that the pruned model is never held. `prompt_text` is hashed into
        the model card. Every layer's neurons are rounded up to a multiple of `multiple_of` (default: 1; for GGUF 32,
        which its quantised types need). `skip`: blocks left out, by prompt.
        Raises OptionError, ExportError, BudgetError, and what a sweep raises."""
        chosen = self._selection(selection, seed, prior, prior_weight)
        skip = skip if skip and skip.share else None
        if skip:
            check_skip(self.skeleton, skip, export=True)
        source = ExportSource(self.name, self.path, list(prompt_ids), prompt_text)
        return self._export(
            source,
            chosen,
            out,
            sparsity=sparsity,
            allocation=allocation,
            force=force,
            format=format,
            gguf_type=gguf_type,
            multiple_of=multiple_of,
            on_layer=on_layer,
            skip=skip,
        )

    def export_static(
        self,
        static: Calibration,
        out: Path,
        *,
        sparsity: Sparsity | None = DEFAULT_SPARSITY,
        allocation: str = "uniform",
        force: bool = False,
        format: str = "safetensors",
        gguf_type: str = "bf16",
        multiple_of: int | None = None,
        host_memory: int | str | None = None,
        on_layer: OnLayer | None = None,
    ) -> tuple[Export, Prior]:
        """As `export`, the neurons chosen by many samples, or by the weights alone: see static.py. Also returns the
        scores that they were chosen by, of all neurons, as a prior.

        `host_memory`: of RAM, for the states of samples that wait for a layer (None: what there is, on the CPU what the
        budget leaves); the others wait in a file without a name beside `out`."""
        source = ExportSource(self.name, self.path, [], "", static)
        export = self._export(
            source,
            Selection(seed=static.seed),
            out,
            host_memory=_size(host_memory),
            sparsity=sparsity,
            allocation=allocation,
            force=force,
            format=format,
            gguf_type=gguf_type,
            multiple_of=multiple_of,
            on_layer=on_layer,
        )
        return export, Prior(export.scores, {**self._facts, **static.to_json()})

    def _export(
        self,
        source: ExportSource,
        chosen: Selection,
        out: Path,
        *,
        sparsity: Sparsity | None,
        allocation: str,
        force: bool,
        format: str,
        gguf_type: str,
        multiple_of: int | None,
        on_layer: OnLayer | None,
        host_memory: int | None = None,
        skip: FfnSkip | None = None,
    ) -> Export:
        check(format, EXPORT_FORMATS, "format")
        check(gguf_type, GGUF_TYPES, "GGUF type")
        multiple = (GGUF_MULTIPLE if format == "gguf" else 1) if multiple_of is None else multiple_of
        if multiple < 1:
            raise OptionError(f"neurons cannot be a multiple of {multiple}: give 1 or more")
        if format == "gguf":
            require_gguf(self.config.model_type)
        request = self.request(max(map(len, source.samples), default=1), 1)
        request = replace(request, share=self.share(allocation), export=True, multiple=multiple, skip=skip)
        if source.static:
            folder = next(parent for parent in Path(out).absolute().parents if parent.is_dir())
            request, waiting = find_room(self.skeleton, request, source.static, host_memory, folder)
            source = replace(source, waiting=waiting)
        plan = choose_plan(self.sizes, request, DEFAULT_SPARSITY if sparsity is None else sparsity, self.name)
        _check_prunes(plan, chosen)
        if source.static and not plan.prunes:
            raise OptionError(f"sparsity {plan.sparsity:g} keeps every neuron: there is nothing to choose")
        self.unload()
        reader = self._reader()
        try:
            if format == "gguf":
                how = Writing(gguf_type, multiple, self.tokenizer)
                return export_gguf(self.skeleton, reader, plan, chosen, source, Path(out), force, on_layer, how)
            return export_checkpoint(self.skeleton, reader, plan, chosen, source, Path(out), force, on_layer)
        finally:
            reader.close()

    def score_samples(
        self, static: Calibration, on_layer: OnLayer | None = None, *, host_memory: int | str | None = None
    ) -> Prior:
        """What every neuron is worth to many samples, from one reading of the weights. The engine is empty after it.

        `host_memory`: as of `export_static`; the file is in the folder for temporary ones. Raises PromptError for a
        sample beyond the context, BudgetError, GriffinError where the disk is full, and what a sweep raises."""
        request = replace(self.request(static.longest, 1), export=True)
        folder = Path(tempfile.gettempdir())
        request, waiting = find_room(self.skeleton, request, static, _size(host_memory), folder)
        plan = choose_plan(self.sizes, request, 0.0, self.name)
        self.unload()
        reader = self._reader()
        try:
            prior = sum_scores(self.skeleton, reader, plan, static, waiting, self.device, on_layer)
        finally:
            reader.close()
        return replace(prior, facts={**self._facts, **prior.facts})

    def sweep(
        self,
        prompt_ids: list[int],
        sparsity: Sparsity | None = None,
        max_new_tokens: int = 1,
        on_layer: OnLayer | None = None,
        *,
        selection: str = "topk",
        allocation: str = "uniform",
        resident_dtype: str | None = None,
        rest: str | None = None,
        prior: Prior | None = None,
        prior_weight: float = WEIGHT,
        seed: int | None = None,
    ) -> Any:
        """The prompt pass alone: transformers' output (logits of the last token, KV cache); the model stays resident.

        For programs that drive `engine.skeleton.model` themselves; the cache has room for `max_new_tokens` more."""
        chosen = self._selection(selection, seed, prior, prior_weight)
        plan = self.plan(
            len(prompt_ids),
            max_new_tokens,
            sparsity,
            allocation=allocation,
            resident_dtype=resident_dtype,
            rest=rest,
        )
        reader = self._reader()
        try:
            sweep = self._resident(plan, chosen, reader, on_layer)
            with sweep, torch.no_grad():
                ids, _ = self._batch([prompt_ids])
                cache = self._cache(plan)
                return self.skeleton.model(ids, past_key_values=cache, use_cache=True, **self.last_logits)
        finally:
            reader.close()

    @contextmanager
    def passage(
        self, tokens: int, waiting: int = 0, on_layer: OnLayer | None = None
    ) -> Generator[Lockstep, None, None]:
        """The whole model passes once, layer by layer, through as many forwards as are given to its `run`; nothing
        stays. `tokens`: of the largest forward; `waiting`: bytes that all of them hold between two layers.

        Raises BudgetError where that does not fit."""
        request = replace(self.request(tokens, 1), export=True, waiting=waiting)
        plan = choose_plan(self.sizes, request, 0.0, self.name)
        self.unload()
        reader = self._reader()
        try:
            load_outer_weights(self.skeleton, reader, self.device)
            layers = passing_layers(self.skeleton, plan.kept, self.device)
            with Lockstep(self.skeleton, self._stream(layers, plan, reader, on_layer)) as lockstep:
                yield lockstep
        finally:
            reader.close()
            self.unload()

    def _answer(self, run: _Run) -> None:
        """One call of transformers' generate, whose first forward is the sweep where one is needed."""
        ids, mask = self._batch(run.prompts)
        weights = None if mask.all() and len(ids) == 1 else (mask / mask.sum(1, keepdim=True)).float().flatten()
        sweep = self._resident(run.plan, run.selection, run.reader, run.on_layer, weights)
        try:
            with sweep, run.skipper or nullcontext():
                self._call_generate(run, ids, mask, self._cache(run.plan, len(ids)), run.streamers)
        except (ValueError, TypeError) as error:
            if isinstance(sweep, Sweep) and not sweep.started:  # generate refused an option, before the first layer
                raise OptionError(" ".join(str(error).split())) from error
            raise

    def _answer_each(self, run: _Run) -> None:
        """A call of generate for each prompt: their first forwards share one sweep, the answers come one by one."""
        self._unload_model()
        load_outer_weights(self.skeleton, run.reader, self.device, run.plan.precision)
        layers = resident_layers(self.skeleton, run.plan.kept, self.device, run.plan.precision)
        sets = [layers, *(another_set(self.skeleton, layers, self.device) for _ in run.prompts[1:])]
        stream = self._stream(layers, run.plan, run.reader, run.on_layer)
        pruners = [(Pruner(self.skeleton, each, run.selection), each) for each in sets]

        def job(prompt_ids: list[int], streamer: Streamer) -> Callable[[], None]:
            def answer() -> None:
                ids, mask = self._batch([prompt_ids])
                self._call_generate(run, ids, mask, self._cache(run.plan), [streamer])

            return answer

        try:
            with Lockstep(self.skeleton, stream, pruners, run.seed) as lockstep:
                lockstep.run([job(ids, streamer) for ids, streamer in zip(run.prompts, run.streamers, strict=True)])
        except (ValueError, TypeError) as error:
            if not any(streamer.times for streamer in run.streamers):
                raise OptionError(" ".join(str(error).split())) from error
            raise
        finally:
            self._unload_model()

    def _call_generate(
        self, run: _Run, ids: torch.Tensor, mask: torch.Tensor, cache: Any, streamers: list[Streamer]
    ) -> None:
        """transformers' generate over ids (B, T), by the options of a run; a streamer for each row."""
        self.skeleton.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            streamer=BatchStreamer(streamers),
            max_new_tokens=run.plan.max_new_tokens,
            tokenizer=self.tokenizer,
            **run.options,
        )

    def _finish_reason(self, token_ids: list[int], plan: Plan) -> str:
        return "stop" if len(token_ids) < plan.max_new_tokens or token_ids[-1] in self._ends else "length"


def _size(size: int | str | None) -> int | None:
    return None if size is None else parse_bytes(size)


def _check_prunes(plan: Plan, selection: Selection) -> None:
    if selection.prior is not None and not plan.prunes:
        raise OptionError(
            "a prior chooses among neurons, and all of them stay: give --sparsity, or leave out the prior"
        )


def _check_options(max_new_tokens: int, options: dict[str, Any]) -> None:
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}: ask for at least 1")
    if options.get("prefill_chunk_size"):
        raise OptionError("prefill_chunk_size would read the model once a chunk: leave it out")
    if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
        raise OptionError("one answer a prompt, without beams: they cannot be streamed")

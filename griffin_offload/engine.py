"""The public API: plan, generate, stream, export and score in one object.

engine = Engine("smollm2-135m")
answer = engine.generate(engine.encode("Why is the sky blue?"), sparsity=0.5)
print(answer.text, answer.report.measured_peak)
"""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OptionError
from .export.pruned_model import Export, ExportSource
from .export.run import ExportAsked, write_export
from .generation import answer
from .memory.out_of_memory import planned
from .model_prior import known_prior, known_selection, score_samples
from .offload.layer_hook import LayerHook
from .offload.lockstep import Lockstep, passing
from .offload.resident_model import ResidentModel
from .opening import open_model
from .options import Decoding, ExportFormat, OnLayer, OnText, Placement, Pruning, from_keywords
from .planning.plan import Plan, choose_plan
from .prefix import with_prefix
from .pruning.calibration import Calibration
from .pruning.prior import Prior
from .refresh import answer_refreshed
from .run import Answer, Asked
from .sources.resolve import DEFAULT_MODEL
from .streamer import texts_to
from .text_stream import OnToken, TokenStream
from .units import parse_budget, parse_bytes


class Engine:
    """One model on one device, or on several GPUs. Making it reads headers only; the first prompt reads the weights.

    Every method takes its options as groups (Pruning, Decoding, ExportFormat) or as plain keywords, which are the
    groups' fields and win over them: `engine.generate(ids, sparsity=0.5, max_new_tokens=80)`."""

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        placement: Placement | None = None,
        *,
        on_progress: Callable[[str, int, int], None] | None = None,
        copies: bool | None = None,
        workers: int = 1,
        **keywords: Any,
    ) -> None:
        """`model`: an alias, a folder, a hub id or a .gguf file. `on_progress(what, done, total)` hears of a fetch.
        `copies`: stage layers as for a GPU, by copies; default: where the device is one. `workers`: processes of this
        machine that read the model, which then share one tier in RAM.

        Raises ModelNotFound, CheckpointError, UnsupportedArchitecture or OptionError."""
        placement = from_keywords(keywords, Placement, placement)
        _refuse(keywords)
        self.opened = opened = open_model(model, placement, copies=copies, workers=workers, on_progress=on_progress)
        weakref.finalize(self, opened.rows.close)
        self.resident = ResidentModel(opened.skeleton, opened.device, opened.copies)
        self.name, self.path, self.device, self.dtype = opened.name, opened.path, opened.device, opened.dtype
        self.tokenizer, self.checkpoint, self.skeleton = opened.tokenizer, opened.checkpoint, opened.skeleton
        self.sizes, self.context_length = opened.sizes, opened.sizes.context
        self.encode, self.encode_chat = opened.prompts.encode, opened.prompts.encode_chat
        self.has_chat_template = opened.prompts.has_chat_template

    @property
    def budget(self) -> int:
        """Bytes that a run may hold on the device, or on each of several: what --device-memory says. May be set, for
        the next run."""
        return self.opened.budget

    @budget.setter
    def budget(self, size: int | str) -> None:
        self.opened = self.opened.with_budget(parse_budget(size))

    @property
    def bytes_from_disk(self) -> int:
        """Bytes of the checkpoint that this engine has made the disk read so far: none for what the page cache had."""
        return self.opened.rows.disk.total

    def plan(
        self,
        prompt_tokens: int,
        max_new_tokens: int = 256,
        pruning: Pruning | None = None,
        *,
        sequences: int = 1,
        per_prompt: bool = False,
        fidelity: bool = True,
        **keywords: Any,
    ) -> Plan:
        """What a run of one prompt will hold, or of `sequences` together, the longest of `prompt_tokens`.
        `fidelity`: it is measured, as by default.

        What the pruning leaves open is chosen (see planning/ladder.py). Raises PromptError, OptionError, and
        BudgetError if it does not fit."""
        pruning = from_keywords(keywords, Pruning, pruning)
        _refuse(keywords)
        return self.opened.plan(prompt_tokens, max_new_tokens, pruning, sequences, per_prompt, fidelity)

    def generate(
        self,
        prompt_ids: list[int],
        pruning: Pruning | None = None,
        decoding: Decoding | None = None,
        *,
        on_text: OnText | None = None,
        continues: bool = False,
        **keywords: Any,
    ) -> Answer:
        """Answer a prompt: the first forward is the prompt pass, the rest run the resident model.

        `on_text` gets the answer as it is made. `continues`: the prompt is a turn of a conversation: the KV cache stays
        for the next one, and of this prompt only the tokens are computed that the last one, if it continues too, did
        not have. All else: see `generate_batch`."""
        keywords |= {"on_text": on_text, "continues": continues}
        return self.generate_batch([prompt_ids], pruning, decoding, **keywords)[0]

    def generate_batch(
        self,
        prompts: Sequence[list[int]],
        pruning: Pruning | None = None,
        decoding: Decoding | None = None,
        *,
        per_prompt: bool = False,
        on_text: OnText | None = None,
        on_layer: OnLayer | None = None,
        on_plan: Callable[[Plan], None] | None = None,
        continues: bool = False,
        shared: int = 0,
        **keywords: Any,
    ) -> list[Answer]:
        """Answer several prompts after one prompt pass: with one set of kept neurons, for which every prompt counts the
        same, or (`per_prompt`) each with its own, as if it were alone. All answers share one report.

        `on_layer(done, total)` hears of the prompt pass, `on_plan` of the plan before anything is read. `shared`: so
        many tokens begin all prompts; they pass through the model once, and stay for the next batch that begins with
        them, where that leaves the answers as they are (the report's `shared` says). Keywords that are no field of a
        group go to transformers' `generate`.
        A KeyboardInterrupt after the first token ends the answers; before it, it is raised."""
        on_token = texts_to(on_text) if on_text else None
        asked = _asked(prompts, pruning, decoding, keywords)
        asked = replace(asked, per_prompt=per_prompt, on_layer=on_layer, on_token=on_token, on_plan=on_plan)
        if continues and len(prompts) != 1:
            raise OptionError(f"one conversation continues at a time: {len(prompts)} prompts are given")
        if shared and len(prompts) > 1 and all(prompts):
            if any(ids[:shared] != prompts[0][:shared] for ids in prompts):
                raise OptionError(f"shared {shared}: the prompts do not begin with the same {shared} tokens")
            asked = with_prefix(self.opened, self.resident, asked, shared)
        return self._answer(replace(asked, continues=continues))

    def stream(
        self,
        prompt_ids: list[int],
        pruning: Pruning | None = None,
        decoding: Decoding | None = None,
        *,
        on_layer: OnLayer | None = None,
        continues: bool = False,
        **keywords: Any,
    ) -> TokenStream[Answer]:
        """An iterator over the tokens of an answer; closing it cancels the rest. Its `answer` has the report.

        The prompt pass runs when the first token is asked for. `continues`: as of `generate`; keywords: as of
        `generate_batch`."""
        asked = replace(_asked([prompt_ids], pruning, decoding, keywords), on_layer=on_layer, continues=continues)

        def make(on_token: OnToken) -> Answer:
            return self._answer(replace(asked, on_token=on_token))[0]

        return TokenStream(make)

    def _answer(self, asked: Asked) -> list[Answer]:
        if asked.decoding.refresh:
            return [answer_refreshed(self.opened, self.resident, asked)]
        return answer(self.opened, self.resident, asked)

    def kept_neurons(self) -> tuple[tuple[Tensor, ...], ...]:
        """By layer and block: the neurons that the last prompt kept, (k,) or of each expert (E, k), int64, ascending.

        Empty where nothing is resident."""
        return self.resident.kept_neurons()

    def export(
        self,
        prompt_ids: list[int],
        out: Path,
        pruning: Pruning | None = None,
        export_format: ExportFormat | None = None,
        *,
        prompt_text: str,
        seed: int = 0,
        force: bool = False,
        **keywords: Any,
    ) -> Export:
        """Write the model pruned to a prompt (sparsity 0.5 if none is given): as a folder that plain transformers
        loads, or, with the format "gguf", as a file for llama.cpp. Nothing is resident after it. The other neurons are
        dropped, since neither can hold one layer's neurons in two formats.

        Layers are written as the prompt passes, so that the pruned model is never held. `prompt_text` is hashed into
        the model card. Raises OptionError, ExportError, BudgetError, and what a prompt pass raises."""
        on_layer: OnLayer | None = keywords.pop("on_layer", None)
        pruning = from_keywords(keywords, Pruning, pruning)
        export_format = from_keywords(keywords, ExportFormat, export_format)
        _refuse(keywords)
        source = ExportSource(self.name, self.path, list(prompt_ids), prompt_text)
        asked = ExportAsked(source, Path(out), pruning, export_format, seed, force, on_layer)
        return write_export(self.opened, self.unload, asked)

    def export_static(
        self,
        calibration: Calibration,
        out: Path,
        pruning: Pruning | None = None,
        export_format: ExportFormat | None = None,
        *,
        force: bool = False,
        host_memory: int | str | None = None,
        **keywords: Any,
    ) -> tuple[Export, Prior]:
        """As `export`, the neurons chosen by many samples, or by the weights alone. Also returns the scores of all
        neurons that they were chosen by, as a prior.

        `host_memory`: RAM for the hidden states of samples that wait for a layer (None: what there is, on the CPU what
        the budget leaves); the others wait in a file without a name beside `out`."""
        on_layer: OnLayer | None = keywords.pop("on_layer", None)
        pruning = from_keywords(keywords, Pruning, pruning)
        export_format = from_keywords(keywords, ExportFormat, export_format)
        _refuse(keywords)
        source = ExportSource(self.name, self.path, [], "", calibration)
        given = (pruning, export_format, calibration.seed, force, on_layer, _size(host_memory))
        written = write_export(self.opened, self.unload, ExportAsked(source, Path(out), *given))
        return written, Prior(written.scores, {**self.opened.facts, **calibration.to_json()})

    def score_samples(
        self, calibration: Calibration, on_layer: OnLayer | None = None, *, host_memory: int | str | None = None
    ) -> Prior:
        """Scores of every neuron over many samples, from one reading of the weights. Nothing is resident after it.

        `host_memory`: as of `export_static`; the file is in the folder for temporary ones. Raises PromptError for a
        sample beyond the context, BudgetError, GriffinError where the disk is full, and what a prompt pass raises."""
        return score_samples(self.opened, self.unload, calibration, on_layer, _size(host_memory))

    def prior(self, on_layer: OnLayer | None = None) -> Prior | None:
        """The model's own prior: scores of every neuron over a text that ships with Griffin, measured once and kept in
        the cache; None where the budget has no room to measure it. Nothing is resident after a measurement."""
        return known_prior(self.opened, self.unload, on_layer)

    def sweep(
        self,
        prompt_ids: list[int],
        pruning: Pruning | None = None,
        max_new_tokens: int = 1,
        *,
        seed: int | None = None,
        beside: int = 0,
        on_layer: OnLayer | None = None,
        **keywords: Any,
    ) -> Any:
        """The prompt pass alone: transformers' output (logits of the last token, KV cache); the model stays resident.

        For programs that drive `engine.skeleton.model` themselves; the cache has room for `max_new_tokens` more.
        `beside`: bytes of the device that such a program holds from before the pass, or will take after it."""
        pruning = from_keywords(keywords, Pruning, pruning)
        _refuse(keywords)
        plan = self.opened.plan(len(prompt_ids), max_new_tokens, pruning, beside=beside)
        selection = known_selection(self.opened, self.unload, pruning, seed, plan)
        reader = self.opened.reader(plan)
        try:
            with self._planned(plan):
                ids, mask = self.opened.batch([prompt_ids])
                with self.resident.prepare(plan, selection, reader, on_layer, mask), torch.no_grad():
                    cache = self.opened.kv_cache(plan)
                    return self.skeleton.model(ids, past_key_values=cache, use_cache=True, **self.opened.last_logits)
        finally:
            reader.close()

    @contextmanager
    def passage(
        self, tokens: int, waiting: int = 0, on_layer: OnLayer | None = None, job_hooks: Sequence[LayerHook] = ()
    ) -> Generator[Lockstep, None, None]:
        """The whole model passes once, layer by layer, through as many forwards as are given to its `run`; nothing
        stays. `tokens`: of the largest forward; `waiting`: bytes that all of them hold between two layers;
        `job_hooks`: one for each forward, which acts on it alone.

        Raises BudgetError where that does not fit."""
        plan = self.plan_passage(tokens, waiting)
        self.unload()
        reader, copies = self.opened.reader(plan), self.opened.copies
        try:
            with (
                self._planned(plan),
                passing(
                    self.skeleton,
                    reader,
                    plan,
                    self.device,
                    hooks=lambda _: {"job_hooks": job_hooks},
                    copies=copies,
                    on_layer=on_layer,
                ) as lockstep,
            ):
                yield lockstep
        finally:
            reader.close()
            self.unload()

    def plan_passage(self, tokens: int, waiting: int = 0) -> Plan:
        """What a `passage` will hold. Raises BudgetError."""
        request = replace(self.opened.request(tokens, 1), export=True, waiting=waiting)
        return choose_plan(self.sizes, request, 0.0, self.name)

    def _planned(self, plan: Plan) -> AbstractContextManager[None]:
        """Out of memory in this block, which `plan` is of, is a BudgetError."""
        return planned(self.device, plan.peak, self.unload, plan.peaks)

    def unload(self) -> None:
        """Give the weights' memory back; the next prompt reads them again."""
        self.resident.unload()
        self.opened.rows.close()


def _asked(
    prompts: Sequence[list[int]], pruning: Pruning | None, decoding: Decoding | None, keywords: dict[str, Any]
) -> Asked:
    """The option groups, changed by keywords; those that are no field of them are transformers' own."""
    pruning = from_keywords(keywords, Pruning, pruning)
    decoding = from_keywords(keywords, Decoding, decoding)
    return Asked(prompts, pruning, replace(decoding, more={**decoding.more, **keywords}))


def _refuse(keywords: dict[str, Any]) -> None:
    """Raises TypeError for keywords that nobody takes, as Python does."""
    if keywords:
        raise TypeError(f"unexpected keyword arguments: {', '.join(keywords)}")


def _size(size: int | str | None) -> int | None:
    return None if size is None else parse_bytes(size)

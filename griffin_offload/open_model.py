"""A model whose config, tokenizer and headers are loaded; no weights yet."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from .checkpoint.extra_layers import ExtraLayers, without_extra_layers
from .checkpoint.headers import Checkpoint
from .checkpoint.key import checkpoint_key
from .checkpoint.page_cache import mostly_cached
from .checkpoint.reader import Reader, buffer_bytes
from .errors import (
    BudgetError,
    CheckpointError,
    ContextError,
    GriffinError,
    OptionError,
    PromptError,
    one_line,
)
from .memory.heap import return_freed_memory
from .memory.host_cache import room_for_layers
from .memory.machine import available_memory, device_budget, devices_of, held_memory, how_known
from .memory.out_of_memory import planned
from .memory.shared_tier import SharedTier
from .memory.upload import Ring, ring_for
from .model.architecture import ARCHITECTURES
from .model.chat_template import ChatTemplate, Message, take_processors_template
from .model.compute_dtype import compute_dtype
from .model.config_fields import override_fields
from .model.generation_fields import check_generation, load_generation_config
from .model.kv_cache import make_cache
from .model.long_texts import PIECE, has_more_tokens
from .model.modules import multiply_by_the_quicker_way
from .model.multimodal import refuse_media
from .model.norms import norm_by_own_kernel
from .model.pretrained import check_layers, load_tokenizer, read_headers
from .model.skeleton import Skeleton
from .native.library import check_asked
from .offload.probe import probe
from .options import AUTO, OFF, WITHOUT_STATISTIC, Placement, Pruning
from .paths import cache_folder, expand, source_name
from .planning.advice import what_helps
from .planning.cards import card_here
from .planning.ladder import best_plan, plan_at_speed
from .planning.lossless import MOST_DRAFTS, lossless_plan
from .planning.plan import Plan
from .planning.request import Card, Earlier, Request
from .planning.sizes import ModelSizes, bounded, model_sizes
from .pruning.layer_allocation import Curves, calibration_path, load_curves
from .pruning.prior import Prior, check_prior, load_prior, prior_path
from .pruning.selection import Selection
from .pruning.shipped_text import shipped_text_hash
from .quant.products import choose, load_libraries
from .sources.resolve import resolve
from .units import format_bytes, parse_budget


@dataclass(frozen=True)
class OpenModel:
    """One model on one device, or its layers on several. In bytes: `budget`; `host_memory`, for layers between prompts
    (`host_memory_is_free`: what was free when the model was opened); `runtime`, what the process held there before any
    weight; `converts`, the reader's buffers. `ring`: by which layers come to a device where the reader cannot write.
    `static`: tokens are decoded by static steps, as CUDA graphs record them. `context`: the most tokens; None: the
    model's. `rows`: reads the embedding's rows where it stays on disk. `overridden`: fields of the checkpoint's configs
    that do not act here, and why, in words. `extra_layers`: what its files hold for drafting further tokens, which is
    not read. `shared`: the tier in RAM where several processes read this checkpoint; `host_memory` is 0 then. `cards`:
    the devices where there are several, `device` and `budget` those of the first."""

    name: str
    path: Path
    device: str
    config: Any
    tokenizer: Any
    checkpoint: Checkpoint
    skeleton: Skeleton
    rows: Reader
    budget: int
    host_memory: int
    runtime: int
    converts: int
    static: bool
    ring: Ring | None
    extra_layers: ExtraLayers
    host_memory_is_free: bool = False
    context: int | None = None
    overridden: tuple[str, ...] = ()
    shared: SharedTier | None = None
    cards: tuple[Card, ...] = ()

    @property
    def copies(self) -> bool:
        """Whether the device is not where the reader writes."""
        return self.ring is not None

    @property
    def where(self) -> str:
        """'cuda, budget 22.00 GiB', or the same of each of several devices."""
        cards = self.cards or (Card(self.device, self.budget),)
        each = ((str(card) if self.cards else card.device, card.budget) for card in cards)
        return "; ".join(f"{name}, budget {format_bytes(budget)}" for name, budget in each)

    @property
    def dtype(self) -> str:
        return str(self.skeleton.layout.dtype).removeprefix("torch.")

    @property
    def sizes(self) -> ModelSizes:
        return bounded(model_sizes(self.skeleton.layout), self.context, self.name)

    @property
    def facts(self) -> dict[str, str]:
        """Which model this is, for what is made of it."""
        return {"model": source_name(self.name, self.path), "key": checkpoint_key(self.checkpoint)}

    @property
    def eos_token_ids(self) -> set[int]:
        end = self.skeleton.model.generation_config.eos_token_id
        return set(end if isinstance(end, list) else [end]) - {None}

    def end_tokens(self, options: Mapping[str, Any]) -> set[int]:
        """The tokens that end an answer made with these options of transformers' `generate`."""
        given = (options.get("eos_token_id"), getattr(options.get("generation_config"), "eos_token_id", None))
        end = next((each for each in given if each is not None), None)
        return self.eos_token_ids if end is None else set(torch.as_tensor(end).flatten().tolist())

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, prompt: str, *, system: str | None = None, raw: bool = False, cut: bool = False) -> list[int]:
        """Token ids of one user turn in the chat template, or of the bare text (`raw`, or no template). `cut`: the
        text may be longer than the model reads. Raises PromptError, ContextError, BudgetError."""
        if not prompt.strip():
            raise PromptError("the prompt is empty: give some text")
        if raw or not self.has_chat_template:
            if system:
                raise PromptError("--system needs a model with a chat template, and no --raw")
            if not cut:
                self._check_length(prompt)
            return self.check_tokens(list(self.tokenizer(prompt)["input_ids"]))
        turns = [{"role": "system", "content": system}] if system else []
        return self.encode_chat([*turns, {"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins. `options`: what the chat template may be told
        beside it, such as `tools`. Raises PromptError without a chat template, and for images and other media;
        ContextError, BudgetError."""
        refuse_media(messages)
        if not self.has_chat_template:
            raise PromptError(f"{self.name} has no chat template: use `griffin generate --raw`")
        ids = self.chat_template.encode(messages, check=self._check_length, **options)
        return self.check_tokens(ids)

    def _check_length(self, text: str) -> None:
        """Before a text is tokenized, which takes hundreds of bytes a token. Raises ContextError for more tokens than
        the model reads, BudgetError for more than the budget has room for."""
        if len(text) <= PIECE:
            return
        sizes, row = self.sizes, self.config.get_text_config().hidden_size * self.skeleton.layout.dtype.itemsize
        fits = self.budget // row  # each has a hidden state
        if has_more_tokens(self.tokenizer, text, min(sizes.context, fits)):
            told = f"the prompt, {format_bytes(len(text))} of text, has more than {min(sizes.context, fits)} tokens"
            if sizes.context <= fits:
                raise ContextError(f"{told}; {self.name} reads at most {sizes.context}, answer included")
            raise BudgetError(f"{told}, and {format_bytes(self.budget)} hold no more: give fewer, or more memory")

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """What makes a prompt of a conversation. It is there even where the tokenizer has no template."""
        return ChatTemplate(self.tokenizer, self.name)

    def check_generation(self, options: dict[str, Any]) -> None:
        """Raises OptionError for options of `generate`, or fields of the generation config, that cannot act here."""
        check_generation(self.skeleton.model.generation_config, options, self.skeleton.rows_of_table)

    def check_tokens(self, ids: list[int]) -> list[int]:
        """The same ids. Raises PromptError for a token that the table of embeddings has no row for."""
        rows = self.skeleton.rows_of_table
        if (wrong := next((token for token in ids if not 0 <= token < rows), None)) is not None:
            text = self.tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
            token = f"{wrong} ({text!r})" if text else wrong
            raise PromptError(
                f"token {token} has no row in {self.name}'s table of {rows} embeddings: "
                "the tokenizer has tokens that the model was never resized for; leave them out of the prompt"
            )
        return ids

    def request(self, prompt_tokens: int, max_new_tokens: int) -> Request:
        """What a plan of one prompt and the whole model is made for, within the budget of this model's device."""
        return Request(
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            sparsity=0.0,
            budget=self.budget,
            device=self.device,
            runtime=self.runtime,
            runtime_note=how_known(self.device),
            converts=self.converts,
            copies=self.copies,
            static=self.static,
            ring=self.ring,
            host_memory=0 if self.host_memory_is_free and self.by_page_cache else self.host_memory,
        )

    def plan(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        pruning: Pruning,
        sequences: int = 1,
        per_prompt: bool = False,
        fidelity: bool = False,
        earlier: Earlier | None = None,
        lossless: bool = False,
        beside: int = 0,
    ) -> Plan:
        """The plan of a run of one prompt, or of `sequences` together, the longest of `prompt_tokens`.

        `fidelity`: it is measured; `earlier`, `beside`: see Request; `lossless`: it drafts for the full model. Raises
        PromptError, OptionError, and BudgetError if it does not fit."""
        request = self._request_of(prompt_tokens, max_new_tokens, pruning, sequences, per_prompt, fidelity)
        request = replace(request, earlier=earlier, beside=beside, drafts=MOST_DRAFTS if lossless else 0)
        choose = lossless_plan if lossless else best_plan
        return plan_at_speed(choose, self.sizes, request, pruning, self.name, self.skeleton.layout.dtype)

    def what_helps(self, plan: Plan, pruning: Pruning, sequences: int = 1, per_prompt: bool = False) -> list[str]:
        """Options that would keep more of the full model than a plan of this pruning does, and fit the budget."""
        tokens = plan.prompt_tokens, plan.max_new_tokens
        request = self._request_of(*tokens, pruning, sequences, per_prompt, plan.read_again > 0)
        return what_helps(self.sizes, request, plan, chosen=pruning.sparsity is None, method=pruning.method)

    def _request_of(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        pruning: Pruning,
        sequences: int,
        per_prompt: bool,
        fidelity: bool,
    ) -> Request:
        return replace(
            self.on_all_cards(self.request(prompt_tokens, max_new_tokens)),
            curves=self.allocation_curves(pruning),
            fold=pruning.folds,
            skip=pruning.skip if pruning.skip.share else None,
            sequences=sequences,
            sets=sequences if per_prompt else 1,
            fidelity=fidelity and (pruning.skip.by_prompt or not pruning.skip.share),
        )

    def on_all_cards(self, request: Request) -> Request:
        """The request of an answer, whose layers may be on several cards; all else has the first alone."""
        return replace(request, cards=self.cards, budget=sum(c.budget for c in self.cards)) if self.cards else request

    def with_budget(self, size: int) -> "OpenModel":
        """The same with another budget, of several cards on each."""
        return replace(self, budget=size, cards=tuple(replace(card, budget=size) for card in self.cards))

    def allocation_curves(self, pruning: Pruning) -> Curves | None:
        """What shares a sparsity over the layers; None: all layers the same, also where nothing was calibrated."""
        if pruning.allocation != AUTO:
            return None if pruning.allocation == "uniform" else self.curves()
        if pruning.skip.share and pruning.skip.by_prompt:  # which needs layers of one size
            return None
        with suppress(GriffinError, OSError):  # a file that is gone is told when it is read
            return self.curves()
        return None

    def curves(self) -> Curves | None:
        """What `griffin calibrate` measured of this checkpoint; None if it did not. Raises GriffinError."""
        return load_curves(calibration_path(cache_folder(), checkpoint_key(self.checkpoint)))

    def selection(self, pruning: Pruning, seed: int | None, plan: Plan) -> Selection:
        """How a plan's neurons are chosen. Reads the prior's file, where one is named or the model has one.

        Raises OptionError for a prior that is another model's or cannot act, GriffinError for a file that is none."""
        prior: Prior | None = None
        if self.takes_prior(pruning, plan):
            prior = self.stored_prior()
        elif pruning.prior not in (AUTO, OFF, None):
            prior = pruning.prior
            if isinstance(pruning.prior, str | Path):
                prior = load_prior(expand(pruning.prior))
            self.check_prior(prior)
            if pruning.selection in WITHOUT_STATISTIC:
                raise OptionError(
                    f"selection {pruning.selection!r} uses no statistic that a prior could join: leave one of them out"
                )
            if not plan.prunes:
                raise OptionError(
                    "a prior chooses among neurons, and all of them are kept: give --sparsity, or no prior"
                )
        return Selection(pruning.selection, seed or 0, prior, pruning.prior_weight)

    @staticmethod
    def takes_prior(pruning: Pruning, plan: Plan) -> bool:
        """Whether the model's own prior has a say in what a plan keeps."""
        drops = plan.rest == "drop" and pruning.prior == AUTO
        return drops and pruning.prior_weight != 0 and pruning.selection not in WITHOUT_STATISTIC

    def lacks_prior(self, pruning: Pruning, plan: Plan) -> bool:
        """Whether the model's own prior has a say, and has not been measured yet."""
        return self.takes_prior(pruning, plan) and self.stored_prior() is None

    def stored_prior(self) -> Prior | None:
        """The prior of the text that ships with this version, as an earlier run measured it; None if none did."""
        with suppress(GriffinError, OSError):
            prior = load_prior(prior_path(cache_folder(), checkpoint_key(self.checkpoint)))
            if prior.facts.get("text_sha256") == shipped_text_hash():
                self.check_prior(prior)
                return prior
        return None

    def check_prior(self, prior: Prior) -> None:
        """Raises OptionError for the prior of another model."""
        shapes = [[block.statistic_shape for block in layer.blocks] for layer in self.skeleton.layers]
        check_prior(prior, shapes, self.name)

    @property
    def by_page_cache(self) -> bool:
        """Whether the next prompt will find the weights in the page cache."""
        return not self._is_large or mostly_cached({info.file for info in self.checkpoint.tensors.values()})

    @property
    def _is_large(self) -> bool:
        """Whether the checkpoint would fill much of the page cache."""
        return self.checkpoint.bytes > available_memory() // 8

    def reader(self, plan: Plan) -> Reader:
        """For a run of this plan. Past the page cache where it lacks a part of a large checkpoint. A small one is read
        through it: the next run finds it there. Where processes share a tier, what has room goes through it."""
        files, disk = self.checkpoint.files, self.rows.disk
        if self.shared is None:
            return Reader(self._is_large, files, disk=disk)
        peak = plan.host_peak if self.copies else plan.peak
        share = self.shared.share(self.checkpoint.bytes, peak, counts_process=not self.copies)
        return Reader(share < 1, files, share, disk)

    def batch(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, T), padded on the left, and which of them count (B, T), int64.

        A row is padded with its own first token: penalties, which count padding too, know it already."""
        longest = max(map(len, prompts))
        ids = [[*prompt[:1] * (longest - len(prompt)), *prompt] for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def kv_cache(self, plan: Plan, sequences: int = 1) -> Any:
        return self.cache_for(plan.prompt_tokens + plan.max_new_tokens, sequences, plan.devices)

    def cache_for(self, tokens: int, sequences: int = 1, devices: Sequence[str] = ()) -> Any:
        """A KV cache of so many tokens. `devices`: of each layer, where there are several."""
        row = max(self.sizes.cache_per_token) // 2
        return make_cache(self.config, tokens, row, self.device, sequences, devices)

    @property
    def last_logits(self) -> dict[str, int]:
        """The option that keeps a forward from computing every token's logits, where the model has it."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.skeleton.model.forward).parameters else {}


def open_model(
    model: str | Path,
    placement: Placement,
    *,
    copies: bool | None = None,
    workers: int = 1,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> OpenModel:
    """Find a model (and fetch it: `on_progress(what, done, total)` hears of that) and read its headers. `workers`:
    processes of this machine that read it.

    Raises ModelNotFound, CheckpointError, UnsupportedArchitecture or OptionError."""
    check_asked()
    return_freed_memory()  # before anything large is allocated: what the heap has grown to stays in use
    device, *others = devices_of(placement.device)
    path = resolve(model, on_progress=on_progress)
    headers = read_headers(path)
    config, checkpoint = headers.config, headers.checkpoint
    overridden = override_fields(path, config)
    check_layers(path, config, checkpoint)
    rows = Reader(files=checkpoint.files)
    dtype, other_dtype = compute_dtype(checkpoint, device, placement.dtype)
    skeleton = _skeleton(path, config, checkpoint, dtype, rows)
    used = {info.name for info in skeleton.layout.infos}
    checkpoint, extra = without_extra_layers(checkpoint, used, len(skeleton.layers))
    if placement.threads:
        torch.set_num_threads(placement.threads)
        skeleton.threads.adapts = False
    with planned(device):  # a GPU may be too full for as much as its context
        skeleton.to_device(device)
    if device == "cpu":
        load_libraries(skeleton.layout.dtype)  # before `runtime` is counted
        if choose(skeleton.layout.dtype, model_sizes(skeleton.layout).full):
            multiply_by_the_quicker_way(skeleton.model)
    settings, told = load_generation_config(path, skeleton.rows_of_table, headers.facts)
    skeleton.model.generation_config = settings
    tokenizer = load_tokenizer(path, headers.whole)
    take_processors_template(path, tokenizer)
    return_freed_memory()  # what reading the tokenizer left would be counted twice: what is allocated next fills it
    bounded(model_sizes(skeleton.layout), placement.context, str(model))
    runtime = held_memory(device)
    size, copies = placement.device_memory, device != "cpu" if copies is None else copies
    if not copies:
        norm_by_own_kernel(skeleton.model)
    ring = ring_for(device, skeleton.layout.converts) if copies else None
    asked = placement.host_memory
    host_memory, shared = room_for_layers(asked, copies or workers > 1), None
    if workers > 1:
        host_memory, shared = 0, SharedTier(workers, None if asked is None else host_memory)
    budget = device_budget(device) if size is None else parse_budget(size)
    first = [Card(device, budget, runtime, how_known(device))] if others else []
    return OpenModel(
        name=str(model),
        path=path,
        device=device,
        config=config,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        skeleton=skeleton,
        rows=rows,
        budget=budget,
        host_memory=host_memory,
        runtime=runtime,
        converts=_conversion_bytes(skeleton, ring.threads if ring else 1),
        static=device == "cuda" or (copies and device == "cpu"),
        ring=ring,
        host_memory_is_free=ring is not None and asked is None,
        context=placement.context,
        overridden=(*overridden, *other_dtype, *([str(extra)] if extra.tensors else []), *told),
        extra_layers=extra,
        shared=shared,
        cards=(*first, *(card_here(each, size) for each in others)),
    )


def _skeleton(path: Path, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, rows: Reader) -> Skeleton:
    """The model without weights, bound to its checkpoint; one of a type in no table is probed."""
    try:
        skeleton = Skeleton(config, dtype)
        skeleton.bind(checkpoint, rows)
        if config.model_type not in ARCHITECTURES:
            probe(config, skeleton.entry)
    except GriffinError:
        raise
    except Exception as error:  # transformers' and torch's, of sizes that make no model
        raise CheckpointError(f"{path}/config.json does not describe a model: {one_line(error)}") from None
    return skeleton


def _conversion_bytes(skeleton: Skeleton, threads: int) -> int:
    """Bytes of the reading threads' buffers, where weights have another dtype or form on disk."""
    return threads * buffer_bytes(skeleton.layout.infos, skeleton.layout.dtype)

"""A model whose config, tokenizer and headers are loaded; no weights yet."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from .checkpoint.extra_layers import ExtraLayers
from .checkpoint.headers import Checkpoint
from .checkpoint.key import checkpoint_key
from .checkpoint.page_cache import mostly_cached
from .checkpoint.reader import Reader
from .errors import GriffinError, OptionError
from .memory.machine import available_memory, how_known
from .memory.shared_tier import SharedTier
from .memory.upload import Ring
from .model.generation_fields import check_generation
from .model.kv_cache import make_cache
from .model.skeleton import Skeleton
from .options import AUTO, OFF, WITHOUT_STATISTIC, Pruning
from .paths import cache_folder, expand, source_name
from .planning.advice import what_helps
from .planning.ladder import best_plan, plan_at_speed
from .planning.lossless import MOST_DRAFTS, lossless_plan
from .planning.plan import Plan
from .planning.request import Card, Earlier, Request
from .planning.sizes import ModelSizes, bounded, model_sizes
from .prompt_encoder import PromptEncoder
from .pruning.layer_allocation import Curves, calibration_path, load_curves
from .pruning.prior import Prior, check_prior, load_prior, prior_path
from .pruning.selection import Selection
from .pruning.shipped_text import shipped_text_hash
from .units import format_bytes


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

    @cached_property
    def prompts(self) -> PromptEncoder:
        """Text -> token ids."""
        sizes = self.sizes
        fits = self.budget // (sizes.hidden * self.skeleton.layout.dtype.itemsize)  # each has a hidden state
        return PromptEncoder(self.name, self.tokenizer, self.skeleton.rows_of_table, sizes.context, fits, self.budget)

    def check_tokens(self, ids: list[int]) -> list[int]:
        """The same ids. Raises PromptError for a token that the table of embeddings has no row for."""
        return self.prompts.check_tokens(ids)

    def check_generation(self, options: dict[str, Any]) -> None:
        """Raises OptionError for options of `generate`, or fields of the generation config, that cannot act here."""
        check_generation(self.skeleton.model.generation_config, options, self.skeleton.rows_of_table)

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

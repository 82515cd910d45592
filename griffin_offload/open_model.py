"""A model opened on a device, its headers read, its weights in memory or not: what Engine stands on."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from .checkpoint.key import checkpoint_key
from .checkpoint.reader import BOUNCE, DECODING, Reader
from .errors import CheckpointError, GriffinError, OptionError, PromptError, one_line
from .memory.heap import return_freed_memory
from .memory.host_cache import HostTier
from .memory.machine import available_memory, best_device, check_device, device_budget
from .memory.measure import resident_set
from .model.architecture import ARCHITECTURES
from .model.bandwidth import memory_bandwidth, read_by_a_token
from .model.kv_cache import make_cache
from .model.pretrained import (
    check_layers,
    load_config,
    load_generation_config,
    load_tokenizer,
    open_checkpoint,
)
from .model.skeleton import Skeleton, compute_dtype
from .offload.layer_stream import LayerStream
from .offload.outer_weights import load_outer_weights
from .offload.probe import probe
from .offload.resident_layer import ResidentLayer, resident_layers
from .offload.skip_by_prompt import Slots, put_back
from .offload.sweep import Pruner, Sweep
from .options import ALLOCATIONS, DTYPES, FfnSkip, OnLayer, Sparsity, check
from .paths import cache_folder, source_name
from .planning.ladder import best_plan
from .planning.plan import Plan
from .planning.request import Request
from .planning.sizes import model_sizes
from .pruning.layer_allocation import Curves, calibration_path, load_curves, share_neurons
from .pruning.prior import Prior, check_prior
from .pruning.selection import Selection
from .sources.resolve import DEFAULT_MODEL, resolve
from .units import format_bytes, parse_bytes


class Opened:
    """One model on one device. Making it reads headers only; the first prompt reads the weights."""

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str | None = None,
        device_memory: int | str | None = None,
        host_memory: int | str = 0,
        dtype: str | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`device_memory`: bytes, or text such as '4GiB'; default: what is free, less a margin.

        `host_memory`: of RAM, for layers that the next prompt then need not read; on the CPU, what `device_memory`
        leaves of it. `on_progress(what, done, total)` hears of a fetch. Raises ModelNotFound, CheckpointError,
        UnsupportedArchitecture or OptionError."""
        if dtype is not None:
            check(dtype, DTYPES, "dtype")
        return_freed_memory()  # before anything large is taken: what the heap has grown to stays in use
        self.name = str(model)
        self.device = check_device(device) if device else best_device()
        self.path = resolve(model, on_progress=on_progress)
        self.config = load_config(self.path)
        self.checkpoint = open_checkpoint(self.path)
        native = compute_dtype(self.checkpoint)
        check_layers(self.path, self.config, self.checkpoint)
        try:
            self.skeleton = Skeleton(self.config, getattr(torch, dtype) if dtype else native)
            self.skeleton.bind(self.checkpoint)  # first: a head that the files hold beside its table counts too
            self._rows = Reader()
            weakref.finalize(self, self._rows.close)
            self.skeleton.leave_table(self._rows)
            self.sizes = model_sizes(self.skeleton)
            if self.config.model_type not in ARCHITECTURES:
                probe(self.config, self.skeleton.entry)
        except GriffinError:
            raise
        except Exception as error:  # transformers' and torch's, of sizes that make no model
            raise CheckpointError(f"{self.path}/config.json does not describe a model: {one_line(error)}") from None
        self.skeleton.to_device(self.device)
        self.skeleton.model.generation_config = load_generation_config(self.path, self.config)
        self.tokenizer = load_tokenizer(self.path)
        self.dtype = str(self.skeleton.dtype).removeprefix("torch.")
        infos = [piece.info for parts in self.skeleton.pieces.values() for piece in parts]
        self._converts = BOUNCE if any(info.dtype != self.skeleton.dtype for info in infos) else 0
        if any(info.encoding for info in infos):
            self._converts = DECODING
        return_freed_memory()  # what reading the tokenizer left would be counted twice: what is taken next fills it
        self._runtime = resident_set() if self.device == "cpu" else 0
        self.budget = parse_bytes(device_memory) if device_memory is not None else device_budget(self.device)
        self.host_memory = parse_bytes(host_memory)
        if self._copies and self.host_memory > (free := available_memory()):
            raise OptionError(f"--host-memory {format_bytes(self.host_memory)}: {format_bytes(free)} of RAM is free")
        self._tier = HostTier()
        self._layers: list[ResidentLayer] | None = None
        self._head_format: str | None = None  # of what is outside the layers; None: it is not there
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

    def plan(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        sparsity: Sparsity | None = None,
        *,
        allocation: str = "uniform",
        resident_dtype: str | None = None,
        rest: str | None = None,
        skip: FfnSkip | None = None,
        sequences: int = 1,
        per_prompt: bool = False,
    ) -> Plan:
        """The plan of a run of one prompt, or of `sequences` together, the longest of `prompt_tokens`. What is None is
        chosen: see ladder.best_plan. Raises PromptError, OptionError, and BudgetError if it does not fit."""
        request = replace(
            self.request(prompt_tokens, max_new_tokens),
            share=self.share(allocation),
            skip=skip,
            sequences=sequences,
            sets=sequences if per_prompt else 1,
        )
        return best_plan(self.sizes, request, sparsity, resident_dtype, rest, self.name)

    def request(self, prompt_tokens: int, max_new_tokens: int) -> Request:
        """What a plan of one prompt and the full model is made for, within this engine's budget: see plan.make_plan."""
        return Request(
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            sparsity=0.0,
            budget=self.budget,
            runtime=self._runtime,
            converts=self._converts,
            copies=self._copies,
            host_memory=self.host_memory,
        )

    def share(self, allocation: str) -> Callable[[Sequence[int], float], tuple[int, ...]] | None:
        """How an allocation shares a sparsity over the layers (see plan.Request); None: all the same, also where
        'sensitivity' was not calibrated. Raises OptionError for an unknown one."""
        check(allocation, ALLOCATIONS, "allocation")
        if allocation == "uniform":
            return None
        curves = self.curves()
        return partial(share_neurons, curves) if curves else None

    def curves(self) -> Curves | None:
        """What `griffin calibrate` measured of this checkpoint; None if it did not. Raises GriffinError."""
        return load_curves(calibration_path(cache_folder(), checkpoint_key(self.checkpoint)))

    def unload(self) -> None:
        """Give the weights' memory back; the next prompt reads them again."""
        self._tier = HostTier()
        self._unload_model()

    def _unload_model(self) -> None:
        self.skeleton.unload()
        self._layers = self._head_format = None
        self._rows.close()

    @property
    def _facts(self) -> dict[str, str]:
        """Which model this is, for what is made of it."""
        return {"model": source_name(self.name, self.path), "key": checkpoint_key(self.checkpoint)}

    def check_prior(self, prior: Prior) -> None:
        """Raises OptionError for the prior of another model."""
        shapes = [[block.statistic_shape for block in layer.blocks] for layer in self.skeleton.layers]
        check_prior(prior, shapes, self.name)

    def _selection(self, name: str, seed: int | None, prior: Prior | None, prior_weight: float) -> Selection:
        """Raises OptionError for an unknown name, a weight out of range, and a prior that is another model's or cannot
        act."""
        if prior is not None:
            self.check_prior(prior)
            if name in ("magnitude", "random"):
                raise OptionError(f"selection {name!r} looks at no statistic that a prior could join: leave one out")
        return Selection(name, seed or 0, prior, prior_weight)

    @property
    def last_logits(self) -> dict[str, int]:
        """The option that keeps a forward from computing every token's logits, where the model has it."""
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.skeleton.model.forward).parameters else {}

    def _resident(
        self,
        plan: Plan,
        selection: Selection,
        reader: Reader,
        on_layer: OnLayer | None,
        weights: torch.Tensor | None = None,
    ) -> AbstractContextManager[Any]:
        """Memory for the plan, what is outside the layers read, and a sweep for the next forward if it needs one."""
        self._let_go(plan)
        how = plan.precision
        if self._head_format is None:
            load_outer_weights(self.skeleton, reader, self.device, how)
            self._head_format = how.head
        if self._layers is None:
            self._layers = resident_layers(self.skeleton, plan.kept, self.device, how)
        if not plan.reads_again and all(layer.complete for layer in self._layers):
            return nullcontext()
        skip = plan.skip if plan.skip and plan.skip.by_prompt else None
        slots = Slots(self.skeleton, skip, self._layers) if skip else None
        stream = self._stream(self._layers, plan, reader, on_layer)
        return Sweep(stream, Pruner(self.skeleton, self._layers, selection, weights), slots)

    def _let_go(self, plan: Plan) -> None:
        """Free what is resident and not as the plan has it, before anything else is taken."""
        how = plan.precision
        self._tier.hold(plan.held_layers, len(plan.kept))
        if self._layers and plan.skip and plan.skip.by_prompt:
            put_back(self.skeleton, self._layers, plan.kept)
        if [(layer.kept, layer.precision) for layer in self._layers or ()] != [(kept, how) for kept in plan.kept]:
            self._layers = self._bandwidth = None
            self.skeleton.unload(self.skeleton.inside)
        if self._head_format not in (None, how.head):
            self._head_format = None
            self.skeleton.unload(self.skeleton.outer)

    def _stream(self, layers: list[ResidentLayer], plan: Plan, reader: Reader, on_layer: OnLayer | None) -> LayerStream:
        return LayerStream(
            self.skeleton,
            reader,
            layers,
            copies=self._copies,
            steady=plan.steady_heap,
            tier=self._tier,
            on_layer=on_layer,
        )

    def _cache(self, plan: Plan, sequences: int = 1) -> Any:
        row = max(self.sizes.cache_per_token) // 2
        return make_cache(self.config, plan.prompt_tokens + plan.max_new_tokens, row, self.device, sequences)

    def _batch(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, T), padded on the left, and which of them count (B, T), int64."""
        longest = max(map(len, prompts))
        pad = self.skeleton.model.generation_config.pad_token_id or 0
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _reader(self) -> Reader:
        """Past the page cache, unless the checkpoint is small beside the free memory: the next run finds it there."""
        return Reader(direct=self.checkpoint.bytes > available_memory() // 8)

    @property
    def _copies(self) -> bool:
        """Whether the device's memory is not what the reader writes to."""
        return self.device != "cpu"

    def _memory_bandwidth(self) -> float:
        """Measured once for what is resident; 0.0 where Ctrl-C ends it: the answer is there all the same."""
        if self._bandwidth is None:
            try:
                weights = read_by_a_token(self.skeleton.model) + self.skeleton.packed
                self._bandwidth = memory_bandwidth(weights)
            except KeyboardInterrupt:
                return 0.0
        return self._bandwidth

    @property
    def _ends(self) -> set[int]:
        end = self.skeleton.model.generation_config.eos_token_id
        return set(end if isinstance(end, list) else [end]) - {None}

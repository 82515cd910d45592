"""Decodes a token by a step that is the same work at the same addresses for every token, so that a CUDA graph can
replay it.

transformers' generate still drives: processors, sampling, stopping and streaming are its own, and only the model's
forward over one token is answered by the step. A step is recorded for each bucket of cache lengths, so that a short
answer does not look at the whole cache. B sequences, S slots of the cache."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import OptionError, one_line
from ..memory.capture import Capture
from .architecture import ARCHITECTURES
from .compiled import CompiledLayers
from .config_facts import rope_changes
from .modules import LookedUp
from .skeleton import Skeleton
from .static_cache import fixed_cache, not_fixed, rings_of

SMALLEST = 256  # slots of the smallest bucket; each further one is twice as long
TENSORS = {"input_ids", "attention_mask", "position_ids"}  # arguments of a forward that a step knows


def buckets(slots: int) -> list[int]:
    """Lengths of the cache for which a step is recorded: 256, 512, ... and all `slots` that there are."""
    lengths = [SMALLEST]
    while lengths[-1] < slots:
        lengths.append(2 * lengths[-1])
    return [*(length for length in lengths if length < slots), slots]


def why_dynamic(skeleton: Skeleton) -> str:
    """Why a model's tokens cannot be decoded by a static step; '' if they can."""
    kind = skeleton.config.model_type
    if kind not in ARCHITECTURES:
        return f"model type {kind} is in no table"
    if not skeleton.entry.static:
        return f"{kind}'s code decides on the host what a token computes"
    if any(block.routed for layer in skeleton.layers for block in layer.blocks):
        return "routed experts are chosen on the host"
    return "its rotary embedding changes with the length" if rope_changes(skeleton.config) else ""


@dataclass(frozen=True)
class Steps:
    """How tokens were decoded: `tokens` by static steps, of which `recordings` were made; `preparing_s`: seconds that
    compiling and recording took. `why_dynamic`, `why_not_recorded`, `why_not_compiled`: reasons, or ''."""

    tokens: int = 0
    recordings: int = 0
    preparing_s: float = 0.0
    compiled: bool = False
    why_dynamic: str = ""
    why_not_recorded: str = ""
    why_not_compiled: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """'CUDA graphs: 2, prepared in 0.31 s', or why there are none."""
        if self.why_dynamic:
            return f"not static: {self.why_dynamic}"
        parts = [f"CUDA graphs: {self.recordings}" if self.recordings else "static"]
        parts += ["compiled"] if self.compiled else []
        parts += [f"prepared in {self.preparing_s:.2f} s"] if self.preparing_s else []
        parts += [f"not recorded: {self.why_not_recorded}"] if self.why_not_recorded else []
        return ", ".join([*parts, *([self.why_not_compiled] if self.why_not_compiled else [])])


class StaticStep:
    """Answers the forwards over the tokens of answers, each with a cache of its own."""

    def __init__(
        self,
        looked_up: LookedUp | None,
        forward: Callable[..., Any],
        capture: Capture,
        compiled: CompiledLayers | None = None,
    ) -> None:
        """`looked_up`: the model's embedding where it stays on disk; `forward`: the model's."""
        self._looked_up, self._forward, self.capture, self._compiled = looked_up, forward, capture, compiled
        self._prompts: dict[int, Any] = {}  # caches whose first forward, the prompt's, has been; by their ids
        self._answers: dict[int, _Token] = {}  # by their caches
        self._streamers: dict[int, Any] = {}  # likewise
        self._dynamic, self._tokens, self._preparing_s = "", 0, 0.0

    @property
    def steps(self) -> Steps:
        """What was done so far."""
        return Steps(
            tokens=self._tokens,
            recordings=self.capture.count,
            preparing_s=self._preparing_s,
            compiled=self._compiled is not None and not self._compiled.failed,
            why_not_compiled=self._compiled.failed if self._compiled else "",
            why_dynamic=self._dynamic,
            why_not_recorded=self.capture.failed,
        )

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether this forward is a token's after a prompt's. The first one makes the cache a fixed one."""
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        if self.has(cache):
            if ids is None or ids.shape != self._answers[id(cache)].ids.shape:
                raise OptionError("generate asks for several tokens at a time, after one: leave that option out")
            return True
        if id(cache) not in self._prompts:  # however few tokens it has
            self._prompts[id(cache)] = cache
            return False
        if self._dynamic or ids is None or ids.shape[1] != 1 or cache is None or not cache.get_seq_length():
            return False
        self._dynamic = _unknown(arguments) or not_fixed(cache)
        if not self._dynamic:
            self._answers[id(cache)] = _Token(arguments, cache, self._forward, self._compiled, self._looked_up)
        return not self._dynamic

    def has(self, cache: Any) -> bool:
        """Whether the tokens of this cache are decoded by steps: it has taken the first one."""
        return id(cache) in self._answers

    @contextmanager
    def followed_by(self, streamer: Any, cache: Any) -> Iterator[None]:
        """Within it, a BatchStreamer gets the tokens of this cache, and hands each on once the next step is launched:
        its text is made while the device computes."""
        self._streamers[id(cache)], streamer.waits = streamer, True
        try:
            yield
        finally:
            streamer.tell()

    def tell(self, cache: Any) -> None:
        """The token before is handed on, if that was not done yet."""
        if streamer := self._streamers.get(id(cache)):
            streamer.tell()

    def close(self) -> None:
        """The caches hold the tokens of the steps from now on, where they still can."""
        for key, token in self._answers.items():
            for layer in self._prompts[key].layers:
                if layer.is_initialized:
                    layer.fill(token.length)
            token.close()

    def __call__(self, arguments: Mapping[str, Any]) -> CausalLMOutputWithPast:
        """The logits (B, 1, V), valid until the next step."""
        cache, ids = arguments["past_key_values"], arguments["input_ids"]
        key, recorded = id(cache), self.capture.count
        token = self._answers[key]
        bucket, step = token.step()
        if not self.capture.replays((key, bucket)):  # that takes its time
            self.tell(cache)
        begin = time.perf_counter()
        token.ids.copy_(ids)
        if self._looked_up and token.rows:
            self._looked_up.look_ahead(self._on_host(ids, cache), token.rows)
        try:
            self.capture.run((key, bucket), step)
        finally:
            if self._looked_up:
                self._looked_up.ahead = None  # a replay does not take it
        if (self._compiled and token.is_new) or self.capture.count > recorded:
            self._preparing_s += time.perf_counter() - begin
        token.length += 1
        self._tokens += 1
        self.tell(cache)
        return CausalLMOutputWithPast(logits=token.logits, past_key_values=cache)

    def _on_host(self, ids: Tensor, cache: Any) -> list[int]:
        """The tokens (B, 1) of a forward: those that the streamer has got already, or copied now."""
        streamer, tokens = self._streamers.get(id(cache)), []
        if streamer:
            tokens, streamer.tokens = streamer.tokens, []
        return tokens or ids.flatten().tolist()


class _Token:
    """The tensors that a step reads and writes, and the step for each length of the cache.

    `length`: tokens in the cache; `rows`: the tokens' of the embedding, where that stays on disk; `is_new`: the last
    step that was asked for had not been made before."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        cache: Any,
        forward: Callable[..., Any],
        compiled: CompiledLayers | None,
        looked_up: LookedUp | None,
    ) -> None:
        """`arguments`: of the forward over the first token after the prompt; `cache`: the prompt's, of kv_cache.py."""
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        self._cache, self._forward, self._steps = cache, forward, dict[int, Callable[[], None]]()
        self.length, self.is_new = int(cache.get_seq_length()), False
        slots = max(layer.slots for layer in cache.layers)
        self._buckets = [slots] if compiled else buckets(slots)  # a program for each length would take too long
        self._compiled = compiled
        self.ids, self.logits = torch.empty_like(ids), torch.empty(0)
        self.rows = looked_up.rows_ahead(ids) if looked_up else None
        self._position = torch.tensor(self.length, device=ids.device)
        self._rings = rings_of(cache, ids.device)
        counts = torch.ones(len(ids), cache.tokens, dtype=torch.int64, device=ids.device)
        if mask is not None:
            counts[:, : mask.shape[1]] = mask
        padding = self.length - counts[:, : self.length].sum(1, keepdim=True)
        self._counts = counts
        self._arguments: dict[str, Any] = {"use_cache": True, "return_dict": True}
        self._padding = padding if arguments.get("position_ids") is not None else None

    def close(self) -> None:
        """The steps hold this object, and so the cache: without them it goes with the answer."""
        self._steps.clear()

    def step(self) -> tuple[int, Callable[[], None]]:
        """The bucket of the next token, and what computes its logits from its id."""
        bucket = next((length for length in self._buckets if length > self.length), self._buckets[-1])
        self.is_new = bucket not in self._steps
        if self.is_new:
            self._steps[bucket] = self._make_step(bucket)
        return bucket, self._steps[bucket]

    def _make_step(self, bucket: int) -> Callable[[], None]:
        cache = fixed_cache(self._cache, bucket, self._position, self._rings)
        # Where every layer slides, the last bucket is for all tokens, however many: their numbers go beyond its slots.
        counts = self._counts if bucket == self._buckets[-1] else self._counts[:, :bucket]

        def step() -> None:
            for ring in self._rings.values():
                ring.move(self._position)
            positions: dict[str, Any] = (
                {} if self._padding is None else {"position_ids": self._position - self._padding}
            )
            more = positions | self._arguments
            self.logits = self._run(input_ids=self.ids, attention_mask=counts, past_key_values=cache, **more).logits
            self._position.add_(1)

        return step

    def _run(self, **arguments: Any) -> Any:
        """The model's forward, with compiled layers unless they cannot be compiled."""
        if self._compiled and not self._compiled.failed:
            try:
                with self._compiled.in_place():
                    return self._forward(**arguments)
            except Exception as error:  # the compiler's, of many kinds; what else there is will come again
                self._compiled.failed = f"not compiled: {one_line(error)}"
        return self._forward(**arguments)


def _unknown(arguments: Mapping[str, Any]) -> str:
    """What a forward is asked for that a step does not do; ''."""
    for name, value in arguments.items():
        if (isinstance(value, Tensor) and name not in TENSORS) or (name.startswith("output_") and value):
            return f"generate asks for {name}"
    return ""


@contextmanager
def static_decoding(
    skeleton: Skeleton, capture: Capture, compiled: CompiledLayers | None = None
) -> Iterator[StaticStep]:
    """While it is open, the model's forwards of one token after a prompt are static steps. Once one was taken, the
    prompt's cache is used up by them."""
    model = skeleton.model
    forward, prepare, update = (
        model.forward,
        model.prepare_inputs_for_generation,
        model._update_model_kwargs_for_generation,
    )
    step = StaticStep(skeleton.slots.looked_up, forward, capture, compiled)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not args and step.takes(kwargs):
            return step(kwargs)
        step.tell(kwargs.get("past_key_values"))
        return forward(*args, **kwargs)

    @wraps(prepare)
    def prepare_inputs(input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if next_sequence_length == 1 and step.has(cache):
            return {"input_ids": input_ids[:, -1:], "past_key_values": cache}
        return prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    @wraps(update)
    def update_arguments(outputs: Any, arguments: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if step.has(outputs.get("past_key_values")):
            return arguments  # masks and positions grow within the step
        return update(outputs, arguments, *args, **kwargs)

    model.forward, model.prepare_inputs_for_generation = run, prepare_inputs
    model._update_model_kwargs_for_generation = update_arguments
    try:
        yield step
    finally:
        model.forward, model.prepare_inputs_for_generation = forward, prepare
        model._update_model_kwargs_for_generation = update
        step.close()

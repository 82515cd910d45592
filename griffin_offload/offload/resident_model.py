"""What of a model is in memory between prompts, and what the next prompt must read."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Reader
from ..memory.arena import arenas_on, padded
from ..memory.heap import trim_heap
from ..memory.host_cache import HostTier
from ..memory.page_locks import locker_for
from ..model.bandwidth import memory_bandwidth, read_by_a_token
from ..model.hops import Hops
from ..model.skeleton import Skeleton
from ..options import OnLayer, Pruning
from ..planning.plan import Plan
from ..planning.sizes import Kept
from ..pruning.fold import fold_tokens
from ..pruning.selection import Selection
from ..quant.precision import Precision
from .earlier_turns import REWRITTEN, EarlierTurns, Statistics, TurnStatistics
from .folding import Folding
from .layer_hook import HookSequence, LayerHook
from .layer_stream import LayerStream
from .lockstep import Lockstep
from .outer_weights import load_outer_weights
from .pruner import Pruner
from .resident_layer import ResidentLayer, another_set, resident_layers
from .shared_prefix import SharedPrefix
from .skip_by_prompt import EmptyBlocks, put_back
from .sweep import Sweep


class State(Enum):
    """What is in memory."""

    EMPTY = "nothing"
    OUTER = "embeddings, final norm and lm_head"
    PARTIAL = "memory for every layer, not all of it filled"
    COMPLETE = "every layer as its plan has it"


class ResidentModel:
    """The weights of one model, as the last plan had them: on one device, or the layers on several."""

    def __init__(self, skeleton: Skeleton, device: str, copies: bool) -> None:
        """`copies`: the device is not where the reader writes."""
        self._skeleton, self._device, self._copies = skeleton, device, copies
        self._tier = self._new_tier()
        self._has_outer = False
        self._lm_head_format = ""  # of the lm_head that is loaded
        self._bandwidth: float | None = None  # not measured yet
        self.layers: list[ResidentLayer] = []
        self._ends: tuple[int, ...] = ()  # on several devices, see Plan
        self._hops: Hops | None = None  # where layers are on other devices
        self.turns = EarlierTurns()
        self.prefix: SharedPrefix | None = None  # what the last batch's prompts began with
        self._turn: TurnStatistics | None = None  # of the pass at hand, or of the last one

    @property
    def device(self) -> str:
        return self._device

    @property
    def state(self) -> State:
        if not self._has_outer:
            return State.EMPTY
        if not self.layers:
            return State.OUTER
        return State.COMPLETE if all(layer.complete for layer in self.layers) else State.PARTIAL

    def match(self, plan: Plan) -> None:
        """Free what is resident and not as the plan has it, before anything else is allocated."""
        layout, slots = self._skeleton.layout, self._skeleton.slots
        if not plan.shares:
            self.prefix = None
        if self.ends != plan.ends:  # before keys move to a card that the old layers fill
            self._drop_layers()
            slots.unload(layout.inside)
        if plan.earlier_tokens and not plan.shares:
            with self._skeleton.threads.fitted(1):  # many small copies
                room = plan.prompt_tokens + plan.max_new_tokens
                self.turns.go_back(plan.earlier_tokens, room, plan.devices)
            trim_heap()  # what the last turn freed would count beside this one
        elif self.turns.cache is not None:
            self.turns.clear()
            trim_heap()
        if not plan.repeats:
            self.turns.answered = None
        self._tier.hold(plan.held_layers, len(plan.kept))
        if self.layers and plan.skip and plan.skip.by_prompt:
            put_back(layout, self.layers, plan.kept)
        planned = [(kept, plan.precision, device) for kept, device in zip(plan.kept, self._devices(plan), strict=True)]
        if [(layer.kept, layer.precision, layer.device) for layer in self.layers] != planned:
            self._drop_layers()
            slots.unload(layout.inside)
        if self._has_outer and self._lm_head_format != plan.precision.head:
            self._has_outer = False
            slots.unload(layout.outer)

    def prepare(
        self,
        plan: Plan,
        selection: Selection,
        reader: Reader,
        on_layer: OnLayer | None,
        mask: Tensor,
    ) -> AbstractContextManager[Any]:
        """Memory for the plan, the outer weights loaded, and the sweep that the next forward is, if it needs one.

        `mask` (B, T), int64: which tokens of the prompts count, all of which count the same."""
        self.match(plan)
        lengths, new = mask.sum(1, keepdim=True), mask.cumsum(1) > plan.earlier_tokens
        mask = (mask * new)[:, plan.earlier_tokens :]  # of the pass, new tokens alone
        self._load_outer(plan, reader)
        if not self.layers:
            self._allocate(plan)
        self._turn = self._turn_statistics(plan) if plan.continues and plan.prunes and not plan.repeats else None
        if plan.repeats or (not plan.reads_again and self.state is State.COMPLETE):
            return nullcontext()
        shares = lengths.float().mean() / lengths  # a prompt of average length counts 1 a token: sums stay tokens
        weights = None if len(mask) == 1 else (mask * shares).flatten()
        if plan.shares:
            self._turn = self._after_the_prefix(plan, float(shares.sum()))
        hooks: list[LayerHook] = [self._pruner(self.layers, plan, selection, mask, weights, self._turn)]
        if plan.skip and plan.skip.by_prompt:
            hooks.insert(0, EmptyBlocks(self._skeleton, plan.skip, self.layers))
        return Sweep(self._stream(self.layers, plan, reader, on_layer), HookSequence(hooks))

    def prepare_each(
        self,
        plan: Plan,
        selection: Selection,
        reader: Reader,
        on_layer: OnLayer | None,
        lengths: Sequence[int],
        seed: int | None,
    ) -> Lockstep:
        """The same for several prompts that share one reading, each with neurons of its own. Nothing is to stay.

        `lengths`: of the prompts, in tokens."""
        self.unload(keep_tier=True)
        layout = self._skeleton.layout
        self._load_outer(plan, reader)
        self._allocate(plan)
        sets = [self.layers, *(another_set(layout, self.layers) for _ in lengths[1:])]
        masks = [torch.ones(1, length, dtype=torch.int64, device=self._device) for length in lengths]
        turn = self._after_the_prefix(plan) if plan.shares else None
        hooks = [self._pruner(own, plan, selection, mask, turn=turn) for own, mask in zip(sets, masks, strict=True)]
        stream = self._stream(self.layers, plan, reader, on_layer)
        return Lockstep(self._skeleton, stream, job_hooks=hooks, sets=sets, seed=seed)

    def stream_again(self, plan: Plan, reader: Reader) -> LayerStream:
        """All layers once more, and as often as it is opened: what is resident stays as it is."""
        return self._stream(self.layers, plan, reader, None, stays=True)

    def _pruner(
        self,
        layers: Sequence[ResidentLayer],
        plan: Plan,
        selection: Selection,
        mask: Tensor,
        weights: Tensor | None = None,
        turn: TurnStatistics | None = None,
    ) -> Pruner:
        folding = None if plan.fold is None else Folding(plan.fold, fold_tokens(mask))
        return Pruner(self._skeleton.layout, self._skeleton.modules, layers, selection, weights, folding, turn)

    def _turn_statistics(self, plan: Plan) -> TurnStatistics:
        """For the pass of a conversation's turn, allocated before it."""
        earlier = self.turns.statistics(plan.earlier_tokens, plan.kept, self._neurons)
        count = plan.pass_tokens - REWRITTEN
        return TurnStatistics(earlier, self._copied() if count > 0 else None, count)

    def has_prefix(self, ids: Sequence[int], kept: Kept) -> bool:
        """Whether these tokens are in memory as the prefix, with what neurons of it that are `kept` are chosen by."""
        return self.prefix is not None and self.prefix.ids == ids and self.prefix.covers(kept, self._neurons)

    def _after_the_prefix(self, plan: Plan, times: float = 1.0) -> TurnStatistics | None:
        """For the pass of a batch, whose rows count what they begin with `times` together."""
        assert self.prefix
        if not plan.prunes:
            return None
        return TurnStatistics(self.prefix.statistics_for(plan.kept, self._neurons), times=times)

    def _copied(self, device: str = "") -> Statistics:
        """A copy of the statistics of all blocks that are pruned, on a device, or on that of each layer; in memory of
        its own: blocks that stay would tear the heap into holes."""
        each = [
            zip(layer.statistics, layer.kept, whole, strict=True)
            for layer, whole in zip(self.layers, self._neurons, strict=True)
        ]
        pruned = [[total if k < n else None for total, k, n in layer] for layer in each]
        devices = [device or layer.device for layer in self.layers]
        sizes = [sum(padded(t.nbytes) for t in layer if t is not None) for layer in pruned]
        arenas = arenas_on(devices, sizes, huge=False)
        return [
            tuple(None if total is None else arenas[d].take(total.shape, total.dtype).copy_(total) for total in layer)
            for layer, d in zip(pruned, devices, strict=True)
        ]

    @property
    def _neurons(self) -> Kept:
        return tuple(layer.whole for layer in self._skeleton.layers)

    @property
    def plan_of_layers(self) -> tuple[Kept, Precision] | None:
        """Kept neurons by layer and block, and formats, of what is resident, or was when a conversation was saved; None
        where nothing is."""
        if not self.layers:
            return self.turns.resident
        return tuple(layer.kept for layer in self.layers), self.layers[0].precision

    @property
    def ends(self) -> tuple[int, ...]:
        """Of several devices that hold the layers, the layer behind the last one of each."""
        return self._ends if self.layers else ()

    def can_add_to(self, tokens: int, plan: Plan) -> bool:
        """Whether a plan's neurons can be chosen by what the first tokens of a conversation showed, and by others."""
        return not plan.prunes or self.turns.statistics(tokens, plan.kept, self._neurons) is not None

    def keep_turn(self, plan: Plan, cache: Any, prompt: Sequence[int], answer: Sequence[int], pruning: Pruning) -> None:
        """After an answer: keep the cache for the next turn, and the statistics. Of the answer's tokens what the full
        model computed. `pruning`: what the plan was made for."""
        points: dict[int, Statistics] | None = None if plan.repeats else {}
        if self._turn and points is not None:
            points[plan.prompt_tokens] = self._copied("cpu")
            if until := self._turn.until:
                point = plan.earlier_tokens + self._turn.count
                points[point] = [tuple(None if t is None else t.cpu() for t in layer) for layer in until]
        self.turns.keep(cache, [*prompt, *(() if plan.reads_again else answer)], points)
        self.turns.pruning, self._turn = pruning, None

    def unload(self, keep_tier: bool = False) -> None:
        """Give the weights' memory back; the next prompt reads them again (but for what the tier in RAM keeps)."""
        if not keep_tier:
            self._tier.close()
            self._tier, self.prefix = self._new_tier(), None
        self._skeleton.slots.unload()
        self._drop_layers()
        self._has_outer = False
        self.turns.clear()

    def kept_neurons(self) -> tuple[tuple[Tensor, ...], ...]:
        """By layer and block: indices of the kept neurons, (k,) or of each expert (E, k), int64, ascending."""
        return tuple(layer.kept_neurons for layer in self.layers)

    def answered(self) -> None:
        """Between prompts, the layers in RAM are page-locked, in the background."""
        self._tier.lock()

    def wait_for_locks(self, seconds: float | None = None) -> None:
        """Returns when they are, as far as they can be, or after so many seconds."""
        self._tier.wait_for_locks(seconds)

    @property
    def locked_bytes(self) -> int:
        """RAM of the layers that are page-locked."""
        return self._tier.locked_bytes

    @property
    def host_bytes(self) -> int:
        """RAM of the layers that are kept for the next prompt."""
        return self._tier.bytes

    def bandwidth(self) -> float:
        """Bytes a second at which a token reads the resident weights, measured once for them; 0.0 where Ctrl-C ends
        the measurement: the answer is there all the same."""
        if self._bandwidth is None:
            try:
                weights = read_by_a_token(self._skeleton.model) + self._skeleton.slots.quantized_tensors()
                with self._skeleton.threads.fitted(1):
                    self._bandwidth = memory_bandwidth(weights)
            except KeyboardInterrupt:
                return 0.0
        return self._bandwidth

    def _new_tier(self) -> HostTier:
        return HostTier(yields=self._copies, locker=locker_for(self._device) if self._copies else None)

    def _devices(self, plan: Plan) -> Sequence[str]:
        """Where each layer of a plan is."""
        return plan.devices or [self._device] * len(plan.kept)

    def _allocate(self, plan: Plan) -> None:
        """Memory for the layers. Those that are on other devices get their inputs there from now on."""
        devices = self._devices(plan)
        self.layers = resident_layers(self._skeleton.layout, plan.kept, devices, plan.precision)
        self._ends = plan.ends
        if set(devices) != {self._device}:
            self._hops = Hops(self._skeleton.modules, devices, self._device)

    def _drop_layers(self) -> None:
        self.layers, self._ends, self._bandwidth = [], (), None
        if self._hops:
            self._hops.remove()
            self._hops = None

    def _load_outer(self, plan: Plan, reader: Reader) -> None:
        if not self._has_outer:
            with self._skeleton.threads.fitted(1):  # the head is quantized by many small operators
                load_outer_weights(self._skeleton, reader, self._device, plan.precision)
            self._has_outer, self._lm_head_format = True, plan.precision.head

    def _stream(
        self,
        layers: Sequence[ResidentLayer],
        plan: Plan,
        reader: Reader,
        on_layer: OnLayer | None,
        stays: bool = False,
    ) -> LayerStream:
        return LayerStream(
            self._skeleton,
            reader,
            layers,
            copies=self._copies,
            steady=plan.steady_heap and not stays,
            tier=self._tier,
            on_layer=on_layer,
            stays=stays,
        )

"""Byte counts of weights (in any format), KV cache and activations: the inputs of a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import OptionError
from ..memory.arena import padded
from ..model.cache_layers import capacity
from ..model.config_facts import context_length, experts_per_token
from ..model.kv_cache import windows
from ..model.layout import Block, Layer, ModelLayout
from ..model.modules import PIECE
from ..model.rotary import switch_length
from ..options import Sparsity
from ..pruning.fold import ROWS
from ..pruning.selection import kept_neurons
from ..pruning.statistic import CHUNK
from ..quant.formats import FORMATS
from ..quant.precision import NATIVE, Precision

Kept = tuple[tuple[int, ...], ...]  # neurons by layer, and by block within it


@dataclass(frozen=True)
class NeuronTensor:
    """One parameter of a block (of each routed expert): a neuron is `rows` rows of `width` elements, or as many columns
    (`down`). `width` 0: a bias."""

    rows: int
    width: int
    down: bool

    def bytes(self, kept: int, routed: int, item: int, format: str = "") -> int:
        elements = kept * self.rows * max(1, self.width)
        if not self.width or not format:
            return padded(routed * elements * item)
        return self.quantized(kept, routed, item, format)

    def quantized(self, kept: int, routed: int, item: int, format: str) -> int:
        shape = (self.width, kept) if self.down else (kept * self.rows, self.width)
        return routed * int(FORMATS[format].bytes(*shape, item)) if kept else 0


@dataclass(frozen=True)
class BlockSizes:
    """A feed-forward block of `neurons` neurons, in each of `routed` experts (1: a plain block), of which a token takes
    `per_token`; `item` bytes each."""

    neurons: int
    routed: int
    tensors: tuple[NeuronTensor, ...]
    item: int
    per_token: int = 1

    @property
    def per_neuron(self) -> int:
        """Bytes of one neuron's largest row, in all experts."""
        return max(t.rows * max(1, t.width) for t in self.tensors) * self.item * self.routed

    def bytes(self, kept: int, precision: Precision = NATIVE) -> int:
        """Bytes of `kept` neurons, and of the others where they are kept too."""
        rest = self.neurons - kept
        if precision.rest is None or not rest:
            return sum(t.bytes(kept, self.routed, self.item, precision.kept) for t in self.tensors)
        two = ((kept, precision.kept), (rest, precision.rest))
        return sum(
            sum(t.quantized(count, self.routed, self.item, format) for count, format in two)
            if t.width
            else t.bytes(self.neurons, self.routed, self.item)
            for t in self.tensors
        )


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of a decoder layer: `fixed` (attention, norms, biases that stay) and its feed-forward blocks.

    `matrices`: (rows, columns) of the fixed ones that can be quantized."""

    fixed: int
    blocks: tuple[BlockSizes, ...]
    matrices: tuple[tuple[int, int], ...] = ()
    item: int = 2

    @property
    def whole(self) -> tuple[int, ...]:
        return tuple(block.neurons for block in self.blocks)

    def count(self, kept: tuple[int, ...]) -> int:
        """Neurons, over all routed experts."""
        return sum(k * block.routed for k, block in zip(kept, self.blocks, strict=True))

    def fixed_in(self, precision: Precision) -> int:
        if not precision.others:
            return self.fixed
        quantized = sum(int(FORMATS[precision.others].bytes(n, k, self.item)) for n, k in self.matrices)
        return self.fixed - self._matrices + quantized

    def feed_forward(self, kept: tuple[int, ...], precision: Precision = NATIVE) -> int:
        return sum(block.bytes(k, precision) for k, block in zip(kept, self.blocks, strict=True))

    def staged(self, kept: tuple[int, ...], precision: Precision) -> int:
        """Bytes that every prompt reads again, since they do not stay as they are read."""
        blocks = zip(kept, self.blocks, strict=True)
        changed = sum(block.bytes(block.neurons) for k, block in blocks if k < block.neurons or precision.kept)
        return changed + (self._matrices if precision.others else 0)

    @property
    def _matrices(self) -> int:
        return sum(padded(n * k * self.item) for n, k in self.matrices)


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model in the dtype it runs in (`item` bytes an element), and what its working memory depends on.

    `outer`: embeddings, final norm, lm_head. `lookup`: the part of it that one token does not read (an untied
    embedding); `in_file`: an embedding that is read row by row from its file, and held nowhere. `head`: rows, columns
    of an lm_head that can be quantized, and the bytes that it and its embedding take otherwise.
    `cache_per_token`: bytes of keys and values by layer; `windows`: how many tokens each layer keeps.
    `score_heads`: heads whose products of token with token are written out (0: a kernel does without); `in_pieces`:
    attention takes a long prompt a piece at a time. `switch`: after so many tokens a whole text is read again.
    `bounded`: `context` is less than the model reads, as was asked for.
    `states`: bytes of a sequence's recurrent states.
    """

    outer: int
    lookup: int
    in_file: int
    head: tuple[int, int, int] | None
    layers: tuple[LayerSizes, ...]
    item: int
    hidden: int
    vocabulary: int
    heads: int
    cache_per_token: tuple[int, ...]
    windows: tuple[int | None, ...]
    score_heads: int
    in_pieces: bool
    context: int
    switch: int | None = None
    bounded: bool = False
    states: int = 0

    def of_layers(self, begin: int, end: int) -> "ModelSizes":
        """The part of the model that these layers are, and with the first of them all that lies outside the layers.

        Recurrent states are those of all layers, whichever they are."""
        here = slice(begin, end)
        own = (self.layers[here], self.cache_per_token[here], self.windows[here])
        part = replace(self, layers=own[0], cache_per_token=own[1], windows=own[2])
        return part if begin == 0 else replace(part, outer=0, lookup=0, in_file=0, head=None, vocabulary=1)

    def kept(self, sparsity: Sparsity) -> Kept:
        """Kept neurons of every block, at one sparsity or one for each layer. Raises OptionError for another number."""
        each = [sparsity] * len(self.layers) if isinstance(sparsity, int | float) else list(sparsity)
        if len(each) != len(self.layers):
            raise OptionError(f"{len(each)} sparsities are given; the model has {len(self.layers)} layers")
        layers = zip(self.layers, each, strict=True)
        return tuple(tuple(kept_neurons(block.neurons, s) for block in layer.blocks) for layer, s in layers)

    def resident(self, kept: Kept, precision: Precision = NATIVE) -> int:
        layers = zip(self.layers, kept, strict=True)
        inside = sum(layer.fixed_in(precision) + layer.feed_forward(k, precision) for layer, k in layers)
        return self.outer_in(precision) + inside

    def outer_in(self, precision: Precision) -> int:
        if not precision.head or not self.head:
            return self.outer
        rows, columns, dense = self.head
        return self.outer - dense + int(FORMATS[precision.head].bytes(rows, columns, self.item))

    def staged(self, kept: Kept, precision: Precision) -> int:
        """Bytes of the layer of which most is read again for every prompt."""
        return max(layer.staged(k, precision) for layer, k in zip(self.layers, kept, strict=True))

    @property
    def full(self) -> int:
        return self.resident(self.kept(0)) + self.in_file

    @property
    def widest(self) -> int:
        """Columns of the widest matrix that can be quantized."""
        tensors = [(t, block) for layer in self.layers for block in layer.blocks for t in block.tensors]
        neurons = [block.neurons if t.down else t.width for t, block in tensors]
        return max([self.hidden, *neurons, *(columns for layer in self.layers for _, columns in layer.matrices)])

    def cache(self, tokens: int) -> int:
        """Bytes of the KV cache that holds `tokens` tokens."""
        rows = zip(self.cache_per_token, self.windows, strict=True)
        return sum(row * capacity(tokens, window) for row, window in rows)

    @property
    def statistics(self) -> int:
        """Bytes of the statistics of all blocks."""
        return sum(4 * block.neurons * block.routed for layer in self.layers for block in layer.blocks)

    def cache_of_a_layer(self, tokens: int) -> int:
        """Bytes of the largest layer's keys and values."""
        return max(
            row * capacity(tokens, window) for row, window in zip(self.cache_per_token, self.windows, strict=True)
        )

    def activations(self, tokens: int, sequences: int = 1, earlier: int = 0) -> int:
        """At most the bytes that a layer's forward, the statistic and the lm_head hold for `sequences` of `tokens`.

        `earlier`: tokens before them, whose keys and values are in the cache; they are written out for every head."""
        rows = tokens * sequences
        neurons = max((block.neurons for layer in self.layers for block in layer.blocks), default=0)
        cache_row = max(self.cache_per_token)
        norm = 2 * self.hidden * self.item + 2 * self.hidden * 4  # input, output; two in float32
        attention = 2 * self.hidden * self.item + 4 * self.heads * self.item + 3 * cache_row  # q and k while they turn
        feed_forward = 4 * neurons * self.item  # gate, up, act(gate), z
        layer = max(rows * max(norm, attention), 3 * rows * self.hidden * self.item + min(rows, PIECE) * feed_forward)
        statistic = 3 * min(rows, CHUNK) * neurons * 4
        written_out = sequences * earlier * (2 * self.heads * self.item + 2 * cache_row)
        masks = self._masks(tokens, sequences > 1, earlier)
        return layer + statistic + written_out + sequences * (masks + 6 * self.vocabulary * 4)

    def fold(self, tokens: int, kept: Kept, pieces: bool) -> int:
        """At most the bytes that the fold holds in a layer: the rows of z of so many tokens (`pieces`: once more, while
        they are joined), the kept part of them, in float32 too, what the others gave, the system, and a few rows of
        its result."""
        most = 0
        for layer, counts in zip(self.layers, kept, strict=True):
            blocks = [(block, k) for block, k in zip(layer.blocks, counts, strict=True) if 0 < k < block.neurons]
            rows = sum(tokens * block.per_token * block.neurons * self.item for block, _ in blocks)
            solve = max((self._solve(tokens, block.neurons, k, pieces) for block, k in blocks), default=0)
            most = max(most, rows + solve)
        return most

    def _solve(self, tokens: int, neurons: int, kept: int, pieces: bool) -> int:
        of_z = neurons * (self.item if pieces else 0) + kept * (self.item + 2 * 4)
        return tokens * (of_z + self.hidden * (2 * self.item + 2 * 4) + 3 * tokens * 4) + ROWS * kept * 2 * 4

    def _masks(self, tokens: int, padded: bool, earlier: int) -> int:
        """Bytes of masks and scores, tokens x tokens, in the kind of layer that holds most of them."""
        rows = min(tokens, PIECE) if self.in_pieces else tokens
        most = 0
        for window in set(self.windows):
            slides = window is not None and tokens > window
            keys = min(earlier + tokens, PIECE + window) if window and self.in_pieces else earlier + tokens
            a_pair = 1 + self.item if slides or padded or earlier or self.score_heads else 0
            most = max(most, rows * keys * (a_pair + self.score_heads * (2 * self.item + 4)))
        return most


def bounded(sizes: ModelSizes, context: int | None, name: str) -> ModelSizes:
    """The sizes of a model of this name that is to read at most `context` tokens. Raises OptionError for more than it
    reads."""
    if context is None:
        return sizes
    if context > sizes.context:
        raise OptionError(f"--context {context}: {name} reads at most {sizes.context} tokens")
    return replace(sizes, context=context, bounded=context < sizes.context)


@lru_cache(maxsize=8)
def model_sizes(layout: ModelLayout) -> ModelSizes:
    """Bytes of every part of a model, from its shapes alone."""
    config, item, embedding = layout.config, layout.dtype.itemsize, layout.embedding
    looks_back = windows(config)
    tied = layout.aliases.get(layout.lm_head) == embedding or layout.aliases.get(embedding) == layout.lm_head
    in_file = count(layout.shapes[embedding]) * item
    return ModelSizes(
        outer=sum(_padded(layout, name) for name in layout.outer if name != layout.table),
        lookup=0 if tied or layout.embedding_on_disk else in_file,
        in_file=in_file if layout.embedding_on_disk else 0,
        head=_head_sizes(layout),
        layers=tuple(_layer_sizes(layout, layer) for layer in layout.layers),
        item=item,
        hidden=config.hidden_size,
        vocabulary=layout.shapes[layout.lm_head][0],
        heads=layout.attention.width,
        cache_per_token=(2 * layout.attention.cached * item,) * len(looks_back),
        windows=looks_back,
        score_heads=config.num_attention_heads if layout.writes_scores else 0,
        in_pieces=layout.in_chunks,
        context=context_length(config),
        switch=switch_length(config),
        states=layout.state_bytes or 0,
    )


def _head_sizes(layout: ModelLayout) -> tuple[int, int, int] | None:
    if (head := layout.quantizable_head) is None:
        return None
    held = {layout.aliases.get(name, name) for name in (head, layout.embedding)} - {layout.table}
    rows, columns = layout.shapes[head]
    return rows, columns, sum(_padded(layout, name) for name in held)


def _layer_sizes(layout: ModelLayout, layer: Layer) -> LayerSizes:
    item = layout.dtype.itemsize
    return LayerSizes(
        fixed=sum(_padded(layout, layer.prefix + name) for name in layer.fixed),
        blocks=tuple(
            BlockSizes(
                block.neurons,
                max(1, block.routed),
                tuple(_neuron_tensor(layout, layer, block, name) for name in block.rows),
                item,
                min(block.routed, experts_per_token(layout.config)) if block.routed else 1,
            )
            for block in layer.blocks
        ),
        matrices=tuple(layer.matrices.values()),
        item=item,
    )


def _neuron_tensor(layout: ModelLayout, layer: Layer, block: Block, name: str) -> NeuronTensor:
    shape, rows = layout.shapes[layer.prefix + name][bool(block.routed) :], block.rows[name]
    width = 0 if len(shape) == 1 else shape[1 - rows.axis]
    return NeuronTensor(2 if rows.halves else 1, width, name == block.down)


def _padded(layout: ModelLayout, name: str) -> int:
    return padded(count(layout.shapes[name]) * layout.dtype.itemsize)


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor."""
    return math.prod(shape)

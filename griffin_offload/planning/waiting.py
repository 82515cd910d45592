"""Bytes that a forward holds while it waits for others to pass a layer."""

from ..model.layout import ModelLayout
from ..model.modules import PIECE
from ..units import KIB
from .sizes import ModelSizes

STACK = 64 * KIB  # of one forward that waits (measured)


def state_bytes(sizes: ModelSizes, tokens: int) -> int:
    """Hidden states of a forward over `tokens` tokens, and as much again for its embedding's output."""
    return tokens * 2 * sizes.hidden * sizes.item


def waiting_bytes(layout: ModelLayout, sizes: ModelSizes, tokens: int) -> int:
    """What such a forward holds besides its hidden states: stack, ids, rotary embeddings, masks."""
    config = layout.config
    head: int = sizes.heads // config.num_attention_heads
    inputs: int = getattr(config, "hidden_size_per_layer_input", None) or 0
    row = 32 + (4 * head + inputs * len(layout.layers)) * sizes.item
    slides = any(window is not None and tokens > window for window in sizes.windows)
    late = sizes.in_pieces and (tokens > PIECE or not (slides or sizes.score_heads))  # no mask, or written in chunks
    return STACK + tokens * row + (0 if late else tokens * tokens * (1 + sizes.item))


def score_bytes(layout: ModelLayout) -> int:
    """A float32 score for every neuron."""
    blocks = [block for layer in layout.layers for block in layer.blocks]
    return sum(4 * block.neurons * max(1, block.routed) for block in blocks)

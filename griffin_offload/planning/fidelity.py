"""What measuring the fidelity takes (see offload/fidelity_meter.py): how many tokens are read again, and bytes."""

from ..model.cache_layers import READ_AGAIN
from ..pruning.fidelity import ROOM
from .sizes import Kept, ModelSizes

SHARE = 0.04  # of the prompt pass's arithmetic that may be spent on it
LEAST = 16  # tokens; fewer tell too little


def tokens_again(sizes: ModelSizes, kept: Kept, prompt_tokens: int) -> int:
    """How many of a prompt's last tokens the resident model reads again: as many as SHARE pays for, 16 to 64.

    A token costs the kept neurons and the attention of every layer, and the lm_head twice."""
    layers = sum(layer.fixed + layer.feed_forward(layer.whole) for layer in sizes.layers)
    resident = sum(layer.fixed + layer.feed_forward(k) for layer, k in zip(sizes.layers, kept, strict=True))
    head = sizes.vocabulary * sizes.hidden * sizes.item
    affordable = int(SHARE * prompt_tokens * layers / (resident + 2 * head))
    return min(prompt_tokens, READ_AGAIN, max(LEAST, affordable))


def meter_bytes(sizes: ModelSizes, count: int, prompt_tokens: int, together: int, sequences: int) -> int:
    """Bytes that reading the last `count` tokens again holds besides the resident model and the prompt's KV cache.

    `together`: prompts of one forward, of `sequences` in all, whose states of the last tokens wait."""
    states = 2 * sequences * count * sizes.hidden * sizes.item
    one_layer = together * max(sizes.cache_per_token) * (prompt_tokens + count)
    compared = min(together * count, max(1, ROOM // sizes.vocabulary)) * sizes.vocabulary
    return states + one_layer + sizes.activations(count, together) + compared * (2 * sizes.item + 4 * 4)

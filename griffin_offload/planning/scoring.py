"""Bytes that scoring continuations holds besides the model (see evaluation/scoring): numbers in, bytes out.

A pair is a prompt of P tokens and a continuation, of which T tokens are read: all but the last. R rows (ways of
pruning, the full model among them) read the continuation."""

from ..pruning.fold import TOKENS
from ..units import MIB
from .sizes import ModelSizes
from .waiting import STACK

LOGITS = 64 * MIB  # at most, of one forward: it has as many rows as that allows
POSITIONS = 32  # tokens whose logits are compared in float32 at a time


def rows_at_once(sizes: ModelSizes, following: int) -> int:
    """How many rows one forward over T tokens takes: as many as LOGITS bytes of logits hold, at least one."""
    return max(1, LOGITS // max(1, following * sizes.vocabulary * sizes.item))


def prompt_waits(sizes: ModelSizes, prompt: int, rows: int, static: int) -> int:
    """Bytes that the forwards over a prompt of P tokens hold between two layers: states, masks, keys and values, the
    statistic, and which neurons each row drops. `static` of the rows read the prompt too, each by itself."""
    neurons = max((block.neurons * block.routed for layer in sizes.layers for block in layer.blocks), default=0)
    states, mask = _states(sizes), _mask(sizes)
    leaves = prompt * sum(sizes.cache_per_token) + 4 * sizes.vocabulary
    return (1 + static) * (STACK + prompt * (states + prompt * mask) + leaves) + neurons * (4 + rows)


def continuation_waits(sizes: ModelSizes, prompt: int, following: int, rows: int, static: int) -> int:
    """Bytes that the forwards over a continuation hold between two layers, T tokens of it in each of R rows."""
    forwards = static - (-(rows - static) // rows_at_once(sizes, following)) if following else 0
    return forwards * STACK + rows * following * (_states(sizes) + (prompt + following) * _mask(sizes))


def continuation_runs(sizes: ModelSizes, prompt: int, following: int, rows: int) -> int:
    """Bytes that one forward over T tokens takes in a layer, and for its logits and their comparison."""
    together = min(rows, rows_at_once(sizes, following))
    logits = (together + 2) * following * sizes.vocabulary * sizes.item + 8 * POSITIONS * sizes.vocabulary * 4
    return logits + sizes.activations(prompt + following, together)


def pair_holds(sizes: ModelSizes, prompt: int, continuation: int) -> int:
    """Bytes that scoring one pair by the pruned models themselves takes beside them: the full model's logits of the
    continuation, a forward over it with its own logits, and their comparison."""
    return continuation_runs(sizes, prompt, continuation, 1)


def fold_waits(sizes: ModelSizes, prompt: int) -> int:
    """Bytes of a prompt's activations that the fold keeps until the next layer."""
    blocks = (sum(b.neurons * b.per_token for b in layer.blocks) for layer in sizes.layers)
    return min(prompt, TOKENS) * max(blocks, default=0) * sizes.item


def fold_runs(sizes: ModelSizes, prompt: int, following: int) -> int:
    """Bytes that the fold of one row over T tokens takes, float32: activations in two parts, the system, and what it
    says of the dropped neurons."""
    tokens = min(prompt, TOKENS)
    neurons = max((block.neurons for layer in sizes.layers for block in layer.blocks), default=0)
    return 4 * (tokens * (5 * neurons + 2 * tokens + following) + 3 * following * neurons)


def _states(sizes: ModelSizes) -> int:
    """Bytes of a token's hidden states that wait for a layer."""
    return 3 * sizes.hidden * sizes.item


def _mask(sizes: ModelSizes) -> int:
    """Bytes of a mask, for each token that another one looks at."""
    return 1 + sizes.item

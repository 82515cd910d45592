"""Which pairs share one reading of the weights: as many as the budget has room for."""

from collections.abc import Sequence
from dataclasses import replace

from ...engine import Engine
from ...planning.plan import make_plan
from ...planning.scoring import continuation_runs, continuation_waits, fold_runs, fold_waits, prompt_waits
from .scored import Pair
from .variant import ScoredRow


def plan_reads(engine: Engine, pairs: Sequence[Pair], rows: Sequence[ScoredRow]) -> list[tuple[int, list[int]]]:
    """The readings that score all pairs: for each, the bytes that its forwards hold, and the numbers of its pairs.

    Pairs with the same context stay together, so that it is passed once in a reading. The largest reading is the first:
    what does not fit is refused before anything is read."""
    room = _room(engine, pairs)
    running = max(_running(engine, pair, rows) for pair in pairs)
    found: list[tuple[int, list[int]]] = []
    before: list[int] = []
    for number in _by_context(pairs):
        prompt, following = _waiting(engine, pairs[number], rows)
        more = following if pairs[number][0] == before else prompt + following
        if found and found[-1][0] + more <= room:
            held, numbers = found[-1]
            numbers.append(number)
            found[-1] = held + more, numbers
        else:
            found.append((running + prompt + following, [number]))
        before = pairs[number][0]
    return sorted(found, reverse=True)


def fits(engine: Engine, pairs: Sequence[Pair], rows: Sequence[ScoredRow]) -> bool:
    """Whether the budget has room for that many rows."""
    return plan_reads(engine, pairs, rows)[0][0] <= _room(engine, pairs)


def _room(engine: Engine, pairs: Sequence[Pair]) -> int:
    """Bytes that the budget leaves for forwards that wait."""
    request = replace(engine.opened.request(max(len(context) for context, _ in pairs), 1), export=True, waiting=1)
    return engine.budget - make_plan(engine.sizes, request).peak + request.waiting


def _by_context(pairs: Sequence[Pair]) -> list[int]:
    """The numbers of all pairs, those with the same context next to each other."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(number)
    return [number for numbers in by_context.values() for number in numbers]


def _waiting(engine: Engine, pair: Pair, rows: Sequence[ScoredRow]) -> tuple[int, int]:
    """Bytes that the forwards over a pair's prompt, and over its continuation, hold between two layers."""
    sizes, prompt, following = engine.sizes, len(pair[0]), len(pair[1]) - 1
    static = sum(row.static for row in rows)
    of_prompt = prompt_waits(sizes, prompt, len(rows), static)
    if any(row.fold for row in rows):
        of_prompt += fold_waits(sizes, prompt)
    return of_prompt, continuation_waits(sizes, prompt, following, len(rows), static)


def _running(engine: Engine, pair: Pair, rows: Sequence[ScoredRow]) -> int:
    running = continuation_runs(engine.sizes, len(pair[0]), len(pair[1]) - 1, len(rows))
    return running + (fold_runs(engine.sizes, *map(len, pair)) if any(row.fold for row in rows) else 0)

"""Word problems of one or two sums, with their reasoning: a seeded generator, and few-shot prompts of them.

No model has been trained on them. A problem is also a row for pruning/calibration_texts.py."""

import random
from collections.abc import Callable, Sequence

from ..engine import Engine
from .scoring.scored import Pair

Problem = dict[str, str]  # question, rationale, answer
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Lena", "Omar")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "marbles", "cards", "eggs", "shells", "tickets")
QUESTION, ANSWER, END = "Question: ", "\nAnswer:", "\n"


def problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` problems, no two alike; another seed gives others."""
    draw = random.Random(f"arithmetic {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = draw.choice(KINDS)(draw)
        found.setdefault(problem["question"], problem)
    return list(found.values())


def _sum(draw: random.Random) -> Problem:
    a, b = draw.randint(1, 20), draw.randint(1, 9)
    return _problem(f"What is {a} + {b}?", [f"{a} + {b} = {a + b}"], a + b)


def _difference(draw: random.Random) -> Problem:
    a = draw.randint(2, 20)
    b = draw.randint(1, min(a - 1, 9))
    return _problem(f"What is {a} - {b}?", [f"{a} - {b} = {a - b}"], a - b)


def _product(draw: random.Random) -> Problem:
    a, b = draw.randint(2, 10), draw.randint(2, 10)
    return _problem(f"What is {a} * {b}?", [f"{a} * {b} = {a * b}"], a * b)


def _gets(draw: random.Random) -> Problem:
    (name, other), thing = draw.sample(NAMES, 2), draw.choice(THINGS)
    has, more = draw.randint(2, 12), draw.randint(2, 9)
    return _problem(
        f"{name} has {has} {thing}. {other} gives {name} {more} more. How many {thing} does {name} have now?",
        [f"{has} + {more} = {has + more}"],
        has + more,
    )


def _loses(draw: random.Random) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    has = draw.randint(5, 20)
    gone = draw.randint(1, min(has - 1, 9))
    return _problem(
        f"{name} has {has} {thing} and sells {gone} of them. How many {thing} are left?",
        [f"{has} - {gone} = {has - gone}"],
        has - gone,
    )


def _boxes(draw: random.Random) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    boxes, each = draw.randint(2, 6), draw.randint(2, 9)
    return _problem(
        f"{name} has {boxes} boxes with {each} {thing} in each. How many {thing} does {name} have?",
        [f"{boxes} * {each} = {boxes * each}"],
        boxes * each,
    )


def _gets_and_loses(draw: random.Random) -> Problem:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    has, more = draw.randint(2, 20), draw.randint(2, 12)
    gone = draw.randint(1, has)
    return _problem(
        f"{name} has {has} {thing}, buys {more} more and then loses {gone}. How many {thing} does {name} have now?",
        [f"{has} + {more} = {has + more}", f"{has + more} - {gone} = {has + more - gone}"],
        has + more - gone,
    )


def _together(draw: random.Random) -> Problem:
    (name, other), thing = draw.sample(NAMES, 2), draw.choice(THINGS)
    has, more = draw.randint(2, 15), draw.randint(2, 9)
    return _problem(
        f"{name} has {has} {thing}. {other} has {more} more than {name}. How many {thing} do they have together?",
        [f"{has} + {more} = {has + more}", f"{has} + {has + more} = {has + has + more}"],
        has + has + more,
    )


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    *(_sum, _difference, _product),
    *(_gets, _loses, _boxes, _gets_and_loses, _together),
)


def _problem(question: str, steps: Sequence[str], answer: int) -> Problem:
    return {"question": question, "rationale": ". ".join(steps) + ".", "answer": str(answer)}


def few_shot(engine: Engine, tests: Sequence[Problem], examples: Sequence[Problem]) -> list[Pair]:
    """Token ids of each test's question after the examples, and of its answer up to the end of the line.

    A model for which each of these tokens is the likeliest gives exactly this answer when it is asked."""
    before = "".join(f"{QUESTION}{p['question']}{ANSWER} {p['answer']}{END}" for p in examples)
    pairs = []
    for test in tests:
        context = engine.encode(f"{before}{QUESTION}{test['question']}{ANSWER}", raw=True)
        answer = engine.tokenizer(f" {test['answer']}{END}", add_special_tokens=False)["input_ids"]
        pairs.append((context, list(answer)))
    return pairs

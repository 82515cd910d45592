"""Texts, or questions and answers -> calibration samples: lists of at most T token ids.

A sample is a piece of text, one question with its answer, many pairs joined, or a question alone. Nothing is used
twice: too little text gives fewer samples.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from ..errors import GriffinError, OptionError, PromptError
from ..files import reason
from ..inputs import TEXT, read_input
from ..jsonl import Row, read_content, read_rows
from ..options import FORMS, check

LONG = 2**21  # characters: of a longer text, pieces from all over it are read
PIECE = 2**16
SAMPLES, TOKENS = 128, 2048  # default count and length
QUESTION = "Question: {question}\n"
ANSWER = "Answer: {answer}\n\n"
JOINED = "concat"  # the default form of questions and answers
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class CalibrationText:
    """A source of samples. `content`: one text, or rows of {"text"}, or of {"question", "answer"} and perhaps
    "rationale". `share`: its weight among the sources. `sha256`: of the file, or of the rows' JSON.

    Raises PromptError for other content, OptionError for a share that is not above 0."""

    name: str
    content: str | Sequence[Row]
    share: float = 1.0
    sha256: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share < float("inf"):
            raise OptionError(f"the share {self.share:g} of {self.name} is not above 0")
        if not self.content or (isinstance(self.content, str) and not self.content.strip()):
            raise PromptError(f"{self.name} is empty: give it some text, or rows in a file that is named .jsonl")
        for number, row in enumerate(() if isinstance(self.content, str) else self.content, 1):
            if wrong := _fault(row):
                raise PromptError(f"{self.name}, row {number}: {wrong}")
            if ("text" in row) == self.asks:
                raise PromptError(f'{self.name} mixes rows with a "text" and rows with a "question": make two of it')
        if not self.sha256:
            text = self.content if isinstance(self.content, str) else json.dumps(list(self.content), default=str)
            object.__setattr__(self, "sha256", hashlib.sha256(text.encode()).hexdigest())

    @property
    def asks(self) -> bool:
        """Whether the rows are questions and answers."""
        return not isinstance(self.content, str) and "text" not in self.content[0]


@dataclass(frozen=True)
class Samples:
    """Token ids of each sample; `facts` about them for cards and reports; `notes` for people, on too little text."""

    ids: tuple[list[int], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_source(path: Path, share: float = 1.0) -> CalibrationText:
    """Reads a file of rows (.jsonl, .json) or a text. Raises GriffinError that names the file and the row's line."""
    if path.suffix.lower() in (".jsonl", ".json"):
        content = read_content(path)
        rows = read_rows(path, _fault, content=content)
        return CalibrationText(path.name, rows, share, hashlib.sha256(content).hexdigest())
    try:
        content = read_input(path, TEXT, pipe=True)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or no UTF-8
        raise GriffinError(f"cannot read {path}: {reason(error)}") from None
    return CalibrationText(path.name, text, share, hashlib.sha256(content).hexdigest())


def _fault(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    needed = ("text",) if "text" in row else ("question", "answer")
    if "question" not in row and "text" not in row:
        return 'neither a "text" nor a "question"'
    for name in (*needed, "rationale"):
        value = row.get(name, "" if name == "rationale" else None)
        if not isinstance(value, str) or (name in needed and not value.strip()):
            return f'the "{name}" is missing, empty or not a text'
    return None


def draw_samples(
    encode: Encode,
    sources: Sequence[CalibrationText],
    *,
    samples: int = SAMPLES,
    tokens: int = TOKENS,
    form: str | None = None,
    rationale: bool = True,
    seed: int = 0,
    bos: int | None = None,
) -> Samples:
    """Up to `samples` lists of at most `tokens` ids, from every source its share; the same for the same seed.

    `form` of questions and answers: 'qa' is one pair, 'concat' pairs up to the length, 'question' no answer.
    `rationale`: put the reasoning before the answer. `bos`, which `encode` puts first, also begins pieces from the
    middle of a text. Raises OptionError, PromptError."""
    _check(sources, samples, tokens, form)
    found: list[list[int]] = []
    facts, notes = [], []
    for number, (source, count) in enumerate(zip(sources, _counts(sources, samples), strict=True)):
        shape = (form or JOINED) if source.asks else "text"
        drawn = _draw(encode, source, shape, (count, tokens), rationale, Random(f"{seed} {number}"), bos)
        ids = [part for part in islice(drawn, count) if part]
        if len(ids) < count:
            notes.append(f"{source.name} makes {len(ids)} samples of up to {tokens} tokens, not {count}")
        found += ids
        of_source = {"file": source.name, "sha256": source.sha256, "share": source.share, "form": shape}
        facts.append({**of_source, "samples": len(ids), "tokens": sum(map(len, ids))})
    if not found:
        raise PromptError("no samples: the calibration texts have no tokens")
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    about: dict[str, Any] = {"longest": tokens, "texts": facts, "samples_sha256": digest}
    if any(source.asks for source in sources):
        about["rationale"] = rationale
    return Samples(tuple(found), about, tuple(notes))


def _check(sources: Sequence[CalibrationText], samples: int, tokens: int, form: str | None) -> None:
    if not sources:
        raise PromptError("no samples: give at least one text to calibrate with")
    if samples < len(sources):
        raise OptionError(f"{samples} samples cannot be drawn from {len(sources)} files: ask for one of each at least")
    if tokens < 2:
        raise OptionError(f"samples of {tokens} tokens are too short: ask for at least 2")
    if form is None:
        return
    check(form, FORMS, "calibration format")
    texts = [source for source in sources if not source.asks]
    if form == "text" and len(texts) < len(sources):
        other = next(source for source in sources if source.asks)
        raise OptionError(f"format 'text' needs rows with a \"text\"; {other.name} has questions: use qa or concat")
    if form != "text" and len(texts) == len(sources):
        raise OptionError(f'format {form!r} needs rows with a "question" and an "answer"; {texts[0].name} has texts')


def _counts(sources: Sequence[CalibrationText], samples: int) -> list[int]:
    """Samples of each source, by its share: at least one, `samples` in all."""
    total = sum(source.share for source in sources)
    exact = [samples * source.share / total for source in sources]
    counts = [max(1, int(part)) for part in exact]
    while sum(counts) < samples:
        counts[max(range(len(counts)), key=lambda i: exact[i] - counts[i])] += 1
    while sum(counts) > samples:
        counts[max(range(len(counts)), key=lambda i: counts[i] - exact[i] if counts[i] > 1 else -samples)] -= 1
    return counts


def _draw(
    encode: Encode,
    source: CalibrationText,
    form: str,
    size: tuple[int, int],
    rationale: bool,
    random: Random,
    bos: int | None,
) -> Iterator[list[int]]:
    """A source's samples, in random order. `size`: how many are wanted, of how many tokens."""
    count, tokens = size
    if isinstance(source.content, str):
        for part, wanted in _parts(source.content, count, tokens, random):
            yield from islice(_pieces(encode(part), tokens, random, bos), wanted)
        return
    texts = list(dict.fromkeys(_text(row, form, rationale) for row in source.content))
    random.shuffle(texts)
    if form == JOINED:
        yield from _joined(encode, texts, tokens)
    for text in texts if form != JOINED else ():
        part, _ = next(_parts(text, 1, tokens, random))
        ids = encode(part)
        yield _cut(ids, tokens, random, bos) if form == "text" else ids[:tokens]


def _parts(text: str, count: int, tokens: int, random: Random) -> Iterator[tuple[str, int | None]]:
    """The whole text; or of a long one parts from all over it, and how many samples each gives."""
    if len(text) <= LONG:
        yield text, None
        return
    size = max(PIECE, 8 * tokens)
    begins = list(range(0, len(text), size))
    random.shuffle(begins)
    for begin in begins:
        yield text[begin : begin + size], -(-count // len(begins))


def _text(row: Row, form: str, rationale: bool) -> str:
    if form == "text":
        return str(row["text"])
    question = QUESTION.format(question=row["question"])
    reasoning = [row["rationale"]] if rationale and row.get("rationale") else []
    return question if form == "question" else question + ANSWER.format(answer=" ".join([*reasoning, row["answer"]]))


def _joined(encode: Encode, pairs: Sequence[str], tokens: int) -> Iterator[list[int]]:
    """Joins pairs to `tokens` tokens, and cuts there; the last sample may be shorter."""
    text, long = "", 0
    for pair in pairs:
        text += pair
        long += len(encode(pair))
        if long >= tokens and len(ids := encode(text)) >= tokens:
            yield ids[:tokens]
            text, long = "", 0
    if text:
        yield encode(text)[:tokens]


def _pieces(ids: list[int], tokens: int, random: Random, bos: int | None) -> Iterator[list[int]]:
    """Pieces of a long text that do not overlap, in random order. A shorter one only if it is the whole text."""
    first, rest = _split(ids, bos)
    size = tokens - len(first)
    begins = list(range(0, max(1, len(rest) - size + 1), size))
    random.shuffle(begins)
    for begin in begins:
        yield first + rest[begin : begin + size]


def _cut(ids: list[int], tokens: int, random: Random, bos: int | None) -> list[int]:
    """Cuts a text that is too long, from a random place."""
    first, rest = _split(ids, bos)
    size = tokens - len(first)
    if len(rest) <= size:
        return ids
    begin = random.randrange(len(rest) - size + 1)
    return first + rest[begin : begin + size]


def _split(ids: list[int], bos: int | None) -> tuple[list[int], list[int]]:
    has = bool(ids) and ids[0] == bos
    return ids[: int(has)], ids[int(has) :]

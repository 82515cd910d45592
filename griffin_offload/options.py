"""Every option once: its default, its range, its help. Flags, checks, chat's /set and docs/commands.md come from here.

Four frozen groups say how a model is run; the callbacks' types and the names that a user may choose from stand here
too. No torch: `griffin --help` reads this file."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import OptionError

SELECTIONS = ("topk", "sampling", "topk-sampling", "magnitude", "random")
WITHOUT_STATISTIC = ("magnitude", "random")  # selections that no prior can join
DRAWN = ("sampling", "topk-sampling", "random")  # the selections that a seed repeats
COLD = 1e-4  # a temperature below it is 0, which is greedy: logits divided by less may be infinite
MOST = 10**6  # of what a run counts one by one: samples, windows, questions
MOST_TOKENS = 10**8
ZERO = ("temperature", 0)  # which asks for no sampling
AUTO = "auto"
OFF = "off"
ALLOCATIONS = (AUTO, "uniform", "sensitivity")
RESIDENT_DTYPES = ("bfloat16", "int8", "int4")  # bfloat16: as the model runs
RESTS = ("drop", "int8", "int4")
METHODS = {  # name -> what it means: fields of Pruning; griffin is the paper's (arXiv:2404.01365)
    "griffin": {"selection": "topk", "allocation": "uniform", "rest": "drop", "prior": OFF, "fold": False},
}
SKIP_MODES = ("token", "prompt")
DTYPES = ("float32", "bfloat16", "float16")
EXPORT_FORMATS = ("safetensors", "gguf")
GGUF_TYPES = ("bf16", "f16", "f32", "q8_0")
SCORES = ("griffin", "wanda", "magnitude", "random")  # of neurons, over calibration texts
FORMS = ("text", "qa", "concat", "question")  # of calibration samples
MODES = ("gen", "class")  # of multiple choice: what counts as the prompt
ORDERS = ("original", "permuted", "random")  # of a prompt's tokens, in a figure

Sparsity = float | Sequence[float]  # of every layer, or one for each
OnLayer = Callable[[int, int], None]  # layers done, layers in all
OnText = Callable[[str], None]
Group = TypeVar("Group")


def check(name: str, known: Sequence[str], what: str) -> None:
    """Raises OptionError for a name that is not among `known`."""
    if name not in known:
        raise OptionError(f"{what} {name!r} is not known; known: {', '.join(known)}")


@dataclass(frozen=True)
class Option:
    """What is known of one option. `parse` reads it from text; `wanted` says in words what that text should be.

    `several`: a flag that may be given more than once, for a tuple of values.
    `low` to `high`, or more than `above`: the range, which `allowed` gives in words; `strict`: for a command, a value
    outside it is wrong usage. `default`: what --help says of a default that the field itself cannot show.
    `prefix`: a group within a group, whose names begin with it."""

    help: str
    parse: Callable[[str], Any] = str
    wanted: str = "a text"
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    allowed: str = ""
    strict: bool = False
    default: str = ""
    prefix: str = ""
    several: bool = False

    def takes(self, value: Any) -> bool:
        """Whether a value, such as a file of ours holds, is of the type that the option has. None is a default."""
        if value is None:
            return True
        each = value if isinstance(value, tuple) else ()
        if self.parse is parse_pair:
            return len(each) == 2 and all(type(one) is int for one in each)
        if self.parse is parse_texts:
            return isinstance(value, tuple) and all(type(one) is str for one in each)
        if self.parse is parse_switch or self.parse in (int, str):
            return type(value) is (bool if self.parse is parse_switch else self.parse)
        return all(type(one) in (int, float) for one in each or (value,))

    def check(self, name: str, value: Any) -> None:
        """Raises OptionError for a value (or one of several) that is outside the range or no choice."""
        if value is None:
            return
        if self.choices:
            check(value, self.choices, name)
        if self.allowed:
            for each in value if isinstance(value, tuple | list) else (value,):
                if isinstance(each, int) and abs(each) >= 2**63:  # more than a float, or a tensor, can hold
                    raise OptionError(f"{name} {str(each)[:20]}... is outside its range: {self.allowed}, below 2^63")
                if not (math.isfinite(each) and self.low <= each <= self.high and each > self.above):
                    percent = self.low == 0 and self.high == 1 and 1 < each <= 100
                    meant = f"; did you mean {each / 100:g}?" if percent else ""
                    raise OptionError(f"{name} {each} is outside its range: {self.allowed}{meant}")


def option(default: Any, help: str, /, **facts: Any) -> Any:
    """A field of an option group: its default, its help, and what else an Option knows."""
    return field(default=default, metadata={"option": Option(help, **facts)})


def number(default: Any, help: str, /, **facts: Any) -> Any:
    return option(default, help, parse=float, wanted="a number", **facts)


def whole(default: Any, help: str, /, **facts: Any) -> Any:
    return option(default, help, parse=int, wanted="a whole number", **{"metavar": "N", **facts})


def switch(help: str, /, *, value: bool | None = False, **facts: Any) -> Any:
    """On or off. Where `value`, the default, is None, the flag has a --no- form too."""
    return option(value, help, parse=parse_switch, wanted="on or off", **facts)


def parse_switch(text: str) -> bool:
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def parse_shares(text: str) -> float | tuple[float, ...]:
    """'0.5' or '50%', or one number for each layer: '0.2,0.5,0.9' (commas, spaces or lines)."""
    parts = text.replace(",", " ").split()
    shares = tuple(float(part[:-1]) / 100 if part.endswith("%") else float(part) for part in parts)
    if not shares:
        raise ValueError(text)
    return shares if len(shares) > 1 else shares[0]


def parse_pair(text: str) -> tuple[int, int]:
    """'2,2'."""
    first, last = text.split(",")
    return int(first), int(last)


def parse_texts(text: str) -> tuple[str, ...]:
    r"""'###', with \n and \t for a line's end and a tab; or several as a JSON list: '["###", "\n"]'."""
    if text.startswith("["):
        found = json.loads(text)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError(text)
        return tuple(found)
    return (text.replace("\\n", "\n").replace("\\t", "\t"),)


def declared(group: Any, values: Any = None) -> Iterator[tuple[str, Option, Any]]:
    """Name, Option and default (or the value that `values`, one of this group, has) of each option of a group.

    Those of a group within it come by its prefix: `ffn_skip` (its first field), `ffn_skip_mode` ..."""
    for each in fields(group):
        told: Option | None = each.metadata.get("option")
        if told is None:
            continue
        value = _default(each) if values is None else getattr(values, each.name)
        if not told.prefix:
            yield each.name, told, value
            continue
        for number, (name, inner, within) in enumerate(declared(type(_default(each)), value)):
            yield (f"{told.prefix}_{name}" if number else told.prefix), inner, within


def default_of(group: type, name: str) -> Any:
    """The default of one field."""
    return _default(next(each for each in fields(group) if each.name == name))


def _default(each: "Field[Any]") -> Any:
    if each.default is not MISSING:
        return each.default
    assert each.default_factory is not MISSING
    return each.default_factory()


class _Checked:
    """Checks every field when a group is made."""

    def __post_init__(self) -> None:
        for name, each, value in declared(type(self), self):
            each.check(name, value)


@dataclass(frozen=True)
class Placement(_Checked):
    """Where a model runs, and in how much memory. Sizes are bytes, or text such as '4GiB'."""

    device: str | None = option(
        None,
        "cuda, mps or cpu; or several GPUs as cuda:0,cuda:1, or all of them: a model that answers prompts then has on "
        "the next one the layers that the first has no room for.",
        metavar="NAME",
        default="$GRIFFIN_DEVICE, or the best there is",
    )
    device_memory: int | str | None = option(
        None,
        "The most memory to use: 4GiB, 4900MB or bytes. Of several GPUs: on each.",
        metavar="SIZE",
        default="what is free, less a margin",
    )
    dtype: str | None = option(None, "Precision of the weights.", choices=DTYPES, default="the checkpoint's")
    host_memory: int | str | None = option(
        None,
        "RAM that keeps layers between prompts, so that the next prompt need not read them from disk; 0 for none. "
        "On the CPU it is part of --device-memory. Workers of generate --input share it, beside their memory; by "
        "default what they leave free.",
        metavar="SIZE",
        default="on a GPU what is free, less a margin; on the CPU none",
    )
    context: int | None = whole(
        None,
        "The most tokens of a prompt with its answer, or of a whole conversation: bounds the KV cache, and with it the "
        "memory of a run. A longer prompt is refused.",
        low=2,
        allowed="2 or more",
        default="as many as the model reads",
    )
    threads: int | None = whole(
        None,
        "Threads of the processor, however busy it is.",
        low=1,
        allowed="1 or more",
        default="torch's; while other programs use cores, as many fewer",
    )


@dataclass(frozen=True)
class FfnSkip(_Checked):
    """FFN-SkipLLM (arXiv:2404.03865): whole feed-forward blocks are skipped where they change the hidden state least.

    `cold` (first, last): blocks at each end that are never skipped. Caps the reachable share at
    (L - first - last) / L of L blocks."""

    share: float = number(
        0.0,
        "Share of the feed-forward blocks to skip, those that change the hidden state least (FFN-SkipLLM).",
        metavar="SHARE",
        low=0,
        high=1,
        allowed="0 (no block is skipped) to 1 (all but the cold ones)",
        default="0",
    )
    mode: str = option(
        "token",
        "token: each token of the answer skips for itself, which saves time but no memory; prompt: the blocks that the "
        "prompt needs least keep no neurons, which saves both.",
        choices=SKIP_MODES,
    )
    cold: tuple[int, int] = option(
        (2, 2),
        "Blocks at each end that are never skipped.",
        parse=parse_pair,
        wanted="FIRST,LAST",
        metavar="FIRST,LAST",
        low=0,
        allowed="two numbers, 0 or more",
        default="2,2",
    )
    warmup: int = whole(
        4, "In token mode: the first N tokens of the answer skip nothing.", low=0, allowed="0 or more", default="4"
    )
    run: int = whole(
        0,
        "Skip at most N consecutive blocks.",
        low=0,
        allowed="0 (as few as reach the share) or more",
        default="0, as few as reach the share",
    )

    @property
    def by_prompt(self) -> bool:
        return self.mode == "prompt"

    def skippable(self, blocks: int) -> range:
        """Those of L blocks that may be skipped: all but the cold ends. In token mode never the first, since nothing
        before it tells how much it would change."""
        first = max(self.cold[0], 1 if self.mode == "token" else 0)
        return range(first, max(first, blocks - self.cold[1]))

    def count(self, blocks: int) -> int:
        """Blocks that a prompt's answer leaves out: the share, as far as the cold ends allow."""
        return min(round(self.share * blocks), len(self.skippable(blocks)))

    def length(self, blocks: int) -> int:
        """Longest run of consecutive skips. One of every run + 1 skippable blocks still runs; 0 picks the shortest run
        that reaches the share."""
        skippable, wanted = len(self.skippable(blocks)), self.count(blocks)
        runs = range(1, skippable + 2)
        return self.run or next(run for run in runs if skippable - skippable // (run + 1) >= wanted)


@dataclass(frozen=True)
class Pruning(_Checked):
    """What is kept of the model for one answer. Where sparsity, resident_dtype and rest are None, the best that fits is
    taken (planning/ladder.py). A method sets the fields that METHODS names; OptionError for one that says otherwise."""

    sparsity: Sparsity | None = option(
        None,
        "Share of the feed-forward neurons that are not kept as they are (--rest says what becomes of them), 0 to 1; "
        "or one for each layer: 0.2,0.5,... or a file of them; or auto.",
        parse=parse_shares,
        wanted="a number",
        metavar="SHARE",
        low=0,
        high=1,
        allowed="0 (nothing is pruned) to 1 (no neuron is kept)",
        default="auto, as little as fits",
    )
    resident_dtype: str | None = option(
        None,
        "Format of the weights kept in memory. bfloat16: as the model runs; int8, int4: quantized after the prompt has "
        "passed, lm_head in int8 in both. auto: the best that fits.",
        choices=(AUTO, *RESIDENT_DTYPES),
        default="auto, but bfloat16 where --sparsity is given",
    )
    rest: str | None = option(
        None,
        "The neurons that the prompt does not choose: int8, int4: kept in so many bits; drop: left out, as in the "
        "GRIFFIN paper, which saves more memory and costs far more quality; auto: int4 where it fits, else dropped.",
        choices=(AUTO, *RESTS),
        default=AUTO,
    )
    selection: str = option(
        "topk", "How the kept neurons are chosen. All but topk are for comparison.", choices=SELECTIONS
    )
    allocation: str = option(
        AUTO,
        "How the sparsity is shared over the layers. uniform: every layer drops the same share; sensitivity: as "
        "`griffin calibrate` measured it; auto: so, where it has, and in no export, whose layers have one width.",
        choices=ALLOCATIONS,
    )
    prior: Any = option(
        AUTO,
        "Scores of the neurons over other texts, mixed with the prompt's. auto: where neurons are dropped, of a text "
        "that ships with Griffin, measured once for each model; off: none; or a file that "
        "`griffin export-pruned --calibration ... --prior-out FILE` wrote.",
        metavar="FILE",
        default=AUTO,
    )
    prior_weight: float | None = number(
        None,
        "How much the prior counts, 0 (the prompt alone) to 1 (the prior alone).",
        metavar="W",
        low=0,
        high=1,
        allowed="0 (the prompt's own choice) to 1 (the prior's)",
        default="less, the longer the prompt is: as much as 64 tokens of it",
    )
    fold: bool | None = switch(
        "Where neurons are dropped, the kept ones take over what those gave the prompt, by ridge regression.",
        value=None,
        default="on",
    )
    fold_strength: float = number(
        0.3,
        "How strongly the fold holds on to the weights as they were: the ridge, in units of the mean squared "
        "activation.",
        metavar="L",
        above=0,
        allowed="above 0",
    )
    skip: FfnSkip = option(FfnSkip(), "Blocks to skip.", prefix="ffn_skip")
    method: str | None = option(
        None,
        "griffin: exactly the paper's choice, the neurons of the largest statistic, the same share in every layer, the "
        "rest dropped and nothing folded. It stands for --selection topk --allocation uniform --rest drop --no-fold "
        "--prior off.",
        choices=tuple(METHODS),
        default="none of these",
    )

    @property
    def folds(self) -> float | None:
        """The fold's strength; None: it is off."""
        return None if self.fold is False else self.fold_strength

    def __post_init__(self) -> None:
        if self.prior is None:
            object.__setattr__(self, "prior", OFF)
        for name, value in METHODS.get(self.method or "", {}).items():
            given = getattr(self, name)
            if given not in (value, AUTO, default_of(Pruning, name)):
                told = "off" if value is False else value or "none"
                raise OptionError(f"method {self.method} has {name} {told}: leave out {name}, or the method")
            object.__setattr__(self, name, value)
        if isinstance(self.sparsity, list):
            object.__setattr__(self, "sparsity", tuple(self.sparsity))
        if self.skip is None:
            object.__setattr__(self, "skip", FfnSkip())
        super().__post_init__()


@dataclass(frozen=True)
class Decoding(_Checked):
    """How an answer is made of the model's predictions. What is None is left to the model's own generation config.

    `more`: other options of transformers' `generate`, as they are."""

    max_new_tokens: int = whole(256, "Longest answer, in tokens.", low=1, allowed="1 or more")
    temperature: float | None = number(
        None,
        "Sampling temperature: below 1 is safer, above 1 more varied; 0 is --greedy.",
        metavar="T",
        low=0,
        allowed="0 (the likeliest token every time, as greedy; so is what is below 0.0001) or above",
    )
    top_p: float | None = number(
        None,
        "Sample among the likeliest tokens of total probability P.",
        metavar="P",
        above=0,
        high=1,
        allowed="above 0, up to 1",
    )
    top_k: int | None = whole(
        None, "Sample among the K likeliest tokens.", metavar="K", low=0, allowed="0 (off) or more"
    )
    seed: int | None = whole(
        None,
        "Seed of the sampling: the same one gives the same answer.",
        low=0,
        high=2**32 - 1,
        allowed="0 to 4294967295",
    )
    greedy: bool = switch("Take the likeliest token every time.", default="as the model's own generation config says")
    stop: tuple[str, ...] = option(
        (),
        r"A text that ends the answer and is left out of it; \n is the end of a line. May be given several times.",
        parse=parse_texts,
        wanted="a text, or a JSON list of texts",
        metavar="TEXT",
        several=True,
        default="none",
    )
    compile: bool = switch(
        "On CUDA: compile the decoder layers by torch.compile, which fuses their small steps. The first answer waits "
        "for it, the result is kept on disk. Not for quantized weights: beside --sparsity, give --rest drop."
    )
    lossless: bool = switch(
        "The answer is the full model's own: the resident model drafts tokens, and a pass of the full model, which "
        "streams what is not resident, verifies many of them at once."
    )
    refresh: int | None = whole(
        None,
        "Every N tokens of the answer, the full model computes them, and the neurons are chosen again: for long "
        "answers that lead away from the prompt. Each time the neurons are read once.",
        low=1,
        allowed="1 or more",
        default="never",
    )
    no_fidelity: bool = switch(
        "Do not measure how close the pruned or quantized model is to the full one, which takes a few percent of the "
        "prompt pass."
    )
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stop:
            raise OptionError("stop is an empty text, which would end every answer at once: give some text")
        object.__setattr__(self, "stop", stop)
        if isinstance(self.temperature, int | float) and 0 < self.temperature < COLD:
            object.__setattr__(self, "temperature", 0.0)
        super().__post_init__()

    def sampling(self, selection: str = "topk") -> list[str]:
        """Names of the options that ask for sampling. A seed does not where the selection of neurons draws by it."""
        names = ("temperature", "top_p", "top_k", *(() if selection in DRAWN else ("seed",)))
        return [name for name in names if getattr(self, name) is not None and (name, self.temperature) != ZERO]

    def generate_options(self, selection: str = "topk") -> dict[str, Any]:
        """Keywords of transformers' `generate`. Raises OptionError where greedy and sampling are both asked for."""
        sampling = self.sampling(selection)
        if self.greedy and sampling:
            raise OptionError(f"greedy takes the likeliest token every time: leave out {', '.join(sampling)}")
        if self.temperature == 0:
            return {"do_sample": False, **self.more}
        chosen: dict[str, Any] = {"do_sample": not self.greedy} if self.greedy or sampling else {}
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return {**chosen, **{name: value for name, value in values.items() if value is not None}, **self.more}


@dataclass(frozen=True)
class ExportFormat(_Checked):
    """What an export is written as."""

    format: str = option(
        "safetensors", "A folder that transformers loads, or a file that llama.cpp runs.", choices=EXPORT_FORMATS
    )
    gguf_type: str | None = option(
        None, "Type of the matrices in a GGUF file; vectors are f32.", choices=GGUF_TYPES, default="bf16"
    )
    multiple_of: int | None = whole(
        None,
        "Round the kept neurons of every layer up to a multiple of N. llama.cpp's K-quants need 256.",
        low=1,
        allowed="1 or more",
        strict=True,
        default="1; for GGUF 32",
    )


def build(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A group from its options by their declared names; what is not given, or None, has its default.

    Raises OptionError for a value outside its range."""
    given = {name: value for name, value in values.items() if value is not None}
    for name, known, _ in declared(group):
        known.check(name, given.get(name))  # by this name, which a group within it does not know
    found: dict[str, Any] = {}
    for each in fields(group):  # type: ignore[arg-type]
        told: Option | None = each.metadata.get("option")
        if told is not None and told.prefix:
            inner = type(_default(each))
            names = zip((name for name, *_ in declared(group) if name.startswith(told.prefix)), fields(inner))  # noqa: B905
            found[each.name] = inner(**{to.name: given[name] for name, to in names if name in given})
        elif each.name in given:
            found[each.name] = given[each.name]
    return group(**found)


def as_dict(group: Any) -> dict[str, Any]:
    """The values of a group by their declared names."""
    return {name: value for name, _, value in declared(type(group), group)}


def with_text(group: Group, name: str, text: str) -> Group:
    """The same group, one option read from text; 'none' or 'default' gives its default. Raises OptionError."""
    told, default = {known: (each, value) for known, each, value in declared(type(group))}[name]
    try:
        value = default if text.lower() in ("none", "default") else told.parse(text)
    except ValueError:
        raise OptionError(f"{name} cannot be {text!r}: give {told.wanted}, or none") from None
    values = {**as_dict(group), name: value}
    if name == "method":  # what the last one had set is open again
        values |= dict.fromkeys(METHODS.get(as_dict(group)[name] or "", ()))
    undeclared = {each.name: getattr(group, each.name) for each in fields(group) if not each.metadata}  # type: ignore[arg-type]
    return replace(build(type(group), values), **undeclared)  # type: ignore[type-var]


def from_keywords(keywords: dict[str, Any], group: type[Group], given: Group | None = None) -> Group:
    """A group from those of the keywords that are its fields, which are taken out; or `given`, changed by them."""
    own = {each.name: keywords.pop(each.name) for each in fields(group) if each.name in keywords}  # type: ignore[arg-type]
    return replace(given, **own) if given is not None else group(**own)  # type: ignore[type-var]

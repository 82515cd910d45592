"""How the tokens of an answer are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError
from .declare import number, option, parse_texts, switch, whole
from .group import Checked
from .names import DRAWN

COLD = 1e-4  # a temperature below it is 0, which is greedy: logits divided by less may be infinite
ZERO = ("temperature", 0)  # which asks for no sampling


@dataclass(frozen=True)
class Decoding(Checked):
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

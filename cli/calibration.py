"""`griffin export-pruned --calibration`: what static experts are chosen by, from the options."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError, OptionError
from ..options import FORMS, SCORES
from ..pruning.calibration_texts import SAMPLES, TOKENS, CalibrationText, draw_samples, read_source
from . import _console as console
from ._options import F, decorate

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pruning.calibration import Calibration
    from ..pruning.prior import Prior

WITHOUT_TEXTS = ("magnitude", "random")


def calibration_options(command: F) -> F:
    """--calibration and what belongs to it: the arguments of `CalibrationOptions`."""
    return decorate(
        command,
        click.option(
            "--calibration",
            "calibration",
            multiple=True,
            metavar="FILE[:SHARE]",
            help='Choose the neurons by many texts, not by one prompt: a text, or a .jsonl file of {"text": ...} or '
            '{"question": ..., "answer": ..., "rationale": ...}. Give several to mix them, by their shares.',
        ),
        click.option("--samples", type=int, metavar="N", help=f"Samples to draw in all. [default: {SAMPLES}]"),
        click.option(
            "--tokens",
            type=int,
            metavar="T",
            help=f"Longest sample, in tokens. [default: {TOKENS}, or what the model reads]",
        ),
        click.option(
            "--calibration-format",
            type=click.Choice(FORMS),
            help="Of questions and answers: qa, one pair a sample; concat, pairs joined until T tokens; question, "
            "without the answer. Texts are text. [default: concat]",
        ),
        click.option(
            "--rationale/--no-rationale",
            default=None,
            help="Whether a row's reasoning stands before its answer. [default: it does]",
        ),
        click.option(
            "--score",
            type=click.Choice(SCORES),
            help="What a neuron is worth: griffin, its statistic summed over all texts; wanda, activation norm times "
            "column norm; magnitude and random need no texts. [default: griffin]",
        ),
        click.option(
            "--prior-out",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Save the scores of all neurons, for --prior. Without --out nothing else is written.",
        ),
    )


class CalibrationOptions:
    """The options of a static choice; `asked` where there is one. Raises click.UsageError for those that clash."""

    def __init__(
        self,
        *,
        calibration: tuple[str, ...],
        samples: int | None,
        tokens: int | None,
        calibration_format: str | None,
        rationale: bool | None,
        score: str | None,
        prior_out: Path | None,
        host_memory: str | None,
        seed: int,
    ) -> None:
        self._files, self._samples, self._tokens = calibration, samples, tokens
        self._form, self._rationale, self._seed = calibration_format, rationale, seed
        self._score, self.prior_out = score or "griffin", prior_out
        self.asked = bool(calibration) or score is not None
        of_texts: dict[str, Any] = {
            "--samples": samples,
            "--tokens": tokens,
            "--calibration-format": calibration_format,
            "--rationale": rationale,
            "--host-memory": host_memory,
        }
        given = [name for name, value in of_texts.items() if value is not None]
        if given and not calibration:
            raise click.UsageError(f"{given[0]} is of calibration texts: give --calibration FILE")
        if score in WITHOUT_TEXTS and calibration:
            raise click.UsageError(f"--score {score} is the same whatever the texts are: leave out --calibration")
        if score is not None and score not in WITHOUT_TEXTS and not calibration:
            raise click.UsageError(f"--score {score} is measured on texts: give --calibration FILE")
        if prior_out is not None and not self.asked:
            raise click.UsageError("--prior-out saves the scores of calibration texts: give --calibration FILE")

    def refuse_with(self, options: dict[str, Any]) -> None:
        """Raises click.UsageError for options of a prompt that are given beside those of a static choice."""
        given = [name for name, value in options.items() if value]
        if self.asked and given:
            raise click.UsageError(f"{given[0]} is of a prompt, and --calibration or --score chooses without one")

    def sources(self) -> list[CalibrationText]:
        """The files read, before a model is looked for. Raises GriffinError."""
        return [read_source(*with_share(name)) for name in self._files]

    def draw(self, engine: "Engine", sources: list[CalibrationText]) -> "Calibration":
        """What the experts are chosen by; says where there is less text than asked for."""
        from ..pruning.calibration import Calibration

        if not sources:
            return Calibration(score=self._score, seed=self._seed)
        room = engine.context_length - 1
        if self._tokens is not None and self._tokens > room:
            raise OptionError(f"--tokens {self._tokens}: {engine.name} reads at most {room}")
        drawn = draw_samples(
            lambda text: engine.encode(text, raw=True),
            sources,
            samples=SAMPLES if self._samples is None else self._samples,
            tokens=min(TOKENS, room) if self._tokens is None else self._tokens,
            form=self._form,
            rationale=self._rationale is not False,
            seed=self._seed,
            bos=engine.tokenizer.bos_token_id,
        )
        for note in drawn.notes:
            console.note(note)
        return Calibration(drawn.ids, self._score, self._seed, drawn.facts)

    def check_prior_out(self, force: bool) -> None:
        """Before a sweep whose result it takes. Raises GriffinError."""
        path = self.prior_out
        if path is None:
            return
        if path.is_dir():
            raise GriffinError(f"{path} is a folder: give --prior-out the name of a file")
        if path.exists() and not force:
            raise GriffinError(f"{path} exists: give --prior-out another name, or --force to replace it")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise GriffinError(f"{path} cannot be written: {folder} is no folder that takes files")

    def save(self, prior: "Prior") -> None:
        from ..pruning.prior import save_prior

        if self.prior_out is not None:
            save_prior(self.prior_out, prior)
            told = prior.facts
            console.note(
                f"score {told['score']} of {told['samples']} samples, {told['tokens']} tokens: {self.prior_out}"
            )


def with_share(name: str) -> tuple[Path, float]:
    """FILE:SHARE, unless there is a file of just this name."""
    file, colon, share = name.rpartition(":")
    if not colon or os.path.exists(name):
        return Path(name), 1.0
    try:
        return Path(file), float(share)
    except ValueError:
        return Path(name), 1.0

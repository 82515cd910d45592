"""--calibration and the options that go with it: neurons are chosen by many texts, or by the weights alone."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GriffinError, OptionError
from ..options import FORMS, SCORES
from ..pruning.calibration_texts import SAMPLES, TOKENS, CalibrationText, draw_samples, read_source
from . import _console as console
from ._flags import F, count, decorate, file, seed_option

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pruning.calibration import Calibration
    from ..pruning.prior import Prior

WITHOUT_TEXTS = ("magnitude", "random")


def takes_calibration(command: F) -> F:
    """--calibration and the options that go with it: the fields of `CalibrationOptions`."""
    return decorate(
        command,
        click.option(
            "--calibration",
            multiple=True,
            metavar="FILE[:SHARE]",
            help='Choose the neurons by many texts, not by one prompt: a text, or a .jsonl file of {"text": ...} or '
            '{"question": ..., "answer": ..., "rationale": ...}. Give several to mix them, by their shares.',
        ),
        count("--samples", None, f"Samples to draw in all. [default: {SAMPLES}]"),
        count(
            "--tokens",
            None,
            f"Longest sample, in tokens. [default: {TOKENS}, or the model's context length if shorter]",
            metavar="T",
        ),
        click.option(
            "--calibration-format",
            type=click.Choice(FORMS),
            help="How rows become samples. text: rows of text; for questions and answers: qa, one pair a sample; "
            "concat, pairs joined until T tokens; question, without the answer. [default: text or concat]",
        ),
        click.option(
            "--rationale/--no-rationale",
            default=None,
            help="Put a row's rationale before its answer. [default: rationale]",
        ),
        click.option(
            "--score",
            type=click.Choice(SCORES),
            help="How neurons are scored: griffin, its statistic summed over all texts; wanda, activation norm times "
            "column norm; magnitude and random need no texts. [default: griffin]",
        ),
        file("--prior-out", "Save the scores of all neurons, for --prior. Without --out nothing else is written."),
        click.option(
            "--host-memory",
            metavar="SIZE",
            help="RAM for the hidden states of calibration samples between layers; what does not fit goes to a file "
            "beside --out. On the CPU it is part of --device-memory. [default: all that is left]",
        ),
        seed_option("Seed of the samples, and of selections and scores that draw."),
    )


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of a choice without a prompt. Raises click.UsageError for those that do not go together."""

    calibration: tuple[str, ...]
    samples: int | None
    tokens: int | None
    calibration_format: str | None
    rationale: bool | None
    score: str | None
    prior_out: Path | None
    host_memory: str | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "calibration_format", "rationale", "host_memory"):
            if getattr(self, name) is not None and not self.calibration:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --calibration FILE")
        if self.score in WITHOUT_TEXTS and self.calibration:
            raise click.UsageError(f"--score {self.score} does not depend on texts: leave out --calibration")
        if self.score is not None and self.score not in WITHOUT_TEXTS and not self.calibration:
            raise click.UsageError(f"--score {self.score} needs --calibration FILE")
        if self.prior_out is not None and not self.asked:
            raise click.UsageError("--prior-out needs --calibration FILE, whose scores it saves")

    @property
    def asked(self) -> bool:
        """Whether the neurons are chosen without a prompt."""
        return bool(self.calibration) or self.score is not None

    def refuse(self, given: dict[str, Any]) -> None:
        """Raises click.UsageError for an option of a prompt, by its flag, beside those of a choice without one."""
        if self.asked and (flags := [flag for flag, value in given.items() if value]):
            raise click.UsageError(
                f"{flags[0]} cannot be combined with --{'calibration' if self.calibration else 'score'}"
            )

    def sources(self) -> list[CalibrationText]:
        """The files read. Raises GriffinError."""
        return [read_source(*with_share(name)) for name in self.calibration]

    def draw(self, engine: "Engine", sources: list[CalibrationText]) -> "Calibration":
        """Samples of the files, and how neurons are scored. Says where there is less text than asked for."""
        from ..pruning.calibration import Calibration

        score = self.score or "griffin"
        if not sources:
            return Calibration(score=score, seed=self.seed)
        room = engine.context_length - 1
        if self.tokens is not None and self.tokens > room:
            raise OptionError(f"--tokens {self.tokens}: {engine.name} reads at most {room}")
        drawn = draw_samples(
            lambda text: engine.encode(text, raw=True, cut=True),
            sources,
            samples=SAMPLES if self.samples is None else self.samples,
            tokens=min(TOKENS, room) if self.tokens is None else self.tokens,
            form=self.calibration_format,
            rationale=self.rationale is not False,
            seed=self.seed,
            bos=engine.tokenizer.bos_token_id,
        )
        for note in drawn.notes:
            console.note(note)
        return Calibration(drawn.ids, score, self.seed, drawn.facts)

    def check_prior_out(self, force: bool) -> dict[str, Any]:
        """Before the model is read for it. Returns the facts of the prior that is there. Raises GriffinError."""
        path = self.prior_out
        if path is None:
            return {}
        if path.is_dir():
            raise GriffinError(f"{path} is a folder: give --prior-out the name of a file")
        if path.exists() and not force:
            from ..pruning.prior import load_prior

            try:
                return dict(load_prior(path).facts)
            except GriffinError:
                raise self.exists() from None
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise GriffinError(f"{path} cannot be written: no file can be created in {folder}")
        return {}

    def exists(self) -> GriffinError:
        return GriffinError(f"{self.prior_out} exists: give --prior-out another name, or --force to replace it")

    def is_saved(self, engine: "Engine", calibration: "Calibration", before: dict[str, Any]) -> bool:
        """Whether --prior-out is there by these texts already. Raises GriffinError for a prior by others."""
        same = {**engine.opened.facts, **calibration.to_json()}
        if before and {name: before.get(name) for name in same} != json.loads(json.dumps(same)):
            raise self.exists()
        return bool(before)

    def save(self, prior: "Prior", force: bool) -> None:
        from ..pruning.prior import save_prior

        if self.prior_out is not None:
            save_prior(self.prior_out, prior, new=not force)
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

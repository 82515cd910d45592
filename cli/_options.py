"""Options that several commands share, and what they mean."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..chat import Settings
from ..errors import GriffinError
from ..options import ALLOCATIONS, AUTO, RESIDENT_DTYPES, RESTS, SELECTIONS, SKIP_MODES
from ..sources.resolve import DEFAULT_MODEL
from ..units import format_bytes
from . import _console as console
from ._text import check_text, read_file

if TYPE_CHECKING:
    from ..engine import Engine
    from ..planning.plan import Plan
    from ..report import Report

F = TypeVar("F", bound=Callable[..., Any])

SPARSITY_HELP = (
    "Share of the feed-forward neurons to drop, 0 to 1; or one for each layer: 0.2,0.5,... or a file of them; or auto. "
    "[default: auto, as little as fits]"
)


class Shares(click.ParamType):  # type: ignore[type-arg]
    """A number, or one for each layer: with commas between them, or in a file (commas, spaces, lines or JSON)."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower() == AUTO:
            return None
        text = value
        if os.path.isfile(value):
            text = read_file(value).strip().removeprefix("[").removesuffix("]")
        try:
            shares = tuple(float(part) for part in text.replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r} is no number, no numbers with commas between them, and no file of them", param, ctx)
        if not shares:
            self.fail(f"{value!r} holds no number", param, ctx)
        return shares if len(shares) > 1 else shares[0]


SHARES = Shares()


class Ends(click.ParamType):  # type: ignore[type-arg]
    """How many at the beginning and how many at the end."""

    name = "ends"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            first, last = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not FIRST,LAST: write 2,2", param, ctx)
        return first, last


def decorate(command: F, *options: Callable[[F], F]) -> F:
    """Options in the order in which --help lists them."""
    for option in reversed(options):
        command = option(command)
    return command


def device_options(command: F) -> F:
    """--device, --device-memory, --dtype."""
    return decorate(
        command,
        click.option("--device", metavar="NAME", help="cuda, mps or cpu. [default: the best there is]"),
        click.option(
            "--device-memory",
            metavar="SIZE",
            help="Most memory to use: 4GiB, 4900MB or bytes. [default: what is free, less a margin]",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="Precision of the weights. [default: the checkpoint's]",
        ),
    )


def model_options(command: F) -> F:
    """--model and the device options: the arguments of Engine."""
    model = click.option(
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        metavar="NAME",
        help="An alias (see `griffin models`), a folder, a hub id or a .gguf file.",
    )
    return decorate(command, model, device_options)


def host_memory_option(command: F) -> F:
    """--host-memory: for the commands that may answer more than one prompt."""
    return click.option(
        "--host-memory",
        metavar="SIZE",
        default="0",
        help="RAM for layers between prompts: the next prompt need not read them from disk. On the CPU, of what "
        "--device-memory leaves. [default: none]",
    )(command)


def expert_options(command: F) -> F:
    """--selection and --allocation."""
    return decorate(
        command,
        click.option(
            "--selection",
            type=click.Choice(SELECTIONS),
            default="topk",
            show_default=True,
            help="How experts are chosen. All but topk are for comparison.",
        ),
        click.option(
            "--allocation",
            type=click.Choice(ALLOCATIONS),
            default="uniform",
            show_default=True,
            help="How the sparsity is shared over the layers; sensitivity: as `griffin calibrate` measured it, "
            "uniform where it has not.",
        ),
    )


def prior_options(command: F) -> F:
    """--prior and --prior-weight: see `check_prior_options`."""
    return decorate(
        command,
        click.option(
            "--prior",
            metavar="FILE",
            help="What other texts say of the neurons, to be joined with what the prompt says: a file of "
            "`griffin export-pruned --calibration ... --prior-out FILE`.",
        ),
        click.option(
            "--prior-weight",
            type=float,
            metavar="W",
            help="How much the prior counts, 0 (the prompt alone) to 1 (the prior alone). [default: 0.4]",
        ),
    )


def check_prior_options(prior: str | None, prior_weight: float | None) -> None:
    """Raises click.UsageError for a weight of no prior."""
    if prior is None and prior_weight is not None:
        raise click.UsageError("--prior-weight is of a --prior: give one, or leave the weight out")


def precision_options(command: F) -> F:
    """--resident-dtype and --rest."""
    return decorate(
        command,
        click.option(
            "--resident-dtype",
            type=click.Choice((AUTO, *RESIDENT_DTYPES)),
            help="Of the weights that stay. bfloat16: as the model runs; int8, int4: packed while the prompt passes, "
            "which itself is computed unpacked. The head is int8 in both. auto: the first that fits. "
            "[default: auto, but bfloat16 where --sparsity is given]",
        ),
        click.option(
            "--rest",
            type=click.Choice(RESTS),
            help="What becomes of the neurons that the prompt does not favour: dropped, or kept in fewer bits. "
            "[default: drop]",
        ),
    )


def skip_options(command: F) -> F:
    """--ffn-skip and how: FFN-SkipLLM."""
    return decorate(
        command,
        click.option(
            "--ffn-skip",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="Share of the feed-forward blocks to skip where they turn the hidden state least (FFN-SkipLLM). "
            "[default: 0]",
        ),
        click.option(
            "--ffn-skip-mode",
            type=click.Choice(SKIP_MODES),
            default="token",
            show_default=True,
            help="token: each token of the answer skips for itself, which saves time and no memory; prompt: the blocks "
            "that the prompt needs least keep no neurons, which saves both.",
        ),
        click.option(
            "--ffn-skip-cold",
            type=Ends(),
            metavar="FIRST,LAST",
            help="Blocks at both ends that are never skipped. [default: 2,2]",
        ),
        click.option(
            "--ffn-skip-warmup",
            type=int,
            metavar="N",
            help="By token: so many tokens at the beginning of the answer skip nothing. [default: 4]",
        ),
        click.option(
            "--ffn-skip-run",
            type=int,
            metavar="N",
            help="Blocks skipped in a row, at most. [default: 0, as few as reach the share]",
        ),
    )


def check_skip_usage(*, ffn_skip: float, ffn_skip_mode: str, **options: Any) -> None:
    """Raises click.UsageError for options of skipping that cannot act."""
    given = [name for name in ("cold", "warmup", "run") if options.get(f"ffn_skip_{name}") is not None]
    given += ["mode"] if ffn_skip_mode != "token" else []
    if given and not ffn_skip:
        raise click.UsageError(f"--ffn-skip-{given[0]} says how blocks are skipped: add --ffn-skip SHARE")
    if ffn_skip_mode == "prompt" and "warmup" in given:
        raise click.UsageError("--ffn-skip-warmup is of --ffn-skip-mode token: leave it out")


def prompt_form_options(command: F) -> F:
    """--system and --raw, which exclude each other: see `prompt_form`."""
    return decorate(
        command,
        click.option("--system", metavar="TEXT", help="What the model is told before the prompt."),
        click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template."),
    )


def prompt_form(system: str | None, raw: bool) -> str | None:
    """The checked --system. Raises click.UsageError where it meets --raw, PromptError where it is no text."""
    if raw and system is not None:
        raise click.UsageError("--raw leaves out the chat template, and --system needs it: leave one out")
    return None if system is None else check_text(system, "--system")


def answer_options(command: F) -> F:
    """--sparsity, --max-new-tokens and the sampling options: the arguments of `settings`."""
    return decorate(
        command,
        click.option("--sparsity", type=SHARES, metavar="SHARE", help=SPARSITY_HELP),
        precision_options,
        expert_options,
        prior_options,
        skip_options,
        click.option(
            "--max-new-tokens", type=int, default=256, show_default=True, metavar="N", help="Longest answer, in tokens."
        ),
        click.option("--temperature", type=float, metavar="T", help="Sample; below 1 safer, above 1 more varied."),
        click.option("--top-p", type=float, metavar="P", help="Sample among the likeliest tokens of total share P."),
        click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens."),
        click.option("--seed", type=int, metavar="N", help="Sample the same way every time."),
        click.option(
            "--greedy",
            is_flag=True,
            help="Take the likeliest token every time. [default: as the model's own generation config says]",
        ),
    )


def open_engine(
    model: str,
    *,
    device: str | None = None,
    device_memory: str | None = None,
    host_memory: str = "0",
    dtype: str | None = None,
) -> "Engine":
    """The engine of the model options; a bar shows if the model has to be fetched."""
    from ..engine import Engine

    with console.progress_bytes("Fetching") as on_progress:
        return Engine(
            model,
            device=device,
            device_memory=device_memory,
            host_memory=host_memory,
            dtype=dtype,
            on_progress=on_progress,
        )


def settings(**options: Any) -> Settings:
    """Settings from the answer options. Raises click.UsageError where --greedy and a sampling option meet, and for a
    --prior-weight without --prior."""
    check_prior_options(options["prior"], options["prior_weight"])
    sampling = Settings(**(options | {"greedy": False})).sampling()
    if options["greedy"] and sampling:
        flags = ", ".join("--" + name.replace("_", "-") for name in sampling)
        raise click.UsageError(f"--greedy takes the likeliest token every time: leave out {flags}")
    return Settings(**options)


def choice_note(settings: Settings, plan: "Plan", dtype: str) -> str | None:
    """What was chosen to fit, where the user left it open; None where not."""
    from ..planning.ladder import describe

    if settings.sparsity is not None or settings.resident_dtype not in (None, AUTO):
        return None
    if not plan.reads_again:
        return "the whole model fits the device: no offloading needed; nothing is pruned (use --sparsity to prune)"
    if settings.ffn_skip and plan.sparsity == 0 and not plan.precision.quantized:
        return None  # all that was asked for, and no more
    kept = describe(plan).replace("bfloat16", dtype)
    return f"to fit {format_bytes(plan.budget)}: {kept} (griffin mem-report --model shows the choices)"


def remember(report: "Report") -> None:
    """Keep the report for `griffin mem-report --last`. A cache that cannot be written is no reason to fail."""
    from ..paths import cache_folder
    from ..report import save_last

    try:
        save_last(report, cache_folder())
    except (OSError, GriffinError) as error:
        console.note(f"the report is not kept for mem-report --last: {error}")

"""Options that may be given several times, where rows are compared."""

from typing import TYPE_CHECKING

import click

from ..options import ALLOCATIONS, RESIDENT_DTYPES, RESTS, SELECTIONS
from ._options import F, decorate

if TYPE_CHECKING:
    from ..evaluation.scoring.variant import Variant


def resident_dtypes_option(command: F) -> F:
    """--resident-dtype, several times, where rows are compared."""
    return click.option(
        "--resident-dtype",
        "resident_dtypes",
        type=click.Choice(RESIDENT_DTYPES),
        multiple=True,
        default=("bfloat16",),
        show_default=True,
        help="Of the weights that stay, in Griffin's rows. Give several to compare.",
    )(command)


def variant_options(command: F) -> F:
    """--sparsity, --selection, --allocation, --resident-dtype, --rest, --seed: the arguments of `variants`."""
    return decorate(
        command,
        click.option(
            "--sparsity",
            "sparsities",
            type=float,
            multiple=True,
            default=(0.0, 0.5),
            show_default=True,
            metavar="SHARE",
            help="Share of the feed-forward neurons to drop, 0 (the full model) to 1. Give several to compare.",
        ),
        click.option(
            "--selection",
            "selections",
            type=click.Choice(SELECTIONS),
            multiple=True,
            default=("topk",),
            show_default=True,
            help="How experts are chosen. Give several to compare.",
        ),
        click.option(
            "--allocation",
            "allocations",
            type=click.Choice(ALLOCATIONS),
            multiple=True,
            default=("uniform",),
            show_default=True,
            help="How the kept neurons are shared over the layers; `griffin calibrate` measures their sensitivity. "
            "Give several to compare.",
        ),
        resident_dtypes_option,
        click.option(
            "--rest",
            "rests",
            type=click.Choice(RESTS),
            multiple=True,
            default=("drop",),
            show_default=True,
            help="What becomes of the neurons that are no experts. Give several to compare.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            metavar="N",
            help="Seed of the selections that draw: sampling, topk-sampling, random.",
        ),
    )


def variants(
    *,
    sparsities: tuple[float, ...],
    selections: tuple[str, ...],
    allocations: tuple[str, ...],
    resident_dtypes: tuple[str, ...],
    rests: tuple[str, ...],
    seed: int,
) -> list["Variant"]:
    """Every combination, the full model once. Raises OptionError for a sparsity out of range."""
    from ..evaluation.scoring.variant import all_variants

    return all_variants(sparsities, selections, allocations, seed, resident_dtypes, rests)

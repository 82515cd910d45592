"""The figures, drawn from plain data to a file: png, pdf or svg by its suffix.

matplotlib is an extra, imported here only, and through its objects: no window, no state shared with the caller's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import OptionError
from ...files import FIGURE, write_whole
from ...units import GIB, MIB
from .observe import Point, chance_overlap, kept_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "griffin",  # the same data, the same file
}
# Okabe and Ito's colours, which everybody can tell apart, without yellow, which is weak on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
CURVE = 400  # points of a curve over neurons: more cannot be seen
MANY = 50  # layers: a line with more has no room for markers


def check(path: Path) -> None:
    """Raises OptionError where a figure cannot be drawn to `path`. To be called before the work that it shows."""
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"{path}: the name of a figure ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OptionError(f"{path}: the folder {path.parent} does not exist: make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("figures need matplotlib: pip install 'griffin-offload[plot]'") from error


def flocking(panels: Mapping[str, Mapping[int, Tensor]], path: Path, title: str) -> None:
    """Heat maps of relative activations: by row label, by layer, |Z̄| (T, F). Flocking shows as vertical streaks."""
    layers = sorted({layer for row in panels.values() for layer in row})
    drawn = torch.cat([matrix[matrix > 0] for row in panels.values() for matrix in row.values()])  # ReLU: most are 0
    # The few strongest share the last colour: they would leave the others black.
    top = float(drawn.kthvalue(math.ceil(0.98 * len(drawn))).values) if len(drawn) else 1.0
    with canvas(path, 3.3 * len(layers) + 0.9, 3.1 * len(panels) + 0.6, title) as figure:
        grid = figure.subplots(len(panels), len(layers), squeeze=False, sharex=True, sharey=True)
        for axes_row, (label, row) in zip(grid, panels.items(), strict=True):
            for axes, layer in zip(axes_row, layers, strict=True):
                image = axes.imshow(row[layer].numpy(), aspect="auto", cmap="magma", vmin=0, vmax=top, rasterized=True)
                axes.grid(False)
            axes_row[0].set_ylabel(f"{label}\ntoken" if len(panels) > 1 else "token")
        for axes, layer in zip(grid[0], layers, strict=True):
            axes.set_title(f"layer {layer}")
        for axes in grid[-1]:
            axes.set_xlabel("feed-forward neuron")
        figure.colorbar(
            image,
            ax=grid,
            extend="max",
            extendfrac=0.03,
            pad=0.02,
            aspect=30 * len(panels),
            label=r"relative activation $|\bar{z}|$",
        )


def jaccard(overlap: Mapping[float, Sequence[Tensor]], neurons: Sequence[int], path: Path, title: str) -> None:
    """Overlap of kept neurons by layer, a panel for each density. `overlap`: by density, (pairs,) of each layer;
    `neurons`: F of each layer.

    The band is one standard deviation over pairs, the dashed line what random sets would share."""
    layers = range(len(neurons))
    columns = min(4, len(overlap))
    rows = -(-len(overlap) // columns)
    with canvas(path, 2.4 * columns + 1.2, 2.7 * rows + 0.8, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(overlap) :]:
            axes.set_axis_off()
        for axes, (density, pairs) in zip(grid.flat, sorted(overlap.items()), strict=False):
            mean = torch.stack([of_layer.mean() for of_layer in pairs])
            spread = torch.stack([of_layer.std(correction=0) for of_layer in pairs])
            chance = [chance_overlap(size, kept_at(size, density)) for size in neurons]
            low, high = (mean - spread).numpy(), (mean + spread).numpy()
            axes.fill_between(
                layers, low, high, color=COLOURS[0], alpha=0.2, lw=0, label="1 standard deviation of pairs"
            )
            mark = {"marker": "o", "markersize": 3} if len(layers) < MANY else {}
            axes.plot(layers, mean.numpy(), color=COLOURS[0], label="mean over pairs", **mark)
            axes.plot(layers, chance, color=COLOURS[1], linestyle="--", label="chance")
            axes.set(title=f"{100 * density:.3g}% of neurons kept", xlabel="layer", ylim=(0, 1))
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes_row in grid:
            axes_row[0].set_ylabel("Jaccard overlap")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def statistic(statistics: Mapping[int, Tensor], path: Path, title: str) -> None:
    """The sorted s of each layer, and the share of s² that the strongest neurons hold: by layer, s² (P, F).

    Each prompt is sorted by itself and divided by its number of tokens; the lines are means over prompts."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    first, last = min(statistics), max(statistics)
    scale = ScalarMappable(Normalize(first, max(last, first + 1)), "viridis")
    with canvas(path, 9.6, 4.2, title) as figure:
        left, right = figure.subplots(1, 2)
        for layer, squares in sorted(statistics.items()):
            ranked = squares.sort(dim=1, descending=True).values
            ranked = (ranked / ranked.sum(dim=1, keepdim=True)).mean(dim=0)
            size = len(ranked)
            ranks = torch.logspace(0, math.log10(size), CURVE).round().long().unique()
            share = 100 * ranks / size
            colour = scale.cmap((layer - first) / max(1, last - first))
            left.plot(share.numpy(), ranked[ranks - 1].sqrt().numpy(), color=colour, linewidth=1)
            right.plot(share.numpy(), 100 * ranked.cumsum(0)[ranks - 1].numpy(), color=colour, linewidth=1)
        left.set(xscale="log", yscale="log", xlabel="neurons, strongest first (%)", ylabel=r"$s\,/\,\sqrt{T}$")
        left.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        right.plot([0, 100], [0, 100], color="0.3", linestyle="--", linewidth=1, label="all neurons equal")
        right.set(xlabel="neurons kept (%)", ylabel=r"share of $s^2$ that they hold (%)", xlim=(0, 100), ylim=(0, 100))
        right.legend(loc="lower right")
        figure.colorbar(scale, ax=[left, right], label="layer", pad=0.02, aspect=30)


def frontier(points: Sequence[Point], path: Path, title: str) -> None:
    """Perplexity against the resident weights' bytes, one line a series; bars are one standard error."""
    from matplotlib.ticker import LogLocator, NullFormatter

    largest = max(point.resident_bytes for point in points)
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    with canvas(path, 6.8, 4.6, title) as figure:
        axes = figure.subplots()
        for index, label in enumerate(dict.fromkeys(point.series for point in points)):
            line = sorted((p for p in points if p.series == label), key=lambda p: p.resident_bytes)
            error = torch.tensor([p.standard_error for p in line])
            centre = torch.tensor([p.perplexity for p in line])
            axes.errorbar(
                [p.resident_bytes / unit for p in line],
                centre.numpy(),
                yerr=torch.stack([centre * (1 - (-error).exp()), centre * (error.exp() - 1)]).numpy(),
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                capsize=2,
                linewidth=1.2,
                elinewidth=0.8,
                label=label,
            )
        for point in _labelled(points):
            text = f"{100 * point.sparsity:.3g}% pruned" if point.sparsity else "full"
            where = (point.resident_bytes / unit, point.perplexity)
            axes.annotate(text, where, xytext=(6, 4), textcoords="offset points", color="0.3", fontsize=9)
        axes.set(yscale="log", xlabel=f"resident weights ({name})", ylabel="perplexity (bar: 1 standard error)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.12)  # room for the labels
        if len(axes.containers) > 1:
            figure.legend(loc="outside lower center", ncols=2)


def ways(panels: Mapping[str, Sequence[tuple[str, float, float, float]]], path: Path, title: str) -> None:
    """A panel for each measure, a line for each way, a mark for each share: (way, share, mean, standard error).

    A perplexity's error is that of its logarithm. Ways stand in the order in which they come, the first one on top."""
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(way for panel in panels.values() for way, *_ in panel))
    shares = sorted({share for panel in panels.values() for _, share, *_ in panel if share})
    with canvas(path, 3.2 + 2.6 * len(panels), max(3.2, 1.2 + 0.24 * len(names)), title) as figure:
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (measure, panel) in zip(columns, panels.items(), strict=True):
            for way, share, mean, error in panel:
                place = shares.index(share) if share else -1
                around = ([mean * (1 - math.exp(-error))], [mean * (math.exp(error) - 1)])
                axes.errorbar(
                    [mean],
                    [names.index(way) + 0.12 * max(0, place)],
                    xerr=around if measure == "perplexity" else [error],
                    color=COLOURS[place],
                    marker=MARKERS[place],
                    markersize=5,
                    elinewidth=0.8,
                    linestyle="none",
                    label=f"{share:.0%} left out" if share else "nothing left out",
                )
            axes.set(xlabel=measure)
            if measure == "perplexity":
                axes.set(xscale="log")
                means = [mean for _, _, mean, _ in panel]
                narrow = max(means) < 300 * min(means)
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if narrow else (1,), numticks=9 if narrow else 4))
                axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        columns[0].set_yticks(range(len(names)), names)
        columns[0].invert_yaxis()
        handles = dict(zip(*reversed(columns[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _labelled(points: Sequence[Point]) -> list[Point]:
    """Points whose labels do not lie on one another, the highest first."""
    sizes = [point.resident_bytes for point in points]
    heights = [math.log(point.perplexity) for point in points]
    width, height = max(1, max(sizes) - min(sizes)), max(1e-9, max(heights) - min(heights))
    chosen: list[Point] = []
    for point in sorted(points, key=lambda point: -point.perplexity):
        apart = (
            abs(point.resident_bytes - other.resident_bytes) > 0.15 * width
            or abs(math.log(point.perplexity / other.perplexity)) > 0.06 * height
            for other in chosen
        )
        if all(apart):
            chosen.append(point)
    return chosen


@contextmanager
def canvas(path: Path, width: float, height: float, title: str) -> "Iterator[Figure]":
    """An empty figure, width x height inches, written when the block ends."""
    check(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # the caller's settings are his again afterwards
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title)
        yield figure
        dated = {".pdf": "CreationDate", ".svg": "Date"}.get(path.suffix.lower())
        facts = {"Creator": FIGURE, dated: None} if dated else {"Software": FIGURE}
        with write_whole(path, make_folder=False) as temporary:
            figure.savefig(temporary, metadata=facts)

"""Numbers -> SVG, as text. Colours are CSS classes of the page; a <title> tells what a mark is."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, LEFT, RIGHT = 900, 84, 16


class Scale:
    """Values from 0 to `most` -> pixels from `begin` to `end`."""

    def __init__(self, most: float, begin: float, end: float) -> None:
        self.most, self._begin, self._end = most or 1.0, begin, end

    def __call__(self, value: float) -> float:
        return round(self._begin + (self._end - self._begin) * min(1.0, max(0.0, value / self.most)), 1)

    def ticks(self) -> list[float]:
        """Three to seven round values from 0 on."""
        power = 10.0 ** math.floor(math.log10(self.most))
        step = next(part * power for part in (0.2, 0.5, 1, 2) if self.most / (part * power) < 7)
        return [round(n * step, 9) for n in range(int(self.most / step + 1e-9) + 1)]


def svg(height: float, label: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, told: str) -> str:
    shape = f'x="{x:g}" y="{y:g}" width="{max(0.0, width):g}" height="{height:g}"'
    return f'<rect {shape} class="{kind}"><title>{escape(told)}</title></rect>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def path(points: Sequence[tuple[float, float]], kind: str, told: str) -> str:
    told = escape(told)
    shape = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{shape}" class="{kind}"><title>{told}</title></polyline>'


def legend(entries: Sequence[tuple[str, str]], y: float) -> list[str]:
    """(class, words) in one row."""
    parts, x = [], float(LEFT)
    for kind, words in entries:
        parts += [box(x, y - 9, 10, 10, kind, words), text(x + 14, y, words)]
        x += 30 + 6.6 * len(words)
    return parts


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """`kinds`: a colour before each row's first cell, '' for none."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    marks = [f'<i class="{kind}"></i>' if kind else "" for kind in kinds] or [""] * len(rows)
    cells = ("</td><td>".join(map(escape, row)) for row in rows)
    body = "\n".join(f"<tr><td>{mark}{row}</td></tr>" for mark, row in zip(marks, cells, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"

"""Text that somebody else wrote -> text that a terminal shows and never obeys.

Names, numbers and texts of checkpoints, templates, priors, reports, files and requests, and what models answer: all of
it goes through one of the two functions here before it reaches a terminal or an error."""

import re

# What a terminal may obey, or what changes the order or the place of the text around it: controls (ESC, BEL, CSI ...),
# the ends of lines and paragraphs that only Unicode knows, overrides and isolates of the direction, halves of
# characters, annotations, and tags, which are letters that nobody sees.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2061-\u2064\u2066-\u206f\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_FILLERS = "\u115f\u1160\u3164\uffa0"  # letters of Hangul without a shape
NAME, ERROR = 200, 900  # characters of a foreign name in an error, and of a whole error


def printable(text: str) -> str:
    r"""A text of several lines, such as an answer, to be read on a terminal. Line feeds and tabs stay, and so do the
    signs without a shape that languages and emoji need (ZWJ, ZWNJ, LRM, RLM); what a terminal might obey is escaped:
    \x1b. A carriage return, which would overwrite its line, is left out.

    Each character stands for itself, so a text may come in pieces."""
    return _OBEYED.sub(lambda found: _escaped(found[0]), text.replace("\r", ""))


def shown(text: object, most: int | None = None) -> str:
    r"""A name or a value on one line: all that is not to be seen is escaped, line feeds too: a\nb\u200d. `most`:
    characters; of a longer text the middle is left out."""
    line = str(text)
    if most is not None and len(line) > 2 * most:  # what would be cut in any case need not be escaped
        line = line[:most] + line[-most:]
    if not line.isprintable() or any(filler in line for filler in _FILLERS):
        line = "".join(c if c.isprintable() and c not in _FILLERS else _escaped(c) for c in line)
    if most is not None and len(line) > most:
        line = f"{line[: most * 2 // 3]} ... {line[-(most // 3) :]}"
    return line


def sentence(text: object, most: int | None = None) -> str:
    """As `shown`, white space as single blanks: another program's error, or a text to be told of."""
    return shown(" ".join(str(text).split()), most)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]

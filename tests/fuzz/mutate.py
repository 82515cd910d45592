"""Damages inputs: a valid input and a seed -> another input, always the same one.

Bytes are flipped, cut, copied and overwritten; JSON, the header of a safetensors file and that of a GGUF file are taken
apart, so that the damage is inside their values as often as in their frame."""

import copy
import json
import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

MOST = 2**20  # bytes of an input
# What json.dumps cannot write, by the text that stands for it.
RAW = {
    "@digits": "9" * 5000,
    "@deep": "[" * 3000 + "]" * 3000,
    "@objects": '{"a":' * 3000 + "1" + "}" * 3000,
    "@tiny": "1e-320",
    "@huge": "1e400",
    "@half": '"\\ud800"',
}
NUMBERS = [0, 1, -1, 2, 7, 0.5, -0.5, math.nan, math.inf, -math.inf, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 2**64]
TEXTS = ["", "x", "\0", "../x", "/etc/passwd", "x" * 3000, "\x1b[31m", "a\nb", "\u202e", "true", "1", "load", "auto"]
VALUES = [None, True, False, *NUMBERS, 1e308, 10**30, *TEXTS, *RAW, [], [[]], [None], {}, {"": None}, [1, 2], ["a"]]


def damaged(data: bytes, form: str, random: Random, words: Sequence[str] = ()) -> bytes:
    """`form`: of FORMS. `words`: keys and texts that mean something to the reader."""
    kind = "bytes" if random.random() < 0.2 else form
    changed = FORMS[kind](data, random, words)
    if kind != "bytes" and random.random() < 0.1:
        changed = in_bytes(changed, random, words)
    return changed[:MOST]


def in_bytes(data: bytes, random: Random, words: Sequence[str] = ()) -> bytes:
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        if random.random() < 0.5:  # what decides is mostly in front
            at = random.randrange(min(len(out), 256) + 1)
        length = random.choice((1, 1, 2, 4, 8, 100))
        match random.randrange(7):
            case 0:
                out[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                out[at : at + length] = random.choice((bytes(length), b"\xff" * length, random.randbytes(length)))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length] * random.choice((1, 1, 50))
            case 4:
                number = random.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(out)))
                out[at : at + 8] = number.to_bytes(8, "little")
            case 5:
                out[at:at] = random.choice([*words, "\0", "[", "{", '"', "{{", "{%", "é", "\n"]).encode()
            case 6:
                del out[at:]
    return bytes(out)


def in_json(data: bytes, random: Random, words: Sequence[str] = ()) -> bytes:
    return _dumped(_changed(json.loads(data), random, words))


def in_lines(data: bytes, random: Random, words: Sequence[str] = ()) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = in_json(lines[at], random, words) if lines[at] else b"{}"
    return b"\n".join(lines)


def in_safetensors(data: bytes, random: Random, words: Sequence[str] = ()) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = in_json(data[8 : 8 + length], random, words)
    header += b" " * (-len(header) % 8)
    told = len(header) if random.random() < 0.95 else random.choice((0, 2, length, 2**40, 2**63, 2**64 - 1))
    return told.to_bytes(8, "little") + header + data[8 + length :]


def _changed(tree: Any, random: Random, words: Sequence[str]) -> Any:
    """A parsed JSON, which is changed in place."""
    holder = [tree]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        parent, key = random.choice(_places(holder))
        value = parent[key]
        match random.randrange(9):
            case 0 | 1 | 2:
                parent[key] = _value(random, words)
            case 3:
                parent[key] = _nudged(value, random, words)
            case 4:
                del parent[key]
                holder = holder or [None]
            case 5:
                other, name = random.choice(_places(holder))
                parent[key] = json.loads(json.dumps(other[name]))
            case 6:
                parent[key] = random.choice(([value], {"a": value}, [value, copy.deepcopy(value)]))
            case 7 if isinstance(value, dict) or (isinstance(parent, dict) and (value := parent)):
                value[random.choice([*words, "x"])] = _value(random, words)
            case _:
                if isinstance(parent, dict):
                    parent[random.choice([*words, f"{key}_", key.upper()])] = parent.pop(key)
    return holder[0]


def _value(random: Random, words: Sequence[str] = ()) -> Any:
    return copy.deepcopy(random.choice([*VALUES, *words]))  # or the next change would be inside the table


def _nudged(value: Any, random: Random, words: Sequence[str]) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.8:
        try:
            return _dumped(_changed(json.loads(value), random, words)).decode("utf-8", "replace")
        except ValueError:
            pass
    if isinstance(value, str):
        return in_bytes(value.encode("utf-8", "replace"), random, words).decode("utf-8", "replace")
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, value * 2, -value, value / 2, str(value), value + 2**32))
    return _value(random)


def _places(holder: list[Any]) -> list[tuple[Any, Any]]:
    """Every value below, as (its list or object, its place there); of long lists only the first."""
    found, left = [], [holder]
    while left:
        node: Any = left.pop()
        keys = list(node)[:64] if isinstance(node, dict) else range(min(len(node), 64))
        found += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found or [(holder, 0)]


def _dumped(tree: Any) -> bytes:
    text = json.dumps(tree)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


class Gguf:
    """A GGUF file taken apart: fields [key, kind, bytes], tensors [name, shape, kind, offset], data."""

    SIZES = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 24
        _, tensors, fields = struct.unpack_from("<IQQ", data, 4)
        self.fields = [self._field() for _ in range(fields)]
        self.tensors = [self._tensor() for _ in range(tensors)]
        self.align = next((struct.unpack("<I", v)[0] for key, _, v in self.fields if key == b"general.alignment"), 32)
        self.rest = data[-(-self._at // self.align) * self.align :]

    def to_bytes(self, version: int = 3, more: tuple[int, int] = (0, 0)) -> bytes:
        """`more`: tensors and fields than there are, in the counts."""
        out = b"GGUF" + struct.pack("<IQQ", version, len(self.tensors) + more[0], len(self.fields) + more[1])
        for key, kind, value in self.fields:
            out += gguf_text(key) + struct.pack("<I", kind) + value
        for name, shape, kind, offset in self.tensors:
            out += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset % 2**64)
        return out + bytes(-len(out) % self.align) + self.rest

    def set(self, key: str, kind: int, value: bytes) -> "Gguf":
        self.fields = [field for field in self.fields if field[0] != key.encode()] + [[key.encode(), kind, value]]
        return self

    def _text(self) -> bytes:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        self._at += 8 + length
        return self._data[self._at - length : self._at]

    def _skip(self, kind: int) -> None:
        if kind == 8:
            self._text()
        elif kind == 9:
            element, count = struct.unpack_from("<IQ", self._data, self._at)
            self._at += 12
            for _ in range(count):
                self._skip(element)
        else:
            self._at += self.SIZES[kind] or 0

    def _field(self) -> list[Any]:
        key = self._text()
        (kind,) = struct.unpack_from("<I", self._data, self._at)
        self._at += 4
        begin = self._at
        self._skip(kind)
        return [key, kind, self._data[begin : self._at]]

    def _tensor(self) -> list[Any]:
        name = self._text()
        (count,) = struct.unpack_from("<I", self._data, self._at)
        *shape, kind, offset = struct.unpack_from(f"<{count}QIQ", self._data, self._at + 4)
        self._at += 16 + 8 * count
        return [name, shape, kind, offset]


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_values() -> list[tuple[int, bytes]]:
    """Values of every type, (kind, bytes), with what a reader may not expect of each."""
    packed = struct.pack
    found: list[tuple[int, bytes]] = []
    found += [(0, packed("<B", n)) for n in (0, 1, 255)] + [(7, packed("<B", n)) for n in (0, 1, 2)]
    found += [(4, packed("<I", n)) for n in (0, 1, 7, 2**31, 2**32 - 1)]
    found += [(5, packed("<i", n)) for n in (0, -1, -(2**31), 2**31 - 1)]
    found += [(10, packed("<Q", n)) for n in (0, 1, 2**63, 2**64 - 1)] + [(11, packed("<q", -1))]
    found += [(6, packed("<f", n)) for n in (0, -1, 1e-38, 3e38, math.nan, math.inf)]
    found += [(12, packed("<d", n)) for n in (0.5, 1e308, math.nan)]
    found += [(8, gguf_text(t)) for t in (b"", b"x", b"\xff\xfe", b"\0", b"../x", b"\x1b[31m", b"x" * 2000, b"{{ a")]
    found += [(8, packed("<Q", n) + b"x") for n in (2**20, 2**63, 2**64 - 1)]
    found += [(9, packed("<IQ", kind, 0)) for kind in (0, 4, 6, 8, 9, 13)]
    found += [(9, packed("<IQ2I", 4, 2, 1, 2)), (9, packed("<IQ", 8, 2) + gguf_text(b"a") + gguf_text(b"b"))]
    found += [(9, packed("<IQ", kind, n)) for kind in (0, 4, 8, 9, 12) for n in (2**20, 2**40, 2**63, 2**64 - 1)]
    found += [(9, packed("<IQ", 9, 1) * 2000 + packed("<IQI", 4, 1, 7)), (13, b""), (2**32 - 1, b"")]
    return found


def in_gguf(data: bytes, random: Random, words: Sequence[str] = ()) -> bytes:
    file = Gguf(data)
    counts = [0, 0]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        match random.randrange(8):
            case 0 | 1 | 2:
                random.choice(file.fields)[1:] = random.choice(gguf_values())
            case 3:
                key = random.choice(words or ("general.name",)).encode()
                file.fields.append([key, *random.choice(gguf_values())])
            case 4:
                file.fields.pop(random.randrange(len(file.fields)))
                file.fields = file.fields or [[b"a", 4, bytes(4)]]
            case 5:
                tensor = random.choice(file.tensors)
                place = random.randrange(4)
                tensor[place] = random.choice(_tensor_values(tensor, random)[place])
            case 6:
                file.tensors.append([random.choice((b"rope_freqs.weight", b"x", file.tensors[0][0])), [4], 0, 0])
            case _:
                counts[random.randrange(2)] = random.choice((1, -1, 2**31, 2**62))
    more = (max(counts[0], -len(file.tensors)), max(counts[1], -len(file.fields)))
    return file.to_bytes(random.choice((3, 3, 3, 3, 3, 2, 1, 4, 3 << 24)), more)


def _tensor_values(tensor: list[Any], random: Random) -> list[list[Any]]:
    name, shape, _, offset = tensor
    shapes = [[], [0], [1], [2**63, 2], [2**32, 2**32], [*shape, 1], shape[::-1], shape[:1], [1] * 5]
    names = [b"", name + b"x", b"\xff", b"x" * 100, b"a\nb", b"token_embd.weight", b"rope_freqs.weight"]
    return [
        names,
        shapes,
        [0, 1, 2, 8, 12, 26, 30, 39, 999, 2**32 - 1],
        [0, offset + 1, offset + 32, 2**63, 2**64 - 32],
    ]


Form = Callable[[bytes, Random, Sequence[str]], bytes]
FORMS: dict[str, Form] = {
    "bytes": in_bytes,
    "json": in_json,
    "lines": in_lines,
    "safetensors": in_safetensors,
    "gguf": in_gguf,
}

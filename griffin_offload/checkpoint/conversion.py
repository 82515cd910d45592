"""A checkpoint's tensors -> the places in a model's parameters that they are read to.

transformers keeps tables of types whose files name or cut tensors differently: the experts of a mixture, one tensor
each on disk, are one 3-D parameter in memory. Here an entry becomes places in the parameter, so that nothing is copied.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from ..errors import UnsupportedArchitecture
from .headers import Checkpoint, Piece, TensorInfo
from .parts import part, unit
from .quantized.turned import turned


def pieces(model: Any, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """The pieces of each parameter of `shapes` that the files have, by name.

    Raises UnsupportedArchitecture where a table asks for more than putting tensors side by side."""
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    found: dict[str, list[Piece]] = {}
    groups: dict[str, dict[str, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if pattern is not None:
            groups[target][pattern].append(checkpoint.tensors[name])
        elif target in shapes and target not in found:
            found[target] = [Piece(checkpoint.tensors[name])]
    for target, sources in groups.items():
        converter = by_pattern[next(iter(sources))]
        if not shapes.keys() & _targets(converter, target):  # of a vision tower, or of layers that the config lacks
            continue
        ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
        converted = _convert(converter, target, ordered, shapes)
        if converted is None:
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            raise UnsupportedArchitecture(
                f"{model.config.model_type}: {target} is made of the files' tensors by {steps}, "
                "which cannot be read in place"
            )
        found |= {name: parts for name, parts in converted.items() if name in shapes}
    return found


def _targets(converter: WeightConverter, target: str) -> list[str]:
    """The parameters that a converter makes; `target` is the first."""
    return [target.replace(converter.target_patterns[0], pattern) for pattern in converter.target_patterns]


def _convert(
    converter: WeightConverter, target: str, sources: list[list[TensorInfo]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Piece]] | None:
    """The parameters that a converter makes of `sources` (one list for each of its patterns); None if it cannot."""
    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    if steps == [(Chunk, 0)] and len(sources) == 1:
        return _cut(sources[0][0], _targets(converter, target))
    if len(converter.target_patterns) > 1:
        return None
    parts = _parts(steps, sources)
    if parts is None and steps == [(Transpose, None)]:
        parts = _turned(converter.operations[0], sources[0][0], shapes.get(target))
    return None if parts is None else {target: parts}


def _parts(steps: list[tuple[type, int | None]], sources: list[list[TensorInfo]]) -> list[Piece] | None:
    if steps == [(Concatenate, 0)]:
        return _side_by_side([infos[0] for infos in sources], ())
    if steps == [(MergeModulelist, 0)] and len(sources) == 1:
        return [Piece(info, (i,)) for i, info in enumerate(sources[0])]
    if steps == [(MergeModulelist, 0), (Concatenate, 1)]:
        experts = zip(*sources, strict=True)
        return [piece for i, parts in enumerate(experts) for piece in _side_by_side(parts, (i,))]
    return None


def _turned(step: Any, info: TensorInfo, shape: tuple[int, ...] | None) -> list[Piece] | None:
    """Experts whose matrices are transposed where they are not of the model's shape already; None for other tensors."""
    if not step.check_dims or info.encoding:
        return None
    if info.shape == shape:
        return [Piece(info)]
    return [Piece(turned(info))] if (step.dim0, step.dim1) == (1, 2) and len(info.shape) == 3 else None


def _side_by_side(infos: Any, place: tuple[int, ...]) -> list[Piece]:
    """Tensors one after the other, along the first dimension after `place`."""
    parts, begin = [], 0
    for info in infos:
        end = begin + info.shape[0]
        parts.append(Piece(info, (*place, slice(begin, end))))
        begin = end
    return parts


def _cut(info: TensorInfo, names: list[str]) -> dict[str, list[Piece]]:
    """One tensor as several of equal size, along the first dimension."""
    count, shape = math.prod(info.shape) // len(names), (info.shape[0] // len(names), *info.shape[1:])
    if count % unit(info):
        raise UnsupportedArchitecture(f"{info.name}: its quantized weight cannot be cut into {len(names)} equal parts")
    cut = (part(info, i * count, (i + 1) * count) for i in range(len(names)))
    return {name: [Piece(replace(each, shape=shape))] for name, each in zip(names, cut, strict=True)}

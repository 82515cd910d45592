"""Puts weights into a model's modules, dense or quantized, and takes them out again."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.reader import Reader
from ..errors import NumericError
from ..quant.weight import Weight
from .layout import ModelLayout
from .modules import LookedUp, Projection, RoutedExperts

Value = Tensor | Weight | Sequence[Weight]


class WeightSlots:
    """The parameters of a model, by full name. One of the few objects that change a module."""

    def __init__(self, model: Any, layout: ModelLayout, rows: Reader | None = None) -> None:
        """`rows` reads the embedding's rows where it is left on disk, now or beside a quantized lm_head."""
        self._model, self._layout = model, layout
        self._embedding: Any = model.get_input_embeddings()
        self._own_forward = self._embedding.forward
        self._looked_up = LookedUp(self._embedding, self._read_rows(rows)) if rows else None
        if layout.embedding_on_disk:
            self._leave_embedding_on_disk()

    @property
    def looked_up(self) -> LookedUp | None:
        """The embedding's forward while it stays on disk."""
        return self._looked_up if self._embedding.forward is self._looked_up else None

    def assign(self, name: str, value: Value) -> None:
        """Make `value` the parameter `name`, and those tied to it. A quantized one becomes what its module multiplies
        by; several weights: one for each routed expert."""
        if not isinstance(value, Tensor):
            self._quantize(name, value)
            return
        parameter = nn.Parameter(value, requires_grad=False)
        for owner in (name, *(alias for alias, source in self._layout.aliases.items() if source == name)):
            path, _, attribute = owner.rpartition(".")
            module = self._model.get_submodule(path)
            module.register_parameter(attribute, parameter)
            if isinstance(module.forward, Projection) and attribute == "weight":
                module.forward.quantized = None
            elif isinstance(module.forward, RoutedExperts):
                module.forward.quantized.pop(attribute, None)

    def unload(self, names: Iterable[str] | None = None) -> None:
        """Parameters (all, if none are named) back to meta, so that the memory behind them may go."""
        layout = self._layout
        for name in layout.shapes if names is None else names:
            if name not in layout.aliases:
                self.assign(name, torch.empty(layout.shapes[name], dtype=layout.dtype, device="meta"))

    def quantize_lm_head(self, weight: Weight | None) -> None:
        """The lm_head becomes this weight, and its embedding is read from disk; None: both are to be assigned again."""
        if weight is None:
            if not self._layout.embedding_on_disk and self._looked_up is not None:
                self._embedding.forward = self._own_forward
            return
        self._leave_embedding_on_disk()
        self._embedding.register_parameter("weight", self.empty_embedding(weight.tensors[0].device))
        self._quantize(self._layout.lm_head, weight)

    def empty_embedding(self, device: torch.device | str) -> nn.Parameter:
        """An embedding of no row, for one that stays on disk."""
        shape = (0, self._layout.config.hidden_size)
        return nn.Parameter(torch.empty(shape, dtype=self._layout.dtype, device=device), requires_grad=False)

    def quantized_tensors(self) -> list[Tensor]:
        """What one token reads of the quantized weights."""
        forwards = [getattr(module, "forward", None) for module in self._model.modules()]
        weights = [f.quantized for f in forwards if isinstance(f, Projection) and f.quantized is not None]
        weights += [w for f in forwards if isinstance(f, RoutedExperts) for each in f.quantized.values() for w in each]
        return [tensor for weight in weights for tensor in weight.tensors]

    def _quantize(self, name: str, value: Weight | Sequence[Weight]) -> None:
        path, _, attribute = name.rpartition(".")
        module: Any = self._model.get_submodule(path)
        if isinstance(value, Sequence):
            module.forward.quantized[attribute] = value
            device = value[0].tensors[0].device
        else:
            if not isinstance(module.forward, Projection):
                module.forward = Projection(module)
            module.forward.quantized = value
            device = value.tensors[0].device
        shape = getattr(module, attribute).shape
        # Of no row, so that nobody multiplies by it unnoticed.
        empty = torch.empty(0, *shape[1:], dtype=self._layout.dtype, device=device)
        module.register_parameter(attribute, nn.Parameter(empty, requires_grad=False))

    def _leave_embedding_on_disk(self) -> None:
        self._embedding.padding_idx = None  # for training; it need not be among the rows
        self._embedding.forward = self._looked_up

    def _read_rows(self, reader: Reader) -> Any:
        name, dtype = self._layout.embedding, self._layout.dtype
        info = self._layout.source(name)[0].info

        def read(rows: list[int]) -> Tensor:
            found = reader.read_rows(info, rows, dtype)
            if not torch.isfinite(found).all():
                raise NumericError(f"{info.file}: {name} holds NaN or infinite weights")
            return found

        return read

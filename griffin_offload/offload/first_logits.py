"""The full model's logits behind a turn's prompt, by which another answer to the same prompt begins without a pass.

V entries of the vocabulary."""

from functools import wraps
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class FirstLogits:
    """Acts on a model's next forward, the one over a prompt. Use as a context manager around `generate`.

    `logits` (1, 1, V): of the prompt's last token. Where they are given, the forward returns them and computes nothing;
    where they are not, they are what it returned."""

    def __init__(self, model: Any, logits: Tensor | None) -> None:
        self.logits = logits
        self._model, self._forward, self._passed = model, model.forward, False

    def __enter__(self) -> "FirstLogits":
        forward = self._forward = self._model.forward

        @wraps(forward)
        def first(*args: Any, **kwargs: Any) -> Any:
            if self._passed:
                return forward(*args, **kwargs)
            self._passed = True
            if self.logits is not None:
                return CausalLMOutputWithPast(logits=self.logits, past_key_values=kwargs.get("past_key_values"))
            output = forward(*args, **kwargs)
            self.logits = output.logits[:, -1:].clone()
            return output

        self._model.forward = first
        return self

    def __exit__(self, *exc: object) -> None:
        self._model.forward = self._forward

"""JSON schemas -> which tokens may come next, by llguidance (the extra `serve` installs it)."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GriffinError
from .api_error import ApiError, invalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ..engine import Engine

# Where any white space is allowed, small models write no end of it.
ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """How far an answer has come in a grammar."""

    def __init__(self, matcher: "LLMatcher", tokens: int) -> None:
        """`tokens`: in the vocabulary."""
        self._matcher = matcher
        self._bits = np.zeros((tokens + 31) // 32, dtype=np.int32)
        self._tokens = tokens
        self._taken: list[int] = []

    def follow(self, tokens: list[int]) -> None:
        """The answer has these tokens now, of which the grammar may have seen the first, and others that were taken
        back. Raises GriffinError for one that was not allowed."""
        same = next((i for i, pair in enumerate(zip(self._taken, tokens, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(self._taken), len(tokens)) if same is None else same
        if same < len(self._taken):
            self._matcher.rollback(len(self._taken) - same)
            del self._taken[same:]
        for token in tokens[same:]:
            if self._matcher.is_stopped():
                return
            if not self._matcher.consume_token(token):
                raise GriffinError(f"the answer left its JSON schema: {self._matcher.get_error()}")
            self._taken.append(token)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next (V,)."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._tokens].astype(np.bool_)


class Grammars:
    """Makes the grammars of one model. The vocabulary takes up to 150 MiB of RAM; it is read with the first one."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._tokenizer: LLTokenizer | None = None

    @property
    def ready(self) -> bool:
        return self._tokenizer is not None

    def load(self) -> None:
        """Read the vocabulary. Raises ApiError where that cannot be."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ApiError(
                501,
                "JSON schemas and forced calls need the package llguidance on the server: pip install llguidance",
                kind="server_error",
                code="not_installed",
            ) from None
        engine = self._engine
        tokens = max(engine.skeleton.rows_of_table, len(engine.tokenizer))
        ends = sorted(engine.opened.eos_token_ids)
        try:
            self._tokenizer = from_tokenizer(engine.tokenizer, n_vocab=tokens, eos_token=ends)
        except Exception as error:  # of a tokenizer that it does not know
            raise invalid("response_format", f"this model's tokenizer has no grammars: {error}") from None

    def make(self, schema: Any) -> Grammar:
        """The grammar of a JSON schema. Raises ApiError for one that is none."""
        from llguidance import LLMatcher

        assert self._tokenizer
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=ONE_LINE)
            why = LLMatcher.validate_grammar(text, self._tokenizer)
            matcher = LLMatcher(self._tokenizer, text, log_level=0)
        except ValueError as error:
            why = str(error)
        if why:
            raise invalid("response_format", f"the JSON schema cannot be kept to: {' '.join(why.split())[:300]}")
        return Grammar(matcher, self._tokenizer.vocab_size)

"""Griffin as a model of EleutherAI's lm-eval (lm-evaluation-harness), whose tasks then measure a pruned model.

    python -m griffin_offload.evaluation.harness --model griffin \\
        --model_args pretrained=smollm2-135m,sparsity=0.5,mode=gen --tasks boolq

is lm-eval's own command line with the model registered: lm-eval knows only the models whose modules are imported.
From Python, import this module, then call `lm_eval.simple_evaluate(model="griffin", model_args=...)`.

The prompt is the request's context; in multiple choice with `mode=class` it is the paper's (see choice.py). A rolling
log-likelihood has no prompt that could choose neurons: it is the full model's, or an error."""

import sys
from collections.abc import Sequence
from typing import Any

from ..engine import Engine
from ..errors import GriffinError, OptionError, PromptError
from ..options import MODES, Placement, as_dict, build, check, declared
from ..sources.resolve import DEFAULT_MODEL
from .choice import encode_pair, log_likelihoods
from .scoring.scored import Pair
from .scoring.variant import FULL, Variant

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise OptionError(f"lm-eval is missing ({error}): pip install 'griffin-offload[eval]'") from error

SAMPLING = ("temperature", "top_p", "top_k")
OPTIONS = (*(name for group in (Placement, Variant) for name, *_ in declared(group) if name != "prior"), "seed")


@register_model("griffin")
class GriffinLM(TemplateLM):  # type: ignore[misc]
    """Each request's own prompt chooses its neurons. Log-likelihoods share readings of the weights (see score.py);
    answers are generated one at a time."""

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        mode: str = "gen",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """`max_length`: tokens of a request, at most and by default the model's context; longer requests lose their
        beginning, as in lm-eval. Batch sizes are lm-eval's and change nothing. `options`: those of Placement and
        Pruning by their names in --help (sparsity=0.5, device_memory=4GiB), and the `seed` of a selection that draws.
        Raises OptionError, and what Engine raises."""
        super().__init__()
        check(mode, MODES, "mode")
        for name in options:
            check(name, OPTIONS, "option")
        self.mode = mode
        self.variant = build(Variant, options)
        if options.get("device") == "cuda:0":  # lm-eval's own default, with or without a GPU
            options["device"] = None
        self.engine = Engine(pretrained, **as_dict(build(Placement, options)))
        self.tokenizer = self.engine.tokenizer
        self.max_length = min(int(max_length or self.engine.context_length), self.engine.context_length)
        self.max_gen_toks = 256  # lm-eval's default, for tasks that say nothing
        self.batch_size = 1
        self.variant.plan(self.engine, 1, 1)  # what cannot be planned is refused here, before the tasks are built

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that takes the place of an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return self.engine.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the tokenizer does by itself, but a text that begins with the BOS token gets no second one."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = first is None or not string.startswith(first)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        return encode_pair(self.tok_encode, context, continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.engine.has_chat_template:
            raise PromptError(f"{self.engine.name} has no chat template: leave out --apply_chat_template")
        text = self.engine.opened.prompts.chat_template.apply(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._shorten(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm) as bar:

            def on_pair(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            found = log_likelihoods(self.engine, pairs, [self.variant], self.mode, on_pair)
        results = [(one.total, one.greedy) for (one,) in found]
        for (text, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def _shorten(self, context: list[int], continuation: list[int]) -> Pair:
        """As much of the context's end as fits with the continuation. Raises PromptError if none of it fits."""
        room = self.max_length - len(continuation)
        if room < 1:
            raise PromptError(f"a continuation has {len(continuation)} tokens; at most {self.max_length - 1} fit")
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, by the full model. Raises OptionError for a pruned one."""
        if not self.variant.full:
            raise OptionError(
                "a rolling log-likelihood has no prompt that could choose neurons: set sparsity=0, or measure the "
                "perplexity after a prompt with `griffin eval perplexity`"
            )
        results = []
        for request in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # of the input: a pair is one token longer
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            total = sum(one.total for (one,) in log_likelihoods(self.engine, pairs, [FULL]))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers without their stop texts. Greedy unless a task asks for sampling."""
        results = []
        for request in tqdm(requests, desc="Generating", disable=disable_tqdm):
            context, asked = request.args
            text = self._answer(context, normalize_gen_kwargs(asked, self.max_gen_toks))
            self.cache_hook.add_partial("generate_until", (context, asked), text)
            results.append(text)
        return results

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        tokens = options.pop("max_gen_toks")
        stop = [text for text in handle_stop_sequences(options.pop("until"), eos=None) if text]
        ids = self.tok_encode(context)
        room = self.max_length - tokens
        if room < 1:
            raise PromptError(f"max_gen_toks {tokens} leaves no room for a prompt: {self.max_length} tokens in all")
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in SAMPLING}
        options = {"seed": self.variant.drawn_by, "stop_strings": stop or None, **options}
        answer = self.engine.generate(ids[-room:], self.variant, max_new_tokens=tokens, **options)
        return str(postprocess_generated_text(answer.text, stop, None))


def main() -> None:
    """lm-eval's command line. A user's error is one line, with exit code 1."""
    try:
        cli_evaluate()
    except GriffinError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

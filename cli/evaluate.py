"""`griffin eval`: what pruning costs, measured. Each measurement is a command in a module of its own."""

from .main import LazyGroup

command = LazyGroup(
    name="eval",
    short_help="Measure what pruning costs.",
    help="Measure what pruning costs, against the full model.",
    lazy={
        "perplexity": ("eval_perplexity", "Perplexity of a text after a prompt."),
        "summarise": ("eval_summarise", "ROUGE of one-sentence summaries."),
        "choice": ("eval_choice", "Multiple choice by log-likelihood."),
        "compare": ("eval_compare", "All ways to leave out weights, side by side."),
    },
)

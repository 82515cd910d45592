"""Names that a user may choose from, apart from the code that they choose, so that --help imports no torch."""

SELECTIONS = ("topk", "sampling", "topk-sampling", "magnitude", "random")
DRAWN = ("sampling", "topk-sampling", "random")  # which a seed repeats
ALLOCATIONS = ("uniform", "sensitivity")
MODES = ("gen", "class")  # of multiple choice: what is the prompt
ORDERS = ("original", "permuted", "random")  # of a prompt's tokens, to draw

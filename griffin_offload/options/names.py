"""The names that a user may choose from, where more than their option needs them; and the most of what a run counts."""

AUTO = "auto"
OFF = "off"
SELECTIONS = ("topk", "sampling", "topk-sampling", "magnitude", "random")
WITHOUT_STATISTIC = ("magnitude", "random")  # selections that no prior can join
DRAWN = ("sampling", "topk-sampling", "random")  # the selections that a seed repeats
ALLOCATIONS = (AUTO, "uniform", "sensitivity")
RESIDENT_DTYPES = ("bfloat16", "int8", "int4")  # bfloat16: as the model runs
RESTS = ("drop", "int8", "int4")
METHODS = {  # name -> what it means: fields of Pruning; griffin is the paper's (arXiv:2404.01365)
    "griffin": {"selection": "topk", "allocation": "uniform", "rest": "drop", "prior": OFF, "fold": False},
}
SCORES = ("griffin", "wanda", "magnitude", "random")  # of neurons, over calibration texts
FORMS = ("text", "qa", "concat", "question")  # of calibration samples
MODES = ("gen", "class")  # of multiple choice: what counts as the prompt
ORDERS = ("original", "permuted", "random")  # of a prompt's tokens, in a figure
MOST = 10**6  # of what a run counts one by one: samples, windows, questions
MOST_TOKENS = 10**8

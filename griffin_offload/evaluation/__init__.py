"""What pruning costs. Nothing else imports this.

perplexity.py  perplexity, agreement and KL after a prompt
choice.py      multiple choice by log-likelihood
summarise.py   ROUGE of summaries
compare.py     GRIFFIN beside skipped blocks and static models
calibrate.py   how much each layer needs its neurons
harness.py     lm-eval's adapter
arithmetic.py  sums in words
scoring/       continuations scored in one reading of the model
bench/         speed and memory beside other tools
figures/       what the paper's figures show
"""

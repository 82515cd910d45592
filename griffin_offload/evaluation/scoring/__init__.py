"""Continuations scored by the full model and its variants, in one reading.

score.py         pairs of prompt and continuation -> scores
passage.py       the pass that scores them
scored.py        scores, and their means
prompt_cache.py  a prompt's KV cache, forked for each variant
skipped.py       skipped blocks in a scoring pass
variant.py       one way to prune, for comparison
"""

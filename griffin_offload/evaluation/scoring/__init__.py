"""Continuations scored by the full model and its variants, in one reading.

score.py         pairs of prompt and continuation -> scores
variant.py       one way to prune, for comparison
reads.py         which pairs share a reading
passage.py       the reading that scores them
jobs.py          its forwards: a prompt, a continuation
skipped.py       skipped blocks in a scoring pass
prompt_cache.py  a prompt's KV cache, forked for each continuation
scored.py        scores, and their means
"""

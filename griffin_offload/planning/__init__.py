"""What a run will hold, before it reads.

sizes.py          bytes of weights in any format, of the KV cache and of activations
request.py        what a plan is made for
rows.py           the rows of a plan
cards.py          which layers are on which of several cards, and what each holds
fidelity.py       what measuring the fidelity takes
pace.py           expected tokens a second
plan.py           a request -> a plan, or what would fit
ladder.py         the best plan that fits, where nobody says
lossless.py       the plan for drafts that the full model verifies, and what they gave
refresh.py        how often an answer's neurons were chosen again
turn.py           what a turn of a conversation cost
advice.py         what would keep more of the model, and fits
waiting.py        what a forward holds while it waits for others
scoring.py        what scoring continuations holds besides the model
catalogue_fit.py  which models of the catalogue fit
"""

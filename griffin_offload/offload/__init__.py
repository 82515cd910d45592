"""The passes over the layers: drivers (sweep, lockstep) and what they call as a layer passes.

layer_hook.py      the contract: before, after, close
layer_stream.py    streams layers: prefetch, onload, keep, free
prefetch.py        the reading threads
staging.py         where each layer is read to
sweep.py           one prompt through every layer
lockstep.py        many forwards over one reading
pruner.py          chooses and gathers the kept neurons of a layer
folding.py         what the kept down columns of a layer take over
gather.py          kept rows and columns -> compact weights
resident_layer.py  memory for one layer's kept weights
resident_model.py  what is in memory between prompts, by named states
plan_turn.py       what a turn takes over from the turns before it
earlier_turns.py   the KV cache and statistics of a conversation's earlier turns
shared_prefix.py   the same of what all prompts of a batch begin with
drafter.py         drafts tokens by the resident model, for the full model to verify
draft_length.py    when another draft costs more than it gives
saved_turns.py     the same as tensors and facts for a file
first_logits.py    the logits behind a prompt, kept for another answer to it
outer_weights.py   embeddings, final norm and lm_head
skip_by_token.py   skipped blocks, token by token
skip_by_prompt.py  skipped blocks, for a whole answer
fidelity_meter.py  the resident model's predictions beside the full model's
neuron_scores.py   scores of all neurons over many samples
probe.py           the proof of a structure that was detected
"""

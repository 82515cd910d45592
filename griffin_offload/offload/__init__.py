"""The passes over the layers.

layer_stream.py    streams layers: prefetch, onload, keep, free
prefetch.py        the reader thread
resident_layer.py  memory for one layer's kept weights
gather.py          kept rows and columns -> compact weights
outer_weights.py   embeddings, final norm and lm_head
sweep.py           one prompt through every layer, pruned on the way
lockstep.py        many forwards over one reading
skip_by_token.py   skipped blocks, token by token
skip_by_prompt.py  skipped blocks, for a whole answer
neuron_scores.py   scores of all neurons over many samples
probe.py           the proof of a structure that was detected
"""

"""Writes the pruned model.

run.py             from what is asked to what is written
pruned_model.py    its sizes, its config, and the sweep that writes it
to_safetensors.py  a folder for transformers
to_gguf.py         a file for llama.cpp
publish.py         puts the finished file or folder in its place
copied.py          which files of a model go into an export
card.py            the model card
"""

"""Writes the pruned model.

pruned_model.py    its sizes, its config, and the sweep that writes it
to_safetensors.py  a folder for transformers
to_gguf.py         a file for llama.cpp
card.py            the model card
"""

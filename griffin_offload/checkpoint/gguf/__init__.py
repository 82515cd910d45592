"""GGUF files: read in place, decoded on the way, written.

header.py     a file's fields and tensors, checked
blocks.py     the layouts of quantized blocks
decode.py     blocks -> dense rows
config.py     a header <-> transformers' config
tokenizer.py  a header <-> transformers' tokenizer
link.py       a note in our cache: which file holds a model's weights
linked.py     such a note -> a checkpoint
writer.py     writes a file, tensor by tensor
"""

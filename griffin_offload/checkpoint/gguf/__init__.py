"""GGUF files: read in place, decoded on the way, written.

header.py     a file's fields and tensors, checked
values.py     a header's values, each of the type that is meant
blocks.py     the layouts of quantized blocks
decode.py     blocks -> dense rows
config.py     a header <-> transformers' config
fields.py     which fields of a header change a model: applied, or refused by name
rope.py       a header <-> scaled positions
tokenizer.py  a header <-> transformers' tokenizer
link.py       the note in our cache that says which file has a model's weights
writer.py     writes a file, tensor by tensor
"""

"""Bytes on disk <-> tensors.

which_files.py         which files of a folder are the checkpoint
headers.py             the headers of safetensors files, checked
inside.py              what a checkpoint names is in its folder
identity.py            a file that is read again is the one that was opened
key.py                 a fingerprint of a checkpoint
conversion.py          transformers' tables of tensors that are cut differently on disk
extra_layers.py        layers that draft further tokens (MTP heads), which are left out
reader.py              reads tensors to where they stay
parts.py               cuts tensors into pieces of work for several threads
page_cache.py          whether the page cache has a file
safetensors_writer.py  writes a checkpoint, shard by shard
one_file.py           one file of our own, whole or not at all, with checksums
gguf/                  GGUF files
quantized/             weights that other tools quantized (FP8, GPTQ, AWQ, bitsandbytes ...)
"""

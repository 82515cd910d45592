"""Weights in fewer bits, and their products.

weight.py     the protocol of a stored matrix, its scratch memory, and the dense one
products.py    products of many tokens: torch's own, or float32 blocks
int8.py       8 bits, one scale a row
int4.py       4 bits in groups of 32
onednn.py     oneDNN's memory layout for int8
kernels.py    what multiplies a few tokens; whether Triton runs on a device
triton_kernels.py  products of a few tokens on a GPU
joined.py     several matrices in one product; one matrix in two formats
formats.py    the table of formats
precision.py  which weights are in which format
"""

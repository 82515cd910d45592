"""Weights that other tools quantized -> dense weights, while they are read. One file for each format.

formats.py             the table of formats
find.py                which tensors of a checkpoint hold one weight together
decode.py              a weight's stored rows -> their places in the dense weight
sides.py               a weight's scales, zero points ..., held while its parts are read
rows.py                a few stored rows of a weight
bits.py                integers of a few bits out of words, FP8 numbers in float32
fp8.py                 FP8 with a scale for each block (DeepSeek, Qwen, Mistral)
compressed.py          compressed-tensors: int4 and int8 in words, int8 and FP8 as they are
fp4.py                 compressed-tensors: NVFP4 and MXFP4
gptq.py                GPTQ
awq.py                 AWQ
mxfp4.py               MXFP4 experts (gpt-oss)
turned.py              experts that are transposed on disk
bnb.py                 bitsandbytes in 4 bits (NF4, FP4) and 8
"""

"""Our own C++ kernels on a CPU (src/). Compiled when the package is installed; without them other code does the same.

library.py    the compiled library, and which of the processor's instructions it takes
products.py   a few tokens times an int8 or int4 matrix
norm.py       the RMS norm of a few tokens
weights.py    GGUF's blocks -> float32; rows -> int4
"""

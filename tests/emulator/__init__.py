"""A CUDA device in Python, for machines that have none: GRIFFIN_EMULATE_CUDA=2 pytest -m gpu (2: so many devices).

Tensors on it lie in RAM, and say that they are on 'cuda:0'. It computes what the CPU computes, and is as strict as CUDA
about everything around that:

tensor.py     operators: tensors of two devices do not mix; what waits for the device is known
streams.py    streams and events: a copy on a side stream runs as late as it may; accesses without an order are faults
graphs.py     CUDA graphs: a recording computes nothing, a replay runs operators and no Python; no waiting in between
allocator.py  memory: allocated, reserved, peak, a card that is full
kernels.py    products of quantized weights, in the place of Triton's
install.py    puts all of it in the place of torch.cuda
guard.cpp     what torch itself asks of a kind of device

It knows nothing of speed, of cuBLAS's workspaces, of blocks that are too small for what is asked, and of CUDA's own
numbers. It is no proof that something runs on a GPU; but much that cannot, fails here."""

import os

CARDS = int(os.environ.get("GRIFFIN_EMULATE_CUDA", "0"))  # how many devices this process has; 0: none is emulated

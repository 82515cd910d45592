"""Allocates and measures memory.

arena.py       memory that is allocated once and cut into tensors
heap.py        settings of the C library's heap
host_cache.py  layers kept in RAM between prompts
page_locks.py  page-locks these layers between prompts
shared_tier.py  the page cache, as the tier that several processes share
capture.py     records a step of decoding, and replays it
upload.py      pinned pieces and copies to a GPU
stage_clock.py how long each stage of a prompt pass works
timeline.py    this process's memory over the time of a run
spill.py       hidden states that wait in RAM or in a file
cuda.py        what a CUDA device has left, and the context of this process on it
measure.py     peak memory, bytes read, speed of the disk
measured.py    speeds of this machine, kept in the cache folder
machine.py     devices, free memory, budgets
out_of_memory.py  the error where there is no room
"""

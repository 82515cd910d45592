"""Speed and memory, each run in a process of its own.

bench.py          every row measured in turn, beside what limits it
asked.py          what to measure
rows.py           a method at some lengths, and its runs
runner.py         a child process for each run
job.py            what a child is to run, and what it measures of itself
competitors.py    one run of one tool
limits.py         disk, page cache, bus, memory, arithmetic
control_group.py  a memory limit for a process
page_cache.py     drops files from it, or brings them into it
synthetic.py      checkpoints of random weights
"""

"""Speed and memory, each run in a process of its own.

bench.py          rows of methods, their runs, and what limits them
asked.py          what to measure
runner.py         a child process for each run
competitors.py    one run of one tool
control_group.py  a memory limit for a process
synthetic.py      checkpoints of random weights
"""

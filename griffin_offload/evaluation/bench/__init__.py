"""Speed and memory, each run in a process of its own.

bench.py          runs and tables
competitors.py    one run of one tool
control_group.py  a memory limit for a process
synthetic.py      checkpoints of random weights
"""

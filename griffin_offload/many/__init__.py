"""Many prompts: rows of a file -> batches -> answers, by one process or by several.

rows.py       what a row may hold, and what is written of its answer
batches.py    which rows share a reading of the model
answers.py    one engine that encodes rows, checks that batches fit, and answers them
took.py       what a batch took, and what bounds a run of many
elsewhere.py  prompts and answers that are no local file of rows
places.py     where workers run: a GPU, or a share of the CPU
process.py    another process, and the pipe to it
workers.py    processes of this machine, each with an engine of its own
cluster.py    the nodes of a Ray cluster, by one process that speaks to Ray
ray_driver.py that process
ray_nodes.py  which workers the nodes get, and what a worker does"""

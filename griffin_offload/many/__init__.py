"""Many prompts: rows of a file -> batches -> answers, by one process, several, or a cluster.

rows        what a row may hold, and what is written of its answer
batches     which rows share a reading of the model
answers     one engine that encodes rows, checks batches and answers them
workers     processes of this machine, each with an engine of its own"""

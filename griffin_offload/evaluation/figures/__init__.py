"""The paper's figures.

observe.py  activations of a model, as numbers
plots.py    numbers -> pictures
"""

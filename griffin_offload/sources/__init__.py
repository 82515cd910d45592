"""Where models come from: the catalogue of names, the hub, wheels, GGUF files. `models.py` puts them together."""

"""Measurements of quality. Nothing outside this folder imports it."""

"""Types of the functions that a caller gives, to hear of what is done."""

from collections.abc import Callable

OnLayer = Callable[[int, int], None]  # layers done, layers in all
OnText = Callable[[str], None]

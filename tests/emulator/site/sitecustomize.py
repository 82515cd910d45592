"""Gives the processes that tests start the devices of the tests (conftest.py puts this folder into PYTHONPATH)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from emulator import CARDS

if CARDS:
    from emulator.install import install

    install(CARDS)
sys.path.pop(0)

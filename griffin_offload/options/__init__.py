"""Every option once: its default, its range, its help. Flags, checks, chat's /set and docs/commands.md come from here.

Frozen groups say how a model is run. No torch: `griffin --help` reads this folder.

declare.py        declares one option: how it is read, and which values it takes
names.py          the names that a user may choose from
group.py          a group of options, made from values or text
placement.py      Placement: where a model runs, in how much memory
ffn_skip.py       FfnSkip: which feed-forward blocks are skipped
pruning.py        Pruning: what is kept of the model
decoding.py       Decoding: how an answer is made of its predictions
export_format.py  ExportFormat: what an export is written as
callbacks.py      what a caller may hear of while a model runs
"""

from .callbacks import OnLayer, OnText
from .declare import Option, check, parse_pair, parse_shares, parse_switch
from .decoding import COLD, Decoding
from .export_format import ExportFormat
from .ffn_skip import FfnSkip
from .group import as_dict, build, declared, default_of, from_keywords, with_text
from .names import (
    ALLOCATIONS,
    AUTO,
    DRAWN,
    FORMS,
    MODES,
    MOST,
    MOST_TOKENS,
    OFF,
    ORDERS,
    RESIDENT_DTYPES,
    RESTS,
    SCORES,
    SELECTIONS,
    WITHOUT_STATISTIC,
)
from .placement import Placement
from .pruning import Pruning, Sparsity

"""The families of training sequences: each makes one of at most a given length, or None where its tries did not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from ..materials import Materials
from ..sequences import Sequence
from ..wording import ChatStyle
from .counting import common_words, frequent_words
from .haystacks import hidden_needles
from .needles import KINDS, only_needles
from .tracking import variable_chains

Family = Callable[[Materials, random.Random, int, ChatStyle], Sequence | None]

FAMILIES: dict[str, Family] = {
    "text": partial(hidden_needles, haystack="text"),
    "noise": partial(hidden_needles, haystack="noise"),
    **{name: partial(only_needles, family=name) for name in KINDS},
    "vt": variable_chains,
    "cwe": common_words,
    "fwe": frequent_words,
}

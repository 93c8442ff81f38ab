"""How numbers are written in tables and plots."""

from __future__ import annotations

from .bootstrap import Interval


def number(value: float, digits: int = 1) -> str:
    """A number with a real minus sign, and none before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def ends(interval: Interval) -> str:
    """The ends of an interval, "[93.2, 97.0]"."""
    return f"[{number(interval.low)}, {number(interval.high)}]"


def percent(share: float) -> str:
    """A share in per cent with about three digits."""
    value = 100 * share
    return f"{number(value, 0 if value >= 99.95 or value == 0 else 1 if value >= 10 else 2)} %"


def tokens(length: int | None) -> str:
    """A context length as its users write it: 4096 is 4K, 1000 is 1000."""
    if length is None:
        return ""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def mebibytes(size: float) -> str:
    """A size in MiB."""
    value = size / 2**20
    return f"{value:,.0f} MiB" if value >= 100 else f"{number(value)} MiB"

"""Numbers as a person reads them in a narrow table."""

from __future__ import annotations

import time

from medtrain.status.facts import Amount, Shards


def count(number: float) -> str:
    """`12,345`, or `1.23M` where that would be too long."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.4g}M"


def amount(of: Amount | None) -> str:
    """`12/345`."""
    return f"{count(of.done)}/{count(of.total)}" if of else ""


def rate(per_s: float | None) -> str:
    """`12/s`, `3.4/min` or `5.6/h`, whichever is above one."""
    if not per_s:
        return ""
    for seconds, unit in ((1, "s"), (60, "min"), (3600, "h")):
        if per_s * seconds >= 1 or unit == "h":
            number = per_s * seconds
            return f"{number:,.0f}/{unit}" if number >= 100 else f"{number:.2g}/{unit}"
    raise AssertionError("the last unit takes everything")


def duration(seconds: float | None) -> str:
    """`1.2 s`, `42 s`, `12 min`, `3 h 05` or `2 d 04 h`."""
    if seconds is None:
        return ""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02}" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def hours(seconds: float) -> str:
    """`<0.01`, `0.05`, `1.2` or `345`."""
    value = seconds / 3600
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def moment(epoch: float) -> str:
    """`14:05`, or with the day where it is not today."""
    then, now = time.localtime(epoch), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%a %d %b %H:%M", then)


def shards(of: Shards) -> str:
    """`32 shards run, 556 wait, 2 failed, 410 of 1,000 done`, without what is none."""
    parts = [(of.running, "run"), (of.waiting, "wait"), (of.failed, "failed")]
    said = [f"{number:,} {word}" for number, word in parts if number]
    return f"shards: {', '.join([*said, f'{of.done:,} of {of.total:,} done'])}"

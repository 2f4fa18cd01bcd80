"""How far two runs agree: is the difference of their ratios within what their intervals allow?"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from benchmarks.rows import best, number, ratio_key

Row = dict[str, Any]


class Pair(NamedTuple):
    """One ratio, the time of a contender over that of fastda, as two runs found it."""

    case: str
    contender: str
    is_best: bool  # the fastest of the others, in the first run
    first: dict[str, float]  # ratio, low, high
    second: dict[str, float]

    @property
    def difference(self) -> float:
        """|log r₁ − log r₂| over what it may be, √(h₁² + h₂²), with h the intervals' half widths."""
        apart = abs(math.log(self.first["ratio"] / self.second["ratio"]))
        allowed = math.hypot(*(math.log(r["high"] / r["low"]) / 2 for r in (self.first, self.second)))
        return apart / allowed if allowed else math.inf * apart if apart else 0.0

    @property
    def agree(self) -> bool:
        return self.difference <= 1

    @property
    def overlap(self) -> bool:
        a, b = self.first, self.second
        return a["low"] <= b["high"] and b["low"] <= a["high"]

    @property
    def contained(self) -> bool:
        """Each interval holds the other run's ratio."""
        a, b = self.first, self.second
        return a["low"] <= b["ratio"] <= a["high"] and b["low"] <= a["ratio"] <= b["high"]


def pairs(first: list[Row], second: list[Row]) -> list[Pair]:
    """Every ratio that both runs have, but for those of fastda to itself."""
    others = {row["id"]: row for row in second}
    found = []
    for row in first:
        other, key, fastest = others.get(row["id"]), ratio_key(row), best(row, "any")
        for name, contender in row["contenders"].items():
            matching = other and other["contenders"].get(name, {}).get(key)
            if matching and key in contender and not name.startswith("fastda"):
                found.append(Pair(row["id"], name, name == fastest, contender[key], matching))
    return found


def text(found: list[Pair]) -> str:
    lines = []
    for title, members in (
        ("ratio to the best other, a case each", [p for p in found if p.is_best]),
        ("all ratios", found),
    ):
        count = len(members)
        if not count:
            return "the two runs have no ratio in common"
        says = ", ".join(
            f"{sum(getattr(p, what) for p in members)} {label}"
            for what, label in (
                ("agree", "agree (difference within the intervals: |log r1/r2| <= sqrt(h1^2 + h2^2))"),
                ("overlap", "intervals overlap"),
                ("contained", "contain each other's ratio"),
            )
        )
        lines.append(f"{title}, of {count}: {says}")
        lines.append(f"  {100 * sum(p.agree for p in members) / count:.0f} % agree")
    for p in sorted((p for p in found if not p.agree), key=lambda p: -p.difference):
        shown = " against ".join(
            f"{number(r['ratio'])} [{number(r['low'])}-{number(r['high'])}]" for r in (p.first, p.second)
        )
        lines.append(f"  {p.case}, {p.contender}: {shown}")
    return "\n".join(lines)

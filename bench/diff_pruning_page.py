"""docs/results/diff-pruning.md, from the ledger's records."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import formats

from howfine.container import write_atomically
from howfine.ledger import Record

KINDS = ("structured", "unstructured", "non-adaptive")
MIDDLE = 0.005
# Full fine-tuning at its two rates.
FULLS = ("non-adaptive", "full-3e-4")
# Differences of means that are taken for chance, and those that are not.
NOISE, CLEAR = 0.005, 0.005


class Found:
    """The ledger's records, by task and cell."""

    def __init__(self, records: Mapping[str, Record], seeds: int) -> None:
        self.seeds = seeds
        self.records = list(records.values())
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))

    def rows(self, task: str, cell: str) -> list[Record]:
        """Runs of a cell, one a seed."""
        return [r for r in self.records if (r["task"], r["cell"]) == (task, cell)]

    def mean(self, task: str, cell: str, of: str = "score") -> float | None:
        """Mean over all seeds; None where one has no run."""
        values = [float(record[of]) for record in self.rows(task, cell)]
        return statistics.fmean(values) if len(values) >= self.seeds else None

    def having(self, *cells: str) -> list[str]:
        """The tasks on which all of the cells were run with all seeds."""
        return [t for t in self.tasks if all(self.mean(t, c) is not None for c in cells)]

    def over_tasks(
        self, cell: str, of: str = "score", tasks: Sequence[str] | None = None
    ) -> float | None:
        """Mean over tasks of the means over seeds; None where a task has no run."""
        values = [self.mean(task, cell, of) for task in (tasks or self.tasks)]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None


def write(
    path: Path,
    records: Mapping[str, Record],
    sizes: Mapping[str, tuple[int, int]],
    seeds: Sequence[int],
    budgets: Sequence[float],
    common: Mapping[str, Any],
    rates: Mapping[str, float],
) -> None:
    """Write the page."""
    found = Found(records, len(seeds))
    lines = [_intro(found, sizes, seeds, common, rates), "## Scores", ""]
    for task in found.tasks:
        lines += [f"### {task}", "", *_scores(found, task), ""]
    lines += ["## Verdicts", "", *_verdicts(found, budgets), ""]
    write_atomically(path, "\n".join(lines).encode())


def _intro(
    found: Found,
    sizes: Mapping[str, tuple[int, int]],
    seeds: Sequence[int],
    common: Mapping[str, Any],
    rates: Mapping[str, float],
) -> str:
    dates = sorted({record["date"] for record in found.records}) or ["no day yet"]
    machines = "; ".join(sorted({r["machine"] for r in found.records})) or "no machine yet"
    parts = ", ".join(
        f"{name} {sizes[name][0]:,} rows, {sizes[name][1]} tokens" for name in found.tasks
    )
    settings = ", ".join(f"{key} {value}" for key, value in common.items())
    return f"""# Diff pruning

Written by `python bench/diff_pruning.py` from {len(found.records)} runs of {dates[0]} to
{dates[-1]} on {machines}. Base MiniLM (6 × 384, the embedded base), whole test sets (SST-2 and
MRPC: the official validation sets; others: howfine's own split), {len(seeds)} seeds but where a
table says less. Training: {parts}; {settings}; in
{formats(found.records)}. The rate of differences, and of those that train on, is
{rates["differences"]:g}, of full fine-tuning {rates["full"]:g}, of the last layer
{rates["last layer"]:g}.
Scores are of files, loaded again. The letters are those of the claims that
were taken from Guo, Rush & Kim 2021 (arXiv 2012.07463) on BERT-large and whole GLUE: what is
checked here is whether they carry over to a small base and a thousand rows.

*structured* has a gate a tensor beside those of the entries, *non-adaptive* takes the entries that
full fine-tuning moved most. *cut* is a change cut to its budget and not trained on; the others at a
budget have had the epochs of their start and as many on the budget.
"""


def _scores(found: Found, task: str) -> list[str]:
    lines = ["| change | seeds | score | ± | entries changed | bytes |", "|" + " --- |" * 6]
    for cell in dict.fromkeys(r["cell"] for r in found.records if r["task"] == task):
        rows = found.rows(task, cell)
        values = [100 * row["score"] for row in rows]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        name = {"non-adaptive": "full fine-tuning, 1e-4"}.get(cell, cell)
        density, size = (statistics.fmean(r[of] for r in rows) for of in ("density", "bytes"))
        lines.append(
            f"| {name} | {len(rows)} | {statistics.fmean(values):.2f} | {spread} | {density:.3%} "
            f"| {size:,.0f} |"
        )
    return lines


def _verdicts(found: Found, budgets: Sequence[float]) -> list[str]:
    checks = [_d5(found, budgets), _d6(found, budgets), _d7(found), _d8(found), _d9(found)]
    return [f"- **{name}.** {text}" for name, text in [*checks, _d10(found)]]


def _said(holds: bool) -> str:
    return "Holds." if holds else "Does not hold."


_NONE = "Runs are lacking."


def _points(value: float) -> str:
    return f"{100 * value:.2f}"


def _d5(found: Found, budgets: Sequence[float]) -> tuple[str, str]:
    name = "D5: structured ≥ unstructured > non-adaptive > last layer, at 0.5 %"
    cells = [*(f"{kind}@{MIDDLE}" for kind in KINDS), "last-layer"]
    tasks = found.having(*cells)
    means = [found.over_tasks(cell, tasks=tasks) for cell in cells] if tasks else [None]
    if any(mean is None for mean in means):
        return name, _NONE
    s, u, n, last = (float(mean or 0) for mean in means)
    figures = " / ".join(map(_points, (s, u, n, last)))
    said = f"{_said(s >= u > n > last)} {figures} on {', '.join(tasks)}."
    rest = [f"structured@{MIDDLE}", f"non-adaptive@{MIDDLE}", "last-layer"]
    if found.having(*rest) != tasks:
        others = [found.over_tasks(cell, tasks=found.having(*rest)) for cell in rest]
        figures = " / ".join(_points(float(mean or 0)) for mean in others)
        said += f" Without the second, on {', '.join(found.having(*rest))}: {figures}."
    gaps = []
    for b in budgets:
        both = [f"structured@{b}", f"non-adaptive@{b}"]
        pair = [found.over_tasks(cell, tasks=found.having(*both) or [""]) for cell in both]
        gaps.append((b, *pair))
    wide = ", ".join(f"{b:.2%}: {_points(x - y)}" for b, x, y in gaps if x and y)
    return name, f"{said} Structured less non-adaptive by budget: {wide}.{_fewer(found, budgets)}"


def _fewer(found: Found, budgets: Sequence[float]) -> str:
    """Where a start has moved fewer entries than a budget has room for."""
    cells = [f"{kind}@{b}" for kind in KINDS for b in budgets]
    held = {
        cell: (statistics.fmean(row["density"] for row in rows), float(cell.partition("@")[2]))
        for task in found.tasks
        for cell in cells
        if (rows := found.rows(task, cell))
    }
    said = ", ".join(f"{cell} {own:.2%}" for cell, (own, b) in held.items() if own < 0.99 * b)
    told = " Some starts moved fewer entries than that; changed are, on average: "
    return f"{told}{said}." if said else ""


def _d6(found: Found, budgets: Sequence[float]) -> tuple[str, str]:
    name = "D6: at 0.5 % within a point of full fine-tuning; more entries, better"
    tasks = found.having(*FULLS, *(f"structured@{b}" for b in budgets))
    if not tasks:
        return name, _NONE
    fulls = [found.over_tasks(cell, tasks=tasks) for cell in FULLS]
    curve = [found.over_tasks(f"structured@{b}", tasks=tasks) for b in budgets]
    full, at = max(float(f or 0) for f in fulls), float(curve[list(budgets).index(MIDDLE)] or 0)
    rises = all(float(a or 0) <= float(b or 0) + NOISE for a, b in itertools.pairwise(curve))
    said = ", ".join(
        f"{b:.2%}: {_points(float(x or 0))}" for b, x in zip(budgets, curve, strict=True)
    )
    return name, (
        f"{_said(full - at <= 0.01 and rises)} Full at the better of two rates {_points(full)}, "
        f"structured {_points(at)} on {', '.join(tasks)}; {said} (a fall of up to {_points(NOISE)} "
        "counts as noise)."
    )


def _d7(found: Found) -> tuple[str, str]:
    name = "D7: the budget costs under half a point with training on, clearly more without"
    cells = ["structured", f"structured@{MIDDLE}", f"structured@{MIDDLE}-cut"]
    tasks = found.having(*cells)
    if not tasks:
        return name, _NONE
    before, after, cut = (float(found.over_tasks(cell, tasks=tasks) or 0) for cell in cells)
    lost = before - cut
    holds = before - after < 0.005 and lost > CLEAR and lost > before - after
    return name, (
        f"{_said(holds)} Before {_points(before)}, cut {_points(cut)}, trained on, with as many "
        f"epochs again, {_points(after)} on {', '.join(tasks)}."
    )


def _d8(found: Found) -> tuple[str, str]:
    name = "D8: structured leaves 1.5 times as many tensors untouched"
    both = [f"{kind}@{MIDDLE}" for kind in KINDS[:2]]
    tasks = found.having(*both) or [""]
    one, other = (found.over_tasks(cell, "untouched", tasks) for cell in both)
    if one is None or other is None:
        return name, _NONE
    total = found.records[0]["tensors"]
    return name, f"{_said(one >= 1.5 * other)} {one:.1f} against {other:.1f} of {total}."


def _d9(found: Found) -> tuple[str, str]:
    name = "D9: embeddings are changed less than their share of the parameters"
    tasks = found.having(f"structured@{MIDDLE}")
    share = found.over_tasks(f"structured@{MIDDLE}", "in_embeddings", tasks or [""])
    if share is None:
        return name, _NONE
    whole = found.records[0]["embeddings"]
    return (
        name,
        f"{_said(share < whole)} {share:.1%} of the changes, {whole:.1%} of the parameters, on "
        f"{', '.join(tasks)}.",
    )


def _d10(found: Found) -> tuple[str, str]:
    name = "D10: a larger penalty leaves fewer gates open"
    rows = [r for r in found.records if "penalty" in r["cell"]]
    first = [r for t in {r["task"] for r in rows} for r in found.rows(t, "structured")]
    shared = {r["seed"] for r in rows}
    known = [("1.25e-07", r["density"]) for r in first if r["seed"] in shared]
    known += [(r["cell"].removeprefix("penalty-"), r["density"]) for r in rows]
    if len(known) < 3:
        return name, _NONE
    densities = [density for _, density in known]
    falls = all(a >= b for a, b in itertools.pairwise(densities))
    said = ", ".join(f"{penalty}: {density:.2%}" for penalty, density in known)
    capped = " (at most 50 % are stored)" if max(densities) > 0.499 else ""
    where = ", ".join(dict.fromkeys(r["task"] for r in rows))
    told = f"{said}{capped}, {len(shared)} seed of {where}"
    return name, f"{_said(falls and densities[0] > densities[-1])} {told}."

"""G8: in how few entries the skill of a fine-tuning sits, by how it was trained."""

from __future__ import annotations

import itertools

import skill_grafting_said as words
from skill_grafting_found import Curve, Found, needed
from skill_grafting_said import ALIKE, KEPT, LEAST_GAIN, NOT_RUN, Verdict

from howfine.ledger import Record

# Cells of fine-tunings, and in front of the cells of what is grafted from the chosen one.
SGD, PENALISED = "sgd", "l1"
_LACKING = "AdamW with an ℓ1 penalty: not run."


def verdict(found: Found) -> Verdict:
    name = "G8: the skill of SGD's fine-tuning sits in fewer entries than AdamW's"
    pair = _curves(found, SGD)
    if pair is None:
        return name, NOT_RUN
    text, curves, head = pair
    penalty = _penalised(found)
    void = _void(curves, head)
    if void:
        return name, f"Void: {void}. {text}. {penalty}"
    sizes = [needed(curve, head + KEPT * (curve[-1][1] - head)) for curve in curves]
    shares = [words.share(*pair) for pair in zip(sizes, curves, strict=True)]
    figures = f"{KEPT:.0%} of each one's gain: AdamW {shares[0]}, SGD {shares[1]}"
    return name, f"{words.said(sizes[1] < sizes[0])} {text}. {figures}. {penalty}"


def chosen(records: list[Record], kind: str) -> str:
    """The cell that stands for all of its kind, by the first seed's held-out rows.

    Of rates the best; of penalties the largest that costs no more than what counts as nothing.
    """
    best = max(records, key=lambda record: record["dev"])
    if kind == SGD:
        return str(best["cell"])
    near = [r for r in records if r["dev"] >= best["dev"] - ALIKE]
    return str(max(near, key=lambda record: number(record["cell"]))["cell"])


def number(cell: str) -> float:
    """The rate, or the penalty, in a cell's name."""
    return float(cell.partition("-")[2])


def _curves(found: Found, kind: str) -> tuple[str, tuple[Curve, Curve], float] | None:
    """What is said, AdamW's curve and the other's, and the frozen base's score with its own head.

    Over the seeds that all cells of both have. None where runs are lacking.
    """
    runs = [r for (_, c, _), r in found.cells.items() if c.startswith(f"{kind}-")]
    grafts = [r for (_, c, _), r in found.cells.items() if c.startswith(f"{kind}:learned@")]
    first = [r for r in runs if r["seed"] == 0]
    if not first or not grafts:
        return None
    task, cell = first[0]["task"], chosen(first, kind)
    cells = {cell, *(r["cell"] for r in grafts)}
    whole = set.intersection(*({r["seed"] for r in found.rows(task, c)} for c in cells))
    same = Found({r["key"]: r for r in found.cells.values() if r["seed"] in whole})
    own = same.curves(task, ["learned"])
    others = same.curves(task, [f"{kind}:learned"], cell)
    if own is None or others is None:
        return None
    head, curves = own[1][0], (own[0][0], others[0][0])
    ends = [words.points(curve[-1][1]) for curve in curves]
    short, what = ("SGD", "rate") if kind == SGD else ("with the penalty", "λ")
    text = f"{task}, {words.seeds(len(whole))}: AdamW {ends[0]}, {short} {ends[1]}"
    text += f" ({what} {cell.partition('-')[2]}), head alone {words.points(head)}"
    if not _void(curves, head) or _disordered(curves):
        adam, other = (_kept(curve, head) for curve in curves)
        first = f"AdamW {adam}; " if kind == SGD else ""  # it is said once
        text += f". Share of the gain kept, by size: {first}{short} {other}"
    return text, curves, head


def _penalised(found: Found) -> str:
    pair = _curves(found, PENALISED)
    if pair is None:
        return _LACKING
    text, curves, head = pair
    said = f"AdamW with an ℓ1 penalty on its change, on {text}"
    if void := _void(curves, head):
        return f"{said}; void: {void}."
    sizes = [needed(curve, head + KEPT * (curve[-1][1] - head)) for curve in curves]
    shares = [words.share(*pair) for pair in zip(sizes, curves, strict=True)]
    return f"{said}; {KEPT:.0%} of each one's gain: {shares[1]} against {shares[0]}."


def _void(curves: tuple[Curve, Curve], head: float) -> str:
    """Why the two can't be compared; nothing where they can."""
    ends = [curve[-1][1] for curve in curves]
    if abs(ends[0] - ends[1]) > ALIKE or min(ends) - head < LEAST_GAIN:
        return "the two are not alike, or gain too little"
    return "a larger graft scores below a smaller one" if _disordered(curves) else ""


def _disordered(curves: tuple[Curve, Curve]) -> bool:
    pairs = (pair for curve in curves for pair in itertools.pairwise(curve))
    return any(before > after + ALIKE for (_, before), (_, after) in pairs)


def _kept(curve: Curve, head: float) -> str:
    gain = curve[-1][1] - head
    return ", ".join(f"{share:.2%}: {(at - head) / gain:.0%}" for share, at in curve)

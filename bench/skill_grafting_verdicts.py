"""A verdict for each claim of skill grafting, from the ledger's records."""

from __future__ import annotations

import itertools
import statistics

from skill_grafting_found import REGION, SIMILAR, Curve, Found, needed

from howfine.ledger import Record

SMALL, LARGE = "0.001", "0.1"
KINDS = ("learned", "movement", "random")
KEPT = 0.95  # of what fine-tuning gains over the frozen base with a head of its own
# Points of accuracy, as shares: what counts as alike, and how little a gain is too little to share.
ALIKE, LEAST_GAIN, LEAST_FORGOTTEN = 0.02, 0.02, 0.01
SEVERAL = 3.0
Verdict = tuple[str, str]
_NONE = "Not run."
_PENALTY = "AdamW with an ℓ1 penalty: not run."


def verdicts(found: Found) -> list[Verdict]:
    """(claim, verdict), in the claims' order."""
    checks = (_order, _size, _zeroed, _calibration, _sgd, _overlap, _effect, _sequence)
    return [check(found) for check in checks]


def _said(holds: bool) -> str:
    return "Holds." if holds else "Does not hold."


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _order(found: Found) -> Verdict:
    name = (
        "G4: at equal size learned ≥ movement > random at 0.1 % of the entries; random does nothing"
    )
    cells = [*(f"{kind}@{SMALL}" for kind in KINDS), "pre", "ft"]
    means = found.over_tasks(cells)
    if means is None:
        return name, _NONE
    learned, movement, random, pre, tuned = means
    holds = learned >= movement > random and abs(random - pre) <= ALIKE
    text = (
        f"{_said(holds)} Mean over tasks: learned {_points(learned)}, movement "
        f"{_points(movement)}, random {_points(random)}; none at all {_points(pre)}, fine-tuned "
        f"{_points(tuned)}. {_ahead(found)}"
    )
    tasks = {task: found.means(task, cells[:3]) for task in found.tasks}
    text += " By task: " + ", ".join(
        f"{task} {' / '.join(map(_points, values))}" for task, values in tasks.items() if values
    )
    spreads = []
    for density in (SMALL, REGION, LARGE):
        each = found.over_tasks([f"{kind}@{density}" for kind in KINDS])
        if each is not None:
            spreads.append(f"{float(density):.1%}: {_points(max(each) - min(each))}")
    return name, f"{text}. Best less worst of the three, by share: {', '.join(spreads)} points."


def _ahead(found: Found) -> str:
    """In how many runs the mask's training is ahead of movement."""
    gaps = [
        record["score"] - found.cells[task, f"movement@{SMALL}", seed]["score"]
        for (task, cell, seed), record in found.cells.items()
        if cell == f"learned@{SMALL}" and (task, f"movement@{SMALL}", seed) in found.cells
    ]
    ahead, level = sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps)
    return f"Learned is ahead of movement in {ahead} of {len(gaps)} runs, level in {level}."


def _size(found: Found) -> Verdict:
    name = (
        f"G5: for {KEPT:.0%} of the gain over the frozen base with its own head, a learned region "
        f"is {SEVERAL:g} or more times smaller than movement's"
    )
    said, ratios = [], []
    for task in found.tasks:
        known = found.curves(task, KINDS[:2], also=("head", "pre"))
        if known is None:
            continue
        (learned, movement), (head, pre) = known
        gain = learned[-1][1] - head
        target = head + KEPT * gain
        if gain < LEAST_GAIN or pre >= target:
            why = f"gains {_points(gain)} points" if gain < LEAST_GAIN else "needs no graft at all"
            said.append(f"{task}: void, fine-tuning {why}")
            continue
        sizes = [needed(curve, target) for curve in (learned, movement)]
        ratios.append(sizes[1] / sizes[0])
        shares = [_share(*pair) for pair in zip(sizes, (learned, movement), strict=True)]
        said.append(
            f"{task}: {_points(target)} needs {shares[0]} learned, {shares[1]} by movement "
            f"({ratios[-1]:.1f} times)"
        )
    if not said:
        return name, _NONE
    verdict = _said(statistics.geometric_mean(ratios) >= SEVERAL) if ratios else "Void."
    interpolated = "Shares are interpolated between those measured, by their logarithm"
    return name, f"{verdict} {'; '.join(said)}. {interpolated}; the last step is 10 % to 100 %."


def _share(value: float, curve: Curve) -> str:
    if value == curve[0][0]:
        return f"at most {value:.2%}"
    return "all of it" if value == 1 else f"{value:.2%}"


def _zeroed(found: Found) -> Verdict:
    name = "G6: the same entries with 0 elsewhere are at chance, the graft is not"
    said, right = [], []
    for task in found.tasks:
        for kind in KINDS[:2]:
            cells = [f"zero-{kind}@{REGION}", f"{kind}@{REGION}"]
            means, chance = found.means(task, cells), found.means(task, cells, "majority")
            if means is None or chance is None:
                continue
            right.append(means[0] <= chance[0] + ALIKE < means[1])
            figures = f"{_points(means[0])} against {_points(means[1])}"
            said.append(f"{task}, {kind}: {figures} (largest class {_points(chance[0])})")
    return name, f"{_said(all(right))} {'; '.join(said)}." if said else _NONE


def _calibration(found: Found) -> Verdict:
    name = "G7: a learned graft of 1 % is better calibrated than θ_ft, at most 3 points worse"
    said, right, cell = [], [], f"learned@{REGION}"
    for task in found.tasks:
        errors, scores = (found.means(task, ["ft", cell], of) for of in ("ece", "score"))
        tempered = found.means(task, ["ft"], "tempered")
        if errors is None or scores is None or tempered is None:
            continue
        if errors[0] < 0.05:
            said.append(f"{task}: void, θ_ft's ECE is {_points(errors[0])} and 5 was asked for")
            continue
        right.append(errors[1] < errors[0] and scores[0] - scores[1] <= 0.03)
        text = f"{task}: ECE {_points(errors[0])} to {_points(errors[1])}, accuracy "
        text += f"{_points(scores[0])} to {_points(scores[1])}; θ_ft with a temperature "
        said.append(text + f"{_points(tempered[0])}{_interpolation(found, task, scores[1])}")
    if not said:
        return name, _NONE
    return name, f"{_said(all(right)) if right else 'Void.'} {'; '.join(said)}."


def _interpolation(found: Found, task: str, accuracy: float) -> str:
    """The share of the whole change whose accuracy is nearest to a graft's."""
    cells = [c for t, c, _ in found.cells if t == task and c.startswith("wise@")]
    nearest = []
    for cell in dict.fromkeys(cells):
        rows = found.rows(task, cell)
        score, error = (statistics.fmean(row[of] for row in rows) for of in ("score", "ece"))
        nearest.append((abs(score - accuracy), cell.removeprefix("wise@"), score, error))
    if not nearest:
        return ""
    _, alpha, score, error = min(nearest)
    return f", θ + {alpha} Δ {_points(error)} at {_points(score)}"


def _sgd(found: Found) -> Verdict:
    name = "G8: the skill of SGD's fine-tuning sits in fewer entries than AdamW's"
    runs = [r for (_, cell, _), r in found.cells.items() if cell.startswith("sgd-")]
    grafts = [r for (_, cell, _), r in found.cells.items() if cell.startswith("sgd:learned@")]
    if not runs or not grafts:
        return name, _NONE
    # The rate that the first seed's held-out rows chose is that of all seeds.
    best = max((r for r in runs if r["seed"] == 0), key=lambda record: record["dev"])
    task, cell = best["task"], best["cell"]
    cells = {cell, *(r["cell"] for r in grafts)}
    whole = set.intersection(*({r["seed"] for r in found.rows(task, c)} for c in cells))
    same = Found({r["key"]: r for r in found.cells.values() if r["seed"] in whole})
    adam = same.curves(task, ["learned"])
    sgd = same.curves(task, ["sgd:learned"], cell)
    if adam is None or sgd is None:
        return name, _NONE
    head, curves = adam[1][0], (adam[0][0], sgd[0][0])
    ends = [curve[-1][1] for curve in curves]
    figures = f"{task}, {_seeds(len(whole))}: AdamW {_points(ends[0])}, SGD {_points(ends[1])}"
    figures += f" (rate {cell.removeprefix('sgd-')}), head alone {_points(head)}"
    if abs(ends[0] - ends[1]) > ALIKE or min(ends) - head < LEAST_GAIN:
        return name, f"Void: the two are not alike, or gain too little. {figures}. {_PENALTY}"
    if any(a > b + ALIKE for curve in curves for (_, a), (_, b) in itertools.pairwise(curve)):
        parts = [
            ", ".join(
                f"{share:.2%}: {(at - head) / (curve[-1][1] - head):.0%}" for share, at in curve
            )
            for curve in curves
        ]
        told = f"Share of the gain kept, by size: AdamW {parts[0]}; SGD {parts[1]}"
        return (
            name,
            f"Void: a larger graft scores below a smaller one. {figures}. {told}. {_PENALTY}",
        )
    sizes = [needed(curve, head + KEPT * (curve[-1][1] - head)) for curve in curves]
    shares = [_share(*pair) for pair in zip(sizes, curves, strict=True)]
    text = f"{figures}. {KEPT:.0%} of each one's gain: AdamW {shares[0]}, SGD {shares[1]}"
    return name, f"{_said(sizes[1] < sizes[0])} {text}. {_PENALTY}"


def _overlap(found: Found) -> Verdict:
    name = "G9: regions of unlike tasks overlap by less than 20 %, above chance, and like ones more"
    groups = overlaps(found)
    unlike, like, same = (groups.get(kind, []) for kind in ("unlike", "like", "same"))
    if not unlike or not like:
        return name, _NONE
    shares = [statistics.fmean(r["overlap"] for r in rows) for rows in (unlike, like)]
    chance = statistics.fmean(r["chance"] for r in unlike)
    text = f"Unlike {shares[0]:.1%}, like {shares[1]:.1%}, chance {chance:.1%}"
    if same:
        text += f"; the same task twice {statistics.fmean(r['overlap'] for r in same):.1%}"
    return name, f"{_said(chance < shares[0] < 0.2 and shares[1] > shares[0])} {text}."


def overlaps(found: Found) -> dict[str, list[Record]]:
    """Pairs of regions: of one task, of like tasks, of unlike ones; those of one seed apart."""
    groups: dict[str, list[Record]] = {}
    for record in found.about("overlap"):
        by, of = record["by"], record["of"]
        alike = SIMILAR.get(by) == of or SIMILAR.get(of) == by
        kind = "same" if by == of else "like" if alike else "unlike"
        apart = "" if record["by_seed"] != record["of_seed"] else ", one seed"
        groups.setdefault(kind + apart, []).append(record)
    return groups


def _effect(found: Found) -> Verdict:
    name = (
        "G10: in one model of all tasks a region brings 80 % of its own task's gain or more, and "
        "30 % of another's at most"
    )
    record = found.together()
    if record is None:
        return name, "Not run: it needs one model trained on all tasks."
    gains = [high - low for low, high in zip(record["before"], record["tuned"], strict=True)]
    counted = [place for place, gain in enumerate(gains) if gain >= LEAST_GAIN]
    tasks, table = record["tasks"], record["effect"]
    own = {tasks[t]: table[t][t] for t in counted}
    others = [table[i][t] for t in counted for i in range(len(tasks)) if i != t]
    if len(counted) < 2:
        return name, "Void: the model of all tasks gains too little over the base with its head."
    holds = min(own.values()) >= 0.8 and max(others) <= 0.3
    figures = ", ".join(f"{task} {value:.2f}" for task, value in own.items())
    text = f"Own task: {figures}; another's: {min(others):.2f} to {max(others):.2f}"
    text += f". Means over {_seeds(len(record['seeds']))}"
    return name, f"{_said(holds)} {text}, tasks that gain 2 points or more."


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def forgotten(scores: list[list[float]]) -> float:
    """Mean loss of the earlier tasks from right after their training to the end."""
    last = scores[-1]
    return statistics.fmean(scores[t][t] - last[t] for t in range(len(scores) - 1))


def _sequence(found: Found) -> Verdict:
    name = (
        "G11: of tasks learned in a row, the union of disjoint grafts forgets a quarter at most of "
        "what one body tuned on forgets, the last task within 2 points"
    )
    records = found.about("continual")
    if not records:
        return name, _NONE
    naive = statistics.fmean(forgotten(r["sequential"]) for r in records)
    union = statistics.fmean(
        own - both
        for r in records
        for own, both in list(zip(r["own"], r["union"], strict=True))[:-1]
    )
    last = [
        statistics.fmean(scores)
        for scores in (
            [r["sequential"][-1][-1] for r in records],
            [r["union"][-1] for r in records],
        )
    ]
    text = (
        f"{' → '.join(records[0]['order'])}, seeds: {len(records)}. One body tuned on forgets "
        f"{_points(naive)} points, the union {_points(union)}; a graft by itself none, as no later "
        f"training reaches its file. Last task: {_points(last[0])} one body, {_points(last[1])} "
        "union. Not by the paper's procedure: each fine-tuning is of the bare base."
    )
    if naive < LEAST_FORGOTTEN:
        return name, f"Void: too little is forgotten to begin with. {text}"
    return name, f"{_said(union <= naive / 4 and last[1] >= last[0] - ALIKE)} {text}"

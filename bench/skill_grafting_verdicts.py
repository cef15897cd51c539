"""A verdict for each claim of skill grafting, from the ledger's records."""

from __future__ import annotations

import statistics

from skill_grafting_found import REGION, SIMILAR, Found, needed

SMALL, LARGE = "0.001", "0.1"
KINDS = ("learned", "movement", "random")
KEPT = 0.95  # of what fine-tuning gains over the frozen base with a head of its own
# Points of accuracy, as shares: what counts as alike, and how little a gain is too little to share.
ALIKE, LEAST_GAIN, LEAST_FORGOTTEN = 0.02, 0.02, 0.01
SEVERAL = 3.0
Verdict = tuple[str, str]
_NONE = "Not run."


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
        f"{_said(holds)} Mean over tasks: learned {_points(learned)}, movement {_points(movement)}, "
        f"random {_points(random)}; none at all {_points(pre)}, fine-tuned {_points(tuned)}."
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


def _size(found: Found) -> Verdict:
    name = (
        f"G5: for {KEPT:.0%} of the gain over the frozen base with its own head, a learned region "
        f"is {SEVERAL:g} or more times smaller than movement's"
    )
    said, ratios = [], []
    for task in found.tasks:
        ends = found.means(task, ["head", "ft"])
        curves = [found.curve(task, kind) for kind in KINDS[:2]]
        if ends is None or not all(curves):
            continue
        if ends[1] - ends[0] < LEAST_GAIN:
            gain = _points(ends[1] - ends[0])
            said.append(f"{task}: void, fine-tuning gains {gain} points only")
            continue
        target = ends[0] + KEPT * (ends[1] - ends[0])
        learned, movement = (needed(curve, target) for curve in curves)
        ratios.append(movement / learned)
        said.append(
            f"{task}: {_points(target)} needs {_share(learned)} learned, {_share(movement)} by "
            f"movement ({movement / learned:.1f} times)"
        )
    if not said:
        return name, _NONE
    verdict = _said(statistics.geometric_mean(ratios) >= SEVERAL) if ratios else "Void."
    interpolated = "Shares are interpolated between those measured, by their logarithm"
    return name, f"{verdict} {'; '.join(said)}. {interpolated}; the last step is 10 % to 100 %."


def _share(value: float) -> str:
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
        score, error = (found.means(task, [cell], of) for of in ("score", "ece"))
        assert score is not None and error is not None
        nearest.append((abs(score[0] - accuracy), cell.removeprefix("wise@"), score[0], error[0]))
    if not nearest:
        return ""
    _, alpha, score_, error_ = min(nearest)
    return f", θ + {alpha} Δ {_points(error_)} at {_points(score_)}"


def _sgd(found: Found) -> Verdict:
    name = "G8: the skill of SGD's fine-tuning sits in fewer entries than AdamW's"
    runs = [r for (_, cell, _), r in found.cells.items() if cell.startswith("sgd-")]
    grafts = [r for (_, cell, _), r in found.cells.items() if cell.startswith("sgd:learned@")]
    if not runs or not grafts:
        return name, _NONE
    best = max(runs, key=lambda record: record["dev"])
    task, seed = best["task"], best["seed"]
    one = Found({r["key"]: r for r in found.cells.values() if r["seed"] == seed})
    ends = one.means(task, ["head", "ft", best["cell"]])
    if ends is None:
        return name, _NONE
    figures = f"{task}, one seed: AdamW {_points(ends[1])}, SGD {_points(ends[2])}"
    figures += f" (rate {best['cell'].removeprefix('sgd-')}), head alone {_points(ends[0])}"
    if abs(ends[2] - ends[1]) > ALIKE or min(ends[1:]) - ends[0] < LEAST_GAIN:
        return (
            name,
            f"Void: the two are not alike, or gain too little. {figures}. AdamW+ℓ1: not run.",
        )
    sizes = [
        needed(one.curve(task, kind, end), ends[0] + KEPT * (ends[place] - ends[0]))
        for kind, end, place in (("learned", "ft", 1), ("sgd:learned", best["cell"], 2))
    ]
    text = f"{figures}. {KEPT:.0%} of each one's gain: AdamW {_share(sizes[0])}, SGD"
    return name, f"{_said(sizes[1] < sizes[0])} {text} {_share(sizes[1])}. AdamW+ℓ1: not run."


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


def overlaps(found: Found) -> dict[str, list[dict[str, object]] | list]:  # type: ignore[type-arg]
    """Pairs of regions found with unequal seeds: of one task, of like tasks, of unlike ones."""
    groups: dict[str, list] = {}  # type: ignore[type-arg]
    for record in found.about("overlap"):
        by, of = record["by"], record["of"]
        if record["by_seed"] == record["of_seed"]:
            groups.setdefault("same seed", []).append(record)
            continue
        alike = SIMILAR.get(by) == of or SIMILAR.get(of) == by
        kind = "same" if by == of else "like" if alike else "unlike"
        groups.setdefault(kind, []).append(record)
    return groups


def _effect(found: Found) -> Verdict:
    name = "G10: in one model of all tasks a region brings 80 % of its own task's gain, 30 % at most of another's"
    records = found.about("multi")
    if not records:
        return name, "Not run: it needs one model trained on all tasks."
    table = records[0]["effect"]
    own = [row[number] for number, row in enumerate(table)]
    others = [v for i, row in enumerate(table) for j, v in enumerate(row) if i != j]
    holds = min(own) >= 0.8 and max(others) <= 0.3
    figures = ", ".join(
        f"{task} {value:.2f}" for task, value in zip(records[0]["tasks"], own, strict=True)
    )
    return (
        name,
        f"{_said(holds)} Own task: {figures}; another's: {min(others):.2f} to {max(others):.2f}.",
    )


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
        statistics.fmean(v)
        for v in zip(*((r["sequential"][-1][-1], r["union"][-1]) for r in records), strict=True)
    ]
    text = f"{' → '.join(records[0]['order'])}, {len(records)} seeds: one body forgets {_points(naive)}"
    text += f" points, the union {_points(union)}, a graft by itself none (no later training reaches its "
    text += f"file). Last task: {_points(last[0])} one body, {_points(last[1])} union."
    if naive < LEAST_FORGOTTEN:
        return name, f"Void: too little is forgotten to begin with. {text}"
    return name, f"{_said(union <= naive / 4 and last[1] >= last[0] - ALIKE)} {text}"

"""A verdict for each claim of skill grafting, from the ledger's records."""

from __future__ import annotations

import statistics

import skill_grafting_said as words
from skill_grafting_found import REGION, SIMILAR, Found, needed
from skill_grafting_optimisers import verdict as of_optimisers
from skill_grafting_said import ALIKE, KEPT, LEAST_GAIN, NOT_RUN, Verdict, points

from howfine.ledger import Record

SMALL, LARGE = "0.001", "0.1"
KINDS = ("learned", "movement", "random")
LEAST_FORGOTTEN = 0.01
SEVERAL = 3.0


def verdicts(found: Found) -> list[Verdict]:
    """(claim, verdict), in the claims' order."""
    checks = (_order, _size, _zeroed, _calibration, of_optimisers)
    checks += (_overlap, _effect, _sequence)
    return [check(found) for check in checks]


def _order(found: Found) -> Verdict:
    name = (
        "G4: at equal size learned ≥ movement > random at 0.1 % of the entries; random does nothing"
    )
    cells = [*(f"{kind}@{SMALL}" for kind in KINDS), "pre", "ft"]
    means = found.over_tasks(cells)
    if means is None:
        return name, NOT_RUN
    learned, movement, random, pre, tuned = means
    holds = learned >= movement > random and abs(random - pre) <= ALIKE
    text = (
        f"{words.said(holds)} Mean over tasks: learned {points(learned)}, movement "
        f"{points(movement)}, random {points(random)}; none at all {points(pre)}, fine-tuned "
        f"{points(tuned)}. {_ahead(found)}"
    )
    tasks = {task: found.means(task, cells[:3]) for task in found.tasks}
    text += " By task: " + ", ".join(
        f"{task} {' / '.join(map(points, values))}" for task, values in tasks.items() if values
    )
    spreads = []
    for density in (SMALL, REGION, LARGE):
        each = found.over_tasks([f"{kind}@{density}" for kind in KINDS])
        if each is not None:
            spreads.append(f"{float(density):.1%}: {points(max(each) - min(each))}")
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
            why = f"gains {points(gain)} points" if gain < LEAST_GAIN else "needs no graft at all"
            said.append(f"{task}: void, fine-tuning {why}")
            continue
        sizes = [needed(curve, target) for curve in (learned, movement)]
        ratios.append(sizes[1] / sizes[0])
        shares = [words.share(*pair) for pair in zip(sizes, (learned, movement), strict=True)]
        said.append(
            f"{task}: {points(target)} needs {shares[0]} learned, {shares[1]} by movement "
            f"({ratios[-1]:.1f} times)"
        )
    if not said:
        return name, NOT_RUN
    verdict = words.said(statistics.geometric_mean(ratios) >= SEVERAL) if ratios else "Void."
    interpolated = "Shares are interpolated between those measured, by their logarithm"
    return name, f"{verdict} {'; '.join(said)}. {interpolated}; the last step is 10 % to 100 %."


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
            figures = f"{points(means[0])} against {points(means[1])}"
            said.append(f"{task}, {kind}: {figures} (largest class {points(chance[0])})")
    return name, f"{words.said(all(right))} {'; '.join(said)}." if said else NOT_RUN


def _calibration(found: Found) -> Verdict:
    name = "G7: a learned graft of 1 % is better calibrated than θ_ft, at most 3 points worse"
    said, right, cell = [], [], f"learned@{REGION}"
    for task in found.tasks:
        errors, scores = (found.means(task, ["ft", cell], of) for of in ("ece", "score"))
        tempered = found.means(task, ["ft"], "tempered")
        if errors is None or scores is None or tempered is None:
            continue
        if errors[0] < 0.05:
            said.append(f"{task}: void, θ_ft's ECE is {points(errors[0])} and 5 was asked for")
            continue
        right.append(errors[1] < errors[0] and scores[0] - scores[1] <= 0.03)
        text = f"{task}: ECE {points(errors[0])} to {points(errors[1])}, accuracy "
        text += f"{points(scores[0])} to {points(scores[1])}; θ_ft with a temperature "
        said.append(text + f"{points(tempered[0])}{_interpolation(found, task, scores[1])}")
    if not said:
        return name, NOT_RUN
    return name, f"{words.said(all(right)) if right else 'Void.'} {'; '.join(said)}."


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
    return f", θ + {alpha} Δ {points(error)} at {points(score)}"


def _overlap(found: Found) -> Verdict:
    name = "G9: regions of unlike tasks overlap by less than 20 %, above chance, and like ones more"
    groups = overlaps(found)
    unlike, like, same = (groups.get(kind, []) for kind in ("unlike", "like", "same"))
    if not unlike or not like:
        return name, NOT_RUN
    shares = [statistics.fmean(r["overlap"] for r in rows) for rows in (unlike, like)]
    chance = statistics.fmean(r["chance"] for r in unlike)
    text = f"Unlike {shares[0]:.1%}, like {shares[1]:.1%}, chance {chance:.1%}"
    if same:
        text += f"; the same task twice {statistics.fmean(r['overlap'] for r in same):.1%}"
    return name, f"{words.said(chance < shares[0] < 0.2 and shares[1] > shares[0])} {text}."


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
    text += f". Means over {words.seeds(len(record['seeds']))}"
    return name, f"{words.said(holds)} {text}, tasks that gain 2 points or more."


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
        return name, NOT_RUN
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
        f"{points(naive)} points, the union {points(union)}; a graft by itself none, as no later "
        f"training reaches its file. Last task: {points(last[0])} one body, {points(last[1])} "
        "union. Not by the paper's procedure: each fine-tuning is of the bare base."
    )
    if naive < LEAST_FORGOTTEN:
        return name, f"Void: too little is forgotten to begin with. {text}"
    return name, f"{words.said(union <= naive / 4 and last[1] >= last[0] - ALIKE)} {text}"

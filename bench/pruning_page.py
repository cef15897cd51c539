"""The page of `pruning.py`: verdicts, a table a task, domains."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import claims
import latency
from claims import ROOT, Results, Verdict

PAGE = ROOT / "docs" / "results" / "pruning.md"
TASKS, SEEDS, KEEPS = ("sst2", "mrpc", "qnli"), (0, 1, 2), (0.7, 0.5, 0.3, 0.1)
Made = tuple[str, dict[str, Any]]
# One file of all sizes: trained for them; or units ranked, and no weight trained.
UNTRAINED = ("gradient, untrained", "magnitude, untrained", "random, untrained", "post-training")
SIZES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "gradient, untrained": {"by": "gradient", "drawn": 0},
    "magnitude, untrained": {"by": "magnitude", "drawn": 0},
    "random, untrained": {"by": "random", "drawn": 0},
}
# Each size by itself: recipe and settings.
TRAINED: dict[str, Made] = {
    "gradient": ("prune", {"by": "gradient"}),
    "gradient, 4 rounds": ("prune", {"by": "gradient", "rounds": 4}),
    "random": ("prune", {"by": "random"}),
    "magnitude": ("prune", {"by": "magnitude"}),
    "L0": ("l0", {}),
    "post-training": ("post-training", {"rows": 512}),
}
FURTHER: dict[str, Made] = {
    "gradient by layer": ("prune", {"by": "gradient", "scope": "layer"}),
    "gradient by layer, 4 rounds": ("prune", {"by": "gradient", "scope": "layer", "rounds": 4}),
    "magnitude, 4 rounds": ("prune", {"by": "magnitude", "rounds": 4}),
    "Fisher": ("prune", {"by": "fisher"}),
    "post-training, rearranged": ("post-training", {"rows": 512, "stage": "rearranged"}),
    "post-training, masked": ("post-training", {"rows": 512, "stage": "masked"}),
}


def name_of(cell: str, keep: float | None) -> str:
    """A cell at a sparsity."""
    return cell if keep is None else f"{cell} s={1 - keep:.1f}"


# Runs of both cells, on all tasks together, below which nothing is said of a claim.
LEAST = 3
Pairs = list[tuple[float, float]]


def against(r: Results, one: str, other: str, keep: float) -> Pairs:
    """Scores of two cells at a sparsity with the tasks and seeds that both have."""
    found: Pairs = []
    for task in TASKS:
        both = r.common(task, name_of(one, keep), name_of(other, keep))
        found += zip(*both, strict=True) if both else []
    return found


class Gap(float):
    """A mean difference in points, of so many pairs of runs."""

    runs = 0


Gaps = dict[float, Gap]


def gaps(r: Results, one: str, other: str) -> Gaps:
    """The mean difference in points by share kept, where both have enough runs to compare."""
    found: Gaps = {}
    for keep in KEEPS:
        own = against(r, one, other, keep)
        if len(own) >= LEAST:
            found[keep] = Gap(mean(a - b for a, b in own))
            found[keep].runs = len(own)
    return found


def _said(found: Gaps) -> str:
    """With how many pairs of runs each is of."""
    return ", ".join(f"{g:+.1f} ({g.runs}) at s={1 - keep:.1f}" for keep, g in found.items())


def _whole(found: Gaps) -> bool:
    return len(found) == len(KEEPS)


def simplest(r: Results) -> Verdict:
    parts = {other: gaps(r, "gradient", other) for other in ("L0", "random", "magnitude")}
    held = all(gap >= 0 for found in parts.values() for gap in found.values())
    told = "; ".join(f"to {other} {_said(found)}" for other, found in parts.items() if found)
    return told, held if all(_whole(found) for found in parts.values()) else None


def controls(r: Results) -> Verdict:
    first = gaps(r, "magnitude, untrained", "random, untrained")
    second = gaps(r, "gradient, untrained", "magnitude, untrained")
    told = f"magnitude to random {_said(first)}; gradient to magnitude {_said(second)}"
    held = all(gap > 0 for gap in first.values()) and all(gap >= 0 for gap in second.values())
    return told, held if _whole(first) and _whole(second) else None


def rounds(r: Results) -> Verdict:
    found = gaps(r, "gradient, 4 rounds", "gradient")
    held = all(gap >= 0 for gap in found.values())
    grows = _whole(found) and found[KEEPS[-1]] > found[KEEPS[0]]
    return _said(found), (held and grows) if _whole(found) else None


def uneven(r: Results) -> Verdict:
    once = gaps(r, "gradient", "gradient by layer")
    often = gaps(r, "gradient, 4 rounds", "gradient by layer, 4 rounds")
    told = f"at once {_said(once)}; in four rounds {_said(often)}"
    if not (_whole(once) and _whole(often)):
        return told, None
    return told, mean(once.values()) < 0 <= mean(often.values())


def above(r: Results) -> Verdict:
    found = gaps(r, "dynamic", "gradient, untrained")
    return _said(found), all(gap > 0 for gap in found.values()) if _whole(found) else None


def near(r: Results) -> Verdict:
    found = gaps(r, "dynamic", "gradient")
    close = all(found[keep] >= -2 for keep in (0.7, 0.5)) if _whole(found) else None
    return _said(found), close


def shared(r: Results) -> Verdict:
    rows = {keep: r.rows("domains", name_of("domains", keep)) for keep in KEEPS[:3]}
    told, worst = [], []
    for keep, found in rows.items():
        if not found:
            return "", None
        gap = mean(
            100 * (scores["paraphrases"] - scores[name])
            for row in found
            for name, scores in row["domains"].items()
        )
        overlap = mean(row["overlap"] for row in found)
        told.append(
            f"s={1 - keep:.1f}: {gap:+.1f} points, overlap {overlap:.2f} (chance "
            f"{found[0]['chance']:.2f})"
        )
        worst.append(gap)
    return "; ".join(told), min(worst) >= -1


def repaired(r: Results) -> Verdict:
    first = gaps(r, "post-training, rearranged", "post-training, masked")
    second = gaps(r, "post-training", "post-training, rearranged")
    told = f"rearranged to masked {_said(first)}; rescaled to rearranged {_said(second)}"
    held = all(gap >= 0 for found in (first, second) for gap in found.values())
    return told, held if _whole(first) and _whole(second) else None


CLAIMS: list[claims.Claim] = [
    ("F1", "One mask for all domains is as good as one for each (to a point), s up to .7", shared),
    ("F2", "The simplest, gradient ranking and training on, is at least as good as any", simplest),
    ("2", "With no training: random < magnitude <= gradient", controls),
    ("3", "Rounds are at least as good as at once, the more the more goes off", rounds),
    ("7", "Uneven layers are worse at once and not worse in four rounds", uneven),
    ("8", "Post-training: rescaled >= rearranged >= masked", repaired),
    ("DS", "One training of all sizes is above ranking alone at every s >= .3", above),
    ("DS", "… and within 2 points of a training for each size at s <= .5", near),
]
CELLS = ("full", *SIZES, *TRAINED, *FURTHER)


def curves(r: Results, task: str) -> list[str]:
    """A row an algorithm, a column a sparsity: mean (worst; runs)."""
    heads = ["s=0", *(f"s={1 - keep:.1f}" for keep in KEEPS)]
    lines = [f"| {task} | {' | '.join(heads)} | seconds |", "|" + " --- |" * (len(heads) + 2)]
    for cell in CELLS:
        names = ["full"] if cell == "full" else [name_of(cell, keep) for keep in (1.0, *KEEPS)]
        scores = [r.scores(task, name) for name in names] + [[]] * (5 - len(names))
        if not any(scores):
            continue
        said = [_cell(each) for each in scores]
        spent = [row["seconds"] for name in names for row in r.rows(task, name) if "seconds" in row]
        time = f"{mean(spent):.0f}" if spent else ""
        lines.append(f"| {cell} | {' | '.join(said)} | {time} |")
    return lines


def _cell(scores: Sequence[float]) -> str:
    return f"{mean(scores):.1f} ({min(scores):.1f}; {len(scores)})" if scores else ""


def page(results: Results) -> None:
    """Verdicts, then what they rest on."""
    formats = claims.formats(results.records)
    about = f"""Written by `python bench/pruning.py --data DIR --base minilm`. MiniLM (6 layers of
12 heads and 1,536 neurons, English), {formats}.
Each task is fine-tuned on 1,000 rows (3 epochs, batches of 16, 1e-4); every algorithm goes on from
that file and ranks by at most 256 of those rows (post-training pruning by 512). What trains has 2
epochs more (126 steps, 5e-5), a training of all sizes as many steps of three passes. Sparsity s is
the share of heads and of neurons that go; of post-training pruning and L0 the cards say of what.
Test: SST-2's 872 rows, MRPC's 408, 1,000 of QNLI's; accuracy. Verdicts compare runs of the same
task and seed, which have one number format. The claims are Li et al.'s (arXiv 2204.02601), the
numbers in them ours."""
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), ""]
    for task in (name for name in TASKS if results.rows(name, "full")):
        parts += [f"## {task}", "", *curves(results, task), ""]
    parts += ["## Latency against size", "", *latency.lines(), ""]
    parts += SAID.splitlines()
    claims.write(PAGE, "Structured pruning of a small model", about, results, parts, FIGURES)


FIGURES = "shares times 100: mean (worst; number of runs)"
SAID = """Seconds are of training alone, beside other work on the same machine. Domains (F1) are
MRPC's pairs of news sentences and QQP's pairs of questions, as one task of paraphrases: masks
ranked on the rows of one domain or of both, over the same weights, none of them trained on.

## What is not here

A six-layer English encoder can't show languages (F1) nor how many of a multilingual model's heads
matter (F5). With a network, and with your languages' rows as files:

```console
$ howfine tune --base xlm-roberta-base --task en.csv --text premise,hypothesis --recipe full \\
    --out en.delta.safetensors
$ howfine merge en.delta.safetensors xlmr-en
$ cat mask.yaml
method: {prune: {keep: 0.5}}
training: {max_steps: 200}
$ howfine tune --base xlmr-en --task de.csv --text premise,hypothesis --recipe mask.yaml \\
    --out de.delta.safetensors
```

ranks heads and neurons by German rows, over weights that all languages share: a bit a unit, and a
head. Rows of several languages in one file give the shared mask.
"""

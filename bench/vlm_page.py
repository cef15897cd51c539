"""The page of `vlm.py`: verdicts on the paper's claims, and a row a task and cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, stdev

import claims
from claims import ROOT, Results, Verdict

from howfine.ledger import Record

PAGE = ROOT / "docs" / "results" / "vlm.md"
SPEED = ROOT / "bench" / "ledgers" / "bench.jsonl"
TASKS = {
    "e2e": "gen/e2e",
    "dart": "gen/dart",
    "en-de": "gen/multi30k-en-de",
    "de-en": "gen/multi30k-de-en",
    "dream": "gen/dream",
}
TRANSLATIONS = ("en-de", "de-en")
# Where a teacher, and a random start, are tried: this base writes no German, whatever is done.
TAUGHT_ON, STARTS = ("de-en",), ("e2e", "dream")
WIDTHS = (10, 50, 100, 200, 300)
WIDTH = 100
METRICS = ("perplexity", "bleu", "chrf", "rouge_l")
RANDOM = "random start"
FIGURES = "mean ± deviation over the seeds; perplexity is of the references, per token"


def of(r: Results, metric: str, task: str, *cells: str) -> list[float] | None:
    """Means of a metric over the seeds that all the cells have; None without any."""
    rows = [{row["seed"]: row["scores"][metric] for row in r.rows(task, c)} for c in cells]
    seeds = set.intersection(*map(set, rows)) if rows else set()
    return [mean(row[seed] for seed in seeds) for row in rows] if seeds else None


def near_full(r: Results) -> Verdict:
    table, talk = (
        of(r, "bleu", "e2e", "vlm, width 10", "full"),
        of(r, "perplexity", "dream", "vlm", "full"),
    )
    if table is None or talk is None:
        return "", None
    said = f"E2E, width 10: {table[0]:.1f} of {table[1]:.1f} BLEU; "
    said += f"DREAM: perplexity {talk[0]:.1f}, full {talk[1]:.1f}"
    return said, table[0] >= 0.95 * table[1] and talk[0] <= 1.05 * talk[1]


def gaps(r: Results) -> Verdict:
    found = {task: of(r, "perplexity", task, "vlm", "full") for task in TASKS}
    if None in found.values():
        return "", None
    ratios = {task: pair[0] / pair[1] for task, pair in found.items() if pair}
    said = ", ".join(f"{task} {ratio:.2f}" for task, ratio in ratios.items())
    largest = sorted(ratios, key=ratios.__getitem__)[-2:]
    return f"perplexity, VLM's by full's: {said}", set(largest) == set(TRANSLATIONS)


def wider(r: Results) -> Verdict:
    cells = ["vlm" if w == WIDTH else f"vlm, width {w}" for w in WIDTHS]
    found = of(r, "perplexity", "e2e", *cells)
    if found is None:
        return "", None
    said = ", ".join(f"{w}: {p:.1f}" for w, p in zip(WIDTHS, found, strict=True))
    falls = all(b <= 1.02 * a for a, b in pairwise(found))
    return f"E2E, perplexity {said}", falls and found[0] - found[2] >= found[2] - found[4]


def teaching(r: Results) -> Verdict:
    """Held where it helps with each seed: a mean of two would hide that it may not."""
    said, held = [], []
    for task in TAUGHT_ON:
        rows = {cell: r.rows(task, cell) for cell in ("vlm", "vlm, taught", "full", "full, taught")}
        by = {
            cell: {row["seed"]: row["scores"]["bleu"] for row in own} for cell, own in rows.items()
        }
        if not all(by.values()):
            return "", None
        pairs = [
            ", ".join(
                f"{by[cell][seed]:.1f} to {by[f'{cell}, taught'][seed]:.1f}" for seed in by[cell]
            )
            for cell in ("vlm", "full")
        ]
        said.append(f"{task}, seed by seed: VLM {pairs[0]}; full {pairs[1]}")
        held += [by["vlm, taught"][seed] > by["vlm"][seed] for seed in by["vlm"]]
    return "BLEU, " + "; ".join(said), all(held)


def order(r: Results) -> Verdict:
    cells = (RANDOM, "vectors alone", "head and words", "vlm", "full")
    said, held = [], []
    for task in STARTS:
        found = of(r, "perplexity", task, *cells)
        if found is None:
            return "", None
        said.append(f"{task}: " + ", ".join(f"{value:.1f}" for value in found))
        held.append(all(a > b for a, b in pairwise(found[:4])))
        held.append(found[3] >= 0.95 * found[4])
    return "perplexity, " + "; ".join(said), all(held)


def types(r: Results) -> Verdict:
    found = {t: of(r, "perplexity", t, "vlm", "vlm, markers alone") for t in ("e2e", "dream")}
    if None in found.values():
        return "", None
    lost = {task: pair[1] / pair[0] - 1 for task, pair in found.items() if pair}
    said = ", ".join(f"{task} {100 * share:+.1f} %" for task, share in lost.items())
    return f"perplexity without types: {said}", lost["dream"] > max(0.0, lost["e2e"])


def stored(r: Results) -> Verdict:
    trained = [r.rows(task, "vlm") for task in TASKS]
    whole, vectors = r.rows("e2e", "full"), r.rows("e2e", "vectors alone")
    if not (all(trained) and whole and vectors):
        return "", None
    base = whole[0]["trainable"] - vectors[0]["trainable"]
    share = 1 + sum(rows[0]["trainable"] for rows in trained) / base
    return (
        f"with five changes of width {WIDTH}, {share:.3f} times the base's numbers",
        share <= 1.13,
    )


def latency(r: Results) -> Verdict:
    rows = [json.loads(line) for line in SPEED.read_text().splitlines()]
    found = {row["what"]: 1 / row["share"] - 1 for row in rows if row["bench"] == "writing"}
    one, many = found["batch of 1"], found["batch of 16"]
    said = f"{100 * one:.1f} % longer at batch 1, {100 * many:.1f} % at 16 ([bench](bench.md))"
    return said, many <= min(0.05, one)


CLAIMS: list[claims.Claim] = [
    ("6", "0.95 of full's BLEU on E2E by width 10, a dialogue's perplexity within 5 %", near_full),
    ("7 gap", "translation has the largest gap to full", gaps),
    ("7 teacher", "a teacher's texts narrow it", teaching),
    ("8", "random start, vectors, words, VLM: each better; VLM at most as good as full", order),
    ("9", "types help a dialogue, and more than a table", types),
    ("10", "wider is better, and 10 to 100 gains more than 100 to 300", wider),
    ("11", "one model and five tasks take at most 1.13 times one model", stored),
    ("12", "writing takes longer at batch 1, and at most 5 % longer at 16", latency),
]


def reading(r: Results) -> list[str]:
    """What stands behind the verdicts, where the figures say so."""
    found = {t: of(r, "perplexity", t, "head and words", "full", "vlm") for t in ("e2e", "en-de")}
    talk = of(r, "perplexity", "dream", "head and words", "full", "vlm")
    rows = [*found.values(), talk]
    if any(row is None for row in rows) or any(a > c for a, _, c in found.values() if a):
        return []
    said = [f"{task}: {a:.0f}, {b:.0f} and {c:.0f}" for task, (a, b, c) in found.items()]
    return [
        "This base lacks the words of most of these tasks, and VLM leaves words as they are. "
        f"Perplexities where the table of words trains alone, all of the model, and VLM: "
        f"{'; '.join(said)}; dream, which is in the base's own kind of language: "
        f"{talk[0]:.0f}, {talk[1]:.0f} and {talk[2]:.0f}.",
        "",
    ]


def figures(r: Results, cells: Sequence[str]) -> list[str]:
    """A row a task and cell: means over the seeds."""
    lines = ["| task, change | seeds | rate | " + " | ".join(METRICS) + " | trained | bytes |"]
    lines += ["|" + " --- |" * (len(METRICS) + 5)]
    for task in TASKS:
        for cell in cells:
            if rows := r.rows(task, cell):
                lines.append(_line(f"{task}, {cell}", rows))
    return lines


def _line(label: str, rows: Sequence[Record]) -> str:
    said = [_over_seeds([row["scores"][metric] for row in rows]) for metric in METRICS]
    numbers = f"{rows[0]['trainable']:,} | {round(mean(row['bytes'] for row in rows)):,}"
    return f"| {label} | {len(rows)} | {rows[0]['rate']:g} | {' | '.join(said)} | {numbers} |"


def _over_seeds(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def write(results: Results, cells: Sequence[str], about: str) -> None:
    """The page of all runs; `cells` in the order of its rows."""
    parts = ["## Claims", "", *claims.verdicts(results, CLAIMS), "", *reading(results)]
    parts += ["## Scores", ""]
    parts += figures(results, cells)
    claims.write(PAGE, "VLM: one frozen model, tasks that write", about, results, parts, FIGURES)

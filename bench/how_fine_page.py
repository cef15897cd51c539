"""docs/results/how-fine.md: the paper's assertions against the ledger's figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import spearmanr

from howfine.container import write_atomically
from howfine.ledger import Record

Verdict = tuple[str, bool | None]  # figures in words; None where the ledger lacks the runs
MATRICES = ("Q", "K", "V", "D", "I", "O")


class Results:
    """The ledger, by task, cell and seed."""

    def __init__(self, records: dict[str, Record], seeds: tuple[int, ...]) -> None:
        self.records, self.seeds = records, seeds
        self.tasks = sorted({record["task"] for record in records.values()})

    def rows(self, task: str, cell: str) -> list[Record]:
        """One record a seed; [] unless all seeds are there."""
        keys = [f"{task}/{cell}/s{seed}" for seed in self.seeds]
        if not all(key in self.records for key in keys):
            return []
        return [self.records[key] for key in keys]

    def scores(self, task: str, cell: str, field: str = "score") -> list[float]:
        return [100 * row[field] for row in self.rows(task, cell) if field in row]

    def tasks_with(self, *cells: str) -> list[str]:
        return [t for t in self.tasks if all(self.rows(t, cell) for cell in cells)]

    def learned(self, *cells: str) -> list[str]:
        """Those of them on which the first cell is above one answer for all.

        On the others, orders are of what has not been learned.
        """
        return [
            t
            for t in self.tasks_with(*cells)
            if mean(self.scores(t, cells[0])) > 100 * self.rows(t, cells[0])[0]["majority"]
        ]

    def matrices(self, task: str, seed: int) -> list[dict]:
        rows = self.records[f"{task}/full/s{seed}"]["distance"]
        return [row for row in rows if row["layer"] is not None and row["part"] in MATRICES]


def a1(r: Results) -> Verdict:
    """Every matrix: angle < 0.1 × to random, mean|d| < 0.2 × to random."""
    found = [row for t in r.tasks_with("full") for s in r.seeds for row in r.matrices(t, s)]
    if not found:
        return "", None
    angle = max(row["angle"] / row["reference_angle"] for row in found)
    size = max(row["mean_abs"] / row["reference_mean_abs"] for row in found)
    return (
        f"largest of {len(found)} matrices: angle {angle:.4f}, mean abs. difference {size:.4f} of "
        "the distance to a random init",
        angle < 0.1 and size < 0.2,
    )


def a2(r: Results) -> Verdict:
    """Closeness is not uniform (max/min ≥ 2), and its ranking agrees across seeds (ρ > .5)."""
    words, fine = [], []
    for task in r.tasks_with("full"):
        moved = [[row["relative"] for row in r.matrices(task, s)] for s in r.seeds]
        spread = min(max(m) / min(m) for m in moved)
        pairs = [(a, b) for a in range(len(moved)) for b in range(a)]
        rho = min(float(spearmanr(moved[a], moved[b]).statistic) for a, b in pairs)
        words.append(f"{task}: max/min {spread:.1f}, ρ ≥ {rho:.2f}")
        fine.append(spread >= 2 and rho > 0.5)
    return "; ".join(words), all(fine) if fine else None


def a3(r: Results) -> Verdict:
    """Random references stand at right angles: |angle - 0.5| < 0.01 for ≥ 1e5 entries."""
    found = [row for t in r.tasks_with("full") for s in r.seeds for row in r.matrices(t, s)]
    large = [row for row in found if row["count"] >= 1e5]
    if not large:
        return "", None
    off = max(abs(row[name] - 0.5) for row in large for name in ("reference_angle", "random_angle"))
    return f"largest deviation of {len(large)} matrices: {off:.4f}", off < 0.01


def a4(r: Results) -> Verdict:
    """Freezing keys, or the embedding, costs < 1 seed-std; all three ≤ 2 points."""
    cells = ("full", "freeze-keys", "freeze-embedding", "freeze-all-three")
    words, fine = [], []
    for task in r.learned(*cells):
        full = r.scores(task, "full")
        drops = [mean(full) - mean(r.scores(task, cell)) for cell in cells[1:]]
        spread = stdev(full)
        words.append(
            f"{task}: keys {-drops[0]:+.2f}, embedding {-drops[1]:+.2f} (seed-std {spread:.2f}), "
            f"keys + embedding + top layer {-drops[2]:+.2f}"
        )
        fine.append(drops[0] < spread and drops[1] < spread and drops[2] <= 2)
    return "; ".join(words), all(fine) if fine else None


def a5(r: Results) -> Verdict:
    """Freezing the most moved matrices costs at least as much as the least moved ones."""
    words, fine = [], []
    for task in r.learned("full", "freeze-most-moved", "freeze-least-moved"):
        scores = [r.scores(task, f"freeze-{which}-moved") for which in ("most", "least")]
        most, least = map(mean, scores)
        spread = max(map(stdev, scores))
        words.append(
            f"{task}: most moved frozen {most:.2f}, least moved {least:.2f} (seed-std {spread:.2f})"
        )
        fine.append(most <= least)
    return "; ".join(words), all(fine) if fine else None


def a6(r: Results) -> Verdict:
    """A mask at s₀ = .05 within 3 points of full on ≥ 2 tasks; kept weights bit-identical."""
    words, near, same, asked = [], 0, True, 0
    for task in r.tasks_with("full", "mask-0.05"):
        # Where all training examples were used, those runs are the better witness.
        end = "-whole" if r.rows(task, "mask-0.05-whole") else ""
        full, majority = (
            mean(r.scores(task, "full" + end)),
            100 * r.rows(task, "full")[0]["majority"],
        )
        masks = [c + end for c in ("mask-0.0", "mask-0.05", "mask-0.2") if r.rows(task, c + end)]
        found = mean(r.scores(task, "mask-0.05" + end))
        words.append(
            f"{task}: full{end} {full:.2f} (majority {majority:.2f}), mask {found - full:+.2f}"
        )
        asked += 1
        # Where one of them learns nothing, nothing is matched.
        near += found - full >= -3 and min(found, full) > majority
        same &= all(row["kept_bit_identical"] for c in masks for row in r.rows(task, c))
    words.append("kept weights bit-identical" if same else "kept weights NOT identical")
    return "; ".join(words), (near >= 2 and same) if asked >= 2 else None


def a7(r: Results) -> Verdict:
    """Trained > one-shot magnitude > random, shuffled trained ≤ shuffled random; growing with s."""
    words, fine = [], []
    for task in r.learned("full", "mask-0.2", "magnitude-0.2", "random-0.2"):
        gaps = []
        for share in ("0.2", "0.4"):
            if not r.rows(task, f"mask-{share}") or not r.rows(task, f"magnitude-{share}"):
                continue
            if not r.rows(task, f"random-{share}"):
                continue
            trained, magnitude, chance = (
                mean(r.scores(task, f"{name}-{share}")) for name in ("mask", "magnitude", "random")
            )
            # Neither head was trained for the mask that it meets.
            shuffled, other = (
                mean(r.scores(task, f"{name}-{share}", "permuted_score"))
                for name in ("mask", "random")
            )
            words.append(
                f"{task}, s₀ {share}: trained {trained:.1f}, magnitude {magnitude:.1f}, random "
                f"{chance:.1f}; shuffled, trained {shuffled:.1f}, random {other:.1f}"
            )
            gaps.append(trained - magnitude)
            fine.append(trained > magnitude > chance and shuffled <= other)
        if len(gaps) == 2:
            fine.append(gaps[1] > gaps[0])
    return "; ".join(words), all(fine) if fine else None


def a8(r: Results) -> Verdict:
    """Score against final sparsity first falls 2 points below its best at 20 to 60 %."""
    words, fine = [], []
    shares = ("0.0", "0.05", "0.2", "0.4", "0.6")
    for task in r.tasks_with(*(f"mask-{share}" for share in shares)):
        points = [
            (mean(r.scores(task, f"mask-{s}", "sparsity")), mean(r.scores(task, f"mask-{s}")))
            for s in shares
        ]
        best = max(score for _, score in points)
        knee = next((s for s, score in sorted(points) if s > 10 and score < best - 2), math.inf)
        curve = ", ".join(f"{s:.0f} % → {score:.1f}" for s, score in sorted(points))
        words.append(f"{task}: {curve}; first more than 2 points below the best at {knee:.0f} %")
        fine.append(20 <= knee <= 60)
    return "; ".join(words), all(fine) if fine else None


def a9(r: Results) -> Verdict:
    """Seeds give masks whose flipped entries overlap little more than chance."""
    words, fine = [], []
    for task in r.tasks:
        row = r.records.get(f"{task}/overlap")
        if row:
            found, chance = mean(row["jaccard"]), mean(row["chance"])
            words.append(
                f"{task}: {100 * mean(row['flipped']):.2f} % of entries flip, Jaccard {found:.3f}, "
                f"by chance {chance:.3f}"
            )
            fine.append(found < 2 * chance)
    return "; ".join(words), all(fine) if fine else None


def a10(r: Results) -> Verdict:
    """A mask on a randomly initialised encoder stays within 5 points of the majority class."""
    words, fine = [], []
    for task in r.tasks_with("mask-random-base"):
        scores = r.scores(task, "mask-random-base")
        majority = 100 * r.rows(task, "mask-random-base")[0]["majority"]
        words.append(f"{task}: {mean(scores):.1f} (majority {majority:.1f})")
        fine.append(mean(scores) < majority + 5)
    return "; ".join(words), all(fine) if fine else None


def a11(r: Results) -> Verdict:
    """A mask rate of 2e-5 flips no logit."""
    rows = [row for row in r.records.values() if row["cell"] == "mask-rate-2e-5"]
    if not rows:
        return "", None
    flips = sum(row["to_zero"] + row["to_one"] for row in rows)
    return f"{flips} flips in {rows[0]['steps']} steps", flips == 0


def a12(r: Results) -> Verdict:
    """A mask's file ≤ Σn/8 + head + 1 KB."""
    rows = [row for row in r.records.values() if "sparsity" in row]
    if not rows:
        return "", None
    shares = [row["bytes"] / (row["entries"] / 8 + row["head_bytes"] + 1024) for row in rows]
    return (
        f"{len(rows)} files, {min(shares):.2f} to {max(shares):.2f} of the bound; each score is of "
        "the file loaded again",
        max(shares) <= 1,
    )


CHECKS: list[Callable[[Results], Verdict]] = [
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12,
]  # fmt: skip


def write(
    path: Path,
    records: dict[str, Record],
    sizes: dict[str, tuple[int, int]],
    epochs: int,
    seeds: tuple[int, ...],
) -> None:
    """Write the page from the ledgers' records."""
    results = Results(records, seeds)
    lines = [
        _intro(results, sizes, epochs),
        "| | assertion | figures | |",
        "| --- | --- | --- | --- |",
    ]
    for check in CHECKS:
        figures, holds = check(results)
        verdict = {True: "holds", False: "**does not hold**", None: "not run"}[holds]
        about = (check.__doc__ or "").strip().replace("|", "\\|")
        lines.append(f"| {check.__name__.upper()} | {about} | {figures} | {verdict} |")
    lines += ["", "## Every run", "", "Mean over seeds ± standard deviation, in points."]
    for task in results.tasks:
        lines += ["", f"### {task}", "", _table(results, task)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _intro(r: Results, sizes: dict[str, tuple[int, int]], epochs: int) -> str:
    parts = "; ".join(f"{task}: {_sizes(r, task, *sizes[task])}" for task in r.tasks)
    dates = sorted({row["date"] for row in r.records.values()})
    machines = "; ".join(sorted({row["machine"] for row in r.records.values()}))
    return f"""# How fine can fine-tuning be, on MiniLM

Radiya-Dixit & Wang 2020 (arXiv 2004.14129). Written by `python bench/how_fine.py` from the ledgers
under `bench/ledgers`: runs of {" to ".join(dict.fromkeys([dates[0], dates[-1]]))} on
{machines}. Base `minilm`: 6 layers of width 384, 22.7 M parameters. {parts}.
{epochs} epochs, batch 16, {len(r.seeds)} seeds, bfloat16 autocast; full fine-tuning at 1e-4, masks
at 50 over the number of steps (chosen on SST-2's dev split, carved out of train). Nothing was
chosen on these validation sets. A4, A5 and A7 leave out tasks on which full fine-tuning is not
above one answer for all. A shuffled mask's head is not trained again.

Cells that lack a seed count as not run. A8, A10, A11 and the larger shares of A7 were run on SST-2
alone, `whole` on all of MRPC's training examples. At these sizes RTE hardly rises above one answer
for all: its scores say little. The paper's own base is BERT-base: what is found here holds for
MiniLM.
"""


def _sizes(r: Results, task: str, examples: int, tokens: int) -> str:
    count = next(x["n"] for x in r.records.values() if x["task"] == task and "n" in x)
    return (
        f"{examples:,} training examples cut to {tokens} tokens, the whole official validation set "
        f"of {count}"
    )


def _table(r: Results, task: str) -> str:
    cells = list(dict.fromkeys(x["cell"] for x in r.records.values() if x["task"] == task))
    lines = ["| run | score | seeds | bytes | trainable | sparsity | permuted |"]
    lines.append("|" + " --- |" * 7)
    majority = next(x["majority"] for x in r.records.values() if x["task"] == task)
    lines.append(f"| (one answer for all) | {100 * majority:.2f} | | | | | |")
    for cell in cells:
        rows = [x for x in r.records.values() if (x["task"], x["cell"]) == (task, cell)]
        rows = [row for row in rows if "score" in row]
        if not rows:
            continue
        score = _spread([100 * row["score"] for row in rows])
        sparsity = f"{mean(row['sparsity'] for row in rows):.1%}" if "sparsity" in rows[0] else ""
        shuffled = [100 * row["permuted_score"] for row in rows if "permuted_score" in row]
        lines.append(
            f"| {cell} | {score} | {len(rows)} | {round(mean(row['bytes'] for row in rows)):,} | "
            f"{rows[0]['trainable']:,} | {sparsity} | {_spread(shuffled) if shuffled else ''} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

"""docs/results/frontier.md and its pictures, from the ledgers' records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import frontier_plot
from claims import formats
from entries import HEAD_RATE, LONG, RATES, Entry
from frontier_results import FULL, HOPELESS, KEPT, STEADY, TUNED_ON, Row, TaskResults

from howfine.container import write_atomically
from howfine.ledger import Record

SIDES = {"howfine": "howfine", "peft": "PEFT"}
# The aims for the smallest files.
RATIO, SMALL, SMALL_TASKS = 10, 1024, 2


def write(
    path: Path,
    records: Mapping[str, Record],
    entries: Sequence[Entry],
    sizes: Mapping[str, Any],
    seeds: Sequence[int],
    common: Mapping[str, Any],
) -> None:
    """Write the page, and a picture a task beside it."""
    tasks = [
        task for task in sizes if any(r["task"] == task and "score" in r for r in records.values())
    ]
    found = [TaskResults(task, records, entries, seeds) for task in tasks]
    lines = [_intro(records, found, sizes, seeds, common), "## Who is smallest", ""]
    lines += _summary(found, len(sizes))
    for results in found:
        lines += ["", f"## {results.task}", "", _about(results), ""]
        if results.comparable:
            file = path.with_name(f"{path.stem}-{results.task}.svg")
            write_atomically(file, _picture(results).encode())
            lines += [f"![Score against bytes on {results.task}]({file.name})", ""]
        lines += _table(results)
        lines += _left_out(results, entries)
    lines += ["", "## What could not be run", "", *_failures(found)]
    lines += ["", "## The entries", "", *_entries(entries)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _intro(
    records: Mapping[str, Record],
    found: Sequence[TaskResults],
    sizes: Mapping[str, Any],
    seeds: Sequence[int],
    common: Mapping[str, Any],
) -> str:
    runs = [record for record in records.values() if "date" in record]
    dates = sorted({run["date"] for run in runs})
    when = " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])) or "no day yet"
    machines = "; ".join(sorted({run["machine"] for run in runs})) or "none yet"
    parts = "\n".join(
        f"- {results.task}: {_count(results, 'train_size')} training rows, "
        f"{_count(results, 'heldout_size')} held-out rows, {_count(results, 'n')} test rows, "
        f"{sizes[results.task].max_length} tokens."
        for results in found
    )
    return f"""# The smallest file that keeps {KEPT:.0%} of full fine-tuning

For each task: how many bytes must be stored, so that the score is at least {KEPT:.0%} of that of
full fine-tuning? howfine's recipes stand beside PEFT's methods. Written by
`python bench/frontier.py --page` from the ledgers under `bench/ledgers`; run on {when}, on
{machines}. {len(runs):,} runs.

Base `minilm`: 6 layers of width 384, 22.7 M parameters. Seeds {", ".join(map(str, seeds))}.

{parts}

The test rows are the official validation set of GLUE, and the test split of rotten-tomatoes; the
held-out rows are rows of train that nothing was trained on.

- **Training** is the same for all: {common["epochs"]} epochs, batch {common["batch_size"]}, AdamW,
  linear schedule with a tenth of warm-up, gradients clipped at 1, in {formats(runs)},
  one linear layer on the mean of the last hidden states. A recipe of several phases has more
  steps; the ledger has them. Entries that end in -long have {LONG} epochs: few
  numbers take more steps, and the small ones of both sides get them. PEFT's methods run in
  howfine's training loop.
- **Rates**: every entry tries three learning rates on {TUNED_ON} with the first seed; the best one
  on the held-out rows is its rate on all tasks. Full fine-tuning tries its three on every task. The
  head has a rate of its own ({HEAD_RATE:g}, or what the recipe says). No rate was chosen on test
  rows.
- **Seeds**: on tasks that count (below), where the first seed's score is under {HOPELESS:.0%} of
  full fine-tuning's mean, the others are not run, and the entry does not keep {KEPT:.0%}. The same
  rule for both sides, by scores on test: it saves time and can only leave out an entry whose other
  seeds would have to be better than full fine-tuning.
- **Kinds**: of entries that differ in nothing but how many numbers they train, those above one
  that keeps {KEPT:.0%} are not run on that task (they can't be the smallest), nor those below one
  whose first seed is under {HOPELESS:.0%}. What was left out is listed below each table.
- **Precision**: a file of PEFT's falls back to fp32 where fp16 loses a held-out row; howfine's
  precisions are the recipes' and are not put to that test.
- **Bytes** of howfine are the delta file with its header and head. Bytes of PEFT are its
  `adapter_model.safetensors` with the head in it, as `modules_to_save` puts it; in fp16 unless the
  held-out score is lower than in fp32. PEFT's `adapter_config.json` (about half a kB to 1.5 kB,
  without which the file can't be loaded) is not counted, howfine's header is.
- *Header + head + change* account for every byte of the first seed's file, as `howfine inspect`
  does; the ledger has them for every run.
- **Scores** are of the file, loaded again.
- *howfine's bytes at this score*, beside a peer: the smallest file of howfine's whose mean over the
  same seeds is as high or higher, and how many times smaller it is.
- An entry **keeps {KEPT:.0%}** when its mean over the seeds does. *Seeds* counts those that keep it
  against full fine-tuning with the same seed. *Chance* is the share of resampled test rows and
  seeds in which it is kept, both sides scored on the same rows. The smallest of many entries is
  picked on the test rows, so a close call may be luck: read the chance beside it.
"""


def _count(results: TaskResults, field: str) -> str:
    return f"{next(iter(results.rows.values())).runs[0][field]:,}" if results.rows else "?"


def _summary(found: Sequence[TaskResults], asked: int) -> list[str]:
    """A row a task, then the verdict."""
    lines = [
        "| task | full | smallest of howfine | bytes | chance | smallest of PEFT | bytes | chance "
        "| PEFT / howfine |",
        "|" + " --- |" * 9,
    ]
    times: list[bool | None] = []
    small: list[bool] = []
    for results in found:
        ours, theirs = results.smallest("howfine"), results.smallest("peft")
        ratio = theirs.bytes / ours.bytes if ours and theirs else None
        times.append(ratio >= RATIO if ratio is not None and results.telling else None)
        small.append(ours is not None and results.telling and ours.bytes < SMALL)
        full = f"{100 * results.full.score:.2f}" if results.full else "not run"
        cells = [results.task, full, *_smallest(results, ours), *_smallest(results, theirs)]
        lines.append(f"| {' | '.join(cells)} | {f'{ratio:.1f}' if ratio is not None else ''} |")
    lines += ["", _verdict(found, times, small, asked)]
    dull = [results.task for results in found if results.comparable and not results.telling]
    if dull:
        lines += [
            "",
            f"On {', '.join(dull)}, one answer for all rows keeps {KEPT:.0%} of full fine-tuning, "
            f"too, or full fine-tuning's seeds differ by more than {STEADY:.0%} of its score: what "
            "is small there says nothing, and counts for neither aim.",
        ]
    return lines


def _smallest(results: TaskResults, row: Row | None) -> list[str]:
    if row is None:
        return ["none", "", ""]
    return [row.entry.name, f"{round(row.bytes):,}", f"{results.chance(row):.2f}"]


def _verdict(
    found: Sequence[TaskResults], times: list[bool | None], small: list[bool], asked: int
) -> str:
    if len(found) < asked:
        words = ("**not decided**", "**not decided**")
    else:
        held = bool(times) and all(times), sum(small) >= SMALL_TASKS
        words = tuple("**holds**" if each else "**does not hold**" for each in held)
    lacking = [r.task for r, held in zip(found, times, strict=True) if held is None]
    said = "where a side has none or the task says nothing"
    note = f"; no ratio on {', '.join(lacking)}, {said}" if lacking else ""
    run = f"of {len(found)} tasks" + f" (of {asked})" * (len(found) < asked)
    return (
        f"Ten times smaller than PEFT's smallest on every task: {words[0]}, on "
        f"{times.count(True)} {run}{note}. Under 1 KB ({SMALL:,} bytes) on at least two tasks: "
        f"{words[1]}, on {sum(small)} {run}."
    )


def _about(results: TaskResults) -> str:
    words = f"One answer for all rows scores {100 * results.one_answer:.2f}."
    if results.metric is not None:
        words = f"Metric: {results.metric.name}, times 100. {words}"
    if not results.comparable:
        words += " Full fine-tuning is not there with all seeds, or scores 0: no shares."
    return words


def _table(results: TaskResults) -> list[str]:
    """Entries by size, smallest first."""
    lines = [
        "| entry | side | rate | trainable | bytes | header + head + change | score | of full "
        "| seeds | chance | keeps | howfine's bytes at this score |",
        "|" + " --- |" * 12,
    ]
    for row in sorted(results.rows.values(), key=lambda row: row.bytes):
        score = f"{100 * row.score:.2f} ± {100 * row.spread:.2f}"
        cells = [row.entry.name, SIDES[row.entry.side], f"{row.rate:g}"]
        cells += [f"{row.runs[0]['trainable']:,}", _bytes(row), _parts(row), score]
        if results.comparable:
            cells += [f"{100 * results.share(row):.1f} %"]
            cells += [f"{results.seeds_that_keep(row)} of {len(row.runs)}"]
            cells += ["" if row.entry.name == FULL else f"{results.chance(row):.2f}"]
            far = results.hopeless(row.entry.name)
            needless = results.needless(row.entry.name)
            lacking = "not needed" if needless else "seeds lacking"
            unfinished = "" if row.whole else "no, far below" if far else lacking
            cells += [unfinished or ("yes" if results.keeps(row) else "no")]
        else:
            cells += [""] * 4
        cells += [_matching(results, row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _matching(results: TaskResults, row: Row) -> str:
    """For a peer: howfine's smallest file that scores as much, and how many times smaller it is."""
    if row.entry.side == "howfine":
        return ""
    ours = results.matching(row)
    if ours is None or ours.entry.name == FULL:
        return "none"
    times = row.bytes / ours.bytes
    said = f"{times:.1f} times fewer" if times >= 1 else f"{1 / times:.1f} times more"
    return f"{round(ours.bytes):,} ({said})"


def _left_out(results: TaskResults, entries: Sequence[Entry]) -> list[str]:
    """Entries without all their seeds, and why."""
    lacking = [
        entry.name
        for entry in entries
        if entry.name not in results.rows or not results.rows[entry.name].whole
    ]
    reasons = {name: results.needless(name) for name in lacking}
    needless = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    failed = results.failures()
    open_ = [
        name
        for name in lacking
        if not reasons[name] and not results.hopeless(name) and name not in failed
    ]
    lines = []
    if needless:
        lines += ["", f"Not needed: {', '.join(needless)}."]
    if open_:
        lines += ["", f"Not run, or not with all seeds: {', '.join(open_)}."]
    return lines


def _bytes(row: Row) -> str:
    sizes = [run["bytes"] for run in row.runs]
    mean = f"{round(row.bytes):,}"
    return mean if len(set(sizes)) == 1 else f"{mean} ({min(sizes):,} to {max(sizes):,})"


def _parts(row: Row) -> str:
    """Of the first seed's file."""
    parts = row.runs[0].get("parts", {})
    return " + ".join(f"{parts[kind]:,}" for kind in ("header", "head", "change") if kind in parts)


def _picture(results: TaskResults) -> str:
    named = {FULL}
    for side in SIDES:
        if row := results.smallest(side):
            named.add(row.entry.name)
    points = [
        frontier_plot.Point(
            row.entry.name, row.entry.side, row.bytes, results.share(row), row.entry.name in named
        )
        for row in results.rows.values()
    ]
    return frontier_plot.picture(f"{results.task}: share of full fine-tuning's score", points, KEPT)


def _failures(found: Sequence[TaskResults]) -> list[str]:
    rows = [
        f"| {results.task} | {entry} | `{' '.join(error.split()).replace('|', '/')}` |"
        for results in found
        for entry, errors in results.failures().items()
        for error in sorted(errors)
    ]
    if not rows:
        return ["Every entry that was tried ran."]
    return ["Word for word; at some rate, or at all of them.", "",
            "| task | entry | error |", "| --- | --- | --- |", *rows]  # fmt: skip


def _entries(entries: Sequence[Entry]) -> list[str]:
    lines = ["| entry | side | what | settings | rates |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        settings = json.dumps(entry.settings) if entry.settings else ""
        rates = ", ".join(f"{rate:g}" for rate in RATES[entry.rates])
        cells = [entry.name, SIDES[entry.side], entry.what, f"`{settings}`" if settings else ""]
        lines.append(f"| {' | '.join(cells)} | {rates} |")
    return lines

"""Every measurement under "what it must reach", and the page that states them.

    make bench            # or: python bench/run.py [--only codec,steps,distance,startup]

Runs each bench in a process of its own, keeps its lines in bench/ledgers/bench.jsonl, and writes
docs/results/bench.md from them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from howfine.container import write_atomically

ROOT = Path(__file__).parent.parent
LEDGER = ROOT / "bench" / "ledgers" / "bench.jsonl"
PAGE = ROOT / "docs" / "results" / "bench.md"
SCRIPTS = ("codec", "steps", "distance", "switch", "mixed", "writing", "aligning", "slicing")
STARTUP_SECONDS = 0.5
HEADER_BYTES = 700

Row = dict[str, Any]


def run(name: str) -> list[Row]:
    """The JSON lines a bench prints; the others are for people."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py")], capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise SystemExit(f"bench/{name}.py gave no figures:\n{done.stderr[-2000:]}")
    return rows


def startup() -> list[Row]:
    """Wall seconds of a fresh process, median of 7 interleaved."""
    commands = {
        "import howfine": [sys.executable, "-c", "import howfine"],
        "howfine --help": [sys.executable, "-m", "howfine.cli", "--help"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(7):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            found[name].append(time.perf_counter() - start)
    return [
        {"bench": "startup", "what": name, "seconds": round(statistics.median(spent), 3)}
        for name, spent in found.items()
    ]


def header() -> list[Row]:
    """Bytes of a one-matrix mask's file that are not its streams."""
    import tempfile

    from howfine.base import Base
    from howfine.cost import parts
    from howfine.delta import Delta
    from howfine.method import method
    from howfine.readout import readout

    base, read = Base.load(), readout("classifier")
    made = method("mask", where=("Q@0",))
    labels = ("negative", "positive")
    with made.attach(base) as change:
        head = read.attach(base, labels)
        delta = Delta.pack(base, made, change, read, head, labels, "fp16")
    score = {"metric": "accuracy", "value": 0.812345, "interval": [0.783456, 0.840123]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.delta.safetensors"
        delta.with_score({**score, "on": "rotten-tomatoes/dev", "n": 853}).save(path)
        found = {part.name: part.bytes for part in parts(path)}
        total = path.stat().st_size
    overhead = found["header"] + found["index"]
    return [{"bench": "header", "bytes": overhead, "limit": HEADER_BYTES, "file": total}]


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows as Markdown; `columns` maps a heading to a field."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [_cell(row.get(field)) for field in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "holds" if value else "**does not hold**"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " – ".join(map(_cell, value))
    return str(value)


def page(rows: list[Row]) -> str:
    def of(name: str) -> list[Row]:
        return [dict(row) for row in rows if row["bench"] == name]

    steps, codec = of("step"), of("codec")
    full_peak = next((row["peak_bytes"] for row in steps if row["method"] == "full"), 0)
    for row in steps:
        limit = row["limit"]
        row["holds"] = None if limit is None else row["ratio"] <= limit
        row["peer_holds"] = row["to_peer"] <= 1 if "to_peer" in row else None
        row["peak_mb"] = round(row["peak_bytes"] / 1e6)
        row["memory_ratio"] = round(row["peak_bytes"] / full_peak, 2)
        row["allocated_mb"] = round(row["allocated_bytes"] / 1e6, 1)
        if row["allocated_limit"]:
            row["allocated_limit_mb"] = round(row["allocated_limit"] / 1e6, 1)
            row["memory_holds"] = row["allocated_bytes"] <= row["allocated_limit"]
    for row in codec:
        row["percent"], row["holds"] = f"{100 * row['density']:g} %", row["ratio"] <= 1.01
    times = of("codec-time")
    for row in times:
        row["percent"] = f"{100 * row['density']:g} %"
        row["total_s"] = round(row["encode_s"] + row["decode_s"], 4)
        if (row["n"], row["density"]) == (10_000_000, 0.05):
            row["holds"] = row["total_s"] < 0.5
    memory = of("distance-memory")
    for row in memory:
        row["holds"] = row["peak_rss_bytes"] <= row["limit_bytes"]
    starts = of("startup")
    for row in starts:
        row["holds"] = row["seconds"] < STARTUP_SECONDS
    switches, sizes = of("switch"), of("sparse-size")
    for row in switches:
        row["holds"] = None if row["limit"] is None else row["cpu_ms"] <= row["limit"]
    of_mixed = of("mixed")
    for row in of_mixed:
        row["holds"] = row["ratio"] <= row["limit"]
    texts = of("writing")
    for row in texts:
        row["holds"] = row["share"] >= row["least"]
    aligned, chunks = of("aligning"), of("chunks")
    for row in aligned:
        row["holds"] = row["ratio"] >= row["least"]
    for row in chunks:
        row["holds"] = row["ratio"] <= row["limit"]
    slices = of("slicing")
    for row in slices:
        row["holds"] = row["share"] >= row["least"]
    for row in sizes:
        row["percent"], row["holds"] = f"{100 * row['density']:g} %", row["bytes"] <= row["limit"]
    heads = of("header")
    for row in heads:
        row["holds"] = row["bytes"] < row["limit"]
    return f"""# Measurements

Written by `make bench` from runs of {_when(rows)} on {
        _where(rows)
    }. Timings on a shared machine are noisy: ratios are medians over
interleaved rounds, with quartiles. Each table is of one run; two tables may be of two machines.

## Step time and memory against full fine-tuning

MiniLM (6 × 384), 16 sentences of 64 tokens, fp32, AdamW, {_threads(steps)} threads; all methods in
every one of {_rounds(steps)} rounds. Memory is the growth of a fresh process over the loaded base
(it varies by 20 MB), and the tensors that a step makes and holds at once, which repeat to the byte.
A method's peer is PEFT's of its kind (for `sparse`, LoRA); it ran next to it in every round, and
what is asked is at most its time and its tensors' memory.

{
        table(
            steps,
            {
                "method": "method",
                "ms a step": "ms",
                "ratio to full": "ratio",
                "quartiles": "ratio_quartiles",
                "at most": "limit",
                "": "holds",
                "time to its peer": "to_peer",
                "quartiles ": "to_peer_quartiles",
                "  ": "peer_holds",
                "peak MB": "peak_mb",
                "memory to full": "memory_ratio",
                "tensors, MB": "allocated_mb",
                "MB at most": "allocated_limit_mb",
                " ": "memory_holds",
            },
        )
    }

`full` here keeps the pretrained weights beside the trained ones (to restore them bit for bit).

## Rows of different tasks in one batch

MiniLM, 16 rows of 64 tokens, inference, {_threads(of("mixed"))} threads: a pass in which every row
wears another change, against one in which all wear the same one, both with 16 heads or one; medians
of ratios over {_rounds(of("mixed"))} interleaved rounds.

{
        table(
            of_mixed,
            {
                "kind": "kind",
                "ms, bare base": "base_ms",
                "ms, one change": "one_ms",
                "ms, 16 changes": "many_ms",
                "ratio": "ratio",
                "quartiles": "ratio_quartiles",
                "at most": "limit",
                "": "holds",
                "16 to bare base": "to_base",
            },
        )
    }

## Texts written with a task's change on

A model of GPT-2 small's shape with random weights, sources of 64 tokens, 32 written after each,
greedily, with a cache; {_threads(texts)} threads. Texts a second with the paper's widest change
(adapters of width 300 after each block) as a share of the bare base's, and of a batch of five tasks
(widths 300, 300, 100, 100, 10) as a share of one whose rows all are of the widest; medians over
{_rounds(texts)} interleaved rounds.

{
        table(
            texts,
            {
                "batch": "what",
                "share": "share",
                "quartiles": "share_quartiles",
                "at least": "least",
                "": "holds",
            },
        )
    }

## Coding of places

Bits of the coded set against log2 C(n, k), uniformly random, the worst of three seeds; at most
1.01.

{
        table(
            codec,
            {
                "n": "n",
                "density": "percent",
                "coding": "coding",
                "bits": "bits",
                "log2 C(n, k)": "bound",
                "ratio": "ratio",
                "": "holds",
            },
        )
    }

Seconds on one thread, medians of interleaved repeats; 10 M entries at 5 % in under 0.5 s.

{
        table(
            times,
            {
                "n": "n",
                "density": "percent",
                "encode s": "encode_s",
                "decode s": "decode_s",
                "both": "total_s",
                "": "holds",
            },
        )
    }

## Header

Bytes of a one-matrix mask's file that are not its streams: header, index, score and all.

{table(heads, {"bytes": "bytes", "less than": "limit", "whole file": "file", "": "holds"})}

## Files of changed entries

Random places among the matrices of MiniLM (10.6 M entries) and normal values. At most 1.02 times
log2 C(n, k) / 8 plus the empirical entropy of the values (and the bytes of a head of zeros), plus
700.

{
        table(
            sizes,
            {
                "density": "percent",
                "store": "store",
                "entries": "entries",
                "bytes": "bytes",
                "bound": "bound",
                "at most": "limit",
                "": "holds",
            },
        )
    }

## Switching a change on and off

1 % of the entries of MiniLM's matrices, one thread, CPU milliseconds of on and off together,
medians of {
        _rounds(switches)
    } interleaved rounds of five repeats each; PEFT's is `merge_adapter` and `unmerge_adapter`.

{
        table(
            switches,
            {
                "what": "what",
                "CPU ms": "cpu_ms",
                "at most": "limit",
                "": "holds",
                "base restored bit for bit": "restored",
            },
        )
    }

## Distance, streamed

Two checkpoints on disk; at most three times the largest tensor plus 300 MB.

{
        table(
            memory,
            {
                "bytes each": "bytes_per_checkpoint",
                "largest tensor": "largest_tensor_bytes",
                "peak RSS": "peak_rss_bytes",
                "at most": "limit_bytes",
                "seconds": "seconds",
                "": "holds",
            },
        )
    }

## Aligning two towers

A ViT of DeiT-S's shape with random weights (12 × 384, 197 tokens) beside MiniLM, 16 pairs, fp32,
AdamW, {_threads(aligned)} threads: a step that computes all blocks, against one that reuses what
frozen blocks gave (`reuse_frozen`), medians of ratios over {
        _rounds(aligned)
    } interleaved rounds. The
losses of projections alone are equal to the bit. A deep adapter is one block that trains on twelve
that do not; the ViT is read at its first position, which is all that either way computes above the
new block's attention.

{
        table(
            aligned,
            {
                "what trains": "what",
                "ms, all computed": "whole_ms",
                "ms, reused": "ms",
                "ratio": "ratio",
                "quartiles": "ratio_quartiles",
                "at least": "least",
                "": "holds",
            },
        )
    }

{
        table(
            chunks,
            {
                "memory of a step": "what",
                "MB": "mb",
                "MB, small batch": "small_mb",
                "ratio": "ratio",
                "at most": "limit",
                "": "holds",
            },
        )
    }

## A sliced model

MiniLM without half of the heads and neurons of every layer, against the whole one: batches of
16 × 64, fp32, {_threads(slices)} threads, medians of ratios over {_rounds(slices)} interleaved
rounds. The share is the speed-up over the ratio of the blocks' multiplications.

{
        table(
            slices,
            {
                "through": "what",
                "ms, whole": "whole_ms",
                "ms, sliced": "ms",
                "speed-up": "ratio",
                "quartiles": "ratio_quartiles",
                "fewer multiplications": "multiplications",
                "share": "share",
                "at least": "least",
                "": "holds",
            },
        )
    }

## Start-up

Wall seconds of a fresh process, medians of 7; less than {STARTUP_SECONDS}.

{table(starts, {"": "what", "seconds": "seconds", " ": "holds"})}
"""


def _when(rows: list[Row]) -> str:
    days = sorted({row["date"] for row in rows})
    return " to ".join(dict.fromkeys([days[0], days[-1]]))


def _where(rows: list[Row]) -> str:
    """What they ran on, in words; rows of before it was recorded don't say."""
    return "; ".join(sorted({row.get("machine", "a machine of 2 cores") for row in rows}))


def _threads(steps: list[Row]) -> Any:
    return steps[0]["threads"] if steps else "?"


def _rounds(steps: list[Row]) -> Any:
    return steps[0]["rounds"] if steps else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join((*SCRIPTS, "startup", "header")))
    chosen = parser.parse_args().only.split(",")
    old = [json.loads(line) for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []
    made: list[Row] = []
    for name in chosen:
        made += {"startup": startup, "header": header}.get(name, lambda name=name: run(name))()
    fresh = {row["bench"] for row in made}
    rows = [row for row in old if row["bench"] not in fresh]
    where = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    stamp = {"date": datetime.date.today().isoformat(), "machine": where}
    rows += [{**row, **stamp} for row in made]
    write_atomically(LEDGER, "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_atomically(PAGE, page(rows).encode())
    print(PAGE.read_text())


if __name__ == "__main__":
    main()

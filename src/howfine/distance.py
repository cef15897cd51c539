"""How far fine-tuning moved each tensor: metric closeness of Radiya-Dixit & Wang 2020.

For every tensor g, with d = after_g - before_g, all in float64:

    L1          sum|d|, also as mean|d| and as mean|d| / mean|before_g|
    angular     arccos(<before_g, after_g> / (|before_g| |after_g|)) / pi, in [0, 1]

Two references say what "far" would be: R1, the distance of before_g to a fresh random init, and
R2, the distance of two random inits. The init law is N(0, init_std), not truncated, which is what
Hugging Face draws BERT from (the original TensorFlow code truncates at two standard deviations).

The arccos of a cosine near 1 loses half of all digits. By Lagrange's identity, with a = before_g,
b = after_g and c the shorter of b and d (both are equally far from the line through a),

    angle = atan2(sqrt(c·c - (a·c)²/(a·a)), a·b/|a|)

whose error is at worst about 1e-8 |c|/|b| radians, far below the angle of any step but a pure
rescaling. Everything is summed over chunks; no tensor is ever held whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from howfine.align import Place, align, is_matrix
from howfine.checkpoint import Array, Source
from howfine.errors import BaseError, SettingError, near

# Entries summed at a time: they stay in a core's cache, and are too few (OpenBLAS: 10 000) for a
# dot product to be split over threads, which is slower here and rounds by the number of cores.
_BLOCK = 8192
_NO_LAW = ("norm", "bias")  # parts that start at a constant, so a random init says nothing
ORDER = ("QKV", "Q", "K", "V", "QP", "KP", "D", "G", "I", "O")  # a block's matrices, in to out


@dataclass
class Sums:
    """What one pair of tensors adds up to, in float64 (a: before, b: after, d = b - a)."""

    count: int = 0  # entries
    changed: int = 0  # entries with a != b (0.0 equals -0.0)
    l1: float = 0.0  # sum |d|
    abs_a: float = 0.0  # sum |a|
    aa: float = 0.0  # a·a
    bb: float = 0.0  # b·b
    dd: float = 0.0  # d·d
    ab: float = 0.0  # a·b
    ad: float = 0.0  # a·d

    def add(self, a: Array, b: Array) -> None:
        """Adds one pair of 1-D chunks. Raises SettingError if their lengths differ."""
        if a.shape != b.shape:
            raise SettingError(
                f"chunks to compare have shapes {a.shape} and {b.shape}, expected equal ones. "
                "Read both tensors with the same number of entries per chunk."
            )
        for start in range(0, a.size, _BLOCK):
            block_a = a[start : start + _BLOCK].astype(np.float64)
            block_b = b[start : start + _BLOCK].astype(np.float64)
            d = block_b - block_a
            self.aa += float(block_a @ block_a)
            self.bb += float(block_b @ block_b)
            self.dd += float(d @ d)
            self.ab += float(block_a @ block_b)
            self.ad += float(block_a @ d)
            self.changed += int(np.count_nonzero(d))
            self.abs_a += float(np.abs(block_a, out=block_a).sum())
            self.l1 += float(np.abs(d, out=d).sum())
        self.count += a.size

    @property
    def mean_abs(self) -> float:
        """mean|d|; 0 for an empty tensor."""
        return self.l1 / max(self.count, 1)

    @property
    def relative(self) -> float:
        """mean|d| / mean|a|; 0 if nothing moved, infinite if all zeros moved."""
        if self.l1 == 0:
            return 0.0
        return self.l1 / self.abs_a if self.abs_a else math.inf

    @property
    def angle(self) -> float:
        """Angle of a and b over pi, in [0, 1]: 0.0 exactly if they are equal.

        A zero vector has no direction; its angle to any other vector is taken to be 0.5, as if
        the two had nothing in common.
        """
        if self.dd == 0:
            return 0.0
        if self.aa == 0 or self.bb == 0:
            return 0.5
        cc, ac = min((self.dd, self.ad), (self.bb, self.ab))
        across = math.sqrt(max(cc - ac * ac / self.aa, 0.0))
        return math.atan2(across, self.ab / math.sqrt(self.aa)) / math.pi


def measure(chunks_a: Iterable[Array], chunks_b: Iterable[Array]) -> Sums:
    """The sums over two tensors given as equally cut 1-D chunks of any float type.

    Raises SettingError where the chunks, or their numbers, don't agree.
    """
    sums = Sums()
    for a, b in itertools.zip_longest(chunks_a, chunks_b, fillvalue=np.empty(0)):
        sums.add(a, b)
    return sums


@dataclass(frozen=True)
class Distance:
    """How far one tensor moved. The references are None for parts without a random init law."""

    path: str  # parameter path inside the tower
    layer: int | None
    part: str
    count: int  # entries
    l1: float  # sum |d|
    mean_abs: float  # l1 / count
    relative: float  # mean|d| / mean|before|, as Sums.relative
    angle: float  # angle / pi in [0, 1], as Sums.angle
    changed: float  # share of entries that differ at all
    reference_mean_abs: float | None = None  # R1: before against a fresh random init
    reference_angle: float | None = None
    random_mean_abs: float | None = None  # R2: two random inits
    random_angle: float | None = None


def distance(
    before: Source,
    after: Source,
    *,
    place: Place,
    init_std: float = 0.02,
    seed: int = 0,
    references: bool = True,
) -> list[Distance]:
    """One row for every tensor that both checkpoints have, in path order (see `align`).

    `place` maps a path inside the tower to (layer, part). Matrices get the references R1 and R2,
    drawn from N(0, init_std) by a generator that depends on `seed` and the path only. Mind that a
    checkpoint stored in bfloat16 differs from its float32 original by rounding alone: entries by
    up to 0.4 %, the whole by an angle of about 5e-4.

    Raises BaseError as `align` does and for NaN or infinite weights, SettingError for an
    `init_std` or `seed` out of range.
    """
    if not (0 < init_std < math.inf and seed >= 0):
        raise SettingError(
            f"init_std {init_std!r}, seed {seed!r}: expected a positive standard deviation (BERT's "
            "is 0.02) and a seed of at least 0."
        )
    rows = []
    for path, name_before, name_after in align(before, after, place).common:
        layer, part = place(path)
        chunks = before.chunks(name_before), after.chunks(name_after)
        law = references and part not in _NO_LAW and len(before.shape(name_before)) >= 2
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is reported just below
            sums = _with_references(*chunks, path, init_std, seed) if law else [measure(*chunks)]
        rows.append(_row(path, layer, part, *sums))
    return rows


class Table(NamedTuple):
    """Values of the blocks' matrices: values[i][j] is for layers[i] and parts[j]."""

    layers: list[int]
    parts: list[str]
    values: list[list[float | None]]


def table(rows: Iterable[Distance], value: str = "relative") -> Table:
    """The heatmap of one column of Distance, layer × matrix type; None where there is no matrix.

    Raises SettingError for a column that holds no numbers, for rows without block matrices, or
    where two rows share a cell.
    """
    columns = [field.name for field in dataclasses.fields(Distance)][3:]
    if value not in columns:
        raise SettingError(f"no column {value!r} in a distance table. {near(value, columns)}")
    cells: dict[tuple[int | None, str], Distance] = {}
    for row in _matrices(rows):
        first = cells.setdefault((row.layer, row.part), row)
        if first is not row:
            raise SettingError(
                f"{first.path} and {row.path} are both placed at layer {row.layer}, part "
                f"{row.part}; expected one matrix there. Give the second a letter of its own."
            )
    layers = sorted({row.layer for row in cells.values() if row.layer is not None})
    known = {part: index for index, part in enumerate(ORDER)}
    parts = sorted({part for _, part in cells}, key=lambda part: (known.get(part, 99), part))
    values = [[getattr(cells.get((i, j)), value, None) for j in parts] for i in layers]
    return Table(layers, parts, values)


@dataclass(frozen=True)
class Summary:
    """What a distance table comes to, over the blocks' matrices."""

    matrices: int
    unmoved: int  # matrices that are equal to the base
    largest: Distance  # by relative
    smallest: Distance
    spread: float  # largest.relative / smallest.relative; inf if only the smallest is 0, 1 if both
    mean_abs_to_reference: float | None  # largest mean_abs / reference_mean_abs
    angle_to_reference: float | None  # largest angle / reference_angle
    changed: float  # share of all rows' entries (of every part) that differ at all


def summary(rows: Sequence[Distance]) -> Summary:
    """Summary of a distance table. Raises SettingError for rows without block matrices."""
    matrices = _matrices(rows)
    largest = max(matrices, key=lambda row: row.relative)
    smallest = min(matrices, key=lambda row: row.relative)
    if smallest.relative:
        spread = largest.relative / smallest.relative
    else:
        spread = math.inf if largest.relative else 1.0
    to_reference = [
        (row.mean_abs / row.reference_mean_abs, row.angle / row.reference_angle)
        for row in matrices
        if row.reference_mean_abs and row.reference_angle
    ]
    return Summary(
        matrices=len(matrices),
        unmoved=sum(row.changed == 0 for row in matrices),
        largest=largest,
        smallest=smallest,
        spread=spread,
        mean_abs_to_reference=max((ratio for ratio, _ in to_reference), default=None),
        angle_to_reference=max((ratio for _, ratio in to_reference), default=None),
        changed=sum(row.changed * row.count for row in rows)
        / max(sum(row.count for row in rows), 1),
    )


def _matrices(rows: Iterable[Distance]) -> list[Distance]:
    matrices = [row for row in rows if is_matrix(row.layer, row.part)]
    if not matrices:
        raise SettingError(
            "no row is a matrix of a block (layer and part letter); found only norms, biases and "
            "parts outside the blocks. Use the anatomy of the model's own architecture."
        )
    return matrices


def _with_references(
    chunks_a: Iterable[Array], chunks_b: Iterable[Array], path: str, init_std: float, seed: int
) -> list[Sums]:
    """The sums of (a, b), of R1 and of R2, in one pass over the files."""
    seeds = np.random.SeedSequence([seed, *path.encode()]).spawn(2)
    first, second = (np.random.default_rng(one) for one in seeds)
    moved, reference, random = Sums(), Sums(), Sums()
    for a, b in itertools.zip_longest(chunks_a, chunks_b, fillvalue=np.empty(0)):
        moved.add(a, b)
        x = first.standard_normal(a.size, dtype=np.float32) * np.float32(init_std)
        y = second.standard_normal(a.size, dtype=np.float32) * np.float32(init_std)
        reference.add(a, x)
        random.add(x, y)
    return [moved, reference, random]


def _row(
    path: str,
    layer: int | None,
    part: str,
    moved: Sums,
    reference: Sums | None = None,
    random: Sums | None = None,
) -> Distance:
    if not math.isfinite(moved.aa + moved.dd):
        where = "after" if math.isfinite(moved.aa) else "before"
        raise BaseError(
            f"{path}: the checkpoint {where} has NaN or infinite entries, expected finite "
            "weights. Its training diverged, or the file is damaged: use an earlier checkpoint."
        )
    return Distance(
        path=path,
        layer=layer,
        part=part,
        count=moved.count,
        l1=moved.l1,
        mean_abs=moved.mean_abs,
        relative=moved.relative,
        angle=moved.angle,
        changed=moved.changed / max(moved.count, 1),
        reference_mean_abs=reference.mean_abs if reference else None,
        reference_angle=reference.angle if reference else None,
        random_mean_abs=random.mean_abs if random else None,
        random_angle=random.angle if random else None,
    )

"""What a model is made of, by path: layers, parts, and selectors that name some of them.

A path is a parameter's name inside its tower. `part` letters are the source paper's (Radiya-Dixit
& Wang 2020): Q, K, V and D (attention output) of the attention, I and O (in and out) of the
feed-forward net; G is the gate of gated feed-forward nets, QKV a fused projection, and QP, KP the
position projections of DeBERTa.

A selector is `part` or `part@layers`: a part is a letter, `matrices` (all letters), `all`,
`none`, `norm`, `bias`, `embedding`, `pooler`, `other`, or a glob on the path (it holds a `*` or a
`.`); layers are a comma-separated list of indices and ranges, negative ones counted from the top:
`all@-2,-1`, `K`, `matrices@0-3`, `bias@5`.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from howfine.errors import SettingError, near

# LayerNorm, layer_norm, norm1, q_norm, ln_1, ln_f …: how the libraries spell a normalisation.
_NORM = re.compile(r"norm|(^|\.)ln_", re.IGNORECASE)


@dataclass(frozen=True)
class Anatomy:
    """Where an architecture keeps its parts. Paths are relative to the tower's module."""

    block: str  # path of block i, with {} for i
    letters: dict[str, str]  # part letter -> path of the matrix's module in a block ("a|b": either)
    embedding: str  # path of the word (or patch) embedding module
    pooler: str = ""  # path of the pooler's module, "" where there is none
    pooling: str = "cls"  # cls | mean | last | pooler: how the architecture's own head reads
    linear_axes: tuple[str, str] = ("out", "in")  # stored axes of a block's matrices
    heads: str = "num_attention_heads"  # config field: number of attention heads
    # Whether attention is a softmax to whose scores a mask is added, and positions are numbered in
    # the input alone.
    plain_attention: bool = True
    # Module of a block whose output is the feed-forward net's, before the residual is added.
    feed_forward: str = ""
    # Steps from the last hidden state to what a language model's decoder reads: modules of the
    # model with that head, or "gelu". None where there is no such model.
    language: tuple[str, ...] | None = None

    def place(self, path: str) -> tuple[int | None, str]:
        """(layer, part) of a parameter path: layer None outside the blocks, part as above."""
        head, _, kind = path.rpartition(".")
        match = _block_pattern(self.block).match(path)
        layer = int(match.group(1)) if match else None
        if _NORM.search(head):
            return layer, "norm"
        if kind == "bias":
            return layer, "bias"
        inside = head[match.end() :] if match else ""
        for letter, module in self.letters.items():
            if match and inside in module.split("|"):
                return layer, letter
        if not match and head == self.embedding:
            return layer, "embedding"
        if not match and self.pooler and head == self.pooler:
            return layer, "pooler"
        return layer, "other"

    def depth(self, paths: Iterable[str]) -> int:
        """Number of blocks that hold parameters."""
        layers = [layer for layer, _ in map(self.place, paths) if layer is not None]
        return max(layers, default=-1) + 1

    def choose(self, paths: Iterable[str], selectors: Iterable[str]) -> list[str]:
        """The paths that any of the selectors names, in their own order.

        Raises SettingError for a selector that is malformed or names nothing.
        """
        paths = list(paths)
        depth = self.depth(paths)
        chosen: set[str] = set()
        for selector in selectors:
            named = [path for path in paths if self._names(selector, path, depth)]
            if not named and selector != "none":
                part = selector.partition("@")[0]
                present = {own for _, own in map(self.place, paths)} | {"all", "none"}
                if not present.isdisjoint(self.letters):
                    present.add("matrices")
                raise SettingError(
                    f"selector {selector!r} names nothing in this base ({depth} layers). "
                    + near(part, present - {part})
                )
            chosen.update(named)
        return [path for path in paths if path in chosen]

    def _names(self, selector: str, path: str, depth: int) -> bool:
        part, at, where = selector.partition("@")
        if at and not where:
            raise SettingError(f"selector {selector!r}: expected layers after '@', such as K@0-3")
        layer, own = self.place(path)
        if where and (layer is None or layer not in parse_layers(where, depth)):
            return False
        if part == "all":
            return True
        if part == "matrices":
            return own in self.letters
        if part == "bias":  # a LayerNorm's bias is both: a norm, and one of BitFit's biases
            return path.endswith(".bias")
        if "*" in part or "." in part:
            return fnmatch.fnmatchcase(path, part)
        return own == part


@functools.lru_cache
def _block_pattern(block: str) -> re.Pattern[str]:
    return re.compile(re.escape(block).replace(r"\{\}", r"(\d+)") + r"\.")


def parse_layers(text: str, depth: int) -> set[int]:
    """'0,2-4,-1' as a set of layer indices below `depth`; raises SettingError otherwise."""
    layers: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", item)
        if not match:
            raise SettingError(
                f"layers {text!r}: found {item!r}, expected indices and ranges such as '0,2-4,-1'"
            )
        first, last = (int(g) if g is not None else None for g in match.groups())
        assert first is not None
        start = first + depth if first < 0 else first
        stop = start if last is None else (last + depth if last < 0 else last)
        if not 0 <= start <= stop < depth:
            raise SettingError(
                f"layers {text!r}: {item.strip()!r} is outside the base's {depth} layers "
                f"(0 to {depth - 1}, or -{depth} to -1)"
            )
        layers.update(range(start, stop + 1))
    return layers

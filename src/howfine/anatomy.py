"""What a model is made of, by path: layers, parts, and selectors that name some of them.

A path is a parameter's name inside its tower. `part` letters are the source paper's (Radiya-Dixit
& Wang 2020): Q, K, V and D (attention output) of the attention, I and O (in and out) of the
feed-forward net; G is the gate of gated feed-forward nets, QKV a fused projection, and QP, KP the
position projections of DeBERTa. CQ, CK, CV and CD are those of a decoder's attention to what the
encoder gives it (cross-attention).

A whole encoder-decoder has two stacks, whose layers count on: with E of the encoder and D of the
decoder, 0 to E-1 are the encoder's, E to E+D-1 the decoder's, and -1 is the decoder's top.

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


# Part whose inputs are a layer's heads or neurons, side by side -> parts whose outputs they are.
FEEDS = {"D": ("Q", "K", "V", "QKV"), "CD": ("CQ", "CK", "CV"), "O": ("I", "G")}


@dataclass(frozen=True)
class Anatomy:
    """Where an architecture keeps its parts. Paths are relative to the tower's module."""

    block: str  # path of block i, with {} for i
    letters: dict[str, str]  # part letter -> path of the matrix's module in a block ("a|b": either)
    # Path of the word (or patch) embedding module; "a|b": others hold its table too, or one alike.
    embedding: str
    pooler: str = ""  # path of the pooler's module, "" where there is none
    pooling: str = "cls"  # cls | mean | last | pooler: how the architecture's own head reads
    linear_axes: tuple[str, str] = ("out", "in")  # stored axes of a block's matrices
    heads: str = "num_attention_heads"  # config field: number of attention heads
    # Whether attention is a softmax to whose scores a mask is added, and positions are numbered in
    # the input alone.
    plain_attention: bool = True
    # Module of a block whose output is the feed-forward net's, before the residual is added.
    feed_forward: str = ""
    # What lies ahead of a LayerNorm of a block, of its attention's and of its feed-forward net's:
    # "before:" the LayerNorm itself where it reads a branch's input (pre-LN), "after:" the module
    # that gives a branch's output, before the residual is added, where it reads the sum (post-LN).
    branches: tuple[str, ...] = ()
    # Steps from the last hidden state to what a language model's decoder reads: modules of the
    # model with that head, or "gelu". None where there is no such model.
    language: tuple[str, ...] | None = None
    # Module of tables that transformers computes itself: a checkpoint may lack them.
    computed: str = ""
    # The second stack of a whole encoder-decoder, and the config field: blocks of the first one.
    decoder: Anatomy | None = None
    layers: str = ""
    # Of each of two stacks: path of its module, and the number of its first block.
    stack: str = ""
    first: int = 0

    @property
    def stacks(self) -> tuple[Anatomy, ...]:
        """The stacks of blocks, from the bottom: this one, and a whole encoder-decoder's other."""
        return (self, self.decoder) if self.decoder else (self,)

    @property
    def matrices(self) -> set[str]:
        """Letters of all stacks."""
        return {letter for stack in self.stacks for letter in stack.letters}

    def stack_of(self, layer: int) -> Anatomy:
        """The stack that a layer belongs to."""
        return [stack for stack in self.stacks if stack.first <= layer][-1]

    def block_path(self, layer: int) -> str:
        """Path of a layer's block."""
        stack = self.stack_of(layer)
        return stack.block.format(layer - stack.first)

    def attentions(self, depth: int) -> list[tuple[str, list[str]]]:
        """(path of a stack, paths of its attention modules, bottom first), for each kind.

        The kinds are the stacks' self-attentions, then a decoder's cross-attentions.
        """
        found = []
        for stack in self.stacks:
            layers = [layer for layer in range(depth) if self.stack_of(layer) is stack]
            for query in filter(stack.letters.get, ("Q", "QKV", "CQ")):
                inside = stack.letters[query].rpartition(".")[0]
                paths = [f"{self.block_path(layer)}.{inside}" for layer in layers]
                found.append((stack.stack, paths))
        return found

    def place(self, path: str) -> tuple[int | None, str]:
        """(layer, part) of a parameter path: layer None outside the blocks, part as above."""
        head, _, kind = path.rpartition(".")
        stack, match = self, _block_pattern(self.block).match(path)
        if not match and self.decoder:
            stack, match = self.decoder, _block_pattern(self.decoder.block).match(path)
        layer = stack.first + int(match.group(1)) if match else None
        if _NORM.search(head):
            return layer, "norm"
        if kind == "bias":
            return layer, "bias"
        inside = head[match.end() :] if match else ""
        for letter, module in stack.letters.items():
            if match and inside in module.split("|"):
                return layer, letter
        if not match and head in self.embedding.split("|"):
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

        Raises SettingError for a selector that is malformed or names nothing; `bias` may name
        nothing beside others, as LLaMA's and T5's matrices and norms have none.
        """
        paths = list(paths)
        depth = self.depth(paths)
        chosen: set[str] = set()
        # In the end, when it is known whether it stands alone.
        for selector in sorted(selectors, key="bias".__eq__):
            named = [path for path in paths if self._names(selector, path, depth)]
            if not named and selector != "none" and not (selector == "bias" and chosen):
                part = selector.partition("@")[0]
                present = {own for _, own in map(self.place, paths)} | {"all", "none"}
                if not present.isdisjoint(self.matrices):
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
            return own in self.matrices
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

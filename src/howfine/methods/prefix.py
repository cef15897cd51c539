"""Free keys and values in front of every layer's attention; nothing else changes.

Li & Liang 2021, "Prefix-tuning: Optimizing continuous prompts for generation": p positions that
every position attends to, in training made by a small net, P = W_2·tanh(W_1·P' + b_1) + b_2, of
which the result alone is stored. Positions of the text start at p.

A whole encoder-decoder has three nets: of the encoder's attentions, of the decoder's, and of its
attentions to what the encoder gives it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from howfine import attention, language, surgery
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.codec import rounded
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Method, Probe, Tensors
from howfine.reparametrisation import Net, Nets, Rows
from howfine.tokens import ahead, later, numbered, window
from howfine.worn import later as put_later
from howfine.worn import stacked

_HELD = "howfine_prefix"
_Source = Net | Nets | Rows


@dataclass(frozen=True)
class _Kind:
    """Attentions that share a net: where they run, how many, and the shape of their keys."""

    stack: str  # path of the module in the base's body that runs them
    count: int
    heads: int
    width: int

    @property
    def numbers(self) -> int:
        """Numbers of a position: a key and a value in each."""
        return 2 * self.count * self.heads * self.width

    def parts(self, rows: Tensor) -> Tensor:
        """(…, p, numbers) as (2·count, …, heads, p, width): each one's keys, then its values."""
        split = rows.unflatten(-1, (2 * self.count, self.heads, self.width))
        return split.movedim(-3, 0).transpose(-3, -2)


@dataclass(frozen=True)
class Prefix(Method):
    """How many positions, how they are made in training, and what they begin as."""

    starts_at_base: ClassVar[bool] = False
    start: ClassVar[Any] = "own"
    meaning: ClassVar[tuple[str, ...]] = ("length", "shift", "place")

    # Positions in front. With init_text 0: as many as it has tokens.
    length: int = 10
    # Width of the net's hidden layer; 0 trains keys and values themselves.
    hidden: int = 512
    # Words whose keys and values it begins as; "" for random ones.
    init_text: str = ""
    # Whether positions of the text start after the prefix, where positions are numbered.
    shift: bool = True
    # In front of all, or added at the free slots of the readout's template (the paper's infix),
    # which then say how many there are.
    place: Literal["front", "slots"] = "front"

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.length < (0 if self.init_text else 1):
            raise SettingError(
                f"prefix: found length {self.length} and hidden {self.hidden}, expected at least 1 "
                "and 0 (a length of 0 goes with an init_text)"
            )
        if self.init_text and self.place == "slots":
            raise SettingError("prefix init_text: words stand in front; leave out place='slots'")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        if base.tower_name != "text":
            raise SettingError(f"prefix: {base.name} reads no tokens; give a text base")
        if self.init_text and base.anatomy.decoder is not None:
            raise SettingError(
                f"prefix init_text {self.init_text!r}: {base.name} is a whole encoder-decoder, "
                "whose prefix begins at random as the authors' does; leave init_text out"
            )
        if probe is not None and probe.begun:
            return self._put_on(base, self._earlier(probe))
        target = self._words(base) if self.init_text else None
        length = self._positions(probe) if target is None else len(target)
        sizes = [kind.numbers for kind in _kinds(base)]
        if not self.hidden:
            rows = torch.randn(length, sum(sizes)) if target is None else target
            return self._put_on(base, rows)
        nets = [Net(length, self.hidden, base.hidden_size, size) for size in sizes]
        if target is not None:
            nets[0].fit(target.cpu())
        return self._put_on(base, nets[0] if len(nets) == 1 else Nets(nets))

    def _positions(self, probe: Probe | None) -> int:
        """How many there are: as many as slots, where they stand at those."""
        if self.place == "front":
            return self.length
        if probe is None or not probe.slots:
            raise SettingError(
                "prefix place 'slots': the readout's inputs have no free slots; give a template "
                "with {slot}"
            )
        return len(probe.slots)

    def _check_place(self, base: Base) -> None:
        if self.place == "front":
            return
        if base.anatomy.decoder is not None or window(base):
            found = "layers with a sliding window" if window(base) else "two stacks"
            raise SettingError(
                f"prefix place 'slots': found {found} in {base.name}, expected one stack whose "
                "layers see everything; use place='front'"
            )

    def _earlier(self, probe: Probe) -> Tensor:
        """Keys and values of an earlier delta, which train themselves: no net is stored."""
        if self.hidden:
            raise SettingError(
                "prefix: a delta holds keys and values and not the net that made them; set "
                "hidden=0 to go on from one"
            )
        found, slots = probe.begun["keys_values"], len(probe.slots)
        if self.place == "slots" and len(found) != slots:
            raise SettingError(
                f"prefix: the delta to start from has {len(found)} positions, and this template "
                f"{slots} slots; use one with as many"
            )
        return found.clone()

    def _words(self, base: Base) -> Tensor:
        """(p, numbers): keys and values of the words, p being their tokens or `length`."""
        ids = language.pieces(base, self.init_text)
        length = self.length or len(ids)
        if not 0 < length <= len(ids):
            raise SettingError(
                f"prefix init_text {self.init_text!r} has {len(ids)} tokens, and length is "
                f"{self.length}; expected as many at most"
            )
        if length >= base.room:
            raise SettingError(
                f"prefix init_text: its first {length} tokens leave no room for a text "
                f"({base.room_said}); set a smaller length"
            )
        found = attention.recorded(base, torch.tensor(ids[:length]), once=True)
        both = torch.stack([part for pair in found for part in pair])  # (2n, heads, p, width)
        return both.permute(2, 0, 1, 3).flatten(1).float()

    def _put_on(self, base: Base, made: Net | Nets | Tensor, trains: bool = True) -> Change:
        self._check_place(base)
        kinds = _kinds(base)
        net = Rows(made, [k.numbers for k in kinds]) if isinstance(made, Tensor) else made
        net = net.to(base.device).requires_grad_(trains)
        with all_or_nothing() as undo:
            fronts, off = attention.put_on(base)
            undo.append(off)
            undo.append(surgery.hold(base.body, _HELD, net))
            # Each stack by itself: a generation runs the encoder once and the decoder many times.
            for stack, own in itertools.groupby(_shared(kinds, fronts), lambda one: one[1].stack):
                renew = functools.partial(_renew, net, list(own), self.place == "slots")
                undo.append(ahead(base.body.get_submodule(stack), renew))
            undo.append(later(base, net.length if self._shifts else 0))
            return Change(dict(net.named_parameters()), undo, parts={"net": net})

    def pack(self, base: Base, change: Change) -> Tensors:
        with torch.no_grad():
            return {"keys_values": change.parts["net"]().detach().clone()}

    def stored(self, change: Change, store: str) -> Tensors:
        net: _Source = change.parts["net"]
        if not isinstance(net, Rows):  # what is stored is not what trains
            return {}
        return {"rows": rounded(net.rows.detach(), store).to(net.rows.device)}

    def groups(self, change: Change) -> list[dict[str, Any]]:
        return [{"params": list(change.trainable.values()), "weight_decay": 0.0}]

    def learning_rate(self, steps: int) -> float:
        # The paper's 5e-5 is for sums over a target's tokens and five to thirty epochs.
        return 1e-3

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        numbers = sum(kind.numbers for kind in _kinds(base))
        found = tensors.get("keys_values", torch.zeros(0))
        fits = len(tensors) == 1 and not found.is_sparse and found.is_floating_point()
        if not fits or found.ndim != 2 or not len(found) or found.shape[1] != numbers:
            shapes = {name: tuple(value.shape) for name, value in tensors.items()}
            raise DamagedDelta(
                f"prefix: found {shapes}, expected keys_values of rows of {numbers} numbers; the "
                "file is damaged, or made for another model"
            )
        return self._put_on(base, found, trains=False)

    @property
    def _shifts(self) -> bool:
        return self.shift and self.place == "front"

    def takes(self, base: Base, tensors: Tensors) -> int:
        return len(tensors["keys_values"]) if self._shifts and numbered(base) else 0

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Prefix, Tensors]], count: int
    ) -> Change | None:
        if any(method.place == "slots" for method, _ in worn.values()):
            return None
        rows = {row: tensors["keys_values"] for row, (_, tensors) in worn.items()}
        table = stacked(rows, count, next(iter(rows.values()))).to(base.device)
        visible = torch.zeros(table.shape[:2], dtype=torch.bool, device=base.device)
        for row, own in rows.items():
            visible[row, : len(own)] = True
        kinds = _kinds(base)
        starts = {row: method.takes(base, tensors) for row, (method, tensors) in worn.items()}
        with all_or_nothing() as undo:
            fronts, off = attention.put_on(base)
            undo.append(off)
            tables = table.split([kind.numbers for kind in kinds], dim=-1)
            for number, kind, shared in _shared(kinds, fronts):
                _fill(shared, kind.parts(tables[number]))
                for front in shared:
                    front.visible = visible
            undo.append(put_later(base, starts, count))
            return Change({}, undo)


def _kinds(base: Base) -> list[_Kind]:
    """The base's kinds of attention, each of one shape. Raises SettingError where shapes differ."""
    token = base.embedding.num_embeddings - 1
    found = iter(attention.recorded(base, torch.tensor([token])))
    kinds = []
    for stack, paths in base.anatomy.attentions(base.depth):
        shapes = {tuple(keys.shape[::2]) for keys, _ in itertools.islice(found, len(paths))}
        if len(shapes) != 1:
            raise SettingError(
                f"{base.name} has keys of {len(shapes)} shapes in its layers, and a prefix is of "
                "one; give another base"
            )
        kinds.append(_Kind(stack, len(paths), *map(int, shapes.pop())))
    return kinds


def _shared(
    kinds: list[_Kind], fronts: list[attention.Front]
) -> Iterator[tuple[int, _Kind, list[attention.Front]]]:
    """(number, kind, its fronts), of all fronts in the order of their attentions."""
    every = iter(fronts)
    for number, kind in enumerate(kinds):
        yield number, kind, list(itertools.islice(every, kind.count))


def _renew(
    net: _Source, kinds: list[tuple[int, _Kind, list[attention.Front]]], at_slots: bool
) -> None:
    slots = attention.slots_for(net.length) if at_slots else None
    for number, kind, fronts in kinds:
        _fill(fronts, kind.parts(net.of(number)))
        for front in fronts:
            front.slots = slots


def _fill(fronts: list[attention.Front], parts: Tensor) -> None:
    """Keys and values of each front in turn."""
    for front, keys, values in zip(fronts, parts[::2], parts[1::2], strict=True):
        front.keys, front.values = keys, values


EXAMPLE = Prefix(length=3, hidden=8)

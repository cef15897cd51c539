"""Operands: what deltas on one base change of it, entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from howfine import gates, plugins
from howfine.base import Base
from howfine.delta import Delta
from howfine.entries import filled, flat_entries
from howfine.errors import DeltaError, SettingError, WrongBase
from howfine.method import Method, Tensors
from howfine.regions import Region, differs
from howfine.streams import Stream

_DIGITS = 64  # hexadecimal, of a SHA-256

# What a method packed: new values of entries, of whole tensors, what is kept of the weights, or
# nothing where the head is all that was trained.
Kind = Literal["entries", "tensors", "masks", "nothing"]


@dataclass(frozen=True)
class Operand:
    """A delta as new values of the base's entries."""

    # What messages call it.
    name: str
    delta: Delta
    kind: Kind
    # What its method packed, at paths of the base.
    tensors: Tensors

    @property
    def streams(self) -> list[Stream]:
        """The streams of its change, without its head's."""
        return [s for s in self.delta.streams if s.name.startswith("method/")]

    def changed(self, base: Base, path: str) -> Tensor | None:
        """Which entries of a parameter it changes: bool, row-major (n,). None for none.

        Those whose value differs from the base's: see `regions.differs`.
        """
        if path not in self.tensors:
            return None
        found = differs(self.values(base, path), base.original(path).flatten().cpu())
        return found if found.any() else None

    def idle(self, base: Base, path: str) -> Tensor | None:
        """Which entries of a parameter it lists with the base's own value, as `changed`."""
        tensor = self.tensors.get(path)
        if tensor is None or not tensor.is_sparse:
            return None
        found = self.listed(path) & ~differs(
            self.values(base, path), base.original(path).flatten().cpu()
        )
        return found if found.any() else None

    def listed(self, path: str) -> Tensor:
        """Which entries of a parameter its sparse tensor has, changed or not: bool (n,)."""
        found = torch.zeros(self.tensors[path].numel(), dtype=torch.bool)
        found[flat_entries(self.tensors[path])[0]] = True
        return found

    def region(self, base: Base) -> Region:
        """All entries that it changes, row-major (n,) by path."""
        found = {path: self.changed(base, path) for path in base.paths()}
        return {path: mask for path, mask in found.items() if mask is not None}

    def values(self, base: Base, path: str) -> Tensor:
        """The float32 values (n,) of a parameter while the delta is on."""
        tensor = self.tensors[path]
        if tensor.dtype == torch.bool:
            return gates.drop(base.original(path).float().cpu(), tensor).flatten()
        return filled(base.original(path), tensor)


def flat(tensor: Tensor) -> Tensor:
    """Values of entries, or of a whole tensor, in row-major order (n,)."""
    return flat_entries(tensor)[1] if tensor.is_sparse else tensor.flatten()


def operands(deltas: Sequence[Delta | str | Path], base: Base | None) -> tuple[Base, list[Operand]]:
    """The base, loaded if none is given, and the deltas on it.

    Raises SettingError for none, and for a base in half precision, WrongBase where the bases
    differ, DeltaError for a delta whose change is not made of new values of the base's weights, and
    for NaN.
    """
    if not deltas:
        raise SettingError("no delta was given; give one or more")
    opened = [d if isinstance(d, Delta) else Delta.load(d) for d in deltas]
    names = [
        f"delta {number}" if isinstance(delta, Delta) else str(delta)
        for number, delta in enumerate(deltas, 1)
    ]
    first = opened[0]
    for name, delta in zip(names, opened, strict=True):
        alike = same_base(delta.base_fingerprint, first.base_fingerprint)
        if not alike or delta.base_kind != first.base_kind:
            raise WrongBase(
                f"{names[0]} was made on {first.base_name} ({first.base_fingerprint[:12]}…), "
                f"{name} on {delta.base_name} ({delta.base_fingerprint[:12]}…); only changes of "
                "one base can be composed"
            )
    if base is None:
        base = Base.load(first.base_name, kind=first.base_kind)
    base.check_exact("composing deltas")
    return base, [_operand(*each, base) for each in zip(names, opened, strict=True)]


def same_base(one: str, other: str) -> bool:
    """Whether fingerprints agree as far as both go: a folded file holds half of a base's.

    Of other lengths than a whole one (64 digits) and a half none agrees with any.
    """
    shorter, longer = sorted((one, other), key=len)
    known = {len(shorter), len(longer)} <= {_DIGITS // 2, _DIGITS}
    return known and longer.startswith(shorter)


def _operand(name: str, delta: Delta, base: Base) -> Operand:
    tensors, head = delta.tensors(base)
    for path, tensor in [*tensors.items(), *head.items()]:
        values = flat(tensor)
        if values.is_floating_point() and not values.isfinite().all():
            raise DeltaError(
                f"{name}: {path} holds NaN or infinity; its training diverged: tune it again with "
                "a lower learning_rate"
            )
    kinds = {_kind(path, tensor, base) for path, tensor in tensors.items()}
    if "other" in kinds or ("masks" in kinds and len(kinds) > 1):
        made_by = plugins.name_of("methods", Method, delta.method)
        raise DeltaError(
            f"{name} was made by the method {made_by!r}, whose file does not hold new values of "
            "the base's weights: which entries it changes is undefined, and so are unions, "
            "differences and sums. Compose deltas of entries or of tensors"
        )
    kind: Kind = "nothing"
    for each in ("masks", "entries", "tensors"):
        if each in kinds:
            kind = each
    return Operand(name, delta, kind, tensors)


def _kind(path: str, tensor: Tensor, base: Base) -> str:
    if path not in set(base.paths()):
        return "other"
    if tensor.dtype == torch.bool:
        return "masks"
    if tensor.shape != base.parameter(path).shape:
        return "other"
    return "entries" if tensor.is_sparse else "tensors"

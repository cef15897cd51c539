"""Delta: the stored change. One safetensors file, described in docs/format.md.

The file is streams (what `codec` makes of tensors, joined by coding), an index of them, and one
short JSON header. Nothing in it is code. A stream is decoded only against the base it was made on,
whose sizes bound what may be allocated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from howfine import container, plugins
from howfine.base import Base
from howfine.change import Change
from howfine.codec import (
    PRECISIONS,
    Coded,
    decode_places,
    decode_values,
    encode_places,
    encode_values,
)
from howfine.errors import DamagedDelta, SettingError, WrongBase, near
from howfine.method import Method, Tensors, methods
from howfine.readout import Head, Labels, Readout, Wired, readouts

SUFFIX = ".delta.safetensors"
# Places of one stream that are counted without a base to check them against.
MOST_PLACES = 2**31
# What the header's score lists, in this order.
SCORE = ("metric", "value", "interval", "on", "n")


@dataclass(frozen=True)
class Stream:
    """One coded tensor: its name, its shape, and whether it is a difference from the base."""

    name: str  # "method/<path>" or "readout/<name>"
    shape: tuple[int, ...]
    coded: Coded
    difference: bool = False

    @property
    def count(self) -> int:
        """Number of entries."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def kept(self) -> int | None:
        """Places set, for a set of places; None for values."""
        if self.coded.coding in PRECISIONS:
            return None
        if self.coded.coding in ("none", "all"):
            return self.count if self.coded.coding == "all" else 0
        if self.count > MOST_PLACES:
            raise DamagedDelta(
                f"stream {self.name!r} declares {self.count:,} places, more than any matrix has"
            )
        return int(decode_places(self.coded, self.count).count_nonzero())


@dataclass(frozen=True)
class Delta:
    """A task-specific change, ready to be stored or applied."""

    base_name: str
    base_fingerprint: str
    method: Method
    readout: Readout
    labels: Labels
    streams: tuple[Stream, ...]
    score: dict[str, Any] = field(default_factory=dict)
    base_kind: str = "body"

    @classmethod
    def pack(
        cls,
        base: Base,
        method: Method,
        change: Change,
        readout: Readout,
        head: Head,
        labels: Labels,
        store: str = "fp32",
    ) -> Delta:
        """Pack a change and a head. `store` is the precision of stored values.

        Below fp32, a whole tensor of the base is stored as its difference from the base: the
        difference is small, so its rounding is too.
        """
        if store not in PRECISIONS:
            raise SettingError(f"store {store!r} is unknown. {near(store, PRECISIONS)}")
        readout = readout.settled(base)
        streams = [
            _encode(f"method/{path}", tensor, store, base)
            for path, tensor in method.pack(base, change).items()
        ]
        # A head is a handful of numbers: sign or int8 would cost more score than bytes.
        head_store = store if store in ("fp32", "bf16") else "fp16"
        streams += [
            _encode(f"readout/{name}", tensor, head_store, None)
            for name, tensor in readout.pack(head).items()
        ]
        return cls(
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            method=method,
            readout=readout,
            labels=labels,
            streams=tuple(streams),
            base_kind=base.kind,
        )

    def with_score(self, score: dict[str, Any]) -> Delta:
        """The same change with another score in its header."""
        return replace(self, score=score)

    def check_base(self, base: Base) -> None:
        """Raises WrongBase unless this delta was made on `base`."""
        if base.fingerprint != self.base_fingerprint:
            raise WrongBase(
                f"this delta was made on {self.base_name} (SHA-256 {self.base_fingerprint[:12]}…), "
                f"but the base given is {base.name} ({base.fingerprint[:12]}…); load the right one "
                f"with --base {self.base_name} or Base.load({self.base_name!r})"
            )

    def tensors(self, base: Base) -> tuple[Tensors, Tensors]:
        """(method's tensors, readout's tensors), decoded. Raises DamagedDelta, WrongBase."""
        self.check_base(base)
        self._check_sizes(base)
        out: dict[str, Tensors] = {"method": {}, "readout": {}}
        for stream in self.streams:
            owner, _, name = stream.name.partition("/")
            if owner not in out:
                raise DamagedDelta(f"stream {stream.name!r} belongs to neither method nor readout")
            out[owner][name] = _decode(stream, base, name)
        return out["method"], out["readout"]

    def _check_sizes(self, base: Base) -> None:
        """No method needs more entries than a few times the base's own, nor a readout."""
        limit = 4 * sum(p.numel() for p in base.towers.parameters()) + 2**20
        declared = sum(stream.count for stream in self.streams)
        if declared > limit:
            raise DamagedDelta(
                f"the delta declares {declared:,} entries, more than any change of {base.name} "
                f"needs ({limit:,}); the file is damaged"
            )

    @contextmanager
    def applied(self, base: Base) -> Iterator[Wired]:
        """The base with this change on, in evaluation mode; taken off again on leaving."""
        method_tensors, readout_tensors = self.tensors(base)
        head = self.readout.unpack(base, self.labels, readout_tensors)
        with self.method.unpack(base, method_tensors):
            yield Wired(base, self.readout, head).eval()

    def save(self, path: str | Path) -> int:
        """Write atomically; returns the file's bytes. Raises StorageError, leaving no half file."""
        return container.write(Path(path), self.header(), _groups(self.streams))

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read and check a file. Raises DeltaError's children; never runs code from the file."""
        header, groups = container.read(Path(path))
        try:
            return cls._from(header, groups)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            zlib.error,
            OverflowError,
            RecursionError,
        ) as e:
            if isinstance(e, SettingError):
                raise
            raise DamagedDelta(
                f"{path}: the header or index is malformed ({type(e).__name__}: {e}); "
                "get a fresh copy of the file"
            ) from None

    def header(self) -> dict[str, Any]:
        """What the file says of itself, as JSON types."""
        method_name = plugins.name_of("methods", Method, self.method)
        readout_name = plugins.name_of("readouts", Readout, self.readout)
        header: dict[str, Any] = {
            "base": self.base_name,
            "sha256": self.base_fingerprint,
            "method": {method_name: plugins.settings_of(self.method)},
            "readout": {readout_name: plugins.settings_of(self.readout)},
            "labels": list(self.labels),
        }
        if self.base_kind != "body":
            header["kind"] = self.base_kind
        if self.score:
            header["score"] = [self.score[key] for key in SCORE]
        return header

    @classmethod
    def _from(cls, header: dict[str, Any], groups: dict[str, bytes]) -> Delta:
        ((method_name, method_settings),) = header["method"].items()
        ((readout_name, readout_settings),) = header["readout"].items()
        return cls(
            base_name=str(header["base"]),
            base_fingerprint=str(header["sha256"]),
            method=plugins.build("method", methods(), method_name, method_settings),
            readout=plugins.build("readout", readouts(), readout_name, readout_settings),
            labels=tuple(map(str, header["labels"])),
            streams=tuple(_streams(groups)),
            score=dict(zip(SCORE, header["score"], strict=True)) if "score" in header else {},
            base_kind=str(header.get("kind", "body")),
        )


def _encode(name: str, tensor: Tensor, store: str, base: Base | None) -> Stream:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bool:
        return Stream(name, shape, encode_places(tensor))
    path = name.partition("/")[2]
    original = base.parameter(path) if base is not None and path in base.paths() else None
    if store == "fp32" or original is None or original.shape != tensor.shape:
        return Stream(name, shape, encode_values(tensor, store))
    difference = tensor.float() - original.detach().float()
    return Stream(name, shape, encode_values(difference, store), difference=True)


def _decode(stream: Stream, base: Base, path: str) -> Tensor:
    if stream.coded.coding in PRECISIONS:
        tensor = decode_values(stream.coded, stream.count).view(stream.shape)
        if stream.difference:
            if path not in set(base.paths()) or base.parameter(path).shape != stream.shape:
                raise DamagedDelta(f"the delta changes {path!r}, which {base.name} has not")
            tensor = base.parameter(path).detach().float().cpu() + tensor
        return tensor
    return decode_places(stream.coded, stream.count).view(stream.shape)


def _groups(streams: tuple[Stream, ...]) -> dict[str, bytes]:
    """Payloads joined by kind, and the index that takes them apart again."""
    joined: dict[str, list[bytes]] = {}
    rows: list[list[Any]] = []
    for stream in streams:
        coded = stream.coded
        group = coded.coding if coded.coding in PRECISIONS else container.PLACES
        joined.setdefault(group, []).append(coded.payload)
        row: list[Any] = [stream.name, list(stream.shape), coded.coding, len(coded.payload)]
        rows.append([*row, int(stream.difference), *coded.params])
    groups = {group: b"".join(parts) for group, parts in joined.items()}
    groups[container.INDEX] = container.pack_index(rows)
    return groups


def _streams(groups: dict[str, bytes]) -> Iterator[Stream]:
    """The inverse of `_groups`; every payload byte must be used exactly once."""
    position = dict.fromkeys(groups, 0)
    for name, shape, coding, length, difference, *params in container.unpack_index(groups):
        group = coding if coding in PRECISIONS else container.PLACES
        start = position[group]
        sizes = [*shape, length]
        if not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes) or (
            start + length > len(groups[group])
        ):
            raise ValueError(f"stream {name!r} lies outside its group")
        position[group] = start + length
        payload = groups[group][start : start + length]
        coded = Coded(str(coding), tuple(params), payload)
        yield Stream(str(name), tuple(shape), coded, bool(difference))
    position[container.INDEX] = len(groups[container.INDEX])
    if any(position[group] != len(data) for group, data in groups.items()):
        raise ValueError("some bytes belong to no stream")

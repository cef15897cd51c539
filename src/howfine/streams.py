"""Streams: what a delta file is made of, and how tensors become streams and tensors again.

A tensor of values is one stream, a set of places (a bool tensor) another. Changed entries of the
base's tensors (sparse tensors) share one: the places among all entries of those tensors, in the
base's order, and the values at them. Joined, a place costs log2 of all entries over those changed,
and no tensor a row of the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from howfine import container
from howfine.base import Base
from howfine.codec import (
    VALUES,
    Coded,
    count_places,
    decode_places,
    decode_values,
    encode_nonzero,
    encode_places,
    encode_values,
)
from howfine.entries import flat_entries, sparse
from howfine.errors import DamagedDelta
from howfine.method import Tensors

# Places of all streams that are counted without a base to check them against.
MOST_PLACES = 2**40
# Stands for a path where a stream is of several tensors; behind it, which ones.
JOINED = "*"
_MOST_AXES = 8  # of a tensor; a convolution has five


@dataclass(frozen=True)
class Stream:
    """One coded tensor, or the changed entries of several."""

    # "method/<path>", "readout/<name>", or "method/*<set of tensors>" for joined entries, the set
    # being a hexadecimal number with bit i for the base's i-th path.
    name: str
    shape: tuple[int, ...]
    coded: Coded
    # Whether the values are to be added to the base's.
    difference: bool = False
    # Values at the places, for changed entries.
    values: Coded | None = None

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the payload, values included."""
        return len(self.coded.payload) + (len(self.values.payload) if self.values else 0)

    def kept(self) -> int | None:
        """Places set, for a set of places; None for values. No mask of them is made."""
        if self.coded.coding in VALUES:
            return None
        return count_places(self.coded, self.count)


def encode(owner: str, tensors: Mapping[str, Tensor], store: str, base: Base) -> list[Stream]:
    """Streams of what a method or a readout packed; values in the precision `store`.

    Below fp32 what replaces values of the base is stored as the difference from them: it is small,
    so its rounding is too.
    """
    streams = [
        _encoded(f"{owner}/{name}", tensor, store, base)
        for name, tensor in tensors.items()
        if not tensor.is_sparse
    ]
    entries = {name: tensor for name, tensor in tensors.items() if tensor.is_sparse}
    return [*streams, *_joined(owner, entries, store, base)]


def _encoded(name: str, tensor: Tensor, store: str, base: Base) -> Stream:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bool:
        return Stream(name, shape, encode_places(tensor))
    owner, _, path = name.partition("/")
    original = base.parameter(path) if owner == "method" and path in base.paths() else None
    if store == "fp32" or original is None or original.shape != tensor.shape:
        return Stream(name, shape, encode_values(tensor, store))
    difference = tensor.float() - base.original(path).float()
    return Stream(name, shape, encode_values(difference, store), difference=True)


def _joined(owner: str, entries: Mapping[str, Tensor], store: str, base: Base) -> Iterator[Stream]:
    """One stream for the changed entries of all tensors, none where nothing changed."""
    members = [path for path in base.paths() if path in entries and entries[path]._nnz()]
    if not members:
        return
    places, values, originals = [], [], []
    for path in members:
        index, found = flat_entries(entries[path])
        original = base.original(path).flatten()
        places.append(torch.zeros(original.numel(), dtype=torch.bool))
        places[-1][index.cpu()] = True
        values.append(found.float().cpu())
        originals.append(original[index.to(original.device)].float().cpu())
    together, found = torch.cat(places), torch.cat(values)
    name, difference = joined_name(owner, members, base), store != "fp32"
    found = found - torch.cat(originals) if difference else found

    def placed(values: Coded) -> Stream:
        where = coded_places(together, members, base)
        return Stream(name, (len(together),), where, difference, values)

    made = [placed(encode_values(found, store))]
    if difference:
        coded, kept = encode_nonzero(found, store)
        if not kept.any():
            return
        if not kept.all():
            together[together.nonzero().flatten()[~kept]] = False
            made.append(placed(coded))
    # Among most of all entries, those that are left out may take more bits than their zeros.
    yield min(made, key=lambda stream: stream.size)


def coded_places(places: Tensor, members: list[str], base: Base) -> Coded:
    """Places (n,) among the entries of tensors; of one matrix, rows and columns may be shorter."""
    one = len(members) == 1
    return encode_places(places.view(base.parameter(members[0]).shape) if one else places)


def joined_name(owner: str, members: list[str], base: Base) -> str:
    """Name of a stream with entries of the tensors at `members`."""
    chosen = set(members)
    number = sum(1 << bit for bit, path in enumerate(base.paths()) if path in chosen)
    return f"{owner}/{JOINED}{number:x}"


def decode(streams: tuple[Stream, ...], base: Base) -> dict[str, Tensors]:
    """Tensors by owner ("method", "readout") and name.

    Raises DamagedDelta for streams that don't fit the base.
    """
    out: dict[str, Tensors] = {"method": {}, "readout": {}}
    for stream in streams:
        owner, _, name = stream.name.partition("/")
        if owner not in out:
            raise DamagedDelta(f"stream {stream.name!r} belongs to neither method nor readout")
        if stream.values is not None:
            for path, tensor in _taken_apart(stream, name, stream.values, base).items():
                before = out[owner].get(path)
                out[owner][path] = tensor if before is None else _both(path, before, tensor)
        elif name in out[owner]:
            raise _twice(name)
        else:
            out[owner][name] = _decoded(stream, base, name)
    return out


def _twice(path: str) -> DamagedDelta:
    return DamagedDelta(f"the delta changes entries of {path!r} twice; the file is damaged")


def _both(path: str, one: Tensor, other: Tensor) -> Tensor:
    """The entries of two streams in one sparse tensor. Raises DamagedDelta where both have one."""
    if one.is_sparse:
        pairs = zip(flat_entries(one), flat_entries(other), strict=True)
        index, values = (torch.cat(pair) for pair in pairs)
        index, order = index.sort()
        if not (index[1:] == index[:-1]).any():
            return sparse(index, values[order], tuple(other.shape))
    raise _twice(path)


def _decoded(stream: Stream, base: Base, path: str) -> Tensor:
    if stream.coded.coding in VALUES:
        tensor = decode_values(stream.coded, stream.count).view(stream.shape)
        if stream.difference:
            if path not in set(base.paths()) or base.parameter(path).shape != stream.shape:
                raise DamagedDelta(f"the delta changes {path!r}, which {base.name} has not")
            tensor = base.original(path).float().cpu() + tensor
        return tensor
    return decode_places(stream.coded, stream.count).view(stream.shape)


def _taken_apart(stream: Stream, name: str, coded: Coded, base: Base) -> Tensors:
    members = members_of(stream, base.paths())
    sizes = [base.parameter(path).numel() for path in members]
    if not members or not name.startswith(JOINED) or stream.shape != (sum(sizes),):
        raise DamagedDelta(
            f"stream {stream.name!r} of {stream.count:,} entries does not fit the base "
            f"{base.name}; the file is damaged, or made for another model"
        )
    places = decode_places(stream.coded, stream.count).split(sizes)
    indices = [place.nonzero().flatten() for place in places]
    counts = [len(index) for index in indices]
    parts = counts if len(coded.params) > 1 else None  # each tensor with a scale of its own
    values = decode_values(coded, sum(counts), parts).split(counts)
    found = {}
    for path, index, value in zip(members, indices, values, strict=True):
        original = base.original(path)
        if stream.difference:
            value = original.flatten()[index.to(original.device)].float().cpu() + value
        found[path] = sparse(index, value, tuple(original.shape))
    return found


def members_of(stream: Stream, paths: list[str]) -> list[str]:
    """The paths, of a base's `paths`, whose entries a joined stream holds.

    Raises DamagedDelta for a set of others.
    """
    digits = stream.name.partition("/")[2].removeprefix(JOINED)
    number = int(digits, 16) if digits and set(digits) <= set("0123456789abcdef") else 0
    if number.bit_length() > len(paths):
        raise DamagedDelta(
            f"stream {stream.name!r} names tensor {number.bit_length()}, of a base that has "
            f"{len(paths)}; the file is damaged, or made for another model"
        )
    return [path for bit, path in enumerate(paths) if number >> bit & 1]


def groups(streams: tuple[Stream, ...]) -> dict[str, bytes]:
    """Payloads joined by kind, and the index that takes them apart again."""
    joined: dict[str, list[bytes]] = {}
    rows: list[list[Any]] = []
    for stream in streams:
        rows.append([stream.name, list(stream.shape), *_row(stream.coded, stream, joined)])
        if stream.values is not None:  # an empty name: at the places of the row before
            rows.append(["", [], *_row(stream.values, stream, joined)])
    made = {group: b"".join(parts) for group, parts in joined.items()}
    made[container.INDEX] = container.pack_index(rows)
    return made


def _row(coded: Coded, stream: Stream, joined: dict[str, list[bytes]]) -> list[Any]:
    joined.setdefault(_group(coded), []).append(coded.payload)
    return [coded.coding, len(coded.payload), int(stream.difference), *coded.params]


def _group(coded: Coded) -> str:
    return container.group_of(coded.coding)


def parse(groups: dict[str, bytes]) -> Iterator[Stream]:
    """The inverse of `groups`; every payload byte must be used exactly once.

    Raises ValueError or TypeError for an index that does not fit.
    """
    position = dict.fromkeys(groups, 0)

    def coded(coding: Any, length: Any, params: list[Any]) -> Coded:
        made = Coded(str(coding), tuple(params), b"")
        group = _group(made)
        start = position[group]
        if not _is_size(length) or start + length > len(groups[group]):
            raise ValueError("a stream lies outside its group")
        position[group] = start + length
        return Coded(made.coding, made.params, groups[group][start : start + length])

    waiting: Stream | None = None
    for name, shape, coding, length, difference, *params in container.unpack_index(groups):
        _check_shape(name, shape)
        found = coded(coding, length, params)
        if name == "":
            if waiting is None or waiting.coded.coding in VALUES or shape:
                raise ValueError("values without places")
            yield Stream(waiting.name, waiting.shape, waiting.coded, bool(difference), found)
            waiting = None
            continue
        if waiting is not None:
            yield waiting
        waiting = Stream(str(name), tuple(shape), found, bool(difference))
    if waiting is not None:
        yield waiting
    position[container.INDEX] = len(groups[container.INDEX])
    if any(position[group] != len(data) for group, data in groups.items()):
        raise ValueError("some bytes belong to no stream")


def _check_shape(name: Any, shape: Any) -> None:
    """Before anything multiplies the sizes: a long shape of large ones takes for ever."""
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_size, shape)):
        raise ValueError(f"stream {name!r} has no shape")
    count = 1
    for size in shape:
        count *= max(size, 1)
        if not _is_size(count):
            raise ValueError(f"stream {name!r} has a shape of too many entries")


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and 0 <= size < 2**48

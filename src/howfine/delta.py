"""Delta: the stored change. One safetensors file, described in docs/format.md.

The file is streams (what `codec` makes of tensors, joined by coding), an index of them, and one
short JSON header. Nothing in it is code. A stream is decoded only against the base it was made on,
whose sizes bound what may be allocated.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from howfine import container, plugins, streams
from howfine.base import Base
from howfine.change import Change
from howfine.codec import PRECISIONS
from howfine.errors import DamagedDelta, DeltaError, SettingError, StorageError, WrongBase, near
from howfine.method import Method, Tensors, method, methods
from howfine.readout import Head, Labels, Readout, Wired, readouts
from howfine.streams import Stream

SUFFIX = ".delta.safetensors"
# What the header's score lists, in this order.
SCORE = ("metric", "value", "interval", "on", "n")


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

        Below fp32, what replaces values of the base is stored as the difference from them.
        """
        if store not in PRECISIONS:
            raise SettingError(f"store {store!r} is unknown. {near(store, PRECISIONS)}")
        readout = readout.settled(base, labels)
        found = [
            *streams.encode("method", method.pack(base, change), store, base),
            *streams.encode("readout", readout.pack(head), store, base),
        ]
        return cls(
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            method=method,
            readout=readout,
            labels=labels,
            streams=tuple(found),
            base_kind=base.kind,
        )

    def with_score(self, score: dict[str, Any]) -> Delta:
        """The same change with another score in its header."""
        return replace(self, score=score)

    def resized(self, keep: float) -> Delta:
        """The same change as a smaller model: so large a share of its units on when it is put on.

        Raises SettingError for a change of one size only.
        """
        if not self.method.resizable:
            raise SettingError(
                "this delta is of one size; give one whose recipe trains all sizes at once, such "
                f"as {' or '.join(n for n, cls in methods().items() if cls.resizable)}, or one "
                "that was pruned to the size"
            )
        if self.readout.remembers:
            raise SettingError(
                "the delta's head holds what the model of the stored size made of the training "
                "examples, which no other size has; train with a readout that answers by what it "
                "learned, such as inference=scores"
            )
        if not 0 < keep <= 1:
            raise SettingError(f"keep {keep}: expected a share of the units, above 0 and at most 1")
        settings = {**plugins.settings_of(self.method), "keep": keep}
        name = plugins.name_of("methods", Method, self.method)
        return replace(self, method=method(name, **settings), score={})

    def check_base(self, base: Base) -> None:
        """Raises WrongBase unless this delta was made on `base`.

        A small file holds half of the fingerprint.
        """
        known = len(self.base_fingerprint) in (len(base.fingerprint), len(base.fingerprint) // 2)
        if not known or not base.fingerprint.startswith(self.base_fingerprint):
            raise WrongBase(
                f"this delta was made on {self.base_name} (SHA-256 {self.base_fingerprint[:12]}…), "
                f"but the base given is {base.name} ({base.fingerprint[:12]}…); load the right one "
                f"with --base {self.base_name} or Base.load({self.base_name!r})"
            )

    def tensors(self, base: Base) -> tuple[Tensors, Tensors]:
        """(method's tensors, readout's tensors), decoded. Raises DamagedDelta, WrongBase."""
        self.check_base(base)
        self._check_sizes(base)
        out = streams.decode(self.streams, base)
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
        """The base with this change on, in evaluation mode; taken off again on leaving.

        Raises DeltaError for a delta without a head, as `extract` makes of bare models.
        """
        self.check_head(base)
        with self.changed(base) as head:
            assert head is not None
            yield Wired(base, self.readout, head).eval()

    def check_head(self, base: Base) -> None:
        """Raises DeltaError for a delta that changes the base and has no head to answer with."""
        if self.lacks_head(base):
            raise DeltaError(
                "the delta changes the base and has no head, so it gives no answers. Merge it, "
                "start a training from it, or make it again with a head: extract from a model for "
                "classification, compose with a head"
            )

    @contextmanager
    def changed(self, base: Base) -> Iterator[Head | None]:
        """The base with this change on, and the head; None for a delta that has none."""
        method_tensors, readout_tensors = self.tensors(base)
        head = None
        if not self.lacks_head(base):
            head = self.readout.unpack(base, self.labels, readout_tensors)
        with self.method.unpack(base, method_tensors):
            yield head

    def lacks_head(self, base: Base) -> bool:
        """Whether nothing is stored of a head that has parameters."""
        if any(stream.name.startswith("readout/") for stream in self.streams):
            return False
        return bool(self.readout.packed_shapes(base, self.labels))

    def save(self, path: str | Path) -> int:
        """Write atomically; returns the file's bytes.

        Raises StorageError, leaving no half file, and where a file that is no delta would go.
        """
        _check_replaces(Path(path))
        return container.write(Path(path), self.header(), streams.groups(self.streams))

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
            labels=_labels(header["labels"]),
            streams=tuple(streams.parse(groups)),
            score=dict(zip(SCORE, header["score"], strict=True)) if "score" in header else {},
            base_kind=str(header.get("kind", "body")),
        )


def check_target(path: Path) -> None:
    """What `Delta.save` would find out after the work, and the name's ending.

    Raises SettingError for a name that is no delta's, StorageError where something else is there.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} is there and no regular file; name another path to write to")
    if not path.name.endswith(SUFFIX):
        raise SettingError(f"{path}: a delta file is called NAME{SUFFIX}; name it so")
    _check_replaces(path)


def _check_replaces(path: Path) -> None:
    """Raises StorageError for a file that is neither a delta nor empty: it is someone's work."""
    try:
        lost = os.path.isfile(path) and path.stat().st_size and not container.is_delta(path)
    except OSError as error:
        raise StorageError(
            f"{path} is there and can't be read: {error.strerror or error}; name another path to "
            "write to"
        ) from error
    if lost:
        raise StorageError(
            f"{path} is there and no delta file, and would be lost; choose another name or remove "
            "it first"
        )


def _labels(stated: Any) -> Labels:
    """Raises ValueError for what is no list of different texts."""
    if not isinstance(stated, list) or not all(isinstance(label, str) for label in stated):
        raise ValueError(f"labels {stated!r:.40}, expected a list of class names")
    if len(set(stated)) < len(stated):
        raise ValueError(f"{len(stated)} labels, of which {len(set(stated))} are different")
    return tuple(stated)


def only_weights(base: Base, otherwise: str) -> None:
    """Raises SettingError where the change that is on puts parameters beside the base's."""
    if set(dict(base.towers.named_parameters())) != set(base.paths()):
        raise SettingError(f"the delta puts parameters of its own beside the base's, {otherwise}")

"""slice: a changed model without the heads and neurons that give nothing: smaller, really faster.

A unit is off where all that leads out of it is exactly 0, whatever change made it so. Its rows and
columns go; what is left computes the same, but for rounding. Heads are cut where every one has keys
and values of its own and no table of positions of its own (BERT and its kin, ViT, BART, GPT-2);
elsewhere they stay, as zeros, and neurons alone are cut. Of the vocabulary, tokens go that given
texts don't use (`howfine.vocabulary`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from howfine import cuts, pretrained, surgery, units, vocabulary, widths
from howfine.base import Base, TwoTowers
from howfine.delta import SUFFIX, Delta, only_weights
from howfine.errors import SettingError
from howfine.evaluate import opened
from howfine.merge import in_folder, save, stands_alone
from howfine.method import holding
from howfine.readout import Head

READOUT_FILE = f"readout{SUFFIX}"
# Config fields that may state the width of all feed-forward nets, in one architecture or another.
_INNER = (
    "intermediate_size",
    "hidden_dim",
    "n_inner",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)


@dataclass(frozen=True)
class Sliced:
    """A folder with a smaller model, and what it has left."""

    folder: Path
    # Whether AutoModel.from_pretrained loads it; else Base.load alone does.
    plain: bool
    parameters: int
    before: int
    # Kept in each layer, from the bottom up.
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    # The delta of the answers' head on the smaller model, where there is one.
    readout: Path | None
    # Tokens that its tokenizer has left; None where the vocabulary is the base's.
    tokens: int | None = None


def sliced(
    delta: Delta | str | Path | None,
    out: str | Path,
    base: Base | None = None,
    *,
    keep: float | None = None,
    texts: Iterable[str] | None = None,
    least: int = 1,
    dtype: str | torch.dtype | None = None,
) -> Sliced:
    """Write the changed base without its units that are off to the folder `out`.

    With `keep`, of a delta that was trained for all sizes (`Delta.resized`), that share of its
    units stays. With `texts`, of the vocabulary the tokens that are in them `least` times stay, and
    those that `vocabulary.used` names; no unit need be off then, and the base may stand alone, with
    no delta (None). `dtype` is the number format of what is written, the sum of base and change;
    the base's own by default. Beside the model lies a delta of the readout, made on it: `howfine
    predict` and `evaluate` take that one with `--base OUT`. Raises StorageError where `out` exists
    or can't be written, SettingError where nothing is off, for a change that is not one of weights,
    and for a base that is part of a larger model.
    """
    delta, base = _opened(delta, base, keep, texts is not None)
    number_format = None if dtype is None else pretrained.dtype_of(dtype)
    words = () if delta is None else vocabulary.words_of(delta)
    fewer = None if texts is None else vocabulary.used(base, texts, least, words)
    with _changed(delta, base) as head:
        only_weights(base, "which a smaller model would lose; keep the delta beside its base")
        model = cuts.smaller(base, or_same=fewer is not None or _may_be_whole(delta, base, keep))
        if fewer is not None:
            vocabulary.cut(base, model, fewer)
    plain = _state_widths(base, model)
    surgery.convert(model, number_format)

    def write(folder: Path) -> None:
        save(base, model, folder, None if fewer is None else fewer.tokenizer)
        if delta is not None and head is not None:
            small = Base.load(str(folder), kind=base.kind)
            _readout_of(delta, small, str(out)).save(folder / READOUT_FILE)

    folder = in_folder(Path(out), write)
    return Sliced(
        folder=folder,
        plain=plain,
        parameters=sum(p.numel() for p in model.parameters()),
        before=sum(p.numel() for p in base.tower.parameters()),
        heads=_left(base, model, "D"),
        neurons=_left(base, model, "O"),
        readout=folder / READOUT_FILE if head is not None else None,
        tokens=None if fewer is None else len(fewer.kept),
    )


def _opened(
    delta: Delta | str | Path | None, base: Base | None, keep: float | None, fewer: bool
) -> tuple[Delta | None, Base]:
    """What is sliced. Raises SettingError for what can't be."""
    if delta is not None:
        delta, base = opened(delta, base)
        delta = delta if keep is None else delta.resized(keep)
    elif base is None or not fewer or keep is not None:
        raise SettingError(
            "without a delta no unit is off, and the vocabulary alone can be cut: give a base and "
            "texts, and no keep; or a delta"
        )
    if isinstance(base, TwoTowers):
        raise SettingError(f"{base.name} is two towers; slice a delta that was made on one model")
    if not stands_alone(base):
        raise SettingError(
            f"the base {base.name} is the encoder of an encoder-decoder, which no folder holds "
            "alone; tune the whole model, with a readout that writes"
        )
    return delta, base


def _may_be_whole(delta: Delta | None, base: Base, keep: float | None) -> bool:
    """Whether a change may have left all units on. Raises SettingError for one without a size."""
    if delta is None or keep is not None:
        return True
    if delta.method.resizable and not cuts.of(base, base.tower):
        raise SettingError(
            "this delta has all sizes, and as it is stored no unit is off: say how much stays "
            "(keep=0.5; --keep 0.5, or --latency-ms for the largest that is as fast)"
        )
    if not any(stream.name.startswith(f"method/{units.KEPT}") for stream in delta.streams):
        return False
    changed, _ = delta.tensors(base)
    on = [value for name, value in changed.items() if name.startswith(units.KEPT)]
    return all(value.dtype == torch.bool and bool(value.all()) for value in on)


@contextmanager
def _changed(delta: Delta | None, base: Base) -> Iterator[Head | None]:
    """The base with the change on, if there is one, and its head."""
    if delta is None:
        yield None
        return
    with delta.changed(base) as head:
        yield head


def _left(base: Base, model: Any, part: str) -> tuple[int, ...]:
    """How many heads, or neurons, each layer of a model has, from the bottom up."""
    inputs, found = base.anatomy.linear_axes.index("in"), []
    for path in base.choose(("matrices",)):
        if base.place(path)[1] == part:
            size = model.get_parameter(cuts.inside(base, path)).shape[inputs]
            before = base.parameter(path).shape[inputs]
            found.append(size * base.units_into(path) // before)
    return tuple(found)


def _state_widths(base: Base, model: Any) -> bool:
    """Let the model's config say how wide it is. Whether that is one of its architecture's own."""
    plain = copy.deepcopy(model.config)
    if hasattr(plain, widths.KEY):
        delattr(plain, widths.KEY)
    auto, stated = getattr(transformers, pretrained.KINDS[base.kind]), _stated(base, model)
    with pretrained.quiet_transformers(), torch.device("meta"):
        twin = auto.from_config(plain)
        for field, value in stated.items():
            setattr(plain, field, value)
        try:
            even = _shapes(auto.from_config(plain)) == _shapes(model)
        except ValueError:  # numbers that its architecture does not take
            even = False
    if even:
        model.config = plain
        return True
    before = _shapes(twin)
    inputs = base.anatomy.linear_axes.index("in")
    made = {}
    for name, shape in _shapes(model).items():
        if len(shape) == 2 and shape != before[name]:
            path = name.rpartition(".")[0]
            made[path] = [shape[inputs], shape[1 - inputs]]
    setattr(model.config, widths.KEY, made)
    return False


def _stated(base: Base, model: Any) -> dict[str, int]:
    """Config fields that would say so, where all layers are as wide."""
    config, found = model.config, dict[str, int]()
    heads, neurons = set(_left(base, model, "D")), set(_left(base, model, "O"))
    if len(neurons) == 1:
        found |= {name: neurons.copy().pop() for name in _INNER if hasattr(config, name)}
    count = int(getattr(config, base.anatomy.heads))
    if heads != {count} and len(heads) == 1:
        # Some state a width of their own, such as that of a model that was sliced before.
        width = getattr(config, "head_dim", None) or config.hidden_size // count
        found |= {base.anatomy.heads: heads.pop(), "head_dim": width}
        if hasattr(config, "num_key_value_heads"):
            found["num_key_value_heads"] = found[base.anatomy.heads]
    return found


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def _readout_of(delta: Delta, small: Base, name: str) -> Delta:
    """The same head on a smaller model."""
    return Delta(
        base_name=name,
        base_fingerprint=small.fingerprint,
        method=holding("tensors"),
        readout=delta.readout,
        labels=delta.labels,
        streams=tuple(s for s in delta.streams if s.name.startswith("readout/")),
        base_kind=delta.base_kind,
    )

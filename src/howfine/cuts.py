"""Cuts: which rows and columns of a model's matrices go with the units that give nothing.

A unit is off where all that leads out of it is exactly 0, whatever change made it so. Heads are cut
where every one has keys and values of its own and no table of positions of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from howfine import widths
from howfine.anatomy import FEEDS
from howfine.base import IMAGE, Base
from howfine.errors import SettingError

# Of two outputs, relative to the largest, in float32 and in steps of other formats: more is no
# rounding.
_ROUNDING, _STEPS = 1e-4, 8


@dataclass(frozen=True)
class Cut:
    """Inputs and outputs of a linear module that stay; None for all of them."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def applied(self, module: nn.Module, base: Base) -> nn.Module:
        """A smaller module with the values that stay."""
        axes, held = base.anatomy.linear_axes, dict(module.named_parameters())
        weight = held["weight"].detach()
        for which, index in (("in", self.inputs), ("out", self.outputs)):
            if index is not None:
                weight = weight.index_select(axes.index(which), index)
        inputs, outputs = (weight.shape[axes.index(which)] for which in ("in", "out"))
        made = widths.of_width(module, inputs, outputs)
        with torch.no_grad():
            made.get_parameter("weight").copy_(weight)
            if "bias" in held:
                bias = held["bias"].detach()
                made.get_parameter("bias").copy_(
                    bias if self.outputs is None else bias[self.outputs]
                )
        return made


def of(base: Base, model: Any) -> dict[str, Cut]:
    """What stays of each module that gets smaller, by its path in the tower."""
    found: dict[str, Cut] = {}
    for path in base.choose(("matrices",)):
        part = base.place(path)[1]
        feeding = _feeding(base, path) if part in FEEDS else []
        weight = model.get_parameter(inside(base, path)).detach()
        inputs = base.anatomy.linear_axes.index("in")
        if not feeding or (part != "O" and not _heads_may_go(base, feeding, weight)):
            continue
        on = (weight != 0).any(1 - inputs).unflatten(0, (base.units_into(path), -1)).any(1)
        if on.all():
            continue
        on[0] |= not on.any()  # a module without inputs is none
        size = weight.shape[inputs]
        stay = on.repeat_interleave(size // len(on)).nonzero().flatten()
        found[_module(base, path)] = Cut(inputs=stay)
        for each in feeding:
            own = model.get_parameter(inside(base, each))
            several = own.shape[1 - inputs] // size  # three where they are fused
            index = torch.cat([stay + size * at for at in range(several)])
            found[_module(base, each)] = Cut(outputs=index)
    return found


def _feeding(base: Base, path: str) -> list[str]:
    """Matrices of the same layer whose outputs become, unit by unit, another one's inputs."""
    layer, part = base.place(path)
    every = base.choose(("matrices",))
    return [each for each in every if base.place(each) in {(layer, own) for own in FEEDS[part]}]


def _heads_may_go(base: Base, feeding: list[str], weight: Tensor) -> bool:
    """Whether each head has its own queries, keys and values, and nothing else is counted by it."""
    inputs = base.anatomy.linear_axes.index("in")
    sizes = [base.parameter(path).shape[1 - inputs] for path in feeding]
    whole = 3 * weight.shape[inputs] == sum(sizes)
    return base.anatomy.plain_attention and whole and len(sizes) in (1, 3)


def inside(base: Base, path: str) -> str:
    """A parameter's path in the tower."""
    return path.removeprefix(f"{base.tower_name}.")


def _module(base: Base, path: str) -> str:
    return inside(base, path).rpartition(".")[0]


def check_same(base: Base, whole: Tensor, small: Tensor, what: str) -> None:
    """Raises SettingError unless outputs of a model are those of the smaller one without `what`."""
    apart = float((whole - small).abs().max() / whole.abs().max().clamp(min=1e-12))
    if not apart <= max(_ROUNDING, _STEPS * torch.finfo(whole.dtype).eps):
        raise SettingError(
            f"a {base.config.model_type} without {what} gives other outputs (apart by "
            f"{apart:.1e} of the largest), so its architecture can't be cut like this; please tell "
            "its name to howfine's authors"
        )


def smaller(base: Base, *, or_same: bool = False) -> Any:
    """The base's tower, with the change that is on it, without what gives nothing; a copy.

    Raises SettingError where that is nothing, unless it may be the same.
    """
    model = copy.deepcopy(base.tower)
    found = of(base, model)
    if not found and or_same:
        return model
    if not found:
        raise SettingError(
            "nothing can be cut: what leads out of each head and each neuron is not 0 everywhere, "
            "or its layer can't be cut; give a delta of a recipe that switches whole units off"
        )
    for path, cut in found.items():
        widths.put(model, path, cut.applied(model.get_submodule(path), base))
    _check_same(base, model)
    return model


@torch.no_grad()
def _check_same(base: Base, model: Any) -> None:
    """Raises SettingError unless a smaller model computes what the base does."""
    was_training, inputs = base.tower.training, trial(base, 2, min(8, base.room))
    base.tower.eval()
    try:
        whole = base.tower(**inputs)[0]
        small = model.eval()(**inputs)[0]
    finally:
        base.tower.train(was_training)
    check_same(base, whole, small, "these units")


def trial(base: Base, rows: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of the base, drawn from a seed."""
    generator = torch.Generator().manual_seed(0)
    if base.tower_name == IMAGE:
        size = base.config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (rows, getattr(base.config, "num_channels", 3), *sides)
        return {"pixel_values": torch.randn(shape, generator=generator).to(base.device)}
    count = base.tower.get_input_embeddings().num_embeddings
    ids = torch.randint(count, (rows, tokens), generator=generator).to(base.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.anatomy.decoder is not None:
        inputs["decoder_input_ids"] = ids
    return inputs

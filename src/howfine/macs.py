"""Which heads and neurons stay on under a budget, by Fisher information.

Kwon et al. 2022 (arXiv 2204.09656), sections 4.1 and 4.2: a search that takes the information to be
diagonal, then a rearrangement within each layer by what its units have in common. Multiply-adds
(MACs) are those of one sequence: of its matrices, and of attention's two products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from howfine import units
from howfine.anatomy import FEEDS
from howfine.base import Base

Tensors = dict[str, Tensor]


def of_unit(base: Base, path: str, length: int) -> int:
    """MACs of one unit that leads into the matrix at `path`, of a sequence of n = `length` tokens.

    A head: 3·n·d·d_h + 2·n²·d_h + n·d_h·d; a neuron: 2·n·d, 3·n·d where it is gated. Of matrices
    that make its inputs, those whose outputs are all some unit's own: not keys and values that
    several heads share.
    """
    layer, part = base.place(path)
    count, weight = base.units_into(path), base.parameter(path)
    inputs = weight.shape[units.axis(base, "in")]
    entries = weight.numel()
    for other in base.choose(("matrices",)):
        own, into = base.place(other)
        if own == layer and into in FEEDS[part]:
            made = base.parameter(other)
            if made.shape[units.axis(base, "out")] % inputs == 0:  # three times it where fused
                entries += made.numel()
    products = 2 * length**2 * inputs if units.kind(base, path) == "heads" else 0
    return (length * entries + products) // count


def search(
    base: Base, information: Mapping[str, Tensor], costs: Mapping[str, Tensor], room: float
) -> Tensors:
    """(units,) which stay on, by path, that together take no more than `room`.

    `costs` (units,) says what the first unit of a layer takes, the second, and so on. For each
    number k of heads, the k of the largest information and as many neurons as the rest has room
    for; of these the k with the largest sum. Of each layer the best head and neuron come first,
    for which there has to be room. Raises SettingError where the base has no such units.
    """
    units.check_kinds(base, information, "both")
    kinds = units.by_kind(base, information)
    heads, neurons = (_Ranked(kinds[kind], costs) for kind in ("heads", "neurons"))
    best = (-math.inf, heads.firm, neurons.firm)
    for k in range(heads.firm, len(heads.cost)):
        left = torch.tensor(room - float(heads.cost[k]), dtype=neurons.cost.dtype)
        n = int(torch.searchsorted(neurons.cost, left, right=True)) - 1
        if n >= neurons.firm:
            best = max(best, (float(heads.sum[k] + neurons.sum[n]), -k, n))
    found = heads.strongest(abs(best[1])) | neurons.strongest(best[2])
    return {path: found[path] for path in information}


class _Ranked:
    """Units of one kind in the order in which they stay on, and sums over the first k of them."""

    def __init__(self, information: Mapping[str, Tensor], costs: Mapping[str, Tensor]) -> None:
        self.places = units.ranks(information, normalised=False)
        self.total, self.firm = sum(map(len, information.values())), len(information)
        order = torch.cat(list(self.places.values())).argsort(descending=True)
        own = torch.cat([value.double().cpu() for value in information.values()])[order]
        # A layer's units come in the order of their places: the first takes what the first does.
        earlier = (p.argsort(descending=True).argsort() for p in self.places.values())
        by_unit = [costs[path][nth] for path, nth in zip(self.places, earlier, strict=True)]
        cost = torch.cat(by_unit).double()[order]
        self.sum = torch.cat([own.new_zeros(1), own.cumsum(0)])
        self.cost = torch.cat([cost.new_zeros(1), cost.cumsum(0)])

    def strongest(self, count: int) -> Tensors:
        return {path: own >= self.total - count for path, own in self.places.items()}


def rearranged(on: Tensor, gradients: Tensor) -> Tensor:
    """(units,) as many of one layer that stay on, by the block of its Fisher information.

    `gradients` (batches, units) are those g of the loss by the units' factors. Those that are off
    shall have a small ‖Σ g‖². From the least informative on, each unit that is on is tried among
    them; the one without which their sum is shortest comes back on.
    """
    own = gradients.T.double().cpu()
    order = own.square().sum(1).argsort(stable=True).tolist()
    gone = [unit for unit in order if not on[unit]]
    if not gone:
        return on.cpu().clone()
    total = own[gone].sum(0)
    for unit in order:
        if not on[unit]:
            continue
        total = total + own[unit]
        among = own[[*gone, unit]]
        # ‖total - g‖² without what is the same for all
        lengths = among.square().sum(1) - 2 * among @ total
        back = int(lengths.argmin())
        total = total - among[back]
        if back < len(gone):
            gone[back] = unit
    stays = torch.ones(len(own), dtype=torch.bool)
    stays[gone] = False
    return stays

"""Diff pruning: θ + z ⊙ w, a free difference behind a gate per entry that learns to be 0.

Guo, Rush & Kim 2021, "Parameter-efficient transfer learning with diff pruning" (ACL-IJCNLP), eq. 4
to 7: hard-concrete gates (Louizos et al. 2018) with an L0 penalty, a gate for each whole tensor
too where `structure="tensor"`, and in the end the k largest differences, k being the budget. The
authors' third stage, further training of those k, is a phase of its own in the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from howfine import concrete, entries, gates, surgery, whole
from howfine.base import Base
from howfine.change import Change, all_or_nothing
from howfine.errors import SettingError
from howfine.method import Method, Probe, Tensors

START = 5.0  # of every gate's logit: a draw is 1 in 97 % of cases, 0 in 0.7 %
GATE_RATE = 0.1  # AdamW's rate for the logits, constant


class _Gate(nn.Module):
    """Adds a gated difference to a weight: drawn in training, within the budget in evaluation."""

    def __init__(self, path: str, weight: Tensor, structured: bool, budget: _Budget) -> None:
        super().__init__()
        self.diff = nn.Parameter(torch.zeros(weight.shape, device=weight.device))
        self.alpha = nn.Parameter(torch.full(weight.shape, START, device=weight.device))
        self.group = nn.Parameter(weight.new_tensor(START)) if structured else None
        self.path, self.budget = path, budget
        self._spare: concrete.Spare = []
        self._count: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return self.budget.spent(self.path, weight)
        self.budget.forget()
        value, count = concrete.add_gated(
            weight, self.diff, self.alpha, self.group, spare=self._spare
        )
        self._count = [count] if torch.is_grad_enabled() else []
        if self._count:  # the backward pass frees what it would need for a second one
            value.register_hook(lambda _, counted=self._count: counted.clear())
        return value

    def expected(self) -> Tensor:
        """Expected number of entries that the draws keep: the last forward's, if still its own."""
        return self._count.pop() if self._count else concrete.diff_expected_l0(self.alpha)

    def settled(self) -> Tensor:
        """z·z_g·w by gates without chance, of the weight's shape."""
        value = concrete.diff_gate_settled(self.alpha.detach()).mul_(self.diff.detach())
        if self.group is not None:
            value *= concrete.diff_gate_settled(self.group.detach())
        return value


class _Budget:
    """The k largest differences over all gates together, computed once for each state of theirs."""

    def __init__(self, weights: Mapping[str, Tensor], density: float) -> None:
        self.weights = weights
        self.keep = gates.count_of(density, sum(weight.numel() for weight in weights.values()))
        self.gates: dict[str, _Gate] = {}
        self._watched: list[Tensor] = []
        # Parameters' versions, which loading counts up; fused optimisers don't: see `forget`.
        self._state: tuple[int, ...] | None = None
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, gate: _Gate) -> None:
        """One more gate that shares this budget."""
        self.gates[gate.path] = gate
        self._watched += gate.parameters()

    def forget(self) -> None:
        """Training goes on: what was computed is out of date."""
        self._state = None

    def spent(self, path: str, weight: Tensor) -> Tensor:
        """`weight` with the new values of the gate's entries that the budget holds."""
        state = tuple(parameter._version for parameter in self._watched)
        if state != self._state:
            self._found = self.entries()
            self._state = state
        index, values = self._found[path]
        changed = weight.detach().clone(memory_format=torch.contiguous_format)
        changed.view(-1)[index] = values
        return changed

    @torch.inference_mode(False)
    @torch.no_grad()
    def entries(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(row-major indices, new values) of the entries each gate changes.

        `keep` of them in all, or all that differ from the base's where that are fewer: a
        difference that its weight's rounding swallows is none.
        """
        values, sizes = {}, {}
        for path, gate in self.gates.items():
            weight, diff = self.weights[path].detach(), gate.settled()
            values[path] = weight + diff
            sizes[path] = diff.abs_().masked_fill_(values[path] == weight, 0)
        chosen = entries.strongest(sizes, self.keep)
        found = {}
        for path, index in chosen.items():
            index = index.to(sizes[path].device)
            index = index[sizes[path].reshape(-1)[index] > 0]
            found[path] = (index, values[path].reshape(-1)[index])
        return found


@dataclass(frozen=True)
class Diff(Method):
    """Change few entries anywhere: learn a gated difference, keep its largest entries."""

    holds: ClassVar[Any] = "entries"

    # Which parameters get a gated difference, as selectors (see `howfine.anatomy`).
    where: tuple[str, ...] = ("all",)
    # Share of their entries that may change: the k largest differences of all tensors together.
    density: float = 0.005
    # A gate for each whole tensor besides those of its entries ("tensor"), or none.
    structure: Literal["tensor", "none"] = "tensor"
    # Penalty λ on the expected number of changed entries.
    l0: float = 1.25e-7
    # Penalty with both gates: the paper's product of their chances, or the authors' code's sum.
    form: Literal["product", "sum"] = "product"

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise SettingError(
                f"diff density: found {self.density}, expected a share above 0, up to 1"
            )
        if not 0 <= self.l0 < math.inf:
            raise SettingError(f"diff l0: found {self.l0}, expected a finite number from 0")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        paths = base.choose(self.where)
        whole.check_format(base, paths)
        weights = {path: base.original(path) for path in paths}
        budget = _Budget(weights, self.density)
        if not budget.keep:
            raise SettingError(
                f"diff density {self.density}: not one entry of the {len(paths)} tensors chosen; "
                "raise it, or choose more with where"
            )
        trainable: dict[str, nn.Parameter] = {}
        with all_or_nothing() as undo:
            for path, weight in weights.items():
                gate = _Gate(path, weight, self.structure == "tensor", budget)
                budget.add(gate)
                trainable |= {f"{path}:{name}": p for name, p in gate.named_parameters()}
                undo.append(surgery.reweight(base.towers, path, gate))
            return Change(trainable, undo, parts={"budget": budget})

    def pack(self, base: Base, change: Change) -> Tensors:
        budget: _Budget = change.parts["budget"]
        return {
            path: entries.sparse(index, values, tuple(base.parameter(path).shape))
            for path, (index, values) in budget.entries().items()
            if len(index)
        }

    def penalty(self, change: Change, progress: float) -> Tensor:
        all_gates = list(change.parts["budget"].gates.values())
        counts = torch.stack([gate.expected() for gate in all_gates])
        if self.structure == "tensor":
            chances = torch.sigmoid(torch.stack([gate.group for gate in all_gates]))
            counts = counts * chances if self.form == "product" else counts + chances
        return self.l0 * counts.sum()

    def groups(self, change: Change) -> list[dict[str, Any]]:
        pairs = [(name.rpartition(":")[2], p) for name, p in change.trainable.items()]
        return [
            {"params": [p for name, p in pairs if name == "diff"], "weight_decay": 0.0},
            {
                "params": [p for name, p in pairs if name != "diff"],
                "weight_decay": 0.0,
                "lr": GATE_RATE,
                "constant": True,
                "clip": "gates",
            },
        ]

    def learning_rate(self, steps: int) -> float:
        # The paper's 1e-5 is for BERT-large and thousands of steps: a difference must grow before
        # its gate, which moves by up to 0.1 a step, has closed.
        return 2e-4

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        return entries.unpack(base, tensors)


EXAMPLE = Diff(density=0.2)

"""A peer: one of PEFT's own adapters, put on the base by PEFT itself.

For measurements beside howfine's methods: head, data order, loss and training loop are then the
same. PEFT's layers are left in the tower in place, which undo takes out again; a soft prompt is put
around the tower, and its positions are cut off again, so that the readout pools words alone.
Needs the extra `peft`. Use it from anywhere with `HOWFINE_PLUGINS=bench/plugins`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from howfine.base import Base
from howfine.change import Change, Undo, all_or_nothing
from howfine.errors import DamagedDelta, SettingError, near
from howfine.method import Method, Probe, Tensors


@dataclass(frozen=True)
class PeftPeer(Method):
    """PEFT's method `kind` on the modules that `targets` names."""

    # PEFT's name of the method, one of peft.PeftType: LORA, IA3, VERA and so on.
    kind: str = "LORA"
    # Modules that carry it, as selectors; none for PEFT's own choice.
    targets: tuple[str, ...] = ("matrices",)
    # Other settings of PEFT's config class, by name.
    options: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        with all_or_nothing() as undo:
            model = self._put_on(base, undo)
            trainable = {p: v for p, v in base.towers.named_parameters() if v.requires_grad}
            return Change(trainable, undo, {"peft": model})

    def pack(self, base: Base, change: Change) -> Tensors:
        """What `save_pretrained` stores, under its names."""
        return saved_by_peft(change.parts["peft"])

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        with all_or_nothing() as undo:
            model = self._put_on(base, undo)
            expected = saved_by_peft(model)
            if odd := sorted(expected.keys() ^ tensors.keys()):
                raise DamagedDelta(
                    f"{self.kind}: found {len(tensors)} tensors, expected {len(expected)}; they "
                    f"differ in {odd[0]}. Is the file of other settings?"
                )
            with _quiet():
                set_peft_model_state_dict(model, dict(tensors))
            model.requires_grad_(False)
            return Change({}, undo, {"peft": model})

    def _put_on(self, base: Base, undo: list[Undo]) -> Any:
        """PEFT's model around the tower; what takes it off again goes to `undo`."""
        name, tower = base.tower_name, base.tower
        config = self._config(base)
        undo.append(_restorer(tower))
        with _quiet():
            model = peft.get_peft_model(tower, config)
        if config.is_prompt_learning:
            undo.append(lambda: base.towers.update({name: tower}))
            base.towers[name] = _Prompted(model, tower, config.num_virtual_tokens)
        return model

    def _config(self, base: Base) -> Any:
        classes = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        if self.kind not in classes:
            raise SettingError(f"PEFT method {self.kind!r} is unknown. {near(self.kind, classes)}")
        options = dict(self.options)
        if self.targets:
            owners = [path.rpartition(".")[0] for path in base.choose(self.targets)]
            modules = [owner.removeprefix(f"{base.tower_name}.") for owner in owners]
            options["target_modules"] = list(dict.fromkeys(modules))
        with _quiet():
            return classes[self.kind](**options)


class _Prompted(nn.Module):
    """PEFT's model with a soft prompt, whose positions don't come out."""

    def __init__(self, model: nn.Module, tower: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        self.config: Any = tower.config

    def forward(self, **inputs: Any) -> Any:
        with _quiet():  # token types are left out, with a warning a step
            state = self.model(**inputs)
        state.last_hidden_state = state.last_hidden_state[:, self.length :]
        return state


def saved_by_peft(model: Any) -> Tensors:
    """The tensors that PEFT's `save_pretrained` writes, copied."""
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().clone() for name, value in found.items()}


def _quiet() -> Any:
    """Without warnings: PEFT's are of choices made here on purpose, such as unsaved projections."""
    return warnings.catch_warnings(action="ignore")


def _restorer(tower: nn.Module) -> Callable[[], None]:
    """What puts a tower's modules, their attributes and flags back as they are now."""
    modules = [(m, dict(m._modules), set(vars(m)), m.training) for m in tower.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in tower.parameters()]

    def restore() -> None:
        for module, children, names, training in modules:
            module._modules.clear()
            module._modules.update(children)
            for name in set(vars(module)) - names:
                delattr(module, name)
            module.training = training
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = None

    return restore


EXAMPLE = PeftPeer(options={"r": 2})

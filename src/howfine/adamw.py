"""AdamW that can train bfloat16 parameters: what torch's rounds away, this one keeps on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from howfine.errors import SettingError

# Options of torch's that the steps here do not know.
_UNKNOWN = ("maximize", "amsgrad", "capturable", "differentiable")


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019), with stochastic rounding for bfloat16 parameters.

    A bfloat16 has eight significant bits: a step of 0.01 from 5.0 is rounded away however often it
    is made, and so are the small changes of the moments. Here parameter and moments are rounded up
    or down at random, in proportion to how near each is (Gupta et al. 2015, section 3), so that
    the mean is exact. The draws depend on the step and the parameter's place alone: several
    processes stay alike, and a resumed training goes on as it would have. Parameters of other
    formats are torch's own affair.

    Raises SettingError for options of torch's that bfloat16 parameters are not stepped with here:
    maximize, amsgrad, capturable, differentiable.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(p.dtype == torch.bfloat16 for group in self.param_groups for p in group["params"]):
            # A gradient scaler then leaves out steps that overflow, which it else trusts torch's
            # fused step to do.
            self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, which calls it for each group it is made with."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        halves = any(parameter.dtype == torch.bfloat16 for parameter in group["params"])
        odd = [name for name in _UNKNOWN if group[name]]
        if halves and odd:
            raise SettingError(
                f"AdamW: {odd[0]} is not made for bfloat16 parameters; leave it out, or keep the "
                "parameters in float32"
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`, if given, evaluates the model again and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        halves: list[tuple[Tensor, Tensor]] = []
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.dtype != torch.bfloat16 or parameter.grad is None:
                    continue
                self._step(parameter, group, place)
                halves.append((parameter, parameter.grad))
                parameter.grad = None
        super().step()
        for parameter, gradient in halves:
            parameter.grad = gradient
        return loss

    @torch.no_grad()
    def _step(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        """Algorithm 2 of the paper in float32, on what is stored in bfloat16."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2), lr = int(state["step"]), group["betas"], float(group["lr"])
        gradient: Tensor = parameter.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        # One draw for all three: each is right on average, and nothing is computed of two of them.
        noise = _noise(parameter, step, place)
        state["exp_avg"].copy_(stochastic(mean, noise))
        state["exp_avg_sq"].copy_(stochastic(square, noise))
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        value = parameter.float().mul_(1 - lr * group["weight_decay"])
        value.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
        parameter.copy_(stochastic(value, noise))


def stochastic(values: Tensor, noise: Tensor) -> Tensor:
    """float32 values as one of the two neighbouring bfloat16s, the mean over noise being exact.

    `noise` is int32, uniform in 0 to 2^16 - 1, of the values' shape. A bfloat16 is the upper half
    of a float32's bits: what the lower half and the noise carry over decides.
    """
    bits = values.view(torch.int32).add(noise)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _noise(like: Tensor, step: int, place: int) -> Tensor:
    """Uniform int32 in 0 to 2^16 - 1 of the shape and on the device of `like`."""
    if like.device.type != "cpu":
        seeded = torch.Generator(like.device).manual_seed((step << 20) + place)
        return torch.randint(
            1 << 16, like.shape, generator=seeded, device=like.device, dtype=torch.int32
        )
    count = like.numel()
    stream = np.random.SFC64([step, place])
    words = stream.random_raw((count + 3) // 4).view(np.uint16)[:count]
    return torch.from_numpy(words.astype(np.int32)).view(like.shape)

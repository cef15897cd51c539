"""AdamW on bfloat16 parameters: where torch's stands still, the mean goes on exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from howfine.adamw import AdamW, stochastic
from howfine.errors import SettingError


def trained(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype, steps: int, size: int = 4000
) -> Tensor:
    """Scores from 5 after so many steps of a rate far below bfloat16's resolution there."""
    scores = nn.Parameter(torch.full((size,), 5.0, dtype=dtype))
    optimizer = kind([scores], lr=1e-3, weight_decay=0.0)
    numbers = torch.Generator().manual_seed(0)
    for _ in range(steps):
        scores.grad = (1 + torch.randn(size, generator=numbers)).to(dtype)
        optimizer.step()
    return scores.detach().float()


def test_small_steps_add_up_as_in_float32() -> None:
    exact = trained(torch.optim.AdamW, torch.float32, 400)
    assert (5 - exact).mean() > 0.2
    assert (trained(torch.optim.AdamW, torch.bfloat16, 400) == 5).all()
    found = trained(AdamW, torch.bfloat16, 400)
    assert (5 - found).mean() == pytest.approx(float((5 - exact).mean()), rel=0.01)


def test_a_second_moment_forgets() -> None:
    """After a large gradient long ago, small ones move as far as they do in float32."""

    def moved(kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> float:
        value = nn.Parameter(torch.zeros(2000, dtype=dtype))
        optimizer = kind([value], lr=1e-3, weight_decay=0.0)
        for step in range(3000):
            value.grad = torch.full_like(value, 30.0 if step == 0 else 1.0)
            optimizer.step()
        return float(value.detach().float().mean())

    exact = moved(torch.optim.AdamW, torch.float32)
    assert moved(torch.optim.AdamW, torch.bfloat16) != pytest.approx(exact, rel=0.5)
    assert moved(AdamW, torch.bfloat16) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_a_first_moment_follows(beta: float) -> None:
    """Where it is rounded to the nearest, one of 0.99 stops short of its mean."""
    value = nn.Parameter(torch.zeros(2000, dtype=torch.bfloat16))
    optimizer = AdamW([value], lr=1e-3, betas=(beta, 0.999))
    exact = 0.0
    for step in range(1500):
        gradient = 1.0 if step < 50 else 0.5
        value.grad = torch.full_like(value, gradient)
        optimizer.step()
        exact += (1 - beta) * (gradient - exact)
    mean = float(optimizer.state[value]["exp_avg"].float().mean())
    assert mean == pytest.approx(exact, rel=0.01)


def test_a_gradient_scaler_leaves_out_a_step_that_overflows() -> None:
    value = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([value], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (torch.inf, 4.0):
        scaler.scale(torch.zeros(()))  # what makes its scale
        value.grad = torch.full_like(value, gradient)
        scaler.step(optimizer)
        scaler.update()
        assert torch.isfinite(value).all()
        assert (value == 1).all() == (gradient == torch.inf)
    # What was stepped with is the gradient, not its multiple.
    assert float(optimizer.state[value]["exp_avg"].float().mean()) < 1.0


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_what_it_does_not_know_is_refused(option: str) -> None:
    value = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(SettingError, match=f"{option} is not made for bfloat16"):
        AdamW([value], **{option: True})
    AdamW([nn.Parameter(torch.ones(4))], **{option: True})


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    numbers = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=numbers)
    shape = (2000, 500)
    noise = torch.randint(0, 2**16, shape, generator=numbers, dtype=torch.int32)
    drawn = stochastic(values.expand(shape).contiguous(), noise)
    assert drawn.dtype == torch.bfloat16
    assert ((drawn.float() - values).abs() <= values.abs() * 2**-7).all()
    assert ((drawn.float().mean(0) - values).abs() <= values.abs() * 2**-7 / 2000**0.5 * 2.5).all()
    exact = values.bfloat16().float()
    assert (stochastic(exact.expand(shape).contiguous(), noise).float() == exact).all()


def test_other_formats_are_torchs_own() -> None:
    assert torch.equal(
        trained(AdamW, torch.float32, 20), trained(torch.optim.AdamW, torch.float32, 20)
    )


def test_a_resumed_optimiser_goes_on_as_it_would_have() -> None:
    def begun() -> tuple[nn.Parameter, AdamW]:
        scores = nn.Parameter(torch.full((50,), 5.0, dtype=torch.bfloat16))
        return scores, AdamW([scores], lr=1e-2)

    def go(scores: nn.Parameter, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            scores.grad = torch.full_like(scores, 1.0 + step)
            optimizer.step()

    one, first = begun()
    go(one, first, range(10))
    two, second = begun()
    go(two, second, range(4))
    three, third = begun()
    three.data.copy_(two.data)
    third.load_state_dict(second.state_dict())
    torch.rand(3)  # whatever else drew random numbers
    go(three, third, range(4, 10))
    assert torch.equal(one, three)
    assert len(one.detach().unique()) > 1

"""2:4 matrices as semi-structured tensors: which ones go, and what torch makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModel

import howfine
from howfine.errors import SettingError
from howfine.merge import merge
from howfine.method import method
from howfine.semi_structured import semi_structured
from tiny import fit_a_little, tiny_base


def there_and_back(weight: Tensor) -> Tensor:
    """What torch's format keeps of a matrix: its conversion runs on a CPU, its kernels don't."""
    return sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(weight)
    )


def merged(tmp_path: Path, granularity: str = "2:4") -> nn.Module:
    """A merged tiny BERT (64 wide, so that the kernels take its matrices)."""
    base = tiny_base("bert", hidden_size=64, intermediate_size=128)
    fitted = fit_a_little(base, method("mask", granularity=granularity))
    delta = fitted.delta()
    fitted.change.remove()
    model: nn.Module = AutoModel.from_pretrained(merge(delta, tmp_path / "merged", base))
    return model.half().eval()


def test_the_masked_matrices_of_a_merged_model_go_and_lose_nothing(tmp_path: Path) -> None:
    model = merged(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = howfine.semi_structured(model, there_and_back)
    assert len(names) == 2 * 6
    assert all(name.startswith("encoder.layer.") for name in names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(model.get_submodule(name).weight.requires_grad for name in names)


def test_other_matrices_stay(tmp_path: Path) -> None:
    """One with three entries of some four on, one of an odd shape, one that is nothing but 0."""
    model = merged(tmp_path)
    with torch.no_grad():
        model.get_parameter("encoder.layer.0.attention.self.query.weight")[5, 8:11] = 1
        model.get_parameter("encoder.layer.1.output.dense.weight").zero_()
    model.odd = nn.Linear(6, 3).half()
    names = semi_structured(model, there_and_back)
    assert len(names) == 2 * 6 - 2
    assert "odd" not in names


def test_what_cannot_be_is_told_and_changes_nothing(tmp_path: Path) -> None:
    model = merged(tmp_path)
    kept = dict(model.named_parameters())
    with pytest.raises(SettingError, match="on cpu, and torch has semi-structured kernels for"):
        semi_structured(model)
    with pytest.raises(SettingError, match=r"is torch\.float32, expected float16 or bfloat16"):
        semi_structured(model.float(), there_and_back)
    assert all(value is kept[name] for name, value in model.named_parameters())
    dense = AutoModel.from_config(tiny_base("bert").config)
    with pytest.raises(SettingError, match="tune with a 2:4 mask"):
        semi_structured(dense.half(), there_and_back)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpus_kernels_give_the_same_outputs(tmp_path: Path) -> None:
    model = merged(tmp_path).cuda()
    ids = torch.randint(5, 60, (4, 16), device="cuda")
    with torch.inference_mode():
        dense = model(input_ids=ids)[0]
        semi_structured(model)
        assert torch.allclose(model(input_ids=ids)[0], dense, atol=2e-2)

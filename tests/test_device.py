"""Autocast of a training step, and the attention that a CPU computes in float32 inside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from open_pisces import device
from open_pisces.bench import cpu_attention
from open_pisces.device import autocast

CPU = torch.device("cpu")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_attention_is_float32_and_matrix_products_are_bfloat16() -> None:
    q, k, v = (draw(2, 4, length, 16).bfloat16().requires_grad_() for length in (6, 5, 5))
    keep = torch.tensor([True, True, False, True, True]).expand(2, 1, 6, 5)
    with autocast(CPU, True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        assert nn.Linear(16, 8)(out).dtype == torch.bfloat16  # autocast is on again
    assert out.dtype == torch.float32
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=keep)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 for tensor in (q, k, v))


def test_a_mask_of_numbers_and_the_scale_are_kept() -> None:
    q, k, v = (draw(1, 2, 4, 8).bfloat16() for _ in range(3))
    mask = draw(1, 2, 4, 4)
    with autocast(CPU, True):
        out = F.scaled_dot_product_attention(q, k, v, mask.bfloat16(), scale=0.3)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.bfloat16().float(), scale=0.3)
    assert torch.equal(out, expected)


def test_without_bfloat16_nothing_is_changed() -> None:
    q = draw(1, 2, 4, 8).double()
    with autocast(CPU, False):
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.float64
        assert nn.Linear(8, 8)(q.float()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_accelerators_keep_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Float32Attention", lambda: pytest.fail("entered"))
    with autocast(torch.device("cuda"), True):
        pass


def test_its_bench_compares_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "PICTURES", 2)
    found = cpu_attention.run(2)
    assert found["ratio"] > 0 and found["figures"]["pictures"] == 2

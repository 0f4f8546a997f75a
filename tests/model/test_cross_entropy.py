"""The cross-entropy that never has all its logits: equal to the plain one, and what it must not allocate."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_pisces.model import cross_entropy
from open_pisces.model.cross_entropy import KernelError, head_cross_entropy, linear_cross_entropy
from open_pisces.plan.live_bytes import LiveBytes

K, D, V = 37, 8, 101


def inputs(dtype: torch.dtype = torch.float64, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(k, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (k,), generator=draw)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")


def with_grads(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss * 0.37, of)


@pytest.mark.parametrize("chunk", [0, 1, 5, 36, K, 1000])
def test_loss_and_gradients_equal_the_plain_ones(chunk: int) -> None:
    hidden, weight, labels = inputs()
    expected = with_grads(plain(hidden, weight, labels), hidden, weight)
    found = with_grads(linear_cross_entropy(hidden, weight, labels, chunk), hidden, weight)
    assert found[0].dtype == torch.float64
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_chunk_is_as_large_as_the_bound_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    monkeypatch.setattr(cross_entropy, "LOGITS", 10 * V + 3)
    with LiveBytes() as live:
        loss = linear_cross_entropy(hidden, weight, labels)
    assert live.largest == 10 * V  # 37 places in four parts: 10, 10, 10, 7
    torch.testing.assert_close(loss, plain(hidden, weight, labels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_honoured(dtype: torch.dtype, chunk: int) -> None:
    hidden, weight, labels = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, by_chunk = plain(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels, chunk)
    expected, found = with_grads(loss, hidden, weight), with_grads(by_chunk, hidden, weight)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for a, b in zip(found[1:], expected[1:], strict=True):
        # One rounding to bfloat16 of a gradient of the logits, and one of each chunk's product.
        assert (a - b).abs().max() < 0.01 * b.abs().max()


def test_autocast_computes_in_its_dtype_but_leaves_float64_alone() -> None:
    for dtype, products in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        hidden, weight, labels = inputs(dtype)
        with torch.autocast("cpu", torch.bfloat16), _Products() as seen:
            linear_cross_entropy(hidden, weight, labels, 5)
        assert seen.dtypes == {products}


class _Products(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name.removeprefix("aten::").rstrip("_") in ("mm", "addmm"):
            self.dtypes |= {arg.dtype for arg in args}
        return func(*args, **(kwargs or {}))


def test_chunks_add_up_in_the_dtype_of_the_weight() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True)
    labels = torch.randint(2, (4096,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 1)
    (found,) = torch.autograd.grad(loss, weight)  # sums of +-0.5, exact in float32, not in bfloat16
    torch.testing.assert_close(found[1, 0], 2048.0 - labels.sum(), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_places_make_a_zero_that_ties_both_inputs_to_the_graph(autocast: bool) -> None:
    hidden, weight, labels = inputs(torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and hidden.grad.shape == (0, D)
    assert weight.grad is not None and weight.grad.shape == (V, D) and not weight.grad.any()


def test_a_tied_weight_gets_both_gradients() -> None:
    _, weight, labels = inputs()
    ids = labels.flip(0)
    expected = with_grads(plain(F.embedding(ids, weight).tanh(), weight, labels), weight)
    found = with_grads(linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, labels, 5), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_what_learns_gets_a_gradient() -> None:
    hidden, weight, labels = inputs()
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels), hidden)
    with LiveBytes() as live:
        loss = linear_cross_entropy(hidden, weight.detach(), labels, 1)
    assert live.largest < V * D  # no room for a weight's gradient
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels), weight)
    loss = linear_cross_entropy(hidden.detach(), weight, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_nothing_is_made_for_them(frozen: bool) -> None:
    hidden, weight, labels = inputs()
    if frozen:
        hidden, weight = hidden.detach(), weight.detach()
    with torch.set_grad_enabled(frozen), LiveBytes() as live:
        loss = linear_cross_entropy(hidden, weight, labels, 1)
    assert not loss.requires_grad and live.largest == V  # logits of one place
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach(), rtol=1e-12, atol=1e-12)


def test_the_full_logits_never_exist() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=draw, requires_grad=True)
    weight = torch.randn(1000, 4, generator=draw, requires_grad=True)
    labels = torch.randint(1000, (64,), generator=draw)
    with LiveBytes() as live:
        linear_cross_entropy(hidden, weight, labels, 8).backward()
    assert live.largest == 8 * 1000
    assert live.peak(hidden.grad, weight.grad) < 4 * 64 * 1000  # of all steps together, less than one set of logits
    with LiveBytes() as live:
        plain(hidden, weight, labels).backward()
    assert live.largest == 64 * 1000 and live.peak(hidden.grad, weight.grad) > 8 * 64 * 1000


def test_live_bytes_follow_each_storage_to_its_end() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        first = before + 1  # 4,000 bytes
        second = first * 2  # 8,000
        del first
        second.view(10, 100).mul_(2)  # neither a view nor work in place counts
        before.view(10, 100)
        third = torch.zeros(500) + second[:500]  # 4,000 of the second and 2,000 twice
    assert live.peak() == 8000 and live.peak(second) == 4000 and live.largest == 1000
    assert third.shape == (500,)


def test_backward_runs_once() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):  # rather than gradients scaled twice
        loss.backward()


# -------------------------------------------------------------------------------------------------------- heads


def test_a_head_that_is_more_than_a_matrix_is_called() -> None:
    hidden, _, labels = inputs()
    torch.manual_seed(0)
    head = nn.Linear(D, V).double()
    found = head_cross_entropy(head, hidden, labels)
    torch.testing.assert_close(found, F.cross_entropy(head(hidden), labels, reduction="sum"))
    found.backward()
    assert head.bias.grad is not None and head.bias.grad.any()


def test_a_head_that_is_a_matrix_is_not() -> None:
    hidden, _, labels = inputs()
    head = nn.Linear(D, V, bias=False).double()
    with LiveBytes() as live:
        head_cross_entropy(head, hidden.detach()[:1], labels[:1]).backward()
    assert live.largest == V * D
    torch.testing.assert_close(
        head_cross_entropy(head, hidden, labels), plain(hidden, head.weight, labels), rtol=1e-12, atol=1e-12
    )


# ------------------------------------------------------------------------------------------------ fused kernels


@pytest.mark.parametrize(("kernel", "module"), [("liger", "liger_kernel"), ("cut_cross_entropy", "cut_cross_entropy")])
def test_a_kernel_that_is_not_installed_says_what_to_install(
    kernel: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(KernelError, match=f"pip install {module.replace('_', '-')}.*loss.kernel=chunked"):
        linear_cross_entropy(*inputs(), kernel=kernel)


@pytest.mark.parametrize("kernel", ["liger", "cut_cross_entropy"])
def test_a_kernel_away_from_cuda_says_where_the_tensors_are(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    functional, cut = sys.modules["liger_kernel.transformers.functional"], ModuleType("cut_cross_entropy")
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    functional.liger_fused_linear_cross_entropy = cut.linear_cross_entropy = plain  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match="on cpu: train on a CUDA device, or set loss.kernel=chunked"):
        linear_cross_entropy(*inputs(), kernel=kernel)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "module"), [("chunked", "torch"), ("liger", "liger_kernel"), ("cut_cross_entropy", "cut_cross_entropy")]
)
@pytest.mark.parametrize("k", [1024, 0])
def test_every_kernel_equals_the_plain_loss_on_cuda(kernel: str, module: str, k: int) -> None:
    pytest.importorskip(module)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(k, 256, generator=draw).cuda().requires_grad_()
    weight = (torch.randn(32000, 256, generator=draw) * 0.1).cuda().requires_grad_()
    labels = torch.randint(32000, (k,), generator=draw).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss, fused = plain(hidden, weight, labels), linear_cross_entropy(hidden, weight, labels, 100, kernel=kernel)
    expected, found = with_grads(loss, hidden, weight), with_grads(fused, hidden, weight)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-6)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.linalg.norm(a - b) <= 0.02 * torch.linalg.norm(b)


@pytest.mark.gpu
def test_cut_cross_entropy_refuses_32_bits() -> None:
    pytest.importorskip("cut_cross_entropy")
    hidden, weight, labels = (tensor.detach().cuda() for tensor in inputs(torch.float32))
    with pytest.raises(KernelError, match="16 bits.*train.precision=bf16"):
        linear_cross_entropy(hidden, weight, labels, kernel="cut_cross_entropy")

"""Cross-entropy behind a linear layer whose logits never all exist: at 128k words they would outweigh the LLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from open_pisces.device import upcast
from open_pisces.errors import PiscesError

LOGITS = 64 * 2**20
"""Logits that exist at a time, 256 MB in float32; smaller chunks would make the matrix products slower."""
PACKAGES = {"liger": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}
"""What has to be installed for each fused kernel."""


class KernelError(PiscesError):
    """A fused kernel that cannot run here; the message names its package and the remedy."""


def head_cross_entropy(head: nn.Module, hidden_KD: Tensor, labels_K: Tensor, kernel: str = "chunked") -> Tensor:
    """`linear_cross_entropy` of a language model's head.

    A head that is more than a matrix (a bias, an adapter, a shard that gathers itself when it is called) is called.
    """
    # Exactly nn.Linear: a PEFT layer is a subclass whose weight alone would leave the adapter out.
    if type(head) is nn.Linear and head.bias is None:
        return linear_cross_entropy(hidden_KD, head.weight, labels_K, kernel=kernel)
    return F.cross_entropy(upcast(head(hidden_KD)), labels_K, reduction="sum")


def linear_cross_entropy(
    hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor, chunk: int = 0, kernel: str = "chunked"
) -> Tensor:
    """The cross-entropy of ``hidden_KD @ weight_VD.T`` against labels, summed over the places.

    Under autocast the products are in its dtype, the softmax in float32; a weight gradient is added up in the
    weight's own dtype. The gradients are made on the way and scaled in place later: backward runs once.

    Args:
        hidden_KD: what predicts, only at places that are supervised; K may be 0.
        weight_VD: the head, which may be the embedding too.
        labels_K: int64, each in [0, V).
        chunk: places whose logits exist at a time; 0 takes as many as `LOGITS` allows.
        kernel: ``chunked``, or a fused one (`LossConfig.kernel`), which is approximate to the rounding of bfloat16.

    Returns:
        A scalar, float64 for float64 inputs, otherwise float32.

    Raises:
        KernelError: if the fused kernel is not installed, or cannot run on this device or in this dtype.
    """
    if kernel != "chunked":
        run = _fused(kernel, _cast(hidden_KD))
        if len(labels_K):
            return run(_cast(hidden_KD), _cast(weight_VD), labels_K, reduction="sum")
    if not chunk:
        parts = max(1, -(-len(labels_K) * len(weight_VD) // LOGITS))
        chunk = max(1, -(-len(labels_K) // parts))  # equal ones, rather than a small last one
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_KD, weight_VD)]
    if not any(learns):
        return _sum_chunks(hidden_KD, weight_VD, labels_K, chunk)
    return _Chunked.apply(hidden_KD, weight_VD, labels_K, chunk, learns)


class _Chunked(torch.autograd.Function):
    """The loss with both gradients; they need the softmax, so they are taken while a chunk's is there."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, labels_K: Tensor, chunk: int, learns: list[bool]
    ) -> Tensor:
        grad_KD = torch.empty_like(hidden_KD) if learns[0] else None
        grad_VD = torch.empty_like(weight_VD) if learns[1] else None
        loss = _sum_chunks(hidden_KD, weight_VD, labels_K, chunk, grad_KD, grad_VD)
        ctx.save_for_backward(grad_KD, grad_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_KD, grad_VD = ctx.saved_tensors
        for grad in (grad_KD, grad_VD):
            if grad is not None:
                grad.mul_(upstream)  # in place: another tensor as large as the head is worth avoiding
        return grad_KD, grad_VD, None, None, None


def _sum_chunks(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    labels_K: Tensor,
    chunk: int,
    grad_KD: Tensor | None = None,
    grad_VD: Tensor | None = None,
) -> Tensor:
    """The summed loss; its gradients are written into the tensors given for them."""
    hidden_KD = _cast(hidden_KD)
    weight_VD = _cast(weight_VD)
    loss = torch.zeros((), dtype=torch.promote_types(hidden_KD.dtype, torch.float32), device=hidden_KD.device)
    for start in range(0, max(len(labels_K), 1), chunk):
        at = slice(start, start + chunk)
        # log_softmax in float32 from logits in the dtype of the products: what autocast does to F.cross_entropy.
        labels_K1 = labels_K[at, None]
        log_KV = torch.log_softmax(hidden_KD[at] @ weight_VD.T, -1, dtype=loss.dtype)
        right_K1 = log_KV.gather(-1, labels_K1)
        loss -= right_K1.sum()
        if grad_KD is None and grad_VD is None:
            continue
        # The gradient of the logits: the probabilities, less 1 at the right word.
        error_KV = log_KV.exp_().scatter_(-1, labels_K1, right_K1.expm1()).to(weight_VD.dtype)
        del log_KV
        if grad_KD is not None:
            grad_KD[at] = error_KV @ weight_VD
        if grad_VD is not None:
            _add_product(grad_VD, error_KV.T, hidden_KD[at], first=start == 0)
    return loss


def _add_product(into: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """``into += left @ right``; the first time over whatever is there."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, beta=0 if first else 1)
    elif first:
        into.copy_(left @ right)
    else:
        into.add_(left @ right)


def _cast(tensor: Tensor) -> Tensor:
    """What autocast would do to an operand of a matrix product."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _fused(kernel: str, hidden_KD: Tensor) -> Callable[..., Tensor]:
    """A fused kernel, called as ``run(hidden_KD, weight_VD, labels_K, reduction=...)``."""
    instead = "or set loss.kernel=chunked"
    try:
        run = _liger() if kernel == "liger" else _cut()
    except ImportError as error:
        install = f"pip install {PACKAGES[kernel]}"
        raise KernelError(f"loss.kernel={kernel} needs {PACKAGES[kernel]} ({error}): {install}, {instead}") from error
    if hidden_KD.device.type != "cuda":
        found = f"{PACKAGES[kernel]} runs on CUDA, the tensors are on {hidden_KD.device}"
        raise KernelError(f"loss.kernel={kernel}: {found}: train on a CUDA device, {instead}")
    if kernel == "cut_cross_entropy" and hidden_KD.dtype not in (torch.bfloat16, torch.float16):
        found = f"{PACKAGES[kernel]} computes in 16 bits, the tensors are {hidden_KD.dtype}"
        raise KernelError(f"loss.kernel={kernel}: {found}: set train.precision=bf16, {instead}")
    return run


def _liger() -> Callable[..., Tensor]:
    from functools import partial

    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # By default it adds a weight gradient up in the dtype of the cast weight.
    return partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32)


def _cut() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy as run

    return run

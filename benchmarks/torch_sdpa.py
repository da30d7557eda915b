"""torch's F.scaled_dot_product_attention, one backend at a time, on the operands that the JAX peers get.

What is timed is the time on the GPU between two CUDA events around a call, median of 20. Forward: the call with
gradients off. Backward: `torch.autograd.grad` of query, key and value through a graph that was made before, so all
kernels of the backward pass and none of the forward. Matrix products queued in front let the host run ahead, so that
the events do not wait for Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import timing
from .cases import Case


def attention(case: Case, backend: str) -> Callable[..., Any]:
    """Attention of torch tensors [B, T, N, H]; `backend` names a member of torch.nn.attention.SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))  # views: nothing is copied
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = scaled_dot_product_attention(
                *heads_first, is_causal=case.causal, enable_gqa=case.q_heads != case.kv_heads
            )
        return out.transpose(1, 2)

    return call


def prepare(direction: str, attend: Callable[..., Any], arrays: Sequence[jax.Array]):
    """The call to time, its operands, and the output if the call does not give it."""
    import torch

    *operands, cotangent = (torch.from_dlpack(x) for x in arrays)
    if direction == "fwd":
        return torch.no_grad()(attend), operands, None
    leaves = [x.detach().requires_grad_() for x in operands]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True), [], out


def array(x: Any) -> jax.Array:
    return jnp.from_dlpack(x.detach().contiguous())


def kernel_times(call: Callable[..., Any], *operands: Any, repeats: int = timing.REPEATS) -> list[float]:
    """Times on the GPU in ms between two CUDA events around a call."""
    import torch

    busy = torch.ones((8192, 8192), dtype=torch.bfloat16, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(10):
        torch.matmul(busy, busy)
    for start, end in events:
        start.record()
        call(*operands)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wait(_: Any = None) -> None:
    import torch

    torch.cuda.synchronize()

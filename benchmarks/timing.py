"""How long a jitted call takes on the device, and how long the caller waits for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 20


def kernel_ms(call: Callable[..., Any], *operands: Any, repeats: int = REPEATS) -> float | None:
    """Median over `repeats` of the sum of a jitted call's kernel times, by CUPTI; None where JAX offers none."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler
    except ImportError:
        return None
    _, runs = profiler.measure(call, aggregate=True, iterations=repeats)(*operands)
    return statistics.median(runs) if runs else None


def wall_ms(call: Callable[..., Any], *operands: Any, repeats: int = REPEATS, budget_s: float = 0.3) -> float:
    """Time per call of calls queued one after the other, median of five rounds; fewer calls where they are long."""

    def round_s(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = call(*operands)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    calls = max(1, min(repeats, int(budget_s / 5 / round_s(1))))
    return statistics.median(round_s(calls) for _ in range(5)) * 1e3


def warm_up(call: Callable[..., Any], *operands: Any, repeats: int = 3) -> None:
    for _ in range(repeats):
        out = call(*operands)
    jax.block_until_ready(out)


def ceilings() -> dict[str, float]:
    """What this GPU does at most, on random data: a bf16 matrix product of 8192^3, and a copy from device to device."""
    if jax.default_backend() != "gpu":
        return {}
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    source = jax.random.normal(jax.random.key(2), (2**29,), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    for call, operands in ((product, (a, b)), (copy, (source,))):
        warm_up(call, *operands, repeats=10)
    return {
        "matmul_tflops": 2 * 8192**3 / wall_ms(product, a, b) / 1e9,
        "copy_tbs": 2 * source.nbytes / wall_ms(copy, source) / 1e9,
    }

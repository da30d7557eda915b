"""How long a jitted call takes on the device, and how long the caller waits for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jax_flash import extension

REPEATS, TURNS = 20, 4
wait = jax.block_until_ready
array = jnp.asarray  # a result as check takes it


def prepare(direction: str, attention: Callable[..., Any], arrays: Sequence[jax.Array]):
    """The jitted call to time, its operands, and the output if the call does not give it.

    The attention is an operand too: as constants, the arrays that it holds would take minutes to compile.
    """
    *operands, cotangent = arrays
    attention = attention if isinstance(attention, jax.tree_util.Partial) else jax.tree_util.Partial(attention)
    if direction == "fwd":
        return jax.jit(lambda attend, *x: attend(*x)), [attention, *operands], None
    out, pullback = jax.jit(lambda attend, *x: jax.vjp(attend, *x))(attention, *operands)
    return jax.jit(lambda pull, g: pull(g)), [pullback, cotangent], out


def kernel_times(call: Callable[..., Any], *operands: Any, repeats: int = REPEATS) -> list[float]:
    """The sum of a jitted call's kernel times in ms, by CUPTI, of each of `repeats`; none where JAX offers none."""
    if jax.default_backend() != "gpu":
        return []
    try:
        from jax.experimental.mosaic.gpu import profiler
    except ImportError:
        return []
    return profiler.measure(call, aggregate=True, iterations=repeats)(*operands)[1] or []


def wall_times(
    call: Callable[..., Any], *operands: Any, rounds: int = 5, repeats: int = REPEATS, budget_s: float = 0.3, wait=wait
) -> list[float]:
    """Time in ms per call of calls queued one after the other, by round; fewer calls where they are long."""

    def round_s(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = call(*operands)
        wait(out)
        return (time.perf_counter() - start) / calls

    calls = max(1, min(repeats, int(budget_s / 5 / round_s(1))))
    return [round_s(calls) * 1e3 for _ in range(rounds)]


def warm_up(call: Callable[..., Any], *operands: Any, repeats: int = 3, wait=wait) -> None:
    for _ in range(repeats):
        out = call(*operands)
    wait(out)


@dataclasses.dataclass
class Stopwatch:
    """The times of a call. `library` has its kernel_times and wait: this module, or torch_sdpa."""

    call: Callable[..., Any]
    operands: Sequence[Any]
    library: Any
    kernels: list[float] = dataclasses.field(default_factory=list)
    walls: list[float] = dataclasses.field(default_factory=list)

    def take(self) -> None:
        self.kernels += self.library.kernel_times(self.call, *self.operands, repeats=REPEATS // TURNS)
        self.walls += wall_times(self.call, *self.operands, rounds=2, wait=self.library.wait)

    @property
    def line(self) -> dict[str, float | None]:
        kernel = statistics.median(self.kernels) if self.kernels else None
        return {"kernel_ms": kernel, "wall_ms": statistics.median(self.walls)}


@contextlib.contextmanager
def empty_kernel_cache() -> Iterator[None]:
    """No kernel is on disk (those this process has already loaded are not compiled again)."""
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {extension.CACHE_DIR: folder}):
            extension.configure(extension.native())
            yield
    finally:
        extension.configure(extension.native())


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
        "matmul_tflops": 2 * 8192**3 / statistics.median(wall_times(product, a, b)) / 1e9,
        "copy_tbs": 2 * source.nbytes / statistics.median(wall_times(copy, source)) / 1e9,
    }

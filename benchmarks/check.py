"""Is an answer right, and how far off: float64 on the host, for the first key head and the queries that share it."""

from __future__ import annotations

import functools

import jax
import numpy as np

from .cases import Case

ROWS = 128
BLOCK = 256  # queries at a time: of 131072 keys, their weights are 256 MiB
TOLERANCE = {"bf16": 2e-2, "f16": 4e-3, "f32": 1e-5, "fp8": 8e-2, "quantised": 8e-2}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first_head(arrays, heads: int, rows: int):
    """The last `rows` positions of the first `heads` heads of [B, T, N, H], of the first batch entry."""
    return [x[0, -rows:, :heads] for x in arrays]


def exact(case: Case, arrays, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Results and gradients of the last `rows` queries, and of the keys that no other query sees."""
    group = case.q_heads // case.kv_heads
    rows = min(rows, case.q_len)
    q, k, v, g = arrays
    q, g, k, v = (
        np.asarray(x).astype(np.float64)
        for x in (*_first_head((q, g), group, rows), *_first_head((k, v), 1, case.kv_len))
    )
    q, g, k, v = q.swapaxes(0, 1), g.swapaxes(0, 1), k[:, 0], v[:, 0]
    key = np.arange(case.kv_len)[None, :]
    scale = case.head_dim**-0.5
    out, dq, dk, dv = np.zeros_like(g), np.zeros_like(q), np.zeros_like(k[-rows:]), np.zeros_like(v[-rows:])
    for first in range(0, rows, BLOCK):
        some = slice(first, first + BLOCK)
        position = np.arange(case.kv_len - rows, case.kv_len)[some, None]
        hidden = np.zeros((len(position), case.kv_len), bool)
        if case.causal or case.window is not None:
            hidden |= key > position
        if case.window is not None:
            hidden |= key < position - case.window
        if case.documents:
            length = case.q_len // case.documents
            hidden |= key // length != position // length
        weights = np.where(hidden, -np.inf, q[:, some] @ k.T * scale)
        weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, some] = weights @ v
        if case.direction == "bwd":
            delta = (out[:, some] * g[:, some]).sum(axis=-1, keepdims=True)
            slopes = weights * (g[:, some] @ v.T - delta) * scale
            dq[:, some] = slopes @ k
            dk += (slopes[..., -rows:].swapaxes(1, 2) @ q[:, some]).sum(axis=0)
            dv += (weights[..., -rows:].swapaxes(1, 2) @ g[:, some]).sum(axis=0)
    found = {"out": out.swapaxes(0, 1)}
    if case.direction == "bwd":
        found["dq"] = dq.swapaxes(0, 1)
        if case.causal or rows == case.q_len:
            found |= {"dk": dk[:, None], "dv": dv[:, None]}
    return found


def errors(case: Case, right: dict[str, np.ndarray], results: dict[str, jax.Array]) -> dict[str, float]:
    """Relative error of each of `results` (out, dq, dk, dv) in the l2 norm."""
    found = {}
    for name in right.keys() & results.keys():
        (mine,) = _first_head((results[name],), *right[name].shape[1::-1])
        found[name] = float(
            np.linalg.norm(np.asarray(mine).astype(np.float64) - right[name]) / np.linalg.norm(right[name])
        )
    return found


def worst(case: Case, found: dict[str, float]) -> float:
    """The largest of the errors; raises if it is out of bounds."""
    name = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    if not found[name] < TOLERANCE[case.precision or case.dtype]:
        raise AssertionError(f"relative error of {name} {found[name]:.1e}")
    return found[name]

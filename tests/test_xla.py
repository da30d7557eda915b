"""The XLA path against the oracle: values and every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_flash import xla
from jax_flash.spec import AttentionSpec, Operands


def everything(rng, dtype):
    """One call with every feature at once."""
    b, t, s, n, k, h, hv = 2, 37, 53, 4, 2, 8, 16
    spec = AttentionSpec(scale=0.3, causal=True, window_left=20, window_right=3, softcap=2.0, dropout_rate=0.2)
    q, key, v = (rng.standard_normal(shape).astype(dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, hv)))
    q[0, 30:], key[1, 41:], v[1, 41:] = np.nan, np.inf, np.nan
    operands = Operands(
        q_offset=np.array([3, 12], np.int32),
        q_segment_ids=rng.integers(0, 2, (b, t), np.int32),
        kv_segment_ids=rng.integers(0, 2, (b, s), np.int32),
        q_lengths=np.array([30, t], np.int32),
        kv_lengths=np.array([s, 41], np.int32),
        mask=rng.random((1, n, 1, s)) < 0.8,
        bias=rng.standard_normal((b, 1, t, s)).astype(np.float32),
        alibi_slopes=rng.random((1, n)).astype(np.float32) / 8,
        sinks=rng.standard_normal(n).astype(np.float32),
        dropout_seed=np.array([[123456789, 987654321]], np.uint32),
        dropout_batch=np.arange(b, dtype=np.int32),
        dropout_head=np.arange(n, dtype=np.int32),
    )
    return spec, q, key, v, operands, rng.standard_normal((b, t, n, hv)).astype(dtype), rng.standard_normal((b, n, t))


@pytest.mark.parametrize("tile", [8, 512])
def test_every_feature_at_once(monkeypatch, tile):
    monkeypatch.setattr(xla, "_tilings", lambda heads, t, s: (xla.Tiling(t, min(t, tile)), xla.Tiling(s, min(s, tile))))
    spec, *arrays, operands, dout, dlse = everything(np.random.default_rng(0), np.float32)
    operands = jax.tree.map(jnp.asarray, operands)
    dlse = jnp.asarray(dlse, jnp.float32)
    expected = oracle.attention(spec, *arrays, operands)
    truth = oracle.gradients(spec, *arrays, operands, dout, dlse)
    dout[0, 30:] = np.nan

    out, lse = jax.jit(xla.forward, static_argnums=0)(spec, *arrays, operands)
    grads = jax.jit(xla.backward, static_argnums=0)(spec, *arrays, operands, out, lse, dout, dlse)
    dbias = jax.jit(xla.bias_gradient, static_argnums=0)(spec, *arrays, operands, out, lse, dout, dlse)
    for got, want in zip((out, lse, *grads, dbias), (*expected, *truth[:4]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    def differentiable(q, k, v, bias, sinks):
        return xla.attention(spec, q, k, v, operands._replace(bias=bias, sinks=sinks))

    value, vjp = jax.vjp(jax.jit(differentiable), *arrays, operands.bias, operands.sinks)
    for got, want in zip((*value, *vjp((jnp.asarray(dout), dlse))), (*expected, *truth), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

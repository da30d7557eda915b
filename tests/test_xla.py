"""The XLA path against the oracle: values and every gradient, over the case table and the whole space of features.

`JAX_FLASH_EXAMPLES` sets how many calls the property tests draw.
"""

from __future__ import annotations

import os
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_flash import xla

EXAMPLES = int(os.environ.get("JAX_FLASH_EXAMPLES", "100"))


@st.composite
def any_case(draw) -> cases.Case:
    return cases.any_case(lambda options: draw(st.sampled_from(options)), dtypes=("float32",))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of at most 64, so that short sequences have several."""
    original = xla._tilings
    monkeypatch.setattr(xla, "_tilings", lambda heads, t, s: tuple(_limit(x) for x in original(heads, t, s)))


def _limit(tiles: xla.Tiling) -> xla.Tiling:
    return xla.Tiling(tiles.length, min(tiles.size, 64))


def compiled(function, *arrays):
    """The function's results; compiled without the optimisations that would take most of a test's time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*arrays).compile(compiler_options=options)(*arrays)


def pair(inputs: cases.Inputs) -> dict[str, Any]:
    """Results of forward, backward and bias_gradient."""
    spec = inputs.spec

    def run(q, k, v, operands, dout, dlse):
        out, lse = xla.forward(spec, q, k, v, operands)
        results = {"out": out, "lse": lse}
        residuals = (out, lse, dout, dlse)
        results |= zip(("dq", "dk", "dv"), xla.backward(spec, q, k, v, operands, *residuals), strict=True)
        if operands.bias is not None:
            results["dbias"] = xla.bias_gradient(spec, q, k, v, operands, *residuals)
        return results

    return compiled(run, *inputs[1:])


def differentiated(inputs: cases.Inputs) -> dict[str, Any]:
    """Results of `attention` and of JAX's derivative of it."""
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in inputs[1:4]))

    def run(q, k, v, operands, dout, dlse):
        def attend(q, k, v, learned):
            q, k, v = (jnp.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k, v))
            return xla.attention(inputs.spec, q, k, v, operands._replace(**learned))

        learned = {name: getattr(operands, name) for name in ("bias", "sinks") if getattr(operands, name) is not None}
        (out, lse), vjp = jax.vjp(attend, q, k, v, learned)
        dq, dk, dv, gradients = vjp((dout, jnp.zeros_like(lse) if dlse is None else dlse))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"d{n}": x for n, x in gradients.items()}

    q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]) for x in inputs[1:4])  # so that gradients have all batch axes
    return compiled(run, q, k, v, *inputs[4:])


@pytest.mark.parametrize("name", cases.CASES)
def test_case(name):
    inputs = cases.CASES[name].inputs()
    cases.check(inputs, **pair(inputs))


DIFFERENTIATED = ("plain", "window, offset", "segment ids, causal", "lengths, causal", "bias of keys", "sinks of empty rows",
                  "lse, sinks", "grouped heads, bias", "no key", "no batch entry", "everything")  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_case_differentiated_by_jax(name):
    inputs = cases.CASES[name].inputs()
    cases.check(inputs, **differentiated(inputs))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 100)
@given(any_case())
def test_any_case(case):
    inputs = case.inputs()
    cases.check(inputs, **pair(inputs))

"""The XLA path against the oracle: values and every gradient, over the case table and the whole space of features.

`JAX_FLASH_PROGRAMS` sets how many programs the property tests draw; 250 make a full run of 1000 calls.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import os
import re
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jax_flash import xla
from jax_flash.spec import AttentionSpec, Operands

PROGRAMS = int(os.environ.get("JAX_FLASH_PROGRAMS", "25"))
DRAWS = 4


@st.composite
def any_case(draw) -> cases.Case:
    return cases.any_case(lambda options: draw(st.sampled_from(options)), dtypes=("float32",))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of at most 32, so that short sequences have several."""
    original = xla._tilings
    monkeypatch.setattr(xla, "_tilings", lambda heads, t, s: tuple(_limit(x) for x in original(heads, t, s)))


def _limit(tiles: xla.Tiling) -> xla.Tiling:
    return xla.Tiling(tiles.length, min(tiles.size, 32))


# Compiled without the optimisations that would take most of a test's time.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@functools.partial(quick_jit, static_argnums=0)
def pair(spec, q, k, v, operands, dout, dlse) -> dict[str, Any]:
    """Results of forward, backward and bias_gradient."""
    out, lse = xla.forward(spec, q, k, v, operands)
    results = {"out": out, "lse": lse}
    residuals = (out, lse, dout, dlse)
    results |= zip(("dq", "dk", "dv"), xla.backward(spec, q, k, v, operands, *residuals), strict=True)
    if operands.bias is not None:
        results["dbias"] = xla.bias_gradient(spec, q, k, v, operands, *residuals)
    return results


@functools.partial(quick_jit, static_argnums=0)
def differentiated(spec, q, k, v, operands, dout, dlse) -> dict[str, Any]:
    """Results of `attention` and of JAX's derivative of it."""
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    q, k, v = (jnp.broadcast_to(x, batch + x.shape[-3:]) for x in (q, k, v))  # so that gradients have all batch axes
    learned = {name: getattr(operands, name) for name in ("bias", "sinks") if getattr(operands, name) is not None}

    def attend(q, k, v, learned):
        return xla.attention(spec, q, k, v, operands._replace(**learned))

    (out, lse), vjp = jax.vjp(attend, q, k, v, learned)
    dq, dk, dv, gradients = vjp((dout, jnp.zeros_like(lse) if dlse is None else dlse.astype(lse.dtype)))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"d{name}": x for name, x in gradients.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_case(name):
    inputs = cases.CASES[name].inputs()
    cases.check(inputs, **pair(*inputs))


DIFFERENTIATED = (
    "plain",
    "window, offset",
    "segment ids, causal",
    "lengths, causal",
    "bias of keys",
    "sinks of empty rows",
    "lse, sinks",
    "grouped heads, bias",
    "no key",
    "no batch entry",
    "everything",
)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_case_differentiated_by_jax(name):
    inputs = cases.CASES[name].inputs()
    cases.check(inputs, **differentiated(*inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_everything_in_another_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        inputs = dataclasses.replace(cases.CASES["everything"], dtype=dtype, bias_dtype=dtype).inputs()
        for results in (pair(*inputs), differentiated(*inputs)):
            cases.check(inputs, **results)
            dtypes = {"lse": "float64" if dtype == "float64" else "float32", "dsinks": "float32"}
            assert {name: str(x.dtype) for name, x in results.items()} == {n: dtypes.get(n, dtype) for n in results}


@pytest.mark.parametrize(
    "name", ["everything", "sinks of empty rows", "lengths, causal", "queries shared by the batch"]
)
def test_case_as_a_public_call(name):
    case = cases.CASES[name]
    inputs = case.inputs()
    cases.check(inputs, **cases.public_results(case, inputs))


@pytest.mark.parametrize(("results_of", "programs"), [(pair, PROGRAMS), (differentiated, PROGRAMS // 4)])
def test_any_case(results_of, programs):
    """Draws programs, and numbers for each several times. Prints a summary (pytest -s)."""
    errors: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)

    # Without shrinking, which would compile hundreds of programs more.
    @settings(
        max_examples=programs,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=[Phase.generate],
    )
    @given(any_case())
    def holds(case):
        for seed in range(case.seed, case.seed + DRAWS):
            inputs = dataclasses.replace(case, seed=seed).inputs()
            for name, ours_and_plain in cases.check(inputs, **results_of(*inputs)).items():
                errors[name].append(ours_and_plain)

    holds()
    print(
        f"\n{results_of.__name__}: {programs} programs, {DRAWS} calls each; error, and that of plain float32 attention"
    )
    print("         largest of all calls   mean of the calls' largest")
    for name, pairs in errors.items():
        print(f"{name:6}", *(f"  {ours:9.2e} {plain:9.2e}" for ours, plain in (np.max(pairs, 0), np.mean(pairs, 0))))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, dx: jax.jvp(f, (x,), (dx,))[1],
        lambda f, x, dx: jax.jvp(jax.grad(f), (x,), (dx,))[1],
        lambda f, x, dx: jax.grad(lambda x: jax.jvp(f, (x,), (dx,))[1])(x),
        lambda f, x, dx: jax.grad(lambda x: jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, jax.grad(f)(x), dx)))(x),
        lambda f, x, dx: jax.jvp(lambda x: jax.jvp(jax.grad(f), (x,), (dx,))[1], (x,), (dx,))[1],
    ],
    ids=["forward", "forward over reverse", "reverse over forward", "reverse over reverse", "third order"],
)
def test_derivatives_of_any_order_and_mode(transform):
    spec = AttentionSpec(0.5, causal=True, softcap=3.0)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 70, 2, 3), "k": (2, 90, 1, 3), "v": (2, 90, 1, 2), "bias": (1, 2, 1, 90), "sinks": (2,)}
    lengths = np.array([60, 90], np.int32)

    def tiled(x):
        operands = Operands(bias=x["bias"], sinks=x["sinks"], kv_lengths=lengths)
        out, lse = xla.attention(spec, x["q"], x["k"], x["v"], operands)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    def plain(x):
        s = 3 * jnp.tanh(0.5 / 3 * jnp.einsum("btnh,bskh->bnts", x["q"], x["k"])) + x["bias"]
        visible = np.tri(70, 90, dtype=bool) & (np.arange(90) < lengths[:, None, None, None])
        s = jnp.where(visible, s, -1e30)
        sinks = jnp.broadcast_to(x["sinks"].reshape(1, 2, 1, 1), (*s.shape[:-1], 1))
        lse = jax.nn.logsumexp(jnp.concatenate([s, sinks], axis=-1), axis=-1)
        out = jnp.einsum("bnts,bskh->btnh", jnp.exp(s - lse[..., None]), x["v"])
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    with jax.enable_x64(True):
        x, dx = ({name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(2))
        got = quick_jit(functools.partial(transform, tiled))(x, dx)
        want = quick_jit(functools.partial(transform, plain))(x, dx)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), got, want)


def everything() -> cases.Inputs:
    """Every feature at once, in a call without empty rows."""
    case = dataclasses.replace(cases.CASES["everything"], q_len=70, kv_len=90, window=(90, 90))
    inputs = case.inputs()
    operands = inputs.operands._replace(
        q_offset=np.array([0, 20], np.int32),
        q_segment_ids=np.zeros((2, 70), np.int32),
        kv_segment_ids=np.zeros((2, 90), np.int32),
        q_lengths=np.full((2,), 70, np.int32),
        kv_lengths=np.array([90, 80], np.int32),
        mask=np.arange(90).reshape(1, 1, 1, 90) % 7 != 3,
    )
    finite = (
        np.nan_to_num(x, posinf=1.0, neginf=-1.0) for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)
    )
    q, k, v, dout, dlse = finite
    return cases.Inputs(inputs.spec, q, k, v, operands, dout, dlse)


@pytest.mark.parametrize("compiled", [True, False])
def test_clean_under_jax_debug_nans_and_infs(compiled):
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit(not compiled):
        spec, *arrays = everything()
        q, k, v, operands, dout, dlse = jax.tree.map(jnp.asarray, arrays)
        out, lse = xla.forward(spec, q, k, v, operands)
        xla.backward(spec, q, k, v, operands, out, lse, dout, dlse)
        xla.bias_gradient(spec, q, k, v, operands, out, lse, dout, dlse)
        jax.vjp(lambda *x: xla.attention(spec, *x, operands), q, k, v)[1]((dout, dlse))


@pytest.mark.parametrize("size", [1e5, 1e9, 1e18])
@pytest.mark.parametrize("results_of", [pair, differentiated])
def test_huge_scores_stay_finite(results_of, size):
    inputs = dataclasses.replace(cases.CASES["causal"], head_dim=48).inputs()
    inputs = inputs._replace(spec=dataclasses.replace(inputs.spec, scale=0.1), q=inputs.q * size, k=inputs.k * size)
    for name, x in results_of(*inputs).items():
        assert np.isfinite(x).all(), name


def test_memory_grows_with_the_length():
    x = jax.ShapeDtypeStruct((1, 32768, 1, 64), jnp.float32)
    spec = AttentionSpec(0.125, causal=True)

    def train(q, k, v, dout):
        out, lse = xla.forward(spec, q, k, v, Operands())
        return out, xla.backward(spec, q, k, v, Operands(), out, lse, dout, None)

    def train_by_jax(q, k, v, dout):
        out, vjp = jax.vjp(lambda *x: xla.attention(spec, *x, Operands())[0], q, k, v)
        return out, vjp(dout)

    for function in (train, train_by_jax):
        program = jax.jit(function).lower(x, x, x, x).compile()
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < 3 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
        assert not re.search(r"\[[\d,]*32768,[\d,]*32768", program.as_text())


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 1, 1), (2, 0, 1)], ids=str)
def test_vmap_equals_a_loop(mapped):
    """The derivative under vmap, with a loop's bounds (key lengths) mapped as well."""
    rng = np.random.default_rng(0)
    spec = AttentionSpec(0.5, causal=True)
    shapes = ((2, 70, 2, 4), (2, 90, 1, 4), (2, 90, 1, 4))
    arrays = [
        rng.standard_normal(s if a is None else (*s[:a], 3, *s[a:]), np.float32)
        for s, a in zip(shapes, mapped, strict=True)
    ]
    lengths = np.array([[90, 40], [0, 90], [1, 7]], np.int32)

    def gradients(q, k, v, lengths):
        operands = Operands(kv_lengths=lengths)
        out, lse = xla.forward(spec, q, k, v, operands)
        return out, xla.backward(spec, q, k, v, operands, out, lse, jnp.cos(out), None)

    got = jax.jit(jax.vmap(gradients, (*mapped, 0)))(*arrays, lengths)
    for n in range(3):
        one = (x if a is None else np.take(x, n, a) for x, a in zip(arrays, mapped, strict=True))
        want = jax.jit(gradients)(*one, lengths[n])
        nth = jax.tree.map(operator.itemgetter(n), got)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), nth, want)


def test_shard_map_checks_that_results_vary():
    """Each device holds its batch entries; keys and values are the same on all, and their gradients are summed."""
    inputs = everything()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec, q, k, v, operands, dout, dlse = inputs
    k, v = k[:1], v[:1]
    split, whole = PartitionSpec("data"), PartitionSpec()
    specs = Operands(
        **{
            n: whole if x.ndim < 1 or x.shape[0] != 2 or n in ("sinks", "dropout_head") else split
            for n, x in operands.present().items()
        }
    )

    def local(q, k, v, operands, dout, dlse):
        out, lse = xla.forward(spec, q, k, v, operands)
        dq, dk, dv = xla.backward(spec, q, k, v, operands, out, lse, dout, dlse)
        return out, lse, dq, dk, dv

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(split, whole, whole, specs, split, split), out_specs=split, check_vma=True
    )
    results = jax.jit(sharded)(q, k, v, operands, dout, dlse)
    cases.check(inputs._replace(k=k, v=v), **dict(zip(("out", "lse", "dq", "dk", "dv"), results, strict=True)))

    def by_jax(q, k, v, operands, dout, dlse):
        value, vjp = jax.vjp(lambda q, k, v: xla.attention(spec, q, k, v, operands), q, k, v)
        return *value, *vjp((dout, dlse))

    out_specs = (split, split, split, whole, whole)
    sharded = jax.shard_map(by_jax, mesh=mesh, in_specs=(split, whole, whole, specs, split, split), out_specs=out_specs)
    by_jax_results = jax.jit(sharded)(q, k, v, operands, dout, dlse)
    for got, want in zip(by_jax_results[3:], results[3:], strict=True):
        np.testing.assert_allclose(got, np.sum(want, 0, keepdims=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("results_of", [pair, differentiated])
def test_a_bias_of_minus_infinity_hides_like_a_mask(results_of):
    """Whole rows included: what users of additive masks pass."""
    hides = np.random.default_rng(0).random((2, 1, 40, 50)) < 0.3
    hides[0, 0, 7] = True
    case = dataclasses.replace(cases.CASES["causal"], q_len=40, kv_len=50)
    inputs = case.inputs()
    masked = inputs._replace(operands=Operands(mask=~hides))
    biased = inputs._replace(operands=Operands(bias=np.where(hides, -np.inf, 0).astype(np.float32)))
    results = results_of(*biased)
    assert np.isfinite(results.pop("dbias")).all()
    cases.check(masked, **results)


def test_rows_of_the_lowest_bias_are_not_empty():
    """finfo.min is a finite number: a row of it spreads its attention evenly."""
    case = dataclasses.replace(cases.CASES["plain"], q_len=40, kv_len=50)
    spec, q, k, v, _, _, _ = case.inputs()
    operands = Operands(bias=np.full((1, 1, 1, 1), np.finfo(np.float32).min), kv_lengths=np.array([50, 30], np.int32))
    out, _ = xla.forward(spec, q, k, v, operands)
    even = np.stack([v[0].mean(0), v[1, :30].mean(0)])
    np.testing.assert_allclose(out, np.broadcast_to(even[:, None], out.shape), rtol=1e-5, atol=1e-6)

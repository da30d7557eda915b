"""The CUDA kernels under transformations of JAX, against the XLA path under the same: on one GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash as jf

pytestmark = pytest.mark.gpu

B, T, S, N, K, H = 2, 130, 200, 4, 2, 64


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def qkv(*batch):
    return normal(0, *batch, T, N, H), normal(1, *batch, S, K, H), normal(2, *batch, S, K, H)


def operands():
    return {
        "q_offset": jnp.array([0, 60]),
        "segment_ids": (jnp.arange(T)[None] // 70, jnp.arange(S)[None] // 90),
        "kv_lengths": jnp.array([S, 150]),
        "mask": jax.random.bernoulli(jax.random.key(4), 0.8, (B, 1, T, S)),
        "bias": normal(5, N, T, S),
        "sinks": normal(6, N, dtype=jnp.float32),
        "dropout_rng": jax.random.key(7),
    }


def attend(q, k, v, given, implementation):
    rate = 0.2 if "dropout_rng" in given else 0.0
    return jf.flash_attention(q, k, v, **given, causal=True, dropout_rate=rate, implementation=implementation)


def value_and_gradients(implementation, q, k, v, given):
    learned = {name: given[name] for name in ("bias", "sinks") if name in given}

    def loss(q, k, v, learned):
        out = attend(q, k, v, given | learned, implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    gradients, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, learned)
    return out, gradients


def compare(function, *arguments):
    """function(implementation, *arguments) by the kernels, and by XLA in float32: small errors beside the largest."""
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    got = jax.jit(functools.partial(function, "cuda"))(*arguments)
    wanted = jax.jit(functools.partial(function, "xla"))(*in_float32)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.abs(a - b).max() <= 0.03 * max(1.0, np.abs(b).max())


MAPPED = [(), ("q",), ("k", "v"), ("mask",), ("bias",), ("sinks",), ("dropout_rng",), ("q", "k", "v", "mask", "bias")]


@pytest.mark.parametrize("names", MAPPED, ids="+".join)
def test_vmap(names):
    """Any subset of operands, and an inner axis that only the query has."""

    def vary(name, x):
        if name not in names:
            return x
        if name == "dropout_rng":
            return jax.random.split(x, 3)
        return jnp.stack([jnp.roll(x, i, axis=-1) for i in range(3)])

    q, k, v = (vary(name, x) for name, x in zip("qkv", qkv(B), strict=True))
    given = {name: vary(name, x) for name, x in operands().items()}
    queries = jnp.stack([q, 2 * q], axis=1 if "q" in names else 0)

    def both_axes(implementation, q, k, v, given):
        one = functools.partial(value_and_gradients, implementation)
        inner = jax.vmap(one, (0, None, None, None))
        if not names:
            return inner(q, k, v, given)
        axes = (
            *(0 if name in names else None for name in "qkv"),
            {name: 0 if name in names else None for name in given},
        )
        return jax.vmap(inner, axes)(q, k, v, given)

    compare(both_axes, queries, k, v, given)


def test_broadcast_axes_between_full_ones():
    q, k, v = normal(0, 2, 3, 2, T, N, H), normal(1, 2, 2, S, K, H), normal(2, 2, 2, S, K, H)
    bias = normal(3, 2, 2, T, S)

    def mapped(implementation, q, k, v, bias):
        def one(q, k, v, bias):
            return value_and_gradients(implementation, q, k, v, {"bias": bias})

        return jax.vmap(jax.vmap(jax.vmap(one), (0, None, None, None)))(q, k, v, bias)

    compare(mapped, q, k, v, bias)


def test_jacobian():
    q, k, v = (x[:5] for x in qkv())
    compare(lambda path, q, k: jax.jacrev(lambda q, k: attend(q, k, v.astype(q.dtype), {}, path), (0, 1))(q, k), q, k)


@pytest.mark.parametrize("names", [None, (), jf.SAVE_NAMES], ids=["no remat", "nothing saved", "saved"])
def test_scan_and_remat(names):
    q, k, v = qkv(B)

    def loss(implementation, q, k, v):
        def layer(x, _):
            return x + attend(x, k, v, operands() | {"bias": operands()["bias"].astype(x.dtype)}, implementation), None

        if names is not None:
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*names))
        return jnp.sum(jnp.sin(jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32)))

    compare(lambda path, *arrays: jax.grad(functools.partial(loss, path), (0, 1, 2))(*arrays), q, k, v)


def sharing(given):
    """Operands without batch axes, and a bias that float32 queries may have too."""
    return {"bias": given["bias"].astype(jnp.float32), "sinks": given["sinks"], "dropout_rng": given["dropout_rng"]}


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def mapped(implementation, q, k, v):
        local = lambda q, k, v: value_and_gradients(implementation, q, k, v, sharing(operands()))[0]  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma)(q, k, v)

    compare(mapped, *qkv(B))


def test_explicit_mesh():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in qkv(B)]
        compare(lambda path, *arrays: value_and_gradients(path, *arrays, sharing(operands())), *arrays)


def test_pmap():
    q, k, v = qkv(1, B)
    mapped = jax.pmap(
        functools.partial(value_and_gradients, "cuda"), in_axes=(0, 0, 0, None), devices=jax.devices()[:1]
    )
    one = jax.jit(functools.partial(value_and_gradients, "cuda"))(q[0], k[0], v[0], operands())
    for a, b in zip(jax.tree.leaves(mapped(q, k, v, operands())), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(a[0], np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-2)


two_gpus = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")


def gradients_by(q, k, v, given, dout):
    return jax.vjp(lambda q, k, v: attend(q, k, v, given, "cuda"), q, k, v)[1](dout)


def agree(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2)


@two_gpus
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_sharded_jit_on_two_gpus(axis, kv_heads):
    mesh = Mesh(np.array(jax.devices()[:2]), ("gpu",))
    q, k, v = normal(0, B, T, N, H), normal(1, B, S, kv_heads, H), normal(2, B, S, kv_heads, H)
    dout = normal(3, B, T, N, H)
    given = {"dropout_rng": jax.random.key(7), "sinks": normal(6, N, dtype=jnp.float32)}
    spec = P("gpu") if axis == "batch" else P(None, None, "gpu")
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    kv_spec = spec if axis == "batch" or kv_heads > 1 else P()
    arrays = place(q, spec), place(k, kv_spec), place(v, kv_spec)

    forward = jax.jit(lambda *arrays: attend(*arrays, given, "cuda")).lower(*arrays).compile()
    backward = jax.jit(lambda *arrays: gradients_by(*arrays[:3], given, arrays[3]))
    backward = backward.lower(*arrays, place(dout, spec)).compile()
    found = [
        re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", c.as_text()) for c in (forward, backward)
    ]
    shared_key_head = axis == "heads" and kv_heads == 1  # its gradient is a sum over the GPUs
    assert not found[0] and all(name.startswith("all-reduce") for name in found[1])
    assert bool(found[1]) == shared_key_head
    agree(forward(*arrays), attend(q, k, v, given, "cuda"))
    agree(backward(*arrays, place(dout, spec)), gradients_by(q, k, v, given, dout))


@two_gpus
def test_shard_map_and_pmap_on_two_gpus():
    q, k, v = qkv(B)
    dout = normal(3, B, T, N, H)
    wanted = gradients_by(q, k, v, {}, dout)
    mesh = Mesh(np.array(jax.devices()[:2]), ("gpu",))
    local = lambda q, k, v, dout: gradients_by(q, k, v, {}, dout)  # noqa: E731
    agree(jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("gpu"), out_specs=P("gpu")))(q, k, v, dout), wanted)
    mapped = jax.pmap(local, devices=jax.devices()[:2])(*(x[:, None] for x in (q, k, v, dout)))
    agree([x[:, 0] for x in mapped], wanted)


def test_replay_reads_fresh_inputs():
    """Programs are captured into CUDA graphs; a replay must follow the buffers of each call."""
    step = jax.jit(lambda q, k, v: value_and_gradients("cuda", q, k, v, operands()))
    q, k, v = qkv(B)
    alone = [step(q * (i + 1), k, v) for i in range(3)]
    for _ in range(5):
        step(q, k, v)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(step(q * (i + 1), k, v)), jax.tree.leaves(alone[i]), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2)


def test_export():
    from jax import export

    q, k, v = qkv(B)
    checks = [export.DisabledSafetyCheck.custom_call(f"jax_flash_{name}") for name in ("forward", "backward")]
    function = jax.jit(jax.grad(lambda q: jnp.sum(attend(q, k, v, {}, None).astype(jnp.float32))))
    exported = export.export(function, platforms=["cpu", "cuda"], disabled_checks=checks)(q)
    wanted = np.asarray(function(q), np.float32)
    np.testing.assert_allclose(np.asarray(exported.call(q), np.float32), wanted, rtol=1e-2, atol=1e-2)
    on_cpu = exported.call(jax.device_put(q, jax.devices("cpu")[0]))
    np.testing.assert_allclose(np.asarray(on_cpu, np.float32), wanted, rtol=5e-2, atol=5e-2)


def test_head_size_padding():
    q, k, v = (x[..., :60] for x in qkv(B))
    compare(lambda path, *arrays: value_and_gradients(path, *arrays, operands()), q, k, v)


def test_cuda_by_name_raises_for_float32():
    with pytest.raises(NotImplementedError, match="implementation='cuda': no kernel for the forward"):
        attend(*(x.astype(jnp.float32) for x in qkv(B)), {}, "cuda")

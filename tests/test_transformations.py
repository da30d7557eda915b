"""Attention under every transformation of JAX equals the same attention without it. Runs on eight CPU devices."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash as jf

B, T, N, H = 4, 12, 4, 8


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def make_mesh(*sizes, kind=AxisType.Auto):
    names = ("data", "model")[: len(sizes)]
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(sizes))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def qkv(kv_heads=N, heads=N, batch=(B,), dtype=jnp.float32):
    return tuple(normal(i, *batch, T, n, H, dtype=dtype) for i, n in enumerate((heads, kv_heads, kv_heads)))


def operands(batch=B, heads=N):
    """One array for every optional operand."""
    return {
        "q_offset": jnp.arange(batch) - 1,
        "segment_ids": jnp.arange(T)[None] // (3 + jnp.arange(batch)[:, None]),
        "q_lengths": T - jnp.arange(batch),
        "kv_lengths": T - 2 * jnp.arange(batch),
        "mask": normal(10, batch, 1, T, T) < 1.5,
        "bias": normal(11, 1, heads, T, T),
        "alibi_slopes": 2.0 ** -jnp.arange(1, heads + 1, dtype=jnp.float32),
        "sinks": normal(12, heads),
        "dropout_rng": jax.random.key(3),
    }


def attend(q, k, v, operands=None, **static):
    rate = 0.3 if operands and "dropout_rng" in operands else 0.0
    return jf.flash_attention(q, k, v, **(operands or {}), dropout_rate=rate, causal=True, window=(9, None), **static)


def close(got, wanted, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance, rtol=tolerance)


def split_floats(operands):
    """Operands that have a gradient, and the others."""
    learned = {name: x for name, x in operands.items() if name in ("bias", "sinks")}
    return learned, {name: x for name, x in operands.items() if name not in learned}


def gradients(q, k, v, operands, dout, dlse):
    """Of output and lse together, by query, key, value, bias and sinks."""
    learned, rest = split_floats(operands)
    _, vjp = jax.vjp(lambda q, k, v, learned: attend(q, k, v, learned | rest, return_lse=True), q, k, v, learned)
    return vjp((dout, dlse))


def cotangents(q, v):
    return normal(20, *q.shape[:-1], v.shape[-1], dtype=q.dtype), normal(21, *q.shape[:-3], q.shape[-2], q.shape[-3])


def collectives(compiled):
    return re.findall(
        r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    )


def put(mesh, spec, x):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


# --- sharded jit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sharded_jit_needs_no_collective(kv_heads, dtype):
    mesh = make_mesh(4, 2)
    q, k, v = qkv(kv_heads, dtype=dtype)
    dout, _ = cotangents(q, v)
    heads = "model" if kv_heads > 1 else None
    sharded = [put(mesh, ("data", None, h, None), x) for x, h in zip((q, k, v), ("model", heads, heads), strict=True)]

    def backward(q, k, v, dout):
        return jax.vjp(attend, q, k, v)[1](dout)

    forward = jax.jit(attend).lower(*sharded).compile()
    assert collectives(forward) == []
    out = forward(*sharded)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), out.ndim)
    close(out, attend(q, k, v), 2e-5 if dtype == jnp.float32 else 2e-2)

    arguments = (*sharded, put(mesh, ("data", None, "model"), dout))
    compiled = jax.jit(backward).lower(*arguments).compile()
    # One key head for query heads on several devices: its gradient is a sum over them.
    assert collectives(compiled) == ([] if kv_heads > 1 else ["all-reduce"])
    close(compiled(*arguments), backward(q, k, v, dout), 2e-5 if dtype == jnp.float32 else 2e-2)


SHARDINGS = {
    "batch and heads": (("data", None, "model"), ("data", None, "model")),
    "heads over both axes": ((None, None, ("data", "model")), (None, None, "data")),
    "batch over heads' axis": (("model", None, "data"), ("model",)),
    "sequence": ((None, "data", "model"), (None, "data", "model")),
    "head size": ((None, None, None, "data"), (None, "model", None, "data")),
    "query and key at odds": (("data", None, "model"), ("model", "data")),
    "only keys": ((), ("data", None, "model")),
}


def attend_and_gradients(q, k, v, given, dout, dlse):
    return attend(q, k, v, given), gradients(q, k, v, given, dout, dlse)


@pytest.mark.parametrize(
    "q_spec, kv_spec, kv_heads",
    [
        *(pytest.param(*specs, 2, id=f"{name}, grouped") for name, specs in SHARDINGS.items()),
        pytest.param(*SHARDINGS["batch and heads"], 8, id="batch and heads, equal"),
        pytest.param(*SHARDINGS["heads over both axes"], 1, id="heads over both axes, one key head"),
    ],
)
def test_any_sharding_gives_the_same(q_spec, kv_spec, kv_heads):
    mesh = make_mesh(2, 4)
    q, k, v = qkv(kv_heads, heads=8)
    kv_spec = tuple(axes if i != 2 or kv_heads == 8 else None for i, axes in enumerate(kv_spec))
    dout, dlse = cotangents(q, v)
    # Cotangents lie differently from everything else.
    arguments = (
        put(mesh, q_spec, q), put(mesh, kv_spec, k), put(mesh, kv_spec, v), operands(heads=8),
        put(mesh, (None, "model", "data"), dout), put(mesh, ("model",), dlse),
    )  # fmt: skip
    unsharded = jax.device_put(arguments, jax.devices("cpu")[0])
    close(jax.jit(attend_and_gradients)(*arguments), jax.jit(attend_and_gradients)(*unsharded))


def test_operands_are_sharded_with_the_call():
    """Operands that lie as the query does cause no collective, nor does dropout: it keeps the unsharded pattern."""
    mesh = make_mesh(4, 2)
    q, k, v = qkv()
    specs = {"bias": (None, "model"), "sinks": ("model",), "alibi_slopes": ("model",), "dropout_rng": ()}
    placed = {name: put(mesh, specs.get(name, ("data",)), x) for name, x in operands().items()}
    arguments = (*(put(mesh, ("data", None, "model"), x) for x in (q, k, v)), placed)
    compiled = jax.jit(attend).lower(*arguments).compile()
    assert collectives(compiled) == []
    close(compiled(*arguments), attend(q, k, v, operands()))


def test_uneven_sharding_gives_the_same():
    mesh = make_mesh(4, 2)
    q, k, v = qkv(kv_heads=3, heads=3, batch=(6,))

    def inside(*arrays):
        spread = NamedSharding(mesh, P("data", None, "model"))
        return attend(*(jax.lax.with_sharding_constraint(x, spread) for x in arrays))

    close(jax.jit(inside)(q, k, v), attend(q, k, v))


# --- vmap ------------------------------------------------------------------------------------------------------------

MAPPABLE = ("query", "key", "value", *operands())


def mapped_arguments(size, names):
    """Arguments by name; those in `names` with one more axis in front, whose entries differ."""
    q, k, v = qkv(kv_heads=2)
    arguments = {"query": q, "key": k, "value": v, **operands()}

    def vary(name, x):
        if name == "dropout_rng":
            return jax.random.split(x, size)
        return jnp.stack(
            [jnp.roll(x, i, axis=-1) if x.dtype != jnp.float32 else x * (1 + 0.3 * i) for i in range(size)]
        )

    return {name: vary(name, x) if name in names else x for name, x in arguments.items()}


SUBSETS = [
    *((name,) for name in MAPPABLE),
    ("query", "key", "value"),
    ("key", "value"),
    ("query", "bias", "mask"),
    ("key", "kv_lengths", "dropout_rng"),
    MAPPABLE,
]


def everything(arguments, dout, dlse):
    rest = dict(arguments)
    q, k, v = (rest.pop(name) for name in ("query", "key", "value"))
    return attend_and_gradients(q, k, v, rest, dout, dlse)


one_entry = jax.jit(everything)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_vmap_of_any_operands_equals_a_loop(names):
    size = 3
    arguments = mapped_arguments(size, names)
    axes = {name: 0 if name in names else None for name in arguments}
    dout, dlse = normal(20, B, T, N, H), normal(21, B, N, T)

    mapped = jax.jit(jax.vmap(everything, (axes, None, None)))(arguments, dout, dlse)
    for i in range(size):
        entry = one_entry({name: x[i] if name in names else x for name, x in arguments.items()}, dout, dlse)
        close(jax.tree.map(lambda x, i=i: x[i], mapped), entry)


def test_gradient_of_vmap():
    """The gradient by an array that is not mapped is the sum over the mapped axis."""
    arguments = mapped_arguments(3, ("query", "mask"))
    q, k, v, rest = arguments["query"], arguments["key"], arguments["value"], operands() | {"mask": arguments["mask"]}
    learned, rest = split_floats(rest)

    def loss(attend_all, k, v, learned):
        return jnp.sum(jnp.sin(attend_all(k, v, learned)))

    def by_vmap(k, v, learned):
        return jax.vmap(lambda q, mask: attend(q, k, v, learned | rest | {"mask": mask}))(q, rest["mask"])

    def by_loop(k, v, learned):
        return jnp.stack([attend(q[i], k, v, learned | rest | {"mask": rest["mask"][i]}) for i in range(3)])

    grad = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    close(grad(by_vmap, k, v, learned), grad(by_loop, k, v, learned), 1e-4)


def test_nested_vmap_with_axes_anywhere():
    qs, ks, v = normal(5, T, 2, N, 3, H), normal(6, 3, T, N, H), normal(7, T, N, H)  # axes of size 2 and 3
    mapped = jax.jit(jax.vmap(jax.vmap(attend, (1, None, None), 1), (3, 0, None), 2))(qs, ks, v)
    assert mapped.shape == (T, 2, 3, N, H)
    for i, j in itertools.product(range(2), range(3)):
        close(mapped[:, i, j], attend(qs[:, i, :, j], ks[j], v))


def test_broadcast_axes_between_full_ones():
    """Two mapped axes around one that is not, for every kind of operand."""
    q, k, v = qkv(batch=(2, 1, 3))
    bias = normal(7, 2, 1, 3, N, T, T)

    def attend_entry(q, k, v, bias):
        return attend(q, k, v, {"bias": bias})

    full = jnp.broadcast_to(q, (2, 4, 3, T, N, H)) * jnp.arange(1, 5).reshape(4, 1, 1, 1, 1)
    over_all = jax.vmap(jax.vmap(jax.vmap(attend_entry), (0, None, None, None)), (0, 0, 0, 0))
    got = jax.jit(over_all)(full, k[:, 0], v[:, 0], bias[:, 0])
    for i, j, m in itertools.product(range(2), range(4), range(3)):
        close(got[i, j, m], attend_entry(full[i, j, m], k[i, 0, m], v[i, 0, m], bias[i, 0, m]))


def test_vmap_of_grad():
    q, k, v = qkv(batch=(3, B))
    per_entry = jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), (0, 1, 2))
    per_entry = jax.jit(per_entry)
    mapped = jax.jit(jax.vmap(per_entry))(q, k, v)
    for i in range(3):
        close([x[i] for x in mapped], per_entry(q[i], k[i], v[i]))


def test_jacobian():
    q, k, v = (x[:, :3, :2, :4] for x in qkv(batch=(2,)))
    bias = normal(7, 2, 3, 3)

    def by(implementation):
        return lambda q, k, bias: attend(q, k, v, {"bias": bias}, implementation=implementation)

    close(jax.jit(jax.jacrev(by(None), (0, 1, 2)))(q, k, bias), jax.jit(jax.jacfwd(by("xla"), (0, 1, 2)))(q, k, bias))


def test_vmap_under_sharded_jit_needs_no_collective():
    mesh = make_mesh(4, 2)
    arrays = [put(mesh, (None, "data", None, "model"), x) for x in qkv(batch=(3, B))]
    compiled = jax.jit(jax.vmap(attend)).lower(*arrays).compile()
    assert collectives(compiled) == []
    close(compiled(*arrays), attend(*arrays))


def test_dropout_under_vmap_equals_a_loop_with_the_same_key():
    q, k, v = qkv(batch=(3, B))
    rng = {"dropout_rng": jax.random.key(5)}
    mapped = jax.vmap(lambda q, k, v: attend(q, k, v, rng))(q, k, v)
    close(mapped, jnp.stack([attend(q[i], k[i], v[i], rng) for i in range(3)]))


# --- control flow and rematerialisation ------------------------------------------------------------------------------


def layers(attend, x, depth=3, **checkpoint):
    """The sum of squares after `depth` layers of attention with shared weights, scanned."""

    def layer(x, _):
        return x + attend(jnp.sin(x), x, x), None

    layer = jax.checkpoint(layer, **checkpoint) if checkpoint else layer
    return jnp.sum(jax.lax.scan(layer, x, None, length=depth)[0] ** 2)


def test_scan_and_remat():
    x, *_ = qkv()
    wanted = jax.jit(jax.grad(functools.partial(layers, lambda *a: attend(*a, implementation="xla"))))(x)
    save = jax.checkpoint_policies.save_only_these_names(*jf.SAVE_NAMES)
    close(jax.jit(jax.grad(functools.partial(layers, attend)))(x), wanted, 1e-4)
    for policy in (None, jax.checkpoint_policies.nothing_saveable, save):
        close(jax.jit(jax.grad(functools.partial(layers, attend, policy=policy)))(x), wanted, 1e-4)


def calls(jaxpr, direction):
    """How many custom_vmap calls of the direction a jaxpr has, counting by their results."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_vmap_call":
            count += len(equation.outvars) == {"forward": 2, "backward": 3}[direction]
            continue
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        count += sum(calls(x, direction) for x in inner if hasattr(x, "eqns"))
    return count


@pytest.mark.parametrize(
    "names, forwards", [(jf.SAVE_NAMES, 1), (jf.SAVE_NAMES[:1], 2), ((), 2)], ids=["both", "only out", "none"]
)
def test_remat_that_saves_both_names_runs_the_forward_once(names, forwards):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    layer = jax.checkpoint(lambda x: jnp.sin(attend(x, x, x)), policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(layer(x))))(qkv()[0]).jaxpr
    assert (calls(jaxpr, "forward"), calls(jaxpr, "backward")) == (forwards, 1)


# --- manual and explicit sharding ------------------------------------------------------------------------------------


def test_pmap_with_gradients():
    q, k, v = qkv(batch=(4, 2))
    grad = jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), (0, 1, 2))
    devices = jax.devices("cpu")[:4]
    close(jax.pmap(attend, devices=devices)(q, k, v), attend(q, k, v))
    close(jax.pmap(grad, devices=devices)(q, k, v), grad(q, k, v))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_shard_map(check_vma, implementation):
    mesh = make_mesh(4, 2)
    q, k, v = qkv(kv_heads=2)
    spec = P("data", None, "model")

    def local(q, k, v):
        return attend(q, k, v, implementation=implementation)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=check_vma)
    close(jax.jit(mapped)(q, k, v), attend(q, k, v))
    loss = lambda f: lambda *arrays: jnp.sum(f(*arrays) ** 2)  # noqa: E731
    close(*(jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (mapped, attend)))


def test_shard_map_with_replicated_keys_and_operands():
    """Gradients by arrays that are replicated over a mesh axis are summed over it."""
    mesh = make_mesh(4, 2)
    q, k, v = qkv(kv_heads=1)
    learned = {"bias": normal(7, T, T), "sinks": normal(8, N)}
    spec = P("data", None, "model")
    specs = (spec, P("data"), P("data"), {"bias": P(), "sinks": P("model")})
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec)
    loss = lambda f: lambda *arrays: jnp.sum(f(*arrays) ** 2)  # noqa: E731
    close(*(jax.jit(jax.grad(loss(f), (0, 1, 2, 3)))(q, k, v, learned) for f in (mapped, attend)), 1e-4)


def test_partly_manual_shard_map():
    """Manual over the batch, the heads' axis left to the compiler."""
    mesh = make_mesh(4, 2)
    q, k, v = qkv(kv_heads=2)
    arrays = [put(mesh, ("data", None, "model"), x) for x in (q, k, v)]
    spec = P("data")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, axis_names={"data"})
    close(jax.jit(mapped)(*arrays), attend(q, k, v))


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_explicit_mesh(kv_heads, implementation):
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    q, k, v = qkv(kv_heads, heads=8)
    given = operands(heads=8)
    learned, rest = split_floats(given)

    def loss(q, k, v, learned):
        return jnp.sum(attend(q, k, v, learned | rest, implementation=implementation) ** 2)

    wanted = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, learned)
    kv_spec = ("data", None, "model" if kv_heads == 8 else None)
    with jax.set_mesh(mesh):
        arrays = (put(mesh, ("data", None, "model"), q), put(mesh, kv_spec, k), put(mesh, kv_spec, v))
        out = jax.jit(attend)(*arrays)
        assert jax.typeof(out).sharding.spec == P("data", None, "model", None)
        close(out, attend(q, k, v))
        close(jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, learned), wanted, 1e-4)


def test_vmap_on_an_explicit_mesh():
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    q, k, v = qkv(batch=(2, B))

    def loss(*arrays):
        return jnp.sum(jax.vmap(attend)(*arrays) ** 2)

    wanted = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    with jax.set_mesh(mesh):
        arrays = [put(mesh, ("data", None, None, "model"), x) for x in (q, k, v)]
        close(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), wanted, 1e-4)


def test_sharded_arrays_outside_jit():
    mesh = make_mesh(4, 2)
    q, k, v = qkv()
    out = attend(*(put(mesh, ("data", None, "model"), x) for x in (q, k, v)))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), out.ndim)
    close(out, attend(q, k, v))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_set_mesh_with_arrays_that_are_not_on_it(kind):
    q, k, v = map(np.asarray, qkv())
    wanted = attend(q, k, v)
    with jax.default_device(None), jax.set_mesh(make_mesh(4, 2, kind=kind)):
        close(jax.jit(attend)(q, k, v), wanted)


# --- derivatives the kernel path does not have -----------------------------------------------------------------------


def test_higher_derivatives_name_the_path_that_has_them():
    q, k, v = qkv()
    tangents = tuple(map(jnp.ones_like, (q, k, v)))
    grad = jax.grad(lambda q: jnp.sum(attend(q, k, v) ** 2))
    for derivative in (
        lambda: jax.grad(lambda q: jnp.sum(grad(q)))(q),
        lambda: jax.jvp(attend, (q, k, v), tangents),
        lambda: jax.jacfwd(attend)(q, k, v),
        lambda: jax.hessian(lambda q: jnp.sum(attend(q, k, v)))(q),
    ):
        with pytest.raises(NotImplementedError, match="implementation='xla'"):
            derivative()


# --- modes of JAX ----------------------------------------------------------------------------------------------------


def test_strict_modes():
    q, k, v = qkv(kv_heads=2)
    # No row is empty, as an empty row's lse is -inf.
    given = operands() | {"q_offset": jnp.zeros(B, jnp.int32), "segment_ids": jnp.zeros((B, T), jnp.int32)}
    given |= {"mask": jnp.eye(T, dtype=bool) | given["mask"], "kv_lengths": T * jnp.ones(B, jnp.int32)}
    given |= {"q_lengths": T * jnp.ones(B, jnp.int32)}
    dout, dlse = cotangents(q, v)
    wanted = attend(q, k, v, given), gradients(q, k, v, given, dout, dlse)
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True), jax.debug_infs(True):
        close((attend(q, k, v, given), gradients(q, k, v, given, dout, dlse)), wanted)
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    given["bias"] = given["bias"].astype(jnp.bfloat16)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients(*narrow, given, dout.astype(jnp.bfloat16), dlse)
        jf.flash_attention(*narrow, precision=jf.Fp8(), q_lengths=given["q_lengths"])
        jax.vmap(lambda sinks: jf.flash_attention(*narrow, sinks=sinks))(jnp.ones((3, q.shape[-2])))

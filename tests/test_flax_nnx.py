"""jax_flash.flax.nnx.MultiHeadAttention, and Flax's module with attention_fn, against Flax's module as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

from jax_flash import Fp8
from jax_flash.flax import attention_fn
from jax_flash.flax import nnx as flash_nnx

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

X = jax.random.normal(jax.random.key(0), (2, 6, 24))
KV = jax.random.normal(jax.random.key(1), (2, 9, 20))
CAUSAL = nnx.make_causal_mask(X[..., 0])
KEYS = jnp.arange(9) < jnp.array([4, 9])[:, None, None, None]

GRID = {
    "plain": ({}, (X,), {}),
    "sizes": ({"qkv_features": 16, "out_features": 10}, (X,), {"mask": CAUSAL}),
    "no bias": ({"use_bias": False}, (X,), {"is_causal": True}),
    "normalized": ({"normalize_qk": True}, (X,), {"is_causal": True, "mask": KEYS[:1, ..., :6]}),
    "grouped": ({"num_kv_heads": 2}, (X,), {"is_causal": True}),
    "one head": ({"num_kv_heads": 1, "kernel_init": nnx.initializers.ones}, (X,), {}),
    "cross": ({"in_kv_features": 20}, (X, KV), {"mask": KEYS}),
    "cross value": ({"in_kv_features": 20}, (X, KV, 2 * KV), {"mask": KEYS.astype(jnp.float32)}),
    "no batch": ({}, (X[0],), {"is_causal": True}),
    "dtype": ({"dtype": jnp.float32, "param_dtype": jnp.bfloat16, "precision": "highest"}, (X,), {}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, (X,), {}),
    "deterministic call": ({"dropout_rate": 0.5, "keep_rngs": False}, (X,), {"deterministic": True}),
    "metadata": ({"kernel_metadata": {"note": "kept"}}, (X,), {}),
}
OURS = {
    "module": flash_nnx.MultiHeadAttention,
    "attention_fn": functools.partial(nnx.MultiHeadAttention, attention_fn=attention_fn),
}


def make(cls=flash_nnx.MultiHeadAttention, decode=False, **options):
    return cls(4, 24, decode=decode, rngs=nnx.Rngs(2, dropout=3), **options)


def assert_same_state(ours, theirs):
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(module))) for module in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, variable in theirs.items():
        assert type(ours[path]) is type(variable) and ours[path].get_metadata() == variable.get_metadata()
        if not jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(ours[path][...], variable[...])


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize(("options", "inputs", "call"), GRID.values(), ids=GRID)
def test_same_state_and_results(ours, options, inputs, call):
    ours, theirs = make(ours, **options), make(nnx.MultiHeadAttention, **options)
    assert_same_state(ours, theirs)
    close(ours(*inputs, **call), theirs(*inputs, **call))


def test_same_gradients():
    def gradients(module):
        return nnx.grad(lambda module: jnp.sin(module(X, is_causal=True)).sum())(module)

    jax.tree.map(close, gradients(make()), gradients(make(nnx.MultiHeadAttention)))


def test_state_of_flax_loads():
    theirs, ours = make(nnx.MultiHeadAttention), flash_nnx.MultiHeadAttention(4, 24, decode=False, rngs=nnx.Rngs(9))
    nnx.update(ours, nnx.state(theirs))
    close(ours(X), theirs(X))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sown_weights():
    for options in ({"num_kv_heads": 2}, {"dropout_rate": 0.5, "deterministic": False}):
        ours, theirs = make(**options), make(nnx.MultiHeadAttention, **options)
        for module in (ours, theirs):
            module(X, is_causal=True, sow_weights=True)
        close(ours.attention_weights.get_value()[0], theirs.attention_weights.get_value()[0])


def test_dropout_rngs():
    module = make(dropout_rate=0.5, deterministic=False, keep_rngs=False)
    out = module(X, rngs=nnx.Rngs(dropout=7))
    close(out, module(X, rngs=nnx.Rngs(dropout=7)))
    close(out, module(X, rngs=nnx.Rngs(dropout=7).dropout))
    assert not np.allclose(out, module(X, rngs=nnx.Rngs(dropout=8)))
    keeping = make(dropout_rate=0.5, deterministic=False)
    assert not np.allclose(keeping(X), keeping(X))
    with pytest.raises(ValueError, match="rngs"):
        module(X)


def test_wrong_inputs():
    for call, name in (
        ({"inputs_q": KV}, "inputs_q"),
        ({"inputs_q": X, "inputs_v": X}, "inputs_v"),
        ({"inputs_q": X, "decode": True}, "init_cache"),
        ({"inputs_q": X, "input_positions": jnp.arange(6)}, "rotary_base"),
    ):
        with pytest.raises(ValueError, match=name):
            make()(**call)
    with pytest.raises(ValueError, match="attention_precision: expected None or "):
        make(attention_precision="fp8")(X)
    with pytest.raises(ValueError, match="deterministic"):
        make(dropout_rate=0.1)(X)
    with pytest.raises(ValueError, match="decode"):
        make(decode=None)(X)


# What Flax's module lacks


def test_lengths():
    out = make()(X.at[0, 4:].set(jnp.nan), lengths=jnp.array([4, 6]))
    close(out[0, :4], make()(X[0, :4]))
    close(out[1], make()(X[1]))


def test_structure_equals_dense_masks():
    ids = jnp.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    same = nnx.make_attention_mask(ids, ids, jnp.equal)
    near = abs(np.arange(6)[:, None] - np.arange(6)) <= 1
    theirs = make(nnx.MultiHeadAttention)
    close(make(causal=True)(X), theirs(X, is_causal=True))
    close(make(window=1)(X), theirs(X, mask=near[None, None]))
    close(
        make(causal=True, window=(1, None))(X, segment_ids=ids),
        theirs(X, mask=nnx.combine_masks(CAUSAL, near[None, None], same)),
    )


def test_softcap_and_sinks():
    module = make(softcap=0.5, use_sinks=True)
    module.sinks[...] = jnp.arange(4.0)

    def exact(q, k, v, **_):
        scores = 0.5 * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) / 0.5)
        weights = jnp.exp(scores) / (jnp.exp(scores).sum(-1, keepdims=True) + jnp.exp(jnp.arange(4.0))[:, None, None])
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    close(module(X), make(attention_fn=exact)(X))
    assert abs(nnx.grad(lambda module: module(X).sum())(module)["sinks"][...]).min() > 0


def test_fp8_attention():
    options = {"dtype": jnp.bfloat16, "causal": True, "num_kv_heads": 2}
    ours, exact = (make(**options, **precision)(X) for precision in ({"attention_precision": Fp8()}, {}))
    error = jnp.linalg.norm((ours - exact).astype(jnp.float32)) / jnp.linalg.norm(exact.astype(jnp.float32))
    assert 1e-3 < error < 0.1


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this version of Flax has no RoPE")
def test_rotary_as_in_flax():
    rope = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    close(make(rotary_base=1e4)(X), make(nnx.MultiHeadAttention, attention_fn=rope)(X))


@pytest.mark.parametrize(
    "options", [{}, {"rotary_base": 1e4, "num_kv_heads": 2, "window": (2, 0)}], ids=["plain", "all"]
)
@pytest.mark.parametrize("steps", [(6,), (4, 1, 1), (2, 3, 1)])
def test_decoding_equals_causal_attention(options, steps):
    module = make(decode=True, **options)
    module.init_cache(X.shape)
    right = make(causal=True, **options)(X)
    ends = np.cumsum(steps)
    outs = [module(X[:, end - step : end]) for step, end in zip(steps, ends, strict=True)]
    close(jnp.concatenate(outs, axis=1), right)
    assert module.cache_index[...] == 6


def test_ragged_decoding():
    """Prompts of 2 and 4 tokens, both padded to 4, then a token each."""
    options = {"rotary_base": 1e4, "num_kv_heads": 2, "window": (3, 0)}
    module, lengths = make(decode=True, **options), jnp.array([2, 4])
    module.init_cache(X.shape, ragged=True)
    right = make(causal=True, **options)(X)
    prompts = module(X[:, :4].at[0, 2:].set(jnp.inf), lengths=lengths)
    close(prompts[0, :2], right[0, :2])
    close(prompts[1], right[1, :4])
    for step in range(2):
        out = module(X[jnp.arange(2), lengths + step][:, None])
        close(out[:, 0], right[jnp.arange(2), lengths + step])
    np.testing.assert_array_equal(module.cache_index[...], lengths + 2)


def test_decoding_as_flax_does():
    ours, theirs = (
        make(cls, decode=True, num_kv_heads=2) for cls in (flash_nnx.MultiHeadAttention, nnx.MultiHeadAttention)
    )
    ours.init_cache(X.shape)
    theirs.init_cache(X.shape)
    assert_same_state(ours, theirs)
    mask = (jnp.arange(6) != 1)[None, None, None]
    for t in range(6):
        close(ours(X[:, t : t + 1], mask=mask), theirs(X[:, t : t + 1], mask=mask))
    close(ours.cached_key[...], theirs.cached_key[...])


def test_cache_dtype_is_that_of_the_computation():
    module = make(dtype=jnp.bfloat16, decode=True)
    module.init_cache(X.shape)
    assert module.cached_key.dtype == jnp.bfloat16
    assert module(X).dtype == jnp.bfloat16


def test_the_cache_is_updated_in_place():
    module = make(decode=True)
    module.init_cache(X.shape)
    graph, cache, rest = nnx.split(module, nnx.Cache, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, rest, x):
        module = nnx.merge(graph, cache, rest)
        return module(x), nnx.state(module, nnx.Cache)

    compiled = step.lower(cache, rest, X[:, :1]).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_logical_axes():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with (
        linen.logical_axis_rules([("batch", "data"), ("heads", "model"), ("embed", None), ("head", None)]),
        jax.set_mesh(mesh),
    ):
        module = make(
            kernel_metadata={"out_sharding": ("embed", "heads", "head")},
            out_kernel_metadata={"out_sharding": ("heads", "head", "embed")},
            qkv_axes=("batch", "length", "heads", "head"),
            out_axes=("batch", "length", "embed"),
        )
        text = str(jax.make_jaxpr(lambda x: module(x))(X))
    assert module.query.kernel[...].sharding.spec == PartitionSpec(None, "model", None)
    constraints = {
        spec: text.count(f"spec={PartitionSpec(*spec)}")
        for spec in (("data", None, "model", None), ("data", None, None))
    }
    assert list(constraints.values()) == [3, 1]

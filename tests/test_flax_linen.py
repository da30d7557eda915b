"""jax_flash.flax.linen.MultiHeadAttention, and Flax's module with attention_fn, against Flax's module as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

import jax_flash
from jax_flash import Fp8
from jax_flash.flax import attention_fn, linen, rotary

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

X = jax.random.normal(jax.random.key(0), (2, 6, 24))
KV = jax.random.normal(jax.random.key(1), (2, 9, 20))
CAUSAL = nn.make_causal_mask(X[..., 0])
KEYS = jnp.arange(9) < jnp.array([4, 9])[:, None, None, None]

GRID = {
    "plain": ({}, (X,), {}),
    "sizes": ({"qkv_features": 16, "out_features": 10}, (X,), {}),
    "no bias": ({"use_bias": False}, (X,), {"mask": CAUSAL}),
    "normalized": ({"normalize_qk": True}, (X,), {"mask": CAUSAL}),
    "inits": ({"kernel_init": nn.initializers.ones, "out_bias_init": nn.initializers.ones}, (X,), {}),
    "out init": ({"out_kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones}, (X,), {}),
    "cross": ({}, (X, KV), {"mask": KEYS}),
    "cross value": ({}, (X, KV, 2 * KV), {"mask": KEYS[..., :9]}),
    "inputs_kv": ({}, (X,), {"inputs_kv": KV}),
    "no batch": ({}, (X[0],), {}),
    "batches": ({}, (X.reshape(1, 2, 6, 24),), {"mask": CAUSAL[None]}),
    "float32 softmax": ({"force_fp32_for_softmax": True, "param_dtype": jnp.bfloat16}, (X,), {}),
    "dtype": ({"dtype": jnp.float32, "precision": "highest"}, (X,), {}),
    "deterministic": ({"dropout_rate": 0.5, "deterministic": True}, (X,), {}),
    "deterministic call": ({"dropout_rate": 0.5}, (X,), {"deterministic": True}),
    "dot_general": ({"qkv_dot_general": lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)}, (X,), {}),
    "einsums": (
        dict.fromkeys(("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"), lambda: jnp.einsum),
        (X,),
        {},
    ),
}
OURS = {
    "module": linen.MultiHeadAttention,
    "attention_fn": functools.partial(nn.MultiHeadAttention, attention_fn=attention_fn),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
@pytest.mark.parametrize(("fields", "inputs", "options"), GRID.values(), ids=GRID)
def test_same_parameters_and_results(ours, fields, inputs, options):
    ours, theirs = ours(num_heads=4, **fields), nn.MultiHeadAttention(num_heads=4, **fields)
    parameters = theirs.init(jax.random.key(2), *inputs, **options)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(2), *inputs, **options), parameters)
    close(ours.apply(parameters, *inputs, **options), theirs.apply(parameters, *inputs, **options))


def test_same_gradients():
    def gradients(module):
        parameters = module.init(jax.random.key(2), X)
        return jax.grad(lambda p: jnp.sin(module.apply(p, X, mask=CAUSAL)).sum())(parameters)

    jax.tree.map(close, gradients(linen.MultiHeadAttention(4)), gradients(nn.MultiHeadAttention(4)))


def test_unnamed_modules_get_the_same_names():
    class Block(nn.Module):
        library: object

        @nn.compact
        def __call__(self, x):
            return self.library.MultiHeadDotProductAttention(4)(self.library.MultiHeadAttention(4)(x))

    parameters = Block(nn).init(jax.random.key(2), X)
    close(Block(linen).apply(parameters, X), Block(nn).apply(parameters, X))


def test_sown_weights():
    ours, theirs = linen.MultiHeadAttention(4), nn.MultiHeadAttention(4)
    parameters = theirs.init(jax.random.key(2), X)
    sow = {"mask": CAUSAL, "sow_weights": True, "mutable": "intermediates"}
    jax.tree.map(close, ours.apply(parameters, X, **sow), theirs.apply(parameters, X, **sow))


def test_dropout_rngs():
    module = linen.MultiHeadAttention(4, dropout_rate=0.5, deterministic=False)
    parameters = module.init(jax.random.key(2), X)
    one, other = jax.random.split(jax.random.key(3))
    out = module.apply(parameters, X, rngs={"dropout": one})
    close(out, module.apply(parameters, X, rngs={"dropout": one}))
    assert not np.allclose(out, module.apply(parameters, X, rngs={"dropout": other}))
    close(
        module.apply(parameters, X, dropout_rng=one),
        module.apply(parameters, X, dropout_rng=one, rngs={"dropout": other}),
    )
    with pytest.raises(Exception, match="dropout"):
        module.apply(parameters, X)


def test_wrong_inputs():
    for fields in ({"num_heads": 5}, {"num_heads": 0}, *({"num_heads": 4, "num_kv_heads": heads} for heads in (3, 0))):
        with pytest.raises(ValueError, match="num_heads"):
            linen.MultiHeadAttention(**fields).init(jax.random.key(0), X)
    module = linen.MultiHeadAttention(4)
    for inputs, name in (({"inputs_v": X}, "inputs_v"), ({"inputs_k": X, "inputs_kv": X}, "inputs_kv")):
        with pytest.raises(ValueError, match=name):
            module.init(jax.random.key(0), X, **inputs)
    with pytest.raises(ValueError, match="rotary_base"):
        module.init(jax.random.key(0), X, input_positions=jnp.arange(6))
    with pytest.raises(ValueError, match="attention_precision: expected None or "):
        linen.MultiHeadAttention(4, attention_precision="fp8").init(jax.random.key(0), X)


# What Flax's module lacks


def test_grouped_heads_equal_repeated_projections():
    grouped, full = linen.MultiHeadAttention(4, num_kv_heads=2), nn.MultiHeadAttention(4)
    variables = grouped.init(jax.random.key(2), X)
    assert variables["params"]["key"]["kernel"].shape == (24, 2, 6)
    repeated = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.repeat(x, 2, axis=-2) if path[1].key in ("key", "value") else x, variables
    )
    close(grouped.apply(variables, X), full.apply(repeated, X))


def test_structure_equals_dense_masks():
    ids = jnp.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    same = nn.make_attention_mask(ids, ids, jnp.equal)
    near = abs(np.arange(6)[:, None] - np.arange(6)) <= 1
    theirs = nn.MultiHeadAttention(4)
    parameters = theirs.init(jax.random.key(2), X)

    def ours(**fields):
        return functools.partial(linen.MultiHeadAttention(4, **fields).apply, parameters)

    close(ours(causal=True)(X), theirs.apply(parameters, X, mask=CAUSAL))
    close(ours(window=(1, 1))(X), theirs.apply(parameters, X, mask=near))
    close(ours()(X, segment_ids=ids), theirs.apply(parameters, X, mask=same))
    close(
        ours(causal=True, window=(1, None))(X, segment_ids=(ids, ids)),
        theirs.apply(parameters, X, mask=nn.combine_masks(CAUSAL, near[None, None], same)),
    )


def test_softcap_and_sinks():
    module = linen.MultiHeadAttention(4, softcap=0.5, use_sinks=True)
    variables = module.init(jax.random.key(2), X)
    assert variables["params"]["sinks"].shape == (4,)
    variables["params"]["sinks"] = jnp.arange(4.0)
    seen = {}

    def exact(q, k, v, **_):
        scores = 0.5 * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) / 0.5)
        seen["weights"] = jnp.exp(scores) / (
            jnp.exp(scores).sum(-1, keepdims=True) + jnp.exp(jnp.arange(4.0))[:, None, None]
        )
        return jnp.einsum("bnts,bsnh->btnh", seen["weights"], v)

    close(module.apply(variables, X), module.clone(attention_fn=exact).apply(variables, X))
    _, sown = module.apply(variables, X, sow_weights=True, mutable="intermediates")
    close(sown["intermediates"]["attention_weights"][0], seen["weights"])


def test_fp8_attention():
    options = {"num_heads": 4, "dtype": jnp.bfloat16, "causal": True, "num_kv_heads": 2}
    parameters = linen.MultiHeadAttention(**options).init(jax.random.key(2), X)
    ours, exact = (
        linen.MultiHeadAttention(**options, **precision).apply(parameters, X).astype(jnp.float32)
        for precision in ({"attention_precision": Fp8()}, {})
    )
    assert 1e-3 < jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact) < 0.1


@pytest.mark.parametrize(("names", "saved"), [(jax_flash.SAVE_NAMES, 2), ((), 0)], ids=["saved", "recomputed"])
def test_remat_saves_what_the_backward_kernel_reads(names, saved, capsys):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    module = nn.remat(linen.MultiHeadAttention, policy=policy)(4, use_bias=False)
    parameters = module.init(jax.random.key(2), X)
    jax.ad_checkpoint.print_saved_residuals(lambda p: module.apply(p, X).sum(), parameters)
    lines = capsys.readouterr().out.splitlines()
    assert sum("(attend)" in line for line in lines) == saved, lines  # beside arguments and constants


def test_rotary():
    def rotating(q, k, v, **_):
        return nn.dot_product_attention(rotary(q), rotary(k), v)

    module, theirs = linen.MultiHeadAttention(4, rotary_base=1e4), nn.MultiHeadAttention(4, attention_fn=rotating)
    parameters = theirs.init(jax.random.key(2), X)
    close(module.apply(parameters, X), theirs.apply(parameters, X))
    close(module.apply(parameters, X, input_positions=jnp.arange(6) + 5), theirs.apply(parameters, X), atol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"rotary_base": 1e4, "num_kv_heads": 2, "window": (2, 0)}], ids=["plain", "all"]
)
@pytest.mark.parametrize("steps", [(6,), (4, 1, 1), (2, 3, 1), (1, 1, 1, 1, 1, 1)])
def test_decoding_equals_causal_attention(fields, steps):
    module = linen.MultiHeadAttention(4, decode=True, **fields)
    variables = module.init(jax.random.key(2), X)
    right = linen.MultiHeadAttention(4, causal=True, **fields).apply({"params": variables["params"]}, X)
    outs, start = [], 0
    for step in steps:
        out, updated = module.apply(variables, X[:, start : start + step], mutable="cache")
        variables, start = {**variables, **updated}, start + step
        outs.append(out)
    close(jnp.concatenate(outs, axis=1), right)
    assert variables["cache"]["cache_index"] == 6


def test_ragged_decoding():
    """Prompts of 2 and 4 tokens, both padded to 4, then a token each."""
    module, lengths = linen.MultiHeadAttention(4, decode=True, rotary_base=1e4, ragged_cache=True), jnp.array([2, 4])
    variables = module.init(jax.random.key(2), X)
    right = linen.MultiHeadAttention(4, causal=True, rotary_base=1e4).apply({"params": variables["params"]}, X)
    prompts, cache = module.apply(variables, X[:, :4].at[0, 2:].set(jnp.inf), lengths=lengths, mutable="cache")
    close(prompts[0, :2], right[0, :2])
    close(prompts[1], right[1, :4])
    out, cache = module.apply({**variables, **cache}, X[jnp.arange(2), lengths][:, None], mutable="cache")
    close(out[:, 0], right[jnp.arange(2), lengths])
    np.testing.assert_array_equal(cache["cache"]["cache_index"], lengths + 1)


def test_wrong_decoding():
    module = linen.MultiHeadAttention(4, decode=True)
    variables = module.init(jax.random.key(2), X[:, :4])
    with pytest.raises(ValueError, match="inputs: expected at most 4 tokens, the length of the cache, got 6"):
        module.apply(variables, X, mutable="cache")
    with pytest.raises(ValueError, match=r"lengths: expected a ragged cache .*got \(2,\)"):
        module.apply(variables, X[:, :2], lengths=jnp.array([1, 2]), mutable="cache")


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_beside_64_bits(ragged):
    module = linen.MultiHeadAttention(4, decode=True, rotary_base=1e4, ragged_cache=ragged)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        variables = module.init(jax.random.key(2), X)
        lengths = jnp.array([1, 2]) if ragged else None
        _, cache = module.apply(variables, X[:, :2], lengths=lengths, mutable="cache")
        assert cache["cache"]["cache_index"].dtype == jnp.int32


def test_decoding_as_flax_does():
    ours, theirs = linen.MultiHeadAttention(4, decode=True), nn.MultiHeadAttention(4, decode=True)
    variables = theirs.init(jax.random.key(2), X)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(2), X), variables)
    ours, theirs = (jax.jit(functools.partial(m.apply, mutable="cache")) for m in (ours, theirs))
    mask = jnp.arange(6) != 1
    for t in range(6):
        out, cache = ours(variables, X[:, t : t + 1], mask=mask[None, None, None])
        right, right_cache = theirs(variables, X[:, t : t + 1], mask=mask[None, None, None])
        close(out, right)
        jax.tree.map(close, cache, right_cache)
        variables = variables | right_cache


def test_the_cache_is_updated_in_place():
    module = linen.MultiHeadAttention(4, decode=True)
    variables = module.init(jax.random.key(2), X)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(parameters, cache, x):
        return module.apply({"params": parameters, "cache": cache}, x, mutable="cache")

    compiled = step.lower(variables["params"], variables["cache"], X[:, :1]).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(variables["cache"]))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_logical_axes():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    module = linen.MultiHeadAttention(
        4,
        kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", "head")),
        out_kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("heads", "head", "embed")),
        qkv_axes=("batch", "length", "heads", "head"),
        out_axes=("batch", "length", "embed"),
    )
    variables = module.init(jax.random.key(2), X)
    with nn.logical_axis_rules([("batch", "data"), ("heads", "model")]), jax.set_mesh(mesh):
        specs = nn.logical_to_mesh(nn.get_partition_spec(variables))["params"]
        text = str(jax.make_jaxpr(lambda x: module.apply(variables, x))(X))
    assert specs["query"]["kernel"] == PartitionSpec(None, "model", None)
    assert specs["out"]["kernel"] == PartitionSpec("model", None, None)
    constraints = {
        spec: text.count(f"spec={PartitionSpec(*spec)}")
        for spec in (("data", None, "model", None), ("data", None, None))
    }
    assert list(constraints.values()) == [3, 1]

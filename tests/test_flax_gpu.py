"""Flax modules by the GPU's kernels against the same modules by XLA, in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flash.flax import attention_fn
from jax_flash.flax.nnx import MultiHeadAttention

pytestmark = pytest.mark.gpu

X = jax.random.normal(jax.random.key(0), (2, 130, 256), jnp.bfloat16)
IDS = jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.05, (2, 130)), axis=1)
CASES = {
    "plain": ({}, {}),
    "grouped causal rotary": ({"num_kv_heads": 2, "causal": True, "rotary_base": 1e4}, {}),
    "window and documents": ({"causal": True, "window": (40, 0)}, {"segment_ids": IDS}),
    "softcap and sinks": ({"softcap": 5.0, "use_sinks": True}, {"is_causal": True}),
    "padding mask": ({}, {"mask": jnp.arange(130) < jnp.array([70, 130])[:, None, None, None]}),
    "lengths": ({"causal": True}, {"lengths": jnp.array([70, 130])}),
    "shared dropout": ({"dropout_rate": 0.2, "deterministic": False}, {}),
    "dropout": ({"dropout_rate": 0.2, "deterministic": False, "broadcast_dropout": False}, {}),
}


def module(implementation, **options):
    """Without biases: the gradient of the key's is exactly zero, so that only rounding would be compared."""
    fn = functools.partial(attention_fn, implementation=implementation)
    return MultiHeadAttention(
        4, 256, use_bias=False, attention_fn=fn, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **({"decode": False} | options)
    )


def assert_close(ours, right):
    scale = float(jnp.abs(right).max())
    np.testing.assert_allclose(ours.astype(jnp.float32), right.astype(jnp.float32), rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize(("options", "call"), CASES.values(), ids=CASES)
def test_results_and_gradients(options, call):
    def run(implementation):
        def loss(module):
            out = module(X, **call)
            return jnp.sin(out.astype(jnp.float32)).sum(), out

        return nnx.jit(nnx.grad(loss, has_aux=True))(module(implementation, **options))

    (gradients, out), (right_gradients, right) = run("cuda"), run("xla")
    assert_close(out, right)
    jax.tree.map(assert_close, gradients, right_gradients)


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding(ragged):
    def outputs(implementation):
        decoder = module(implementation, decode=True, num_kv_heads=2, rotary_base=1e4)
        decoder.init_cache((2, 160, 256), ragged=ragged)
        yield decoder(X, lengths=jnp.array([70, 130]) if ragged else None)
        for step in range(3):
            yield decoder(X[:, step : step + 1])

    for ours, right in zip(outputs("cuda"), outputs("xla"), strict=True):
        assert_close(ours, right)


def test_attention_fn_in_linen():
    ours, theirs = (
        nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16, attention_fn=fn)
        for fn in (functools.partial(attention_fn, implementation="cuda"), nn.dot_product_attention)
    )
    parameters = theirs.init(jax.random.key(0), X)
    mask = nn.make_causal_mask(X[..., 0])
    for apply in (ours.apply, jax.jit(ours.apply)):
        assert_close(apply(parameters, X, mask=mask), theirs.apply(parameters, X, mask=mask))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_data_parallel_gradients_on_two_gpus(how):
    definition, parameters = nnx.split(module("cuda", causal=True, num_kv_heads=2, rotary_base=1e4))

    def gradients(parameters, x):
        return jax.grad(lambda p: jnp.sin(nnx.merge(definition, p)(x).astype(jnp.float32)).mean())(parameters)

    right = jax.jit(gradients)(parameters, X)
    if how == "jit":
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        ours = jax.jit(gradients)(
            jax.device_put(parameters, NamedSharding(mesh, PartitionSpec())),
            jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))),
        )
    else:
        mean = jax.pmap(
            lambda p, x: jax.lax.pmean(gradients(p, x), "data"), "data", in_axes=(None, 0), devices=jax.devices()[:2]
        )
        ours = jax.tree.map(lambda x: x[0], mean(parameters, X[:, None]))
    jax.tree.map(assert_close, *jax.device_get((ours, right)))

"""attention_fn against the attention functions of Flax, and inside Flax's own modules."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jax_flash.flax import attention_fn, rotary
from jax_flash.flax.functional import mask_structure

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def arrays(batch=(2,), q_len=7, kv_len=9, heads=4, kv_heads=4, dim=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (*batch, q_len, heads, dim), (*batch, kv_len, kv_heads, dim), (*batch, kv_len, kv_heads, dim)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def random_mask(shape):
    """Every query sees key 0: Flax and jax_flash differ where a query sees nothing."""
    return jax.random.bernoulli(jax.random.key(5), 0.6, shape).at[..., 0].set(True)


MASKS = {
    "none": None,
    "dense": random_mask((2, 4, 7, 9)),
    "heads share": random_mask((2, 1, 7, 9)),
    "keys": random_mask((2, 1, 1, 9)),
    "float": random_mask((2, 1, 7, 9)).astype(jnp.float32),
    "causal": jnp.tri(7, 9)[None, None],
    "causal keys": random_mask((2, 1, 1, 9)) & jnp.tri(7, 9, dtype=bool),
    "numpy": np.tri(7, 9, dtype=bool)[None, None],
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("flax_fn", [nn.dot_product_attention, nnx.dot_product_attention], ids=["linen", "nnx"])
def test_masks(flax_fn, mask, jit):
    """A mask given to jit is traced; one given eagerly is known and may be recognised."""
    q, k, v = arrays()
    ours, theirs = (lambda q, k, v, mask, fn=fn: fn(q, k, v, mask=mask) for fn in (attention_fn, flax_fn))
    close((jax.jit(ours) if jit else ours)(q, k, v, mask), theirs(q, k, v, mask))


def test_a_mask_of_python_numbers():
    q, k, v = arrays()
    mask = np.tri(q.shape[1], k.shape[1])
    close(attention_fn(q, k, v, mask=mask.tolist()), attention_fn(q, k, v, mask=mask))
    with pytest.raises(TypeError, match="mask: expected an array, got str"):
        attention_fn(q, k, v, mask="causal")


@pytest.mark.parametrize(("batch", "kv_heads"), [((), 2), ((3,), 1), ((2, 3), 2)])
def test_batch_axes_and_grouped_heads(batch, kv_heads):
    q, k, v = arrays(batch, kv_heads=kv_heads)
    repeated = (jnp.repeat(x, 4 // kv_heads, axis=-2) for x in (k, v))
    close(attention_fn(q, k, v), nn.dot_product_attention(q, *repeated))


def test_nnx_causal_begins_at_the_top_left():
    q, k, v = arrays(kv_heads=2)
    close(attention_fn(q, k, v, is_causal=True), nnx.dot_product_attention(q, k, v, is_causal=True))


def test_bias():
    q, k, v = arrays()
    bias = jax.random.normal(jax.random.key(1), (1, 4, 7, 9))

    def gradients(fn):
        return jax.grad(lambda q, bias: jnp.sin(fn(q, k, v, bias)).sum(), argnums=(0, 1))(q, bias)

    jax.tree.map(close, gradients(attention_fn), gradients(nn.dot_product_attention))


def test_gradients_under_a_mask():
    def gradients(fn):
        return jax.grad(lambda x: jnp.sin(fn(*x, mask=MASKS["causal keys"])).sum())(arrays())

    jax.tree.map(close, gradients(attention_fn), gradients(nn.dot_product_attention))


def test_dtype_is_that_of_the_computation():
    q, k, v = arrays()
    out = attention_fn(q, k, v, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    close(out, nn.dot_product_attention(q, k, v), atol=3e-2)
    assert attention_fn(q, k.astype(jnp.bfloat16), v).dtype == jnp.float32


def test_mask_structure():
    causal = np.tri(7, 9, dtype=bool)
    keys = np.asarray(MASKS["keys"])
    assert mask_structure(nn.make_causal_mask(jnp.zeros((2, 7))), 7, 7) == (True, None)
    assert mask_structure(causal, 7, 9) == (True, None)
    assert mask_structure(np.ones((2, 1, 7, 9), bool), 7, 9) == (False, None)
    is_causal, rest = mask_structure(causal & keys, 7, 9)
    assert is_causal and rest.shape == keys.shape and (rest[..., :7] == keys[..., :7]).all()
    is_causal, rest = mask_structure(np.broadcast_to(keys, (2, 1, 7, 9)), 7, 9)
    assert not is_causal and (rest == keys).all()
    for mask in (causal[::-1], np.tri(7, 9, 2, dtype=bool), np.tri(7, 9, -1, dtype=bool), MASKS["dense"]):
        is_causal, rest = mask_structure(mask, 7, 9)
        assert not is_causal and (rest == mask).all()


def test_a_mask_read_element_by_element_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "jax_flash")
    q, k, v = arrays()
    attention_fn(q, k, v, mask=MASKS["causal"])
    jax.jit(attention_fn)(q, k, v, mask=MASKS["keys"])
    assert "every element" not in caplog.text
    jax.jit(lambda mask: attention_fn(q, k, v, mask=mask))(MASKS["causal"])
    assert "every element" in caplog.text


def dropped(rng, rate=0.25, batch=2, heads=4, length=64, **options):
    """Which weights [B, N, T, S] dropout sets to 0, seen through values that are the unit vectors."""
    zeros = jnp.zeros((batch, length, heads, 8))
    units = jnp.broadcast_to(jnp.eye(length)[:, None], (batch, length, heads, length))
    out = attention_fn(zeros, zeros, units, dropout_rng=rng, dropout_rate=rate, **options)
    kept = out[out > 0]
    close(kept, 1 / length / (1 - rate), rtol=1e-4)
    return np.moveaxis(np.asarray(out == 0), -2, -3)


def test_dropout():
    rng, other = jax.random.split(jax.random.key(3))
    drop = dropped(rng, broadcast_dropout=False)
    assert abs(drop.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / drop.size)
    assert (drop == dropped(rng, broadcast_dropout=False)).all()
    for different in (dropped(other, broadcast_dropout=False), drop[::-1], drop[:, ::-1]):
        assert abs((drop == different).mean() - (0.25**2 + 0.75**2)) < 0.02


def test_broadcast_dropout_shares_a_mask_over_batch_and_heads():
    drop = dropped(jax.random.key(3))
    assert (drop == drop[:1, :1]).all()
    assert abs(drop[0, 0].mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / drop[0, 0].size)


def test_dropout_keeps_the_expected_value():
    q, k, v = arrays(batch=(1,))
    rngs = jax.random.split(jax.random.key(0), 2000)
    outs = jax.vmap(lambda rng: attention_fn(q, k, v, dropout_rng=rng, dropout_rate=0.5))(rngs)
    error = outs.std(0) / np.sqrt(len(rngs))
    assert (abs(outs.mean(0) - attention_fn(q, k, v)) < 5 * error).all()


def test_deterministic_turns_dropout_off():
    q, k, v = arrays()
    close(attention_fn(q, k, v, dropout_rate=0.5, deterministic=True), attention_fn(q, k, v))


def test_custom_einsums_are_called():
    calls = []

    def einsum(*args):
        calls.append(args[0])
        return 2 * jnp.einsum(*args)

    q, k, v = arrays()
    hooks = {"qk_attn_weights_einsum": einsum, "attn_weights_value_einsum": einsum}
    right = nn.dot_product_attention(q, k, v, mask=jnp.tri(7, 9), **hooks)
    close(attention_fn(q, k, v, is_causal=True, **hooks), right)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="window"):
        attention_fn(q, k, v, window=2, **hooks)


def test_options_reach_flash_attention():
    q, k, v = arrays(kv_len=7)
    near = abs(np.arange(7)[:, None] - np.arange(7)) <= 2
    module = nn.MultiHeadDotProductAttention(4, attention_fn=functools.partial(attention_fn, window=2))
    theirs = nn.MultiHeadDotProductAttention(4)
    x = jax.random.normal(jax.random.key(1), (2, 7, 32))
    parameters = theirs.init(jax.random.key(0), x)
    close(module.apply(parameters, x), theirs.apply(parameters, x, mask=near))
    close(attention_fn(q, k, v, window=2), nn.dot_product_attention(q, k, v, mask=near))


@pytest.mark.parametrize(
    "positions", [None, np.arange(7), np.arange(14).reshape(2, 7)], ids=["default", "shared", "each"]
)
def test_rotary(positions):
    x = arrays()[0]
    each = np.broadcast_to(np.arange(7) if positions is None else positions, (2, 7))[..., None, None]
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * each * 1e4 ** (-np.arange(4) / 4))
    with jax.numpy_rank_promotion("raise"):
        close(rotary(x, positions), np.concatenate([turned.real, turned.imag], axis=-1))


def test_wrong_rotary():
    x = arrays()[0]
    for positions in (list(range(3)), np.zeros((1, 2, 7), int)):
        with pytest.raises(
            ValueError, match=r"positions: expected a shape that broadcasts to \[\*B, T\] = \(2, 7\), got"
        ):
            rotary(x, positions)
    with pytest.raises(ValueError, match="base: expected a number above 0, got -1"):
        rotary(x, base=-1.0)


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this version of Flax has no RoPE")
def test_rotary_in_attention_as_in_nnx():
    q, k, v = arrays(kv_len=7)
    right = nnx.dot_product_attention_with_rope(q, k, v, rope=nnx.RoPE())
    close(attention_fn(q, k, v, rotary_base=1e4), right)
    close(attention_fn(q, k, v, rotary_base=1e4, input_positions=jnp.arange(7)), right)
    with pytest.raises(ValueError, match="rotary_base"):
        attention_fn(q, k, v, input_positions=jnp.arange(7))

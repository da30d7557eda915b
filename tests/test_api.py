"""The public calls: what each argument means by example, and what each wrong argument raises."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash as jf

B, T, S, N, K, H = 2, 6, 8, 4, 2, 16

query, key, value = (
    jax.random.normal(jax.random.key(i), (B, length, heads, H))
    for i, (length, heads) in enumerate(((T, N), (S, K), (S, K)))
)


def wrong(error, argument, expected, **changes):
    """One row of the table: changed arguments, the error's class, the argument it names and words it must have."""
    label = ", ".join(f"{name}={getattr(x, 'shape', x)}" for name, x in changes.items())
    return pytest.param(changes, error, rf"^{argument}: .*{expected}.*got ", id=f"{label}-{argument}")


KEY = jax.random.key(0)

WRONG_ARGUMENTS = [
    wrong(TypeError, "query", "an array", query="abc"),
    wrong(TypeError, "query", "an array", query=jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)),
    wrong(TypeError, "query", "dtypes", query=jnp.ones((B, T, N, H), jnp.int32)),
    wrong(TypeError, "query", "dtypes", query=jnp.ones((B, T, N, H), jnp.complex64)),
    wrong(TypeError, "query", "dtypes", query=jnp.ones((B, T, N, H), jnp.float8_e4m3fn)),
    wrong(TypeError, "key", "float32", key=jnp.ones((B, S, K, H), jnp.bfloat16)),
    wrong(TypeError, "value", "float32", value=jnp.ones((B, S, K, H), jnp.float16)),
    wrong(ValueError, "query", r"\[\*B, T, N, H\]", query=jnp.ones((T, H))),
    wrong(ValueError, "query", "at least one head", query=jnp.ones((B, T, 0, H))),
    wrong(ValueError, "key", r"\[\*B, S, K, H\] = \(2, S, K, 16\)", key=jnp.ones((B, S, K, 2 * H))),
    wrong(ValueError, "key", r"\(2, S, K, 16\)", key=jnp.ones((3, S, K, H))),
    wrong(ValueError, "key", r"\(2, S, K, 16\)", key=jnp.ones((S, K, H))),
    wrong(ValueError, "key", "divides query's 4", key=jnp.ones((B, S, 3, H))),
    wrong(ValueError, "key", "divides query's 4", key=jnp.ones((B, S, 0, H))),
    wrong(ValueError, "value", r"\[\*B, S, K, Hv\] = \(2, 8, 2, Hv\)", value=jnp.ones((B, S + 1, K, H))),
    wrong(ValueError, "value", r"\(2, 8, 2, Hv\)", value=jnp.ones((B, S, 1, H))),
    wrong(TypeError, "scale", "a number", scale="1"),
    wrong(TypeError, "scale", "a number", scale=jnp.ones(3)),
    wrong(TypeError, "scale", "a number", scale=jnp.array(True)),
    wrong(ValueError, "scale", "finite", scale=float("nan")),
    wrong(ValueError, "scale", "range of float32", scale=1e39),
    wrong(TypeError, "causal", "True or False", causal=1),
    wrong(TypeError, "window", "integer", window=1.5),
    wrong(TypeError, "window", "integer", window=(True, 0)),
    wrong(ValueError, "window", "at least 0", window=(-1, 3)),
    wrong(ValueError, "window", r"\(left, right\)", window=(1, 2, 3)),
    wrong(TypeError, "q_offset", "integers", q_offset=0.5),
    wrong(TypeError, "q_offset", "integers", q_offset=False),
    wrong(TypeError, "q_offset", "an array", q_offset=2**31),
    wrong(ValueError, "q_offset", r"\[\*B\] = \(2\)", q_offset=jnp.ones(3, int)),
    wrong(TypeError, "segment_ids", "integers", segment_ids=(jnp.ones((B, T)), jnp.ones((B, S)))),
    wrong(ValueError, "segment_ids", "a pair", segment_ids=jnp.ones((B, T), int)),
    wrong(ValueError, "segment_ids", "query ids, key ids", segment_ids=(jnp.ones((B, T), int),)),
    wrong(ValueError, "segment_ids", r"\(2, 8\)", segment_ids=(jnp.ones((B, T), int), jnp.ones((B, T), int))),
    wrong(ValueError, "segment_ids", r"\(2, 6\)", segment_ids=(jnp.ones((B, 1), int), jnp.ones((B, S), int))),
    wrong(TypeError, "q_lengths", "integers", q_lengths=jnp.ones(B)),
    wrong(ValueError, "q_lengths", r"\(2\)", q_lengths=jnp.ones((B, 1), int)),
    wrong(TypeError, "kv_lengths", "integers", kv_lengths=jnp.ones(B, bool)),
    wrong(ValueError, "kv_lengths", r"\(2\)", kv_lengths=jnp.ones(5, int)),
    wrong(TypeError, "mask", "bool", mask=jnp.ones((T, S))),
    wrong(ValueError, "mask", r"\[\*B, N, T, S\] = \(2, 4, 6, 8\)", mask=jnp.ones((S, T), bool)),
    wrong(ValueError, "mask", r"\(2, 4, 6, 8\)", mask=jnp.ones((1, B, N, T, S), bool)),
    wrong(TypeError, "bias", "floating point", bias=jnp.ones((T, S), int)),
    wrong(ValueError, "bias", r"\(2, 4, 6, 8\)", bias=jnp.ones((K, T, S))),
    wrong(TypeError, "alibi_slopes", "floating point", alibi_slopes=jnp.ones(N, int)),
    wrong(ValueError, "alibi_slopes", r"\(2, 4\)", alibi_slopes=jnp.ones(K)),
    wrong(TypeError, "softcap", "a number", softcap=[1.0, 2.0]),
    wrong(ValueError, "softcap", "above 0", softcap=0),
    wrong(ValueError, "softcap", "range of float32", softcap=1e-50),
    wrong(TypeError, "sinks", "floating point", sinks=jnp.ones(N, bool)),
    wrong(ValueError, "sinks", r"\(4\)", sinks=jnp.ones((B, N))),
    wrong(ValueError, "sinks", r"\(4\)", sinks=jnp.float32(1)),
    wrong(ValueError, "dropout_rate", r"\[0, 1\)", dropout_rate=1.0, dropout_rng=KEY),
    wrong(TypeError, "dropout_rate", "a number", dropout_rate=None),
    wrong(ValueError, "dropout_rng", "a key of jax.random", dropout_rate=0.5),
    wrong(TypeError, "dropout_rng", "one key", dropout_rate=0.5, dropout_rng=jax.random.split(KEY, 2)),
    wrong(TypeError, "dropout_rng", "one key", dropout_rate=0.5, dropout_rng=jnp.ones(2)),
    wrong(TypeError, "dropout_rng", "one key", dropout_rate=0.5, dropout_rng=jnp.ones(3, jnp.uint32)),
    wrong(TypeError, "broadcast_dropout", "True or False", dropout_rate=0.5, dropout_rng=KEY, broadcast_dropout="yes"),
    wrong(TypeError, "return_lse", "True or False", return_lse="no"),
    wrong(TypeError, "deterministic", "True or False", deterministic=0),
    wrong(ValueError, "precision", r"None or jax_flash.Fp8\(...\)", precision="fp8"),
    wrong(ValueError, "implementation", "None, 'cuda' or 'xla'", implementation="cudnn"),
    wrong(ValueError, "implementation", "None, 'cuda' or 'xla'", implementation=["xla"]),
]


@pytest.mark.parametrize("changes, error, message", WRONG_ARGUMENTS)
def test_wrong_arguments_raise_and_say_what_was_expected(changes, error, message):
    arguments = {"query": query, "key": key, "value": value} | changes
    with pytest.raises(error, match=message):
        jf.flash_attention(**arguments)


@pytest.mark.parametrize("name", ["scale", "causal", "window", "softcap", "dropout_rate", "deterministic"])
def test_what_must_be_known_at_trace_time_says_so(name):
    with pytest.raises(TypeError, match=rf"^{name}: .*got a traced array"):
        jax.jit(lambda x: jf.flash_attention(query, key, value, **{name: x}))(1)


def test_sizes_must_be_known_at_trace_time():
    (b,) = jax.export.symbolic_shape("b")
    array = jax.ShapeDtypeStruct((b, T, N, H), jnp.float32)
    with pytest.raises(TypeError, match=r"^query: expected sizes known at trace time, got \(b, 6, 4, 16\)"):
        jax.export.export(jax.jit(jf.flash_attention))(array, array, array)


WRONG_FOR_THE_DROP_IN = [
    wrong(ValueError, "query", "3 or 4 axes", query=jnp.ones((1, B, T, N, H))),
    wrong(ValueError, "key", r"\(2, S, K, 16\)", key=jnp.ones((S, K, H))),
    wrong(ValueError, "query_seq_lengths", r"\[B\] = \(2,\)", query_seq_lengths=jnp.ones(3, int)),
    wrong(TypeError, "query_seq_lengths", "integers", query_seq_lengths=jnp.ones(2)),
    wrong(ValueError, "key_value_seq_lengths", r"\[B\] = \(2,\)", key_value_seq_lengths=3),
    wrong(TypeError, "local_window_size", "integer", local_window_size=2.0),
    wrong(ValueError, "local_window_size", "at least 0", local_window_size=-2),
    wrong(TypeError, "is_causal", "True or False", is_causal=None),
    wrong(TypeError, "mask", "bool", mask=jnp.ones((T, S))),
    wrong(TypeError, "bias", "floating point", bias=jnp.ones((T, S), complex)),
    wrong(TypeError, "return_residual", "True or False", return_residual=1),
    wrong(ValueError, "implementation", "None, 'cuda' or 'xla'", implementation="cudnn"),
]


@pytest.mark.parametrize("changes, error, message", WRONG_FOR_THE_DROP_IN)
def test_wrong_arguments_of_the_drop_in(changes, error, message):
    arguments = {"query": query, "key": key, "value": value} | changes
    with pytest.raises(error, match=message):
        jf.dot_product_attention(**arguments)


# --- jax.nn.dot_product_attention ------------------------------------------------------------------------------------

LENGTHS = {
    "query_seq_lengths": jnp.array([T, 3], jnp.int32),
    "key_value_seq_lengths": jnp.array([5, S], jnp.int32),
}
DROP_IN_CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "window in a list": {"local_window_size": [1, 2]},
    "symmetric window": {"local_window_size": 2, "is_causal": True},
    "lengths": LENGTHS,
    "bias of heads": {"bias": jax.random.normal(jax.random.key(5), (N, T, S))},
    "bias of keys": {"bias": jax.random.normal(jax.random.key(5), (B, 1, 1, S), jnp.bfloat16)},
    "integer bias": {"bias": jnp.arange(S)},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(6), 0.7, (1, N, T, S)).at[..., 0].set(True)},
    "all": LENGTHS
    | {"is_causal": True, "local_window_size": (6, 6), "bias": jnp.ones((T, S)), "mask": jnp.arange(S) < 7},
}


@pytest.mark.parametrize("call", DROP_IN_CALLS.values(), ids=DROP_IN_CALLS)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_drop_in_equals_jax_nn(call, implementation):
    wanted, wanted_residual = jax.nn.dot_product_attention(query, key, value, **call, return_residual=True)
    out, residual = jf.dot_product_attention(
        query, key, value, **call, return_residual=True, implementation=implementation
    )
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    assert residual.shape == wanted_residual.shape and residual.dtype == wanted_residual.dtype
    rows = jnp.arange(T)[:, None] < call.get("query_seq_lengths", jnp.array([T, T]))[:, None, None]
    np.testing.assert_allclose(*(jnp.where(rows, x, 0) for x in (residual, wanted_residual)), rtol=1e-5, atol=1e-5)

    def gradients(attend):
        return jax.grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays, **call))), (0, 1, 2))(query, key, value)

    for got, expected in zip(gradients(jf.dot_product_attention), gradients(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_drop_in_takes_positional_bias_and_mask_and_three_axes():
    bias, mask = jnp.ones((T, S)), jnp.arange(S) < 5
    for arrays in ((query, key, value), (query[0], key[0], value[0])):
        wanted = jax.nn.dot_product_attention(*arrays, bias, mask, return_residual=True)
        got = jf.dot_product_attention(*arrays, bias, mask, return_residual=True)
        for a, b in zip(got, wanted, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_residual_has_no_gradient():
    def loss(q):
        return jnp.sum(jf.dot_product_attention(q, key, value, return_residual=True)[1])

    np.testing.assert_array_equal(jax.grad(loss)(query), jnp.zeros_like(query))


def test_integers_and_bools_may_be_differentiated_operands():
    def loss(q, lengths, mask):
        return jnp.sum(jf.dot_product_attention(q, key, value, mask=mask, key_value_seq_lengths=lengths))

    gradients = jax.grad(loss, (0, 1, 2), allow_int=True)(query, jnp.array([3, 4], jnp.int32), jnp.ones((T, S), bool))
    assert [x.dtype for x in gradients] == [jnp.float32, jax.dtypes.float0, jax.dtypes.float0]


def test_float64():
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x), jnp.float64) for x in (query, key, value)]
        out = jf.dot_product_attention(*arrays, is_causal=True)
        assert out.dtype == jnp.float64
        scores = jnp.einsum("btkgh,bskh->bkgts", arrays[0].reshape(B, T, K, N // K, H), arrays[1]) / 4
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, S), bool)), scores, -jnp.inf), axis=-1)
        exact = jnp.einsum("bkgts,bskh->btkgh", weights, arrays[2]).reshape(B, T, N, H)
        np.testing.assert_allclose(out, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_slopes_sinks_and_lse_of_float64(implementation):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x), jnp.float64) for x in (query, key, value))
        slopes, sinks = jnp.linspace(0.1, 0.7, N), jnp.linspace(-1, 1, N)
        distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S))
        biased, biased_lse = jf.flash_attention(
            q, k, v, bias=-slopes[:, None, None] * distance, return_lse=True, implementation=implementation
        )
        wanted_lse = jnp.logaddexp(biased_lse, sinks[:, None])
        wanted = biased * jnp.moveaxis(jnp.exp(biased_lse - wanted_lse), -1, -2)[..., None]
        call = {"alibi_slopes": slopes, "sinks": sinks, "return_lse": True, "implementation": implementation}
        out, lse = jf.flash_attention(q, k, v, **call)
        np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-12, atol=1e-12)
        assert jf.flash_attention(q[:, :0], k, v, **call)[1].dtype == lse.dtype == jnp.float64


# --- flash_attention by example --------------------------------------------------------------------------------------


def test_a_row_that_sees_nothing_gives_zero_and_no_nan():
    def attend(q, k, v):
        return jf.flash_attention(q, k, v, kv_lengths=jnp.array([0, 3]), return_lse=True)

    (out, lse), vjp = jax.vjp(attend, query, key, value)
    assert not out[0].any() and out[1].all()
    assert jnp.all(lse[0] == -jnp.inf) and jnp.all(jnp.isfinite(lse[1]))
    for gradient in vjp((out, jnp.ones_like(lse))):
        assert jnp.all(jnp.isfinite(gradient)) and not gradient[0].any()


@pytest.mark.parametrize("changes", [{"T": 0}, {"S": 0}, {"B": 0}], ids=["no query", "no key", "no batch entry"])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_sizes_of_zero(changes, implementation):
    b, t, s = ({"B": B, "T": T, "S": S} | changes).values()
    arrays = jnp.ones((b, t, N, H)), jnp.ones((b, s, K, H)), jnp.ones((b, s, K, 2 * H))

    def attend(q, k, v):
        return jf.flash_attention(q, k, v, sinks=jnp.ones(N), return_lse=True, implementation=implementation)

    (out, lse), vjp = jax.vjp(attend, *arrays)
    assert out.shape == (b, t, N, 2 * H) and lse.shape == (b, N, t)
    assert not out.any() and jnp.all(lse == -jnp.inf)
    assert [x.shape for x in vjp((out, lse))] == [x.shape for x in arrays]


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)])
def test_any_number_of_batch_axes(batch):
    arrays = [jax.random.normal(jax.random.key(i), (*batch, T, n, H)) for i, n in enumerate((N, K, K))]
    flat = [x.reshape(-1, *x.shape[-3:]) for x in arrays]
    out = jf.flash_attention(*arrays, causal=True)
    np.testing.assert_allclose(out.reshape(-1, T, N, H), jf.flash_attention(*flat, causal=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [2**31 - 1, np.array([2**31 - 1, 2**30], np.int32)], ids=["one", "each"])
def test_positions_far_out(offset):
    everything = jf.flash_attention(query, key, value)
    np.testing.assert_array_equal(jf.flash_attention(query, key, value, causal=True, q_offset=offset), everything)
    assert not jf.flash_attention(query, key, value, causal=True, q_offset=~offset).any()
    assert not jf.flash_attention(query, key, value, window=(9, None), q_offset=offset).any()


def test_integers_wider_than_32_bits_keep_their_order():
    with jax.enable_x64(True):
        far = jnp.array([2**32 + 1, -(2**32) + 1])
        out, lse = jf.flash_attention(query, key, value, causal=True, q_offset=far, kv_lengths=-far, return_lse=True)
        assert jnp.all(lse == -jnp.inf) and not out.any()
        out = jf.flash_attention(query, key, value, q_lengths=far)
        np.testing.assert_array_equal(out[0], jf.flash_attention(query, key, value)[0])
        assert not out[1].any()


def test_scale_may_be_negative_and_head_size_any():
    arrays = [x[..., :13].astype(jnp.bfloat16) for x in (query, key, value)]
    out = jf.flash_attention(*arrays, scale=-0.5)
    wanted = jf.flash_attention(-arrays[0], *arrays[1:], scale=0.5)
    assert out.shape == (B, T, N, 13)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (out, wanted)), rtol=1e-2, atol=1e-2)


def test_alibi_slopes_are_constants_on_the_kernel_path():
    def loss(slopes, implementation=None):
        return jnp.sum(jf.flash_attention(query, key, value, alibi_slopes=slopes, implementation=implementation) ** 2)

    slopes = jnp.linspace(0.1, 0.5, N)
    with pytest.raises(NotImplementedError, match=r"alibi_slopes: .*implementation='xla'"):
        jax.grad(loss)(slopes)
    assert not jax.grad(lambda slopes: loss(jax.lax.stop_gradient(slopes)))(slopes).any()
    assert jnp.all(jax.grad(lambda slopes: loss(slopes, "xla"))(slopes) != 0)


def test_dropout_key_of_any_kind():
    """New keys and raw ones; a rate of 0 needs none; the expected value is kept."""
    ones = jnp.ones((1, 256, 1, 8))
    typed = jf.flash_attention(ones, ones, ones, dropout_rate=0.4, dropout_rng=jax.random.key(1))
    raw = jf.flash_attention(ones, ones, ones, dropout_rate=0.4, dropout_rng=jax.random.PRNGKey(1))
    np.testing.assert_array_equal(typed, raw)
    assert abs(float(typed.mean()) - 1) < 0.01
    np.testing.assert_array_equal(
        jf.flash_attention(ones, ones, ones, dropout_rate=0), jf.flash_attention(ones, ones, ones)
    )


def test_import_is_light():
    """Flax, the extension and anything else that is slow come only when they are needed."""
    code = "import jax, sys; before = set(sys.modules); import jax_flash; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jax_flash.attention" in loaded
    assert not {"flax", "jax_flash.flax", "jax_flash._native", "optax", "torch"} & set(loaded)

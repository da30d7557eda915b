"""FP8: quantisation and its emulation against NumPy on any machine, the kernels against the emulation on a GPU."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_flash as jf
from jax_flash import fp8
from jax_flash.spec import AttentionSpec, Operands

SCORES = pytest.mark.parametrize("scores", ["e4m3", "int8"])


def normal(shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(batch=2, t=70, s=90, heads=4, kv_heads=2, size=64, dtype=jnp.bfloat16):
    shapes = (batch, t, heads, size), (batch, s, kv_heads, size), (batch, s, kv_heads, size)
    return tuple(normal(shape, seed, dtype) for seed, shape in enumerate(shapes))


def relative_error(result, truth):
    result, truth = (np.asarray(x, np.float64) for x in (result, truth))
    return np.linalg.norm(result - truth) / np.linalg.norm(truth)


def with_outliers(shape, rng):
    """N(0, 1) + N(0, 100) * Bernoulli(0.001), the input on which FP8 attention is usually judged."""
    return rng.standard_normal(shape) + 10 * rng.standard_normal(shape) * (rng.random(shape) < 0.001)


def reference_scales(x, scores="e4m3", block=fp8.BLOCK):
    """Scales of [*B, T, N, H] in float64, by `np.frexp` instead of bit arithmetic: [*B, N, blocks]."""
    x = np.abs(np.asarray(x, np.float64))
    starts = range(0, x.shape[-3], block)
    largest = np.stack([x[..., i : i + block, :, :].max(axis=(-3, -1)) for i in starts], axis=-1)
    if scores == "int8":
        return np.maximum(largest, 2.0**-43) / 127
    mantissa, exponent = np.frexp(largest / 448)
    return np.where(largest == 0, 1.0, np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent)))


def tokens(scale, length):
    """[*B, N, blocks] -> [*B, T, N, 1] in float64."""
    return np.repeat(np.swapaxes(np.asarray(scale, np.float64), -1, -2), fp8.BLOCK, axis=-2)[..., :length, :, None]


def dequantized(quantized, length):
    """q, k, v [*B, T, N, H'] in float64."""
    q, k = (np.asarray(x, np.float64) for x in quantized[:2])
    v = np.asarray(fp8.value_from_layout(quantized.value, length), np.float64)
    scales = quantized.query_scale, quantized.key_scale, quantized.value_scale
    return tuple(x * tokens(scale, x.shape[-3]) for x, scale in zip((q, k, v), scales, strict=True))


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_rotation_keeps_products(size):
    q, k = (normal((1, 3, 1, size), seed, jnp.float32) for seed in (0, 1))
    block = fp8.hadamard_size(size)
    rotated = jnp.einsum("btnh,bsnh->bts", fp8._rotated(q, block), fp8._rotated(k, block)) / block
    np.testing.assert_allclose(rotated, jnp.einsum("btnh,bsnh->bts", q, k), rtol=1e-5, atol=1e-4)


def test_rotation_spreads_an_outlier():
    x = jnp.zeros((1, 1, 1, 128)).at[..., 7].set(100.0)
    np.testing.assert_allclose(jnp.abs(fp8._rotated(x, 128)), 100.0)


def test_head_sizes_are_filled_up_ahead_of_the_rotation():
    arrays = qkv(size=20)
    filled = [jnp.pad(x, [(0, 0)] * 3 + [(0, 4)]) for x in arrays]  # as kernels take them
    jax.tree.map(np.testing.assert_array_equal, fp8.quantize(*arrays), fp8.quantize(*filled))


def test_quantize_rounds_each_value_once():
    q, k, v = qkv()
    for x, back in zip((q, k, v), dequantized(fp8.quantize(q, k, v, jf.Fp8(rotate=False)), 90), strict=True):
        x = np.asarray(x, np.float64)
        assert np.abs(back - x).max() <= np.abs(x).max() * 2**-4
        normal_values = np.abs(x) > np.abs(x).max() * 2**-10
        assert (np.abs(back - x) <= np.abs(x) * 2**-4)[normal_values].all()


def test_integers_are_the_nearest():
    q, k, v = qkv()
    quantized = fp8.quantize(q, k, v, jf.Fp8(rotate=False, scores="int8"))
    arrays = zip((q, k), quantized[:2], (quantized.query_scale, quantized.key_scale), strict=True)
    for x, integers, scale in arrays:
        assert integers.dtype == jnp.int8 and jnp.abs(integers.astype(int)).max() == 127
        steps = np.asarray(x, np.float64) / tokens(scale, x.shape[1])
        assert np.abs(integers - steps).max() <= 0.502  # 127 / largest has 16 bits


@SCORES
def test_scales_are_the_least_that_fit(scores):
    q, k, v = qkv()
    quantized = fp8.quantize(q, k, v, jf.Fp8(rotate=False, scores=scores))
    np.testing.assert_array_equal(quantized.value_scale, reference_scales(v))
    for x, scale in ((q, quantized.query_scale), (k, quantized.key_scale)):
        np.testing.assert_allclose(scale, reference_scales(x, scores), rtol=0 if scores == "e4m3" else 2e-7)


@pytest.mark.parametrize("largest, scale", [(448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (0.0, 1.0), (2.0**-58, 2.0**-50)])
def test_scale_of_a_block(largest, scale):
    x = jnp.zeros((1, 4, 1, 64)).at[0, 2, 0, 5].set(-largest)
    assert fp8.quantize(x, x, x, jf.Fp8(rotate=False)).value_scale == scale


@SCORES
@pytest.mark.parametrize("granularity, axes", [("head", (-1,)), ("tensor", None)])
def test_coarse_scales(granularity, axes, scores):
    q, k, v = qkv()
    scale = fp8.quantize(q, k, v, jf.Fp8(scales=granularity, rotate=False, scores=scores)).query_scale
    expected = np.broadcast_to(reference_scales(q, scores).max(axes, keepdims=True), scale.shape)
    np.testing.assert_allclose(scale, expected, rtol=0 if scores == "e4m3" else 2e-7)


def test_unknown_options():
    with pytest.raises(ValueError, match="scales: expected 'block', 'head' or 'tensor', got 'row'"):
        jf.Fp8(scales="row")
    with pytest.raises(ValueError, match="scores: expected 'e4m3' or 'int8', got 'int4'"):
        jf.Fp8(scores="int4")


@pytest.mark.parametrize("length", [1, 16, 33, 90])
def test_value_layout(length):
    v = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, length, 3, 64)), jnp.uint8)
    layout = fp8.value_layout(v)
    assert layout.shape == (2, 3, -(-length // 32) * 2, 64 * 16)
    np.testing.assert_array_equal(fp8.value_from_layout(layout, length), v)
    # Byte 2 of a chunk is key 8: what register 2 of a thread's fragment of P holds beside key 0 and 1.
    assert (layout[0, 1, 0, 5 * 16 + 2] == (v[0, 8, 1, 5] if length > 8 else 0)).all()


@pytest.mark.parametrize("precision", [jf.Fp8(), jf.Fp8(rotate=False), jf.Fp8(scores="int8")], ids=str)
@pytest.mark.parametrize(
    "mask",
    [{}, {"causal": True, "q_offset": 20}, {"window": (8, 4)}, {"softcap": 3.0}, {"kv_lengths": jnp.array([40, 90])}],
    ids=lambda mask: "-".join(mask) or "full",
)
def test_error_on_normal_inputs(mask, precision):
    q, k, v = qkv()
    exact = jf.flash_attention(q, k, v, **mask)
    out, lse = jf.flash_attention(q, k, v, precision=precision, return_lse=True, **mask)
    assert relative_error(out, exact) < (0.07 if precision.scores == "e4m3" else 0.05)
    np.testing.assert_allclose(lse, jf.flash_attention(q, k, v, return_lse=True, **mask)[1], atol=0.1)


def test_error_on_outliers():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(with_outliers((2, s, 1, 128), rng), jnp.float32) for s in (1024, 4096, 4096))
    exact = jf.flash_attention(q, k, v, implementation="xla")

    def error(precision):
        out = jf.flash_attention(q, k, v, precision=precision, implementation="xla")
        return np.sqrt(np.mean(np.square(np.asarray(out, np.float64) - exact)))

    assert error(jf.Fp8()) < 0.75 * error(jf.Fp8(rotate=False, scales="tensor", value_scales="tensor"))
    assert error(jf.Fp8(scores="int8")) < 9.1e-3


@SCORES
def test_emulation_rounds_only_what_the_kernel_rounds(scores):
    """Scores, softmax and sums by NumPy from the quantised operands: p alone is rounded once more."""
    q, k, v = qkv(heads=2)
    quantized = fp8.quantize(q, k, v, jf.Fp8(scores=scores))
    out, lse = jf.quantized_attention(quantized, dtype=jnp.float16, return_lse=True)
    qd, kd, vd = (np.moveaxis(x, -2, -3) for x in dequantized(quantized, 90))
    scores = np.log2(np.e) / 8 * qd @ np.swapaxes(kd, -1, -2)
    scale = np.repeat(np.asarray(quantized.value_scale), fp8.BLOCK, axis=-1)[..., None, :90]
    exponents = scores + np.log2(scale)
    top = np.ceil(exponents.max(-1, keepdims=True)) - 4
    p = np.exp2(exponents - top)
    total = (p / scale).sum(-1, keepdims=True)
    rounded = p.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = np.moveaxis((rounded / scale) @ vd / total, -3, -2)
    # A value of p that lies next to a rounding boundary may fall either way.
    assert relative_error(out, expected) < 2e-3
    np.testing.assert_allclose(lse, np.log(2) * (top + np.log2(total))[..., 0], atol=1e-4)


def test_sinks_and_empty_rows():
    q, k, v = qkv()
    sinks = jnp.array([0.0, 1.0, 5.0, -3.0])
    options = {"sinks": sinks, "kv_lengths": jnp.array([0, 90])}
    out, lse = jf.flash_attention(q, k, v, precision=jf.Fp8(), return_lse=True, **options)
    exact, exact_lse = jf.flash_attention(q, k, v, return_lse=True, **options)
    assert (out[0] == 0).all() and (lse[0] == -jnp.inf).all()
    assert relative_error(out[1], exact[1]) < 0.07
    np.testing.assert_allclose(lse[1], exact_lse[1], atol=0.1)


@SCORES
def test_what_lies_past_the_lengths_does_not_matter(scores):
    q, k, v = qkv()
    precision = jf.Fp8(scores=scores)
    options = {"q_lengths": jnp.array([70, 11]), "kv_lengths": jnp.array([37, 90]), "precision": precision}
    clean = jf.flash_attention(q, k, v, return_lse=True, **options)
    q = q.at[1, 11:].set(jnp.nan)
    k, v = k.at[0, 37:].set(jnp.nan), v.at[0, 37:].set(jnp.inf)
    for dirty, expected in zip(jf.flash_attention(q, k, v, return_lse=True, **options), clean, strict=True):
        np.testing.assert_array_equal(dirty, expected)


HARD = {
    "zero rows": lambda x: x.at[:, ::3].set(0),
    "zeros": lambda x: x * 0,
    "equal rows": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "huge": lambda x: x * 1e17,
    "tiny": lambda x: x * 1e-16,
    "one huge row": lambda x: x.at[:, 5].set(1e30),
    "infinity": lambda x: x.at[:, 5, 0, 3].set(jnp.inf),
    "minus infinity": lambda x: x.at[:, 5, 0, 3].set(-jnp.inf),
}


@SCORES
@pytest.mark.parametrize("which", [0, 1, 2, slice(0, 3)], ids=["query", "key", "value", "all"])
@pytest.mark.parametrize("change", HARD.values(), ids=HARD.keys())
def test_no_nan_from_hard_inputs(change, which, scores, path="xla"):
    arrays = list(qkv())
    arrays[which] = [change(x) for x in arrays[which]] if isinstance(which, slice) else change(arrays[which])
    options = {"precision": jf.Fp8(scores=scores), "return_lse": True, "implementation": path, "causal": True}
    out, lse = jf.flash_attention(*arrays, **options)
    assert not jnp.isnan(out).any() and not jnp.isnan(lse).any()


@SCORES
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("size", [64, 80])
def test_nan_stays_where_it_is_seen(size, rotate, scores, path="xla"):
    q, k, v = qkv(size=size)
    q = q.at[0, [1, 7], 1, 3].set(jnp.nan)  # query 1 sees no key
    k = k.at[1, 40, 0, 5].set(jnp.nan)
    options = {"precision": jf.Fp8(rotate=rotate, scores=scores), "return_lse": True, "implementation": path}
    out, lse = jf.flash_attention(q, k, v, causal=True, q_offset=-2, **options)
    expected = np.zeros(lse.shape, bool)
    expected[0, 1, 7] = True
    expected[1, :2, 42:] = True  # two heads share the key's
    np.testing.assert_array_equal(jnp.isnan(lse), expected)
    np.testing.assert_array_equal(jnp.isnan(out), np.swapaxes(expected, 1, 2)[..., None].repeat(size, -1))


def test_gradients_are_those_of_16_bits():
    q, k, v = qkv()
    dout = normal((2, 70, 4, 64), 7)

    def gradients(precision):
        def loss(q, k, v):
            out = jf.flash_attention(q, k, v, causal=True, q_offset=20, precision=precision)
            return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for ours, exact in zip(gradients(jf.Fp8()), gradients(None), strict=True):
        assert ours.dtype == exact.dtype and relative_error(ours, exact) < 0.05


def test_vmap_equals_a_loop():
    q, k, v = qkv()

    def attend(q, k):
        return jf.flash_attention(q, k, v[0], precision=jf.Fp8())

    np.testing.assert_array_equal(jax.vmap(attend)(q, k), jnp.stack([attend(*pair) for pair in zip(q, k, strict=True)]))


@SCORES
def test_quantized_attention_is_flash_attention(scores):
    q, k, v = qkv(size=80)
    precision = jf.Fp8(scores=scores)
    expected = jf.flash_attention(q, k, v, causal=True, precision=precision)
    out = jf.quantized_attention(fp8.quantize(q, k, v, precision), value_size=80, causal=True, scale=80**-0.5)
    np.testing.assert_array_equal(out, expected)


@SCORES
def test_tensors_with_scales_of_their_own(scores):
    q, k, v = qkv()
    q, k, v = q.astype(fp8.SCORE_DTYPES[scores]), k.astype(fp8.SCORE_DTYPES[scores]), v.astype(fp8.E4M3)
    out = jf.quantized_attention(fp8.from_tensors(q, k, v, 2.0, 0.5, 4.0))
    exact = jf.flash_attention(2.0 * q.astype(jnp.float32), 0.5 * k.astype(jnp.float32), 4.0 * v.astype(jnp.float32))
    assert relative_error(out, exact) < 0.04  # p alone is rounded


def test_wrong_precision():
    for call in (jf.flash_attention, fp8.quantize):
        with pytest.raises(ValueError, match=r"precision: expected None or jax_flash.Fp8\(...\), got 'fp8'"):
            call(*qkv(), precision="fp8")
    with pytest.raises(TypeError, match="rotate: expected True or False, got 1"):
        jf.Fp8(rotate=1)
    with pytest.raises(ValueError, match="precision: expected head sizes up to 256 beside Fp8, got 264"):
        jf.flash_attention(*qkv(size=264), precision=jf.Fp8())


def wrong(error, argument, expected, call):
    return pytest.param(call, error, rf"^{argument}: .*{expected}.*got ", id=f"{argument}-{expected}")


@pytest.mark.parametrize(
    "call, error, message",
    [
        wrong(TypeError, "query", "an array", lambda q, k, v, z: fp8.quantize(None, k, v)),
        wrong(TypeError, "query", "dtypes", lambda q, k, v, z: fp8.quantize(q.astype(int), k, v)),
        wrong(ValueError, "key", "heads that divides", lambda q, k, v, z: fp8.quantize(q, k[..., [0, 0, 1], :], v)),
        wrong(ValueError, "value", "beside key", lambda q, k, v, z: fp8.quantize(q, k, v[:, 1:])),
        wrong(TypeError, "q_lengths", "integers", lambda q, k, v, z: fp8.quantize(q, k, v, q_lengths=1.0)),
        wrong(ValueError, "kv_lengths", r"\(2\)", lambda q, k, v, z: fp8.quantize(q, k, v, kv_lengths=[1, 2, 3])),
        wrong(TypeError, "query", "float8_e4m3fn, int8", lambda q, k, v, z: fp8.from_tensors(q, k, v)),
        wrong(TypeError, "key", "query's", lambda q, k, v, z: fp8.from_tensors(z.query.astype(jnp.int8), z.key, z.key)),
        wrong(TypeError, "value", "float8_e4m3fn", lambda q, k, v, z: fp8.from_tensors(*[z.key.astype(jnp.int8)] * 3)),
        wrong(
            ValueError, "key_scale", "one number", lambda q, k, v, z: fp8.from_tensors(*z[:2], z[1], 1.0, [1.0, 2.0])
        ),
        wrong(TypeError, "quantized", "Quantized", lambda q, k, v, z: jf.quantized_attention(tuple(z))),
        wrong(
            ValueError,
            "quantized.value",
            "of shape",
            lambda q, k, v, z: jf.quantized_attention(z._replace(value=z.value[:, :1])),
        ),
        wrong(
            ValueError,
            "quantized.query_scale",
            "float32",
            lambda q, k, v, z: jf.quantized_attention(z._replace(query_scale=z.query_scale.astype(q.dtype))),
        ),
        wrong(ValueError, "value_size", "1 to 64", lambda q, k, v, z: jf.quantized_attention(z, value_size=65)),
        wrong(TypeError, "dtype", "float16 or bfloat16", lambda q, k, v, z: jf.quantized_attention(z, dtype="float32")),
    ],
)
def test_wrong_arguments(call, error, message):
    q, k, v = qkv(t=3, s=4)
    with pytest.raises(error, match=message):
        call(q, k, v, fp8.quantize(q, k, v))


@pytest.mark.parametrize("changes", [{"t": 0}, {"s": 0}, {"batch": 0}], ids=["no query", "no key", "no batch entry"])
def test_sizes_of_zero(changes):
    q, k, v = qkv(**{"t": 3, "s": 4} | changes)
    out, lse = jf.quantized_attention(fp8.quantize(q, k, v), return_lse=True)
    assert out.shape == q.shape and not out.any() and jnp.all(lse == -jnp.inf)


@SCORES
def test_modes_of_jax(scores):
    arrays, precision = qkv(t=3, s=4), jf.Fp8(scores=scores)
    quantized = jax.jit(lambda *arrays: fp8.quantize(*arrays, precision))(*arrays)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, fp8.quantize(*arrays, precision), quantized)
    with jax.disable_jit():
        jax.eval_shape(lambda *arrays: jf.flash_attention(*arrays, precision=precision), *arrays)


def test_quantized_attention_under_vmap_and_grad():
    quantized = fp8.quantize(*qkv(t=3, s=4))
    out = jf.quantized_attention(quantized)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jf.quantized_attention))(quantized), out)
    with pytest.raises(NotImplementedError, match="quantized_attention: it has no derivative"):
        jax.grad(lambda sinks: jf.quantized_attention(quantized, sinks=sinks)[0, 0, 0, 0])(jnp.ones(4))


@SCORES
def test_quantized_attention_by_the_kernel(scores):
    """Its scale is above 0, whatever sign the call's has; by name, there is no other path."""
    quantized = fp8.quantize(*qkv(t=3, s=4), jf.Fp8(scores=scores))
    attend = jax.jit(lambda x: jf.quantized_attention(x, scale=-0.5, implementation="cuda"))
    text = attend.trace(quantized).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_flash_forward_fp8") == 1 and "scale = 5.000000e-01" in text
    assert f' dtype = "{quantized.query.dtype}"' in text
    with pytest.raises(NotImplementedError, match="compiled for cpu"):
        attend.trace(quantized).lower(lowering_platforms=("cpu",))


def test_explain_says_what_the_scores_are(capsys):
    jf.explain(*qkv(), precision=jf.Fp8(scores="int8"))
    assert "sm90_forward_fp8, scores int8, tile" in capsys.readouterr().out


@SCORES
def test_program_for_cuda_has_two_calls(scores):
    q, k, v = qkv()
    attend = jax.jit(lambda q, k, v: jf.flash_attention(q, k, v, precision=jf.Fp8(scores=scores)))
    text = attend.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_flash_quantize") == text.count("@jax_flash_forward_fp8") == 1
    assert "@jax_flash_forward(" not in text


# Of check_kernel, for large scores. The tensor cores cut products of e4m3 (not of int8) to 13 bits below the largest
# before they add them, and that adds up: where all products are positive, scores of 200 are off by 0.1. Then p is
# rounded elsewhere, by 2^-5.2 of it, and so is the emulation's.
CUT_SUMS = {"e4m3": {"bound": 2**-4.5, "lse_bound": 2**-10}, "int8": {}}


def check_kernel(arrays, precision, *, bound=8e-3, lse_bound=0.0, **options):
    """Output and lse of the kernel against those of the emulation: relative to the outputs, to the largest lse."""

    def attend(implementation):
        fixed = {"precision": precision, "return_lse": True, "implementation": implementation}
        return jax.jit(lambda *arrays: jf.flash_attention(*arrays, **fixed, **options))(*arrays)

    (out, lse), (expected, expected_lse) = (
        [np.asarray(x, np.float64) for x in attend(path)] for path in ("cuda", "xla")
    )
    # A value of p next to a rounding boundary may fall either way, and tiny ones may be denormal: 2^-4 of few.
    few = max(bound, 2**-4 * max(1, lse.size) ** -0.5)
    assert np.linalg.norm(out - expected) <= few * np.linalg.norm(expected)
    largest = np.abs(lse[np.isfinite(lse)]).max(initial=0.0)
    np.testing.assert_allclose(lse, expected_lse, atol=max(2e-3, lse_bound * largest))


def check_quantize(arrays, precision):
    """The kernel and JAX give the same bits."""
    spec = AttentionSpec(1.0, precision=precision)
    ours = jax.jit(lambda *arrays: fp8._quantize_kernel(spec, *arrays, Operands()))(*arrays)
    expected = jax.jit(lambda *arrays: fp8.quantize(*arrays, precision))(*arrays)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))


class TestKernels:
    pytestmark = pytest.mark.gpu

    @SCORES
    @pytest.mark.parametrize("rotate", [True, False])
    @pytest.mark.parametrize("shape", [(2, 70, 4, 64), (1, 200, 2, 128), (2, 33, 3, 256), (2, 100, 2, 80)], ids=str)
    def test_quantize_gives_the_same_bits(self, shape, rotate, scores):
        check_quantize([3 * normal(shape, seed) for seed in range(3)], jf.Fp8(rotate=rotate, scores=scores))

    @pytest.mark.parametrize("change", [*HARD.values(), lambda x: x.at[:, 5, 0, 3].set(jnp.nan)], ids=[*HARD, "NaN"])
    def test_quantize_gives_the_same_bits_of_hard_inputs(self, change):
        check_quantize([change(x) for x in qkv()], jf.Fp8(scores="int8"))

    @SCORES
    @pytest.mark.parametrize("size", [64, 80, 128, 256])
    @pytest.mark.parametrize("length", [1, 128, 333, 1000])
    @pytest.mark.parametrize("causal", [False, True])
    def test_kernel_against_emulation(self, size, length, causal, scores):
        check_kernel(qkv(t=length, s=length, size=size), jf.Fp8(scores=scores), causal=causal)

    @SCORES
    @pytest.mark.parametrize(
        "options",
        [
            {"q_offset": 500, "causal": True},
            {"q_offset": 300, "window": (64, 10)},
            {"q_lengths": [200, 77], "kv_lengths": [300, 700]},
            {"segment_ids": (np.repeat([[0, 2]], 100, 1), np.repeat([[0, 1, 2]], [300, 200, 200], 1))},
            {"softcap": 5.0},
            {"sinks": [0.0, 1.0, 5.0, -3.0]},
            {"alibi_slopes": [0.1, 0.2, 0.3, 0.4], "causal": True},
            {"mask": np.random.default_rng(0).random((2, 1, 200, 700)) < 0.5},
            {"bias": normal((1, 4, 200, 700), 9)},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_features(self, options, scores):
        options = {name: jnp.asarray(x) if isinstance(x, list) else x for name, x in options.items()}
        check_kernel(qkv(t=200, s=700, size=128), jf.Fp8(scores=scores), **options)

    @SCORES
    def test_scores_that_grow_from_tile_to_tile(self, scores):
        q, k, v = qkv(t=300, s=2000, size=128)
        rise = jnp.linspace(8, 0, 2000, dtype=jnp.bfloat16)[:, None, None]
        check_kernel((jnp.abs(q) + 1, jnp.abs(k) + rise, v), jf.Fp8(scores=scores), **CUT_SUMS[scores])

    @SCORES
    @pytest.mark.parametrize("change", HARD.values(), ids=HARD.keys())
    def test_no_nan_from_hard_inputs(self, change, scores):
        test_no_nan_from_hard_inputs(change, slice(0, 3), scores, "cuda")

    @SCORES
    @pytest.mark.parametrize("rotate", [True, False])
    @pytest.mark.parametrize("size", [64, 80])
    def test_nan_stays_where_it_is_seen(self, size, rotate, scores):
        test_nan_stays_where_it_is_seen(size, rotate, scores, "cuda")

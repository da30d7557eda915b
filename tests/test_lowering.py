"""What a program holds that is lowered for CUDA, on any machine: the custom calls, their attributes and operands."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash as jf

B, T, S, N, K, H = 2, 64, 96, 4, 2, 32


def arrays(*batch, head_size=H, dtype=jnp.bfloat16):
    shapes = ((T, N, head_size), (S, K, head_size), (S, K, head_size))
    return tuple(jax.ShapeDtypeStruct((*(batch or (B,)), *shape), dtype) for shape in shapes)


CALL = re.compile(r"custom_call @jax_flash_(\w+)\(.*mhlo\.backend_config = \{(.*?)\}.* : \((.*)\) -> ")


def lowered(function, *arguments, platform="cuda"):
    """[(target, attributes, operand types)] of the custom calls that the program makes, in order."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    bodies = dict(re.findall(r"func\.func \w+ @([\w.]+)(.*?)\n  \}\n", text, re.DOTALL))

    def calls(name):
        for line in bodies[name].splitlines():
            if found := CALL.search(line):
                target, attributes, operands = found.groups()
                yield target, dict(re.findall(r'(\w+) = "?([\w.+-]+)"?', attributes)), operands.split(", ")
            elif found := re.search(r"\bcall @([\w.]+)", line):
                yield from calls(found[1])

    return list(calls("main"))


def gradient(function, wrt):
    return jax.grad(lambda *arguments: jnp.sum(function(*arguments).astype(jnp.float32) ** 2), wrt)


def targets(function, *arguments):
    return [target for target, _, _ in lowered(function, *arguments)]


causal = functools.partial(jf.flash_attention, causal=True, window=(7, None), scale=0.5)


def test_one_readable_call_each_direction():
    forward, backward = lowered(gradient(causal, (0, 1, 2)), *arrays())
    assert (forward[0], backward[0]) == ("forward", "backward")
    wanted = {
        "dtype": "bfloat16", "bias_dtype": "none", "batch": "2", "q_len": "64", "kv_len": "96", "q_heads": "4",
        "kv_heads": "2", "head_dim": "32", "value_dim": "32", "causal": "true", "window_left": "7",
        "window_right": "-1", "mask": "false", "segment_ids": "false", "deterministic": "false",
    }  # fmt: skip
    for _, attributes, _ in (forward, backward):
        assert {name: attributes[name] for name in wanted} == wanted
        assert float(attributes["scale"]) == 0.5
    assert len(forward[2]) == 3
    assert len(backward[2]) == 6  # and out, lse, dout
    assert backward[1]["lse_cotangent"] == "false"
    assert "lse_cotangent" not in forward[1]


def test_every_operand_is_one_argument_in_its_own_shape():
    def attend(q, k, v, given, bias):
        return jf.flash_attention(q, k, v, bias=bias, **given, dropout_rate=0.25)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    given = {
        "q_offset": array(B), "segment_ids": (array(B, T), array(1, S)), "q_lengths": array(B), "kv_lengths": array(B),
        "mask": array(B, 1, 1, S, dtype=jnp.bool_), "alibi_slopes": array(N, dtype=jnp.float32),
        "sinks": array(N, dtype=jnp.float32), "dropout_rng": jax.eval_shape(lambda: jax.random.key(0)),
    }  # fmt: skip
    ((target, attributes, types),) = lowered(attend, *arrays(), given, array(N, T, S, dtype=jnp.bfloat16))
    assert target == "forward"
    assert types[3:] == [
        "tensor<2xi32>", "tensor<2x64xi32>", "tensor<1x96xi32>", "tensor<2xi32>", "tensor<2xi32>",
        "tensor<2x1x1x96xi1>", "tensor<1x4x64x96xbf16>", "tensor<1x4xf32>", "tensor<4xf32>", "tensor<1x2xui32>",
        "tensor<2xi32>", "tensor<4xi32>",
    ]  # fmt: skip
    flags = ("q_offset", "segment_ids", "q_lengths", "kv_lengths", "mask", "alibi", "sinks")
    assert all(attributes[flag] == "true" for flag in flags)
    assert attributes["bias_dtype"] == "bfloat16"
    assert float(attributes["dropout_rate"]) == 0.25


def test_bias_gradient_is_a_call_only_where_it_is_wanted():
    bias = jax.ShapeDtypeStruct((N, T, S), jnp.bfloat16)
    attend = lambda q, k, v, bias: jf.flash_attention(q, k, v, bias=bias)  # noqa: E731
    assert targets(gradient(attend, 0), *arrays(), bias) == ["forward", "backward"]
    assert sorted(targets(gradient(attend, (0, 3)), *arrays(), bias)) == ["backward", "bias_gradient", "forward"]


def test_lse_cotangent_and_sinks():
    """The backward call takes the lse's cotangent if there is one, and never the sinks: the lse has them."""

    def loss(q, k, v, sinks):
        out, lse = jf.flash_attention(q, k, v, sinks=sinks, return_lse=True)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    forward, backward = lowered(jax.grad(loss, (0, 3)), *arrays(), jax.ShapeDtypeStruct((N,), jnp.float32))
    assert (forward[1]["sinks"], backward[1]["sinks"]) == ("true", "false")
    assert backward[1]["lse_cotangent"] == "true"
    assert len(backward[2]) == 7


@pytest.mark.parametrize("names, forwards", [(jf.SAVE_NAMES, 1), ((), 2)])
def test_remat_runs_the_forward_kernel_as_often_as_its_policy_says(names, forwards):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    layer = jax.checkpoint(lambda *arguments: jnp.sin(causal(*arguments)), policy=policy)
    assert sorted(targets(gradient(layer, 0), *arrays())) == ["backward"] + ["forward"] * forwards


def test_mapped_axes_are_batch_axes_of_one_call():
    q, _, _ = arrays(3, B)
    _, k, v = arrays(B)
    mask = jax.ShapeDtypeStruct((3, S), jnp.bool_)
    attend = lambda q, k, v, mask: jf.flash_attention(q, k, v, mask=mask)  # noqa: E731
    ((_, attributes, types),) = lowered(jax.vmap(attend, (0, None, None, 0)), q, k, v, mask)
    assert attributes["batch"] == "6"
    assert types[1] == "tensor<1x2x96x2x32xbf16>"  # read broadcast
    assert types[3] == "tensor<3x1x1x1x96xi1>"


def test_an_axis_between_full_ones_is_materialised():
    """Kernels read one run of batch axes; [5, 1, 2] for a batch of [5, 3, 2] is two."""
    q, _, _ = arrays(5, 3, B)
    _, k, v = arrays(5, B)
    over_inner = jax.vmap(jf.flash_attention, (0, None, None))
    ((_, _, types),) = lowered(jax.vmap(over_inner), q, k, v)
    assert types[1] == "tensor<5x3x2x96x2x32xbf16>"


def test_head_sizes_are_padded_to_multiples_of_8():
    ((_, attributes, types),) = lowered(jf.flash_attention, *arrays(head_size=20))
    assert (attributes["head_dim"], attributes["value_dim"]) == ("24", "24")
    assert types[0] == "tensor<2x64x4x24xbf16>"
    np.testing.assert_allclose(float(attributes["scale"]), 20**-0.5, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_calls_the_kernel_on_its_part(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("model",))
    specs = (P(None, None, "model"), P(None, None, "model"), P(None, None, "model"))
    attend = gradient(causal, (0, 1, 2))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma)
    forward, backward = lowered(mapped, *arrays())
    assert forward[2][:2] == ["tensor<2x64x2x32xbf16>", "tensor<2x96x1x32xbf16>"]
    assert backward[1]["q_heads"] == "2"


def test_explicit_mesh_calls_the_kernel_on_its_part():
    devices = np.array(jax.devices("cpu")[:2])
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("data"))) for x in arrays()]
        forward, backward = lowered(gradient(causal, (0, 1, 2)), *placed)
    assert (forward[1]["batch"], backward[1]["batch"]) == ("1", "1")


def test_other_platforms_and_dtypes_get_no_call(caplog):
    assert lowered(causal, *arrays(), platform="cpu") == []
    with caplog.at_level(logging.DEBUG, "jax_flash"):
        assert lowered(causal, *arrays(dtype=jnp.float32)) == []
        assert lowered(causal, *arrays(4, dtype=jnp.float32)) == []
    assert len([record for record in caplog.records if "forward by XLA" in record.message]) <= 1  # each reason once


def test_cuda_by_name_never_falls_back():
    attend = functools.partial(causal, implementation="cuda")
    assert [target for target, _, _ in lowered(attend, *arrays())] == ["forward"]
    with pytest.raises(NotImplementedError, match="float16 and bfloat16"):
        jax.eval_shape(attend, *arrays(dtype=jnp.float32))
    with pytest.raises(NotImplementedError, match="compiled for cpu"):
        jax.jit(attend).trace(*arrays()).lower(lowering_platforms=("cpu",))


def test_explain_says_what_runs(capsys):
    jf.explain(*arrays(), causal=True)
    assert re.search(r"forward: sm\d+_forward, .*tile", capsys.readouterr().out)
    jf.explain(*arrays(dtype=jnp.float32), bias=jax.ShapeDtypeStruct((T, S), jnp.float32))
    assert re.findall(r"(.*): XLA, ", capsys.readouterr().out) == ["forward", "backward", "bias gradient"]
    jf.explain(*arrays(), scale=np.float32(0.5), causal=np.bool_(True), window=2**40)
    assert re.search(r"forward: sm\d+_forward, ", capsys.readouterr().out)
    jf.explain(*arrays(), implementation="xla")
    assert "asked for" in capsys.readouterr().out


def test_export():
    from jax import export

    q, k, v = (jnp.ones(x.shape, x.dtype) for x in arrays())
    exported = export.export(jax.jit(causal))(q, k, v)
    np.testing.assert_array_equal(exported.call(q, k, v), causal(q, k, v))
    checks = [export.DisabledSafetyCheck.custom_call(f"jax_flash_{name}") for name in ("forward", "backward")]
    for_gpus = export.export(jax.jit(gradient(causal, 0)), platforms=["cpu", "cuda"], disabled_checks=checks)(q, k, v)
    assert "jax_flash_forward" in for_gpus.mlir_module()
    np.testing.assert_array_equal(for_gpus.call(q, k, v), jax.jit(gradient(causal, 0))(q, k, v))

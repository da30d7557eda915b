"""The custom calls on a GPU: CUDA graphs, the disk cache, and buffers that are not what the attributes promise."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import extension
from jax_flash.spec import AttentionSpec, Operands

pytestmark = pytest.mark.gpu

FORWARD = "jax_flash_forward"

# A chain of calls and their gradients, on fresh addresses each time. Prints sums.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax_flash import flash_attention

def chain(q, k, v):
    def loss(q):
        for _ in range(3):
            q = jnp.sin(flash_attention(q, k, v, causal=True, deterministic=True, implementation="cuda"))
        return q.astype(jnp.float32).sum()
    return jax.value_and_grad(loss)(q)

q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 130, 4, 64), jnp.bfloat16)
compiled = jax.jit(chain).lower(q, k, v).compile()
kept = [q]
for _ in range(5):
    kept.append(compiled(kept[-1], k, v)[1])
print(*[np.asarray(x, np.float64).sum().hex() for x in kept])
"""


def run(**environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM]
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return subprocess.check_output(command, env=os.environ | memory | environment, text=True).split()


@pytest.fixture(scope="module")
def without_graphs() -> list[str]:
    return run(XLA_FLAGS="--xla_gpu_enable_command_buffer=")


def test_cuda_graphs_change_no_bit(without_graphs):
    flags = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
    assert run(XLA_FLAGS=flags) == without_graphs


def test_a_later_process_compiles_nothing(without_graphs, tmp_path):
    def states() -> dict[str, int]:
        return {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()}

    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", extension.CACHE_DIR: str(tmp_path)}
    first, filled = run(**environment), states()
    second = run(**environment)
    assert len(filled) >= 2
    assert states() == filled
    assert first == second == without_graphs


Q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
OUT_AND_LSE = {"out": Q, "lse": jax.ShapeDtypeStruct((2, 4, 128), jnp.float32)}


def call(attributes, *arrays, out=OUT_AND_LSE["out"], lse=OUT_AND_LSE["lse"]):
    """The custom call itself on zeros, with operands and results of whatever shapes."""
    scratch = jax.ShapeDtypeStruct((extension.native().scratch_bytes(FORWARD, attributes),), jnp.uint8)
    run = jax.jit(lambda *x: jax.ffi.ffi_call(FORWARD, [out, lse, scratch])(*x, **attributes))
    return jax.block_until_ready(run(*[jnp.zeros(x.shape, x.dtype) for x in arrays]))


def test_buffers_that_keep_the_promise_are_taken():
    out, lse, _ = call(AttentionSpec(scale=0.125).attributes(Q, Q, Q, Operands()), Q, Q, Q)
    assert not out.any()
    np.testing.assert_allclose(lse, np.log(128), rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "shape", "dtype", "message"),
    [
        ("k", (2, 100, 4, 64), jnp.bfloat16, "key has the wrong shape"),
        ("k", (3, 128, 4, 64), jnp.bfloat16, "key has the wrong shape"),
        ("v", (2, 128, 4, 64), jnp.float16, "value has the wrong type"),
        ("q", (128, 4, 64), jnp.bfloat16, "query has the wrong rank"),
        ("lse", (2, 4, 127), jnp.float32, "lse has the wrong shape"),
        ("out", (2, 128, 4, 64), jnp.float32, "out has the wrong type"),
        ("more", (2,), jnp.int32, "more operands than its attributes name"),
    ],
)
def test_buffers_that_break_the_promise_are_refused(changed, shape, dtype, message):
    attributes = AttentionSpec(scale=0.125).attributes(Q, Q, Q, Operands())
    arrays = {"q": Q, "k": Q, "v": Q} | OUT_AND_LSE | {changed: jax.ShapeDtypeStruct(shape, dtype)}
    results = {name: arrays.pop(name) for name in OUT_AND_LSE}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(attributes, *arrays.values(), **results)


def test_an_operand_that_is_missing_is_named():
    attributes = AttentionSpec(scale=0.125).attributes(Q, Q, Q, Operands(kv_lengths=np.zeros(2, np.int32)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no operand kv_lengths"):
        call(attributes, Q, Q, Q)


def test_a_call_without_a_kernel_fails_at_compile_time():
    q = jax.ShapeDtypeStruct(Q.shape, jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no CUDA kernel: "):
        call(AttentionSpec(scale=0.125).attributes(q, q, q, Operands()), q, q, q, out=q)

"""Plans, the compiler and its faults, without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jax_flash import extension
from jax_flash.spec import AttentionSpec, Operands

FORWARD = "jax_flash_forward"
ARCHS = (80, 86, 89, 90, 100, 120)


@pytest.fixture
def native():
    """The extension; whatever a test configures is undone behind it."""
    module = extension.native()
    yield module
    extension.configure(module)


@pytest.fixture
def kernels(native, tmp_path):
    """Configures an empty folder of kernels, without a disk cache."""
    native.configure(nvrtc=extension.nvrtc_candidates(), kernels=str(tmp_path), cache="", dump="")
    return tmp_path


def attributes(q_len=256, kv_len=256, heads=8, kv_heads=8, head_dim=64, dtype=jnp.bfloat16, spec=None, **operands):
    def array(length, heads):
        return jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype)

    spec = spec or AttentionSpec(scale=0.125)
    return spec.attributes(array(q_len, heads), array(kv_len, kv_heads), array(kv_len, kv_heads), Operands(**operands))


def test_every_target_has_its_stages(native):
    registrations = native.registrations()
    directions = ("forward", "backward", "bias_gradient", "quantize", "forward_fp8")
    assert set(registrations) == {f"jax_flash_{direction}" for direction in directions}
    assert all(set(stages) == {"instantiate", "initialize", "execute"} for stages in registrations.values())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_plan_describes_itself(native, arch, causal):
    plan = native.plan(FORWARD, attributes(spec=AttentionSpec(scale=0.125, causal=causal)), arch)
    assert plan["name"].endswith("forward")
    assert "tile" in plan["facts"]
    for kernel in plan["kernels"]:
        assert (extension.kernel_folder() / kernel["source"]).exists()
        assert f"DType(2), jf::DType(0), 64, 64, {'true' if causal else 'false'}," in kernel["variant"]
        assert 32 <= kernel["threads"] <= 1024


def test_scratch_suits_every_architecture(native):
    call = attributes(q_len=1, kv_len=16384)  # few queries: the keys are split
    needs = [native.plan(FORWARD, call, arch)["scratch_bytes"] for arch in ARCHS]
    assert native.scratch_bytes(FORWARD, call) == max(needs) > 0


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (attributes(q_len=0), "size 0"),
        (attributes(heads=3, kv_heads=2), "multiple of kv_heads"),
        (attributes(dtype=jnp.float32), "float16 and bfloat16"),
    ],
)
def test_a_call_without_a_kernel_says_why(native, call, reason):
    assert re.search(reason, native.plan(FORWARD, call, 90)["reason"])


def test_old_gpus_are_refused_by_name(native):
    assert "7.5" in native.plan(FORWARD, attributes(), 75)["reason"]


@pytest.mark.parametrize("missing", ["q_len", "dtype", "scale", "causal"])
def test_a_missing_attribute_is_named(native, missing):
    call = attributes()
    del call[missing]
    with pytest.raises(KeyError, match=missing):
        native.plan(FORWARD, call, 90)


def test_sizes_beyond_32_bits_are_refused(native):
    with pytest.raises(RuntimeError, match="kv_len = 4294967296 is out of range"):
        native.plan(FORWARD, attributes(kv_len=2**32), 90)


def test_an_unknown_target_is_named(native):
    with pytest.raises(RuntimeError, match="jax_flash_sideways"):
        native.plan("jax_flash_sideways", attributes(), 90)


def test_a_compile_error_shows_the_log_and_the_variant(native, kernels):
    (kernels / "broken.cuh").write_text('extern "C" __global__ void broken() { undeclared(); }')
    with pytest.raises(RuntimeError, match=r"(?s)broken\.cuh, -arch=sm_90a.*kTile = 64.*\"undeclared\" is undefined"):
        native.compile("broken.cuh", "broken", "constexpr int kTile = 64;", 90)


def test_a_missing_kernel_is_named(native, kernels):
    with pytest.raises(RuntimeError, match=r"no kernel absent\.cuh in"):
        native.compile("absent.cuh", "absent", "", 90)


def test_serialised_wgmma_is_reported_in_every_process(native, tmp_path, capfd):
    # The accumulator moves between registers while the products that write it are under way.
    (tmp_path / "hasty.cuh").write_text("""
        extern "C" __global__ void __launch_bounds__(128)
        hasty(float* out, unsigned long long a, unsigned long long b, int steps) {
          float d[4] = {1, 2, 3, 4};
          for (int i = 0; i < steps; ++i) {
            if (i & 1) d[2] = d[0];
            asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
            asm volatile("wgmma.commit_group.sync.aligned;");
          }
          for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
        }""")
    cache = tmp_path / "cache"
    native.configure(nvrtc=extension.nvrtc_candidates(), kernels=str(tmp_path), cache=str(cache), dump="")
    for cached in (False, True):
        assert native.compile("hasty.cuh", "hasty", "", 90)["cached"] == cached
        assert re.search(r"(?s)ptxas made wgmma wait.*C751", capfd.readouterr().err)


def test_a_missing_nvrtc_says_what_to_install(native, tmp_path):
    native.configure(nvrtc=["/nowhere/libnvrtc.so.13"], kernels=str(tmp_path), cache="", dump="")
    with pytest.raises(RuntimeError, match=r"(?s)pip install 'jax_flash\[cuda13\]'.*/nowhere/libnvrtc.so.13"):
        native.compile("any.cuh", "any", "", 90)


def test_a_library_that_is_no_nvrtc_is_passed_over(native, tmp_path):
    candidates = [native.__file__, *extension.nvrtc_candidates()]
    native.configure(nvrtc=candidates, kernels=str(tmp_path), cache="", dump="")
    assert "nvrtc" in native.nvrtc()["path"]


def test_a_dump_keeps_source_cubin_and_log(native, tmp_path):
    dump = tmp_path / "dump"
    (tmp_path / "empty.cuh").write_text('extern "C" __global__ void empty() {}')
    native.configure(nvrtc=extension.nvrtc_candidates(), kernels=str(tmp_path), cache="", dump=str(dump))
    made = native.compile("empty.cuh", "empty", "constexpr int kTile = 64;\n", 80)
    kept = {path.suffix: path.read_bytes() for path in dump.iterdir()}
    assert kept == {
        ".cubin": made["cubin"],
        ".log": made["log"].encode() + b"\n",
        ".cu": b'constexpr int kTile = 64;\n#include "empty.cuh"\n',
    }


def test_without_a_driver_its_absence_is_said(native):
    try:
        native.devices()
    except RuntimeError as error:
        assert "driver" in str(error)
    else:
        pytest.skip("there is a driver")


DRIVER = """
#include <string.h>
static int version(int* v) { *v = 12040; return 0; }
static int one(void) { return 0; }
int STEM(const char* name, void** symbol, int a, unsigned long long b, int* status) {
  *symbol = !strcmp(name, "cuDriverGetVersion") ? (void*)version : (void*)one;
  return 0;
}
"""


@pytest.mark.parametrize(
    ("stem", "question", "answer"),
    [
        ("cuGetProcAddress", "driver_version", "older than CUDA 12.0: update it"),
        ("cuGetProcAddress_v2", "nvrtc", "is newer than the driver"),
    ],
)
def test_an_old_driver_is_named(native, tmp_path, stem, question, answer):
    """A driver of CUDA 11, and one of CUDA 12 beside an NVRTC of CUDA 13."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", f"-DSTEM={stem}", "driver.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    newest = [path for path in extension.nvrtc_candidates() if path.endswith(".so.13")]
    program = f"""if True:
        from jax_flash import extension
        native = extension.native()
        native.configure(nvrtc={newest}, kernels="", cache="", dump="")
        native.{question}()"""
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answer in done.stderr

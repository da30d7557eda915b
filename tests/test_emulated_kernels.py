"""The kernels on an emulated GPU, where there is none: what they compute, and how their threads synchronise."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cases
import emulation
import pytest

from jax_flash.extension import kernel_folder

HEADS_128 = {"head_dim": 128, "value_dim": 128}
LONGER = {"q_len": 400, "kv_len": 500}
# Names of the case table, with sizes that end inside tiles and give the two multiprocessors several tiles each.
CASES = {
    80: [
        ("everything", {}),
        ("plain", {"head_dim": 64, "value_dim": 64, **LONGER}),
        ("causal", {"head_dim": 72, "dtype": "float16", "deterministic": True}),
        ("segment ids, causal", HEADS_128),
        ("one query", {"kv_len": 1500, "q_heads": 8, "head_dim": 64}),
        ("growing scores", {**HEADS_128, **LONGER}),
    ],
    90: [
        ("everything", {}),
        ("plain", {"head_dim": 64, "value_dim": 64, "deterministic": True, **LONGER}),
        ("causal", {**HEADS_128, **LONGER}),
        ("causal, offset", {"head_dim": 192, "value_dim": 128}),
        ("grouped heads", {"head_dim": 256, "value_dim": 256, "deterministic": True}),
        ("segment ids", {"head_dim": 96, "value_dim": 96, "dtype": "float16"}),
        ("lengths, causal", {"head_dim": 128, "value_dim": 64}),
        ("growing scores", {**HEADS_128, **LONGER}),
        ("many heads of one key head", HEADS_128),
        ("few queries of grouped heads", HEADS_128),
        ("many batch entries", HEADS_128),
        ("many batch entries, causal", {}),
        ("few queries of grouped heads, segment ids", {"head_dim": 64, "value_dim": 64}),
        ("growing scores, causal", {"head_dim": 256, "value_dim": 256, "dtype": "float16", **LONGER}),
        ("lse", {**HEADS_128, "q_len": 8200, "kv_len": 200, "batch": (1,), "q_heads": 1, "kv_heads": 1}),
        ("bias in tiles", {**HEADS_128, "q_len": 400, "kv_len": 504}),
        ("window, offset", {**HEADS_128, "q_len": 500, "kv_len": 700, "deterministic": True}),
    ],
}
# Synchronisation without which a kernel is wrong: file, text, what stands there instead.
LOOP_WAITS = """barrier_wait(barrier_of(shared.v_full, ring.slot), ring.parity);
      barrier_wait(barrier_of(shared.k_full, next.slot), next.parity);"""
FAULTS = {
    "scores not waited for": ("sm90/forward.cuh", "wgmma_wait<1>();\n      pin(s);", "pin(s);"),
    "keys not waited for": ("sm90/forward.cuh", LOOP_WAITS, LOOP_WAITS.splitlines()[0]),
    "values not waited for": ("sm90/forward.cuh", LOOP_WAITS, LOOP_WAITS.splitlines()[1]),
    "a warp waits alone": (
        "sm90/forward.cuh",
        "if (grown) {  // in some warps: no wait in here, since those of a warpgroup must execute the same ones\n",
        "if (grown) {\n        wgmma_wait<0>();\n",
    ),
    "values never let go": ("sm90/forward.cuh", "pin(o);\n      release(shared.v_free, ring.slot);", "pin(o);"),
    "dS of the other group not waited for": (
        "sm90/backward.cuh",
        "named_sync(kAllConsumers, 256);\n      start_dq();",
        "start_dq();",
    ),
    "scores still read": ("sm80/backward.cuh", "    __syncthreads();  // barrier A\n", ""),
}


def check(name: str, fields: dict, repeats: int = 1) -> None:
    fields = {"dtype": "bfloat16", "deterministic": False, **fields}
    deterministic = fields.pop("deterministic")
    case = dataclasses.replace(cases.CASES[name], **fields)
    inputs = case.inputs()
    for _ in range(repeats):
        results = cases.public_results(case, inputs, implementation="cuda", deterministic=deterministic)
        cases.check(inputs, **results)


def check_fp8(size: int, scores: str) -> None:
    import test_fp8

    from jax_flash import Fp8

    test_fp8.check_kernel(test_fp8.qkv(t=200, s=300, size=size), Fp8(scores=scores), causal=True)


def check_fp8_of_rows_without_keys() -> None:
    import test_fp8

    from jax_flash import Fp8

    for _ in range(12):  # in other orders of the threads
        test_fp8.check_kernel(test_fp8.qkv(batch=3, t=257, s=2, heads=8), Fp8(), causal=True, window=(1, None))


def check_fp8_nan() -> None:
    import test_fp8

    test_fp8.test_nan_stays_where_it_is_seen(80, False, "int8", "cuda")
    test_fp8.TestKernels().test_quantize_gives_the_same_bits_of_hard_inputs(
        lambda x: x.at[:, 5, 0, 3].set(float("nan"))
    )


def check_many_keys() -> None:
    import test_kernels

    test_kernels.check_weight_of_a_key_that_outweighs_many_others()


RUNS = {f"sm_{arch}, {name}": (arch, check, name, fields) for arch in CASES for name, fields in CASES[arch]}
RUNS |= {
    f"FP8, {scores}, head size {size}": (90, check_fp8, size, scores)
    for size in (64, 128, 256)
    for scores in ("e4m3", "int8")
}
RUNS["FP8, int8, NaN"] = 90, check_fp8_nan
RUNS["many keys"] = 90, check_many_keys
RUNS["FP8, rows without keys"] = 90, check_fp8_of_rows_without_keys


def process(*arguments) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), emulation.start, arguments)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def runs(emulator):
    """All runs, begun: a process for each architecture works them off."""
    with process(80, emulator) as ampere, process(90, emulator) as hopper:
        gpus = {80: ampere, 90: hopper}
        yield {name: gpus[arch].submit(function, *arguments) for name, (arch, function, *arguments) in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_run(runs, name):
    runs[name].result()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(emulator, tmp_path, fault):
    name, text, instead = FAULTS[fault]
    kernels = tmp_path / "cuda"
    shutil.copytree(kernel_folder(), kernels)
    source = Path(kernels, name)
    assert source.read_text().count(text) == 1
    source.write_text(source.read_text().replace(text, instead))
    arch = int(name[2:4])
    with process(arch, emulator, str(kernels)) as gpu:
        failure = gpu.submit(check, "plain", {**HEADS_128, **LONGER}, repeats=3).exception()
    assert failure is not None and "does not compile" not in str(failure)

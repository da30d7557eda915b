"""Runs a few calls of every kernel under compute-sanitizer, on this machine's GPU.

XLA's allocator is told to give each array an allocation of its own, so that a step outside an array is a step outside
an allocation. Sizes are odd, tails are poisoned with NaN.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FAMILIES = {"the kernels of this GPU": "", "the universal kernels": "sm80"}
ROOT = pathlib.Path(__file__).parents[1]


def calls() -> None:
    """Forward and backward of some calls; this is what runs under the sanitizer."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_flash as jf

    for size, keywords in (
        (64, {"causal": True}),
        (128, {"causal": True, "window": (70, 0), "softcap": 20.0}),
        (128, {"segments": True, "deterministic": True}),
        (256, {"lengths": True}),
        (128, {"batch": 64, "q_len": 50}),  # heads of a group share tiles; the first keys store dq
        (64, {"precision": jf.Fp8()}),
        (128, {"precision": jf.Fp8(), "causal": True, "softcap": 20.0}),
        (256, {"precision": jf.Fp8(), "lengths": True}),
        (128, {"precision": jf.Fp8(scores="int8"), "causal": True}),
        (256, {"precision": jf.Fp8(scores="int8"), "lengths": True}),
    ):
        if "precision" in keywords and os.environ.get("JAX_FLASH_KERNELS") == "sm80":
            continue  # FP8 has kernels on Hopper only
        print(f"head size {size}, {keywords}", flush=True)  # what a report of the sanitizer belongs to
        batch, q_len = keywords.pop("batch", 2), keywords.pop("q_len", 200)
        q, k, v, g = (
            jax.random.normal(jax.random.key(i), (batch, length, heads, size), jnp.bfloat16)
            for i, (length, heads) in enumerate(((q_len, 4), (200, 2), (200, 2), (q_len, 4)))
        )
        arrays = {}  # operands of the call: initcheck does not see how constants of a program get their values
        if keywords.pop("segments", False):
            arrays["segment_ids"] = jnp.arange(200) // 70
        if keywords.pop("lengths", False):
            arrays["q_lengths"] = arrays["kv_lengths"] = jnp.array([131, 200])
            q, k, v, g = (x.at[0, 131:].set(jnp.nan) for x in (q, k, v, g))

        @jax.jit
        def attend(q, k, v, arrays, keywords=keywords):
            return jf.flash_attention(q, k, v, implementation="cuda", **keywords, **arrays)

        out, pullback = jax.vjp(lambda q, k, v, arrays=arrays: attend(q, k, v, arrays), q, k, v)
        gradients = jax.jit(lambda pull, g: pull(g))(pullback, g)
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, *gradients)):
            raise AssertionError(f"NaN or Inf at head size {size}")


def sanitize(tool: str, kernels: str) -> subprocess.CompletedProcess[str]:
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--print-limit",
        "1000",
        "--show-backtrace",
        "no",
    ]
    environment = {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
        "JAX_FLASH_KERNELS": kernels,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [*command, sys.executable, __file__, "--calls"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def summary(report: str) -> list[str]:
    """How often each finding was reported at each place, by call."""
    lines, finding, found = [], "", collections.Counter[str]()
    for line in [*report.splitlines(), "head size"]:
        if line.startswith("head size"):
            lines += [f"  {count} x {finding}" for finding, count in found.most_common(20)]
            lines.append(line)
            found.clear()
        elif match := re.match(r"=+ +(?!by thread|Address|Host Frame|COMPUTE)(\S.*?)( \[\d+ hazards\])?$", line):
            place = match[1].startswith(("at ", "and "))  # of the finding in an earlier line
            finding = finding if place else match[1]
            found[f"{finding} {match[1]}" if place else finding] += 1
    return lines[:-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help=f"any of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--calls", action="store_true", help="only run the calls, without a sanitizer")
    args = parser.parse_args()
    if args.calls:
        calls()
        return 0
    if not shutil.which("compute-sanitizer"):
        parser.exit(2, "no compute-sanitizer on the path: it comes with NVIDIA's CUDA toolkit\n")
    jobs = [(tool, name) for tool in args.tools or TOOLS for name in FAMILIES]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        runs = pool.map(lambda job: sanitize(job[0], FAMILIES[job[1]]), jobs)
        failed = 0
        for (tool, name), run in zip(jobs, runs, strict=True):
            print(f"{tool}, {name}: {'clean' if run.returncode == 0 else f'exit {run.returncode}'}", flush=True)
            if run.returncode:
                failed += 1
                print(*summary(run.stdout), run.stderr[-1000:], sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

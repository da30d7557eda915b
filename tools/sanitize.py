"""Runs calls of every kernel under compute-sanitizer, on this machine's GPU: the case table of the tests, and calls
of sizes and precisions that it has not.

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
import tempfile
import time
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FAMILIES = {"the kernels of this GPU": "", "the universal kernels": "sm80"}
ROOT = pathlib.Path(__file__).parents[1]
PARTS = 8  # processes that share the calls of a tool and a family
LIMIT_S = 120  # for each; exit 124 is a process that took longer: tools have hung
CALL = "call: "  # starts the line that says what the findings below it belong to


def table() -> dict:
    """By name, the calls and further keywords of `flash_attention`."""
    import cases

    from jax_flash import Fp8

    def sized(size: int, *features: str, **fields):
        sizes = {"head_dim": size, "value_dim": size, "scale": size**-0.5, "q_heads": 4, "dtype": "bfloat16"}
        return cases.Case(**sizes | {"kv_len": 200, "features": frozenset(features)} | fields)

    found = {name: (cases.in_16_bits(case, "bfloat16"), {}) for name, case in cases.CASES.items()}
    found |= {
        f"{name}, deterministic": (cases.in_16_bits(case, "float16"), {"deterministic": True})
        for name, case in cases.CASES.items()
    }
    found |= {
        "head size 64": (sized(64, causal=True), {}),
        "head size 128, window, softcap": (sized(128, causal=True, window=(70, 0), softcap=20.0), {}),
        "head size 128, many queries": (sized(128, batch=(1,), q_len=8200, q_heads=2), {}),
        "head size 128, many keys": (sized(128, batch=(1,), q_len=3, kv_len=16500, q_heads=67, kv_heads=1), {}),
        "head size 128, segment ids": (sized(128, "segment_ids"), {"deterministic": True}),
        "head size 256, lengths": (sized(256, "q_lengths", "kv_lengths"), {}),
        "head size 128, many batch entries": (sized(128, batch=(64,), q_len=50), {}),  # the first keys store dq
    }
    if os.environ.get("JAX_FLASH_KERNELS") != "sm80":  # FP8 has kernels on Hopper only
        int8 = Fp8(scores="int8")
        found |= {
            "e4m3, head size 64": (sized(64), {"precision": Fp8()}),
            "e4m3, head size 128": (sized(128, causal=True, softcap=20.0), {"precision": Fp8()}),
            "e4m3, head size 256": (sized(256, "q_lengths", "kv_lengths"), {"precision": Fp8()}),
            "int8, head size 128": (sized(128, causal=True), {"precision": int8}),
            "int8, head size 256": (sized(256, "q_lengths", "kv_lengths"), {"precision": int8}),
        }
    return found


def calls(part: int) -> None:
    """Forward and backward of a share of the calls; this is what runs under the sanitizer."""
    sys.path[:0] = [str(ROOT / "tests")]
    import cases
    import jax
    import numpy as np

    for name, (case, keywords) in list(table().items())[part::PARTS]:
        print(f"{CALL}{name}", flush=True)
        start = time.monotonic()
        inputs = case.inputs()

        # Every array is an operand: initcheck does not see how constants of a program get their values.
        def attend(arrays, case=case, inputs=inputs, keywords=keywords):
            return cases.public_results(case, inputs._replace(**arrays), implementation="cuda", **keywords)

        arrays = inputs._asdict()
        del arrays["spec"]
        for result, x in jax.jit(attend)(arrays).items():
            x = np.asarray(x, np.float32)
            if not (np.isfinite(x) | ((x == -np.inf) & (result == "lse"))).all():  # -inf: of rows that see nothing
                raise AssertionError(f"{name}: NaN or Inf in {result}")
        print(f"{time.monotonic() - start:.1f} s", flush=True)


def run(tool: str, kernels: str, part: int, programs: str) -> subprocess.CompletedProcess[str]:
    """A share of the calls under a tool, or under none. `programs`: folder of what XLA has compiled already."""
    limit = ["timeout", "--kill-after", "5", str(LIMIT_S)]
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    sanitizer += ["--print-limit", "1000", "--show-backtrace", "no"]
    environment = {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_FLASH_KERNELS": kernels,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [*limit, *(sanitizer if tool else []), sys.executable, __file__, "--calls", str(part)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def summary(report: str) -> list[str]:
    """How often each finding was reported at each place, by call."""
    lines, finding, found = [], "", collections.Counter[str]()
    for line in [*report.splitlines(), CALL]:
        if line.startswith(CALL):
            lines += [f"  {count} x {finding}" for finding, count in found.most_common(20)]
            lines.append(line)
            found.clear()
        elif match := re.match(r"=+ +(?!by thread|Address|Host Frame|COMPUTE)(\S.*?)( \[\d+ hazards\])?$", line):
            place = match[1].startswith(("at ", "and "))  # of the finding in an earlier line
            finding = finding if place else match[1]
            found[f"{finding} {match[1]}" if place else finding] += 1
    return lines[:-1]


def verdict(tool: str, report: subprocess.CompletedProcess[str]) -> str:
    if report.returncode:
        return f"exit {report.returncode}"
    return "clean" if not tool or "SUMMARY: 0 " in report.stdout else f"no summary of {tool}'s"


def run_all(tools: Sequence[str], pool: concurrent.futures.Executor, programs: str) -> bool:
    """Whether all calls of all families are clean under the tools; prints what each process found as it ends."""
    runs = {
        pool.submit(run, tool, FAMILIES[name], part, programs): (tool, f"{name}, {part + 1} of {PARTS}")
        for part in range(PARTS)
        for tool in tools
        for name in FAMILIES
    }
    clean = True
    for done in concurrent.futures.as_completed(runs):
        (tool, share), report = runs[done], done.result()
        found = verdict(tool, report)
        print(f"{tool or 'no tool'}, {share}: {report.stdout.count(CALL)} calls, {found}", flush=True)
        if found != "clean":
            clean = False
            print(*summary(report.stdout), report.stderr[-1000:], sep="\n", flush=True)
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help=f"any of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--calls", type=int, metavar="PART", help="only run a share of the calls, without a sanitizer")
    args = parser.parse_args()
    if args.calls is not None:
        calls(args.calls)
        return 0
    if not shutil.which("compute-sanitizer"):
        parser.exit(2, "no compute-sanitizer on the path: it comes with NVIDIA's CUDA toolkit\n")
    with (
        tempfile.TemporaryDirectory() as programs,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # First without a tool, which compiles everything: under a tool that takes long.
        clean = run_all([""], pool, programs) and run_all(args.tools or TOOLS, pool, programs)
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())

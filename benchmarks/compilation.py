"""How long each kernel takes to compile, and to come from the disk: `python -m benchmarks.compilation --help`.

The kernels are those of tests/resources.csv, every variant of the support table. No GPU is needed; NVRTC is.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

from jax_flash import extension

from . import report, timing

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tools"))

import resources


def kernels(calls, arch: int) -> list[tuple[str, dict]]:
    """One of the calls, and its kernel, for each source and variant of all calls."""
    found: dict[tuple[str, str], tuple[str, dict]] = {}
    for call in calls:
        for _, _, plan in resources.plans_of(call, arch):
            for kernel in plan.get("kernels", ()):
                found.setdefault((kernel["source"], kernel["variant"]), (call, kernel))
    return list(found.values())


def seconds(kernel: dict, arch: int) -> tuple[float, bool]:
    """Of a compilation, and whether the disk had it."""
    start = time.perf_counter()
    cached = extension.native().compile(kernel["source"], kernel["entry"], kernel["variant"], arch)["cached"]
    return time.perf_counter() - start, cached


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compilation", description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--calls", nargs="+", default=resources.ALL, help="as the table of registers has them")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/compilation.jsonl"))
    parser.add_argument("--commit", default="", help="recorded with the results where git cannot tell it")
    args = parser.parse_args(argv)

    about = report.machine(args.commit) | {"nvrtc": resources.nvrtc_version(), "arch": args.arch}
    rows = []
    with timing.empty_kernel_cache():
        for call, kernel in kernels(args.calls, args.arch):
            (cold, was_there), (warm, is_there) = (seconds(kernel, args.arch) for _ in range(2))
            if was_there or not is_there:
                raise AssertionError(f"{kernel['entry']} of {call}: on disk before: {was_there}, after: {is_there}")
            row = {"group": "compilation", "kernel": kernel["entry"], "case": call, "cold_s": cold, "warm_s": warm}
            rows.append(row | about)

    report.write(args.out, rows)
    for key in ("cold_s", "warm_s"):
        slowest = max(rows, key=lambda row: row[key])
        print(f"{len(rows)} kernels, {key} at most {slowest[key]:.4f}: {slowest['kernel']} of {slowest['case']}")
    return rows


if __name__ == "__main__":
    main()

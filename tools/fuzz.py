"""Random attention calls over the whole space of features, on this machine's GPU, against the float64 oracle.

    python tools/fuzz.py                       2,000 calls, spread over one process per core
    python tools/fuzz.py --first 317 --count 1 one call again, by its number
    python tools/fuzz.py --kernels sm80        with one family of kernels only
    python tools/fuzz.py --emulate 90          on emulated GPUs of that architecture (tests/emulation.py): no GPU needed

Values and all gradients must be as exact as plain attention in the same dtype (tests/cases.py has the bound); those of
FP8, where the GPU has it, agree with its emulation. Calls come in groups that share kernels and differ in sizes and
numbers, since compiling takes most of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

HEAD_DIMS = (8, 16, 64, 64, 72, 96, 104, 128, 128, 192, 256, 1, 20)
GROUP = 4  # calls that share kernels


def draw(number: int):
    """The call of this number and the further keywords of its call."""
    import cases

    from jax_flash import Fp8

    rng = np.random.default_rng(number // GROUP)

    def pick(options):
        return options[rng.integers(len(options))]

    case = cases.any_case(pick, dtypes=("bfloat16", "float16"), head_dims=HEAD_DIMS, longest=150)
    if pick((True, True, False)):  # mostly a few features at a time
        case = dataclasses.replace(case, features=frozenset(f for f in sorted(case.features) if pick((True, False))))
    size = case.head_dim**-0.5 * (-1 if case.scale < 0 else 1)
    case = dataclasses.replace(case, scale=size * pick((0.5, 1.0, 3.0)))
    keywords = {"deterministic": pick((False, True)), "precision": None}
    precision = pick((None, None, None, Fp8(), Fp8(scores="int8")))
    if has_fp8() and not case.dropout_rate:
        keywords["precision"] = precision

    rng = np.random.default_rng((1, number))
    if number % GROUP:
        lengths = (1, 2, 17, 63, 64, 65, 127, 128, 129, 150, 200, 257)
        window = tuple(None if side is None else pick((0, 1, 30, 64, 200)) for side in case.window)
        case = dataclasses.replace(
            case, q_len=pick(lengths), kv_len=pick((*lengths, 1500)), window=window, seed=int(rng.integers(2**31))
        )
    return case, keywords


def has_fp8() -> bool:
    from jax_flash import custom_call

    return custom_call._architectures() == (90,) and os.environ.get("JAX_FLASH_KERNELS", "sm90") in ("", "sm90")


def run(number: int) -> str:
    """'' or what went wrong."""
    import cases
    import test_fp8

    case, keywords = draw(number)
    try:
        inputs = case.inputs()
        if keywords["precision"]:
            arrays, features = cases.public(case, inputs)
            precision = keywords["precision"]
            test_fp8.check_kernel(arrays, precision, **test_fp8.CUT_SUMS[precision.scores], **features)
        else:
            cases.check(inputs, **cases.public_results(case, inputs, implementation="cuda", **keywords))
    except Exception as error:
        return f"{number}: {case} {keywords}\n    {type(error).__name__}: {str(error)[:2000]}"
    return ""


def start_process(arch: int | None) -> None:
    if arch is not None:
        import emulation

        emulation.start(arch)


def run_groups(groups: list[int], first: int, end: int) -> list[str]:
    numbers = (
        number for group in groups for number in range(group * GROUP, (group + 1) * GROUP) if first <= number < end
    )
    return [failure for number in numbers if (failure := run(number))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--kernels", default="", help="family of kernels (JAX_FLASH_KERNELS)")
    parser.add_argument("--emulate", type=int, metavar="ARCH", help="80 or 90")
    arguments = parser.parse_args()

    if arguments.kernels:
        os.environ["JAX_FLASH_KERNELS"] = arguments.kernels
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]

    start, failures = time.monotonic(), 0
    first, end = arguments.first, arguments.first + arguments.count
    groups = [[group] for group in range(first // GROUP, (end - 1) // GROUP + 1)]
    workers = min(arguments.workers, len(groups))
    with multiprocessing.get_context("spawn").Pool(workers, start_process, (arguments.emulate,)) as pool:
        tasks = [pool.apply_async(run_groups, (group, first, end)) for group in groups]
        for done, task in enumerate(tasks):
            if done and done % 50 == 0:  # for whoever reads the output of a run that was cut off
                print(f"the first {done * GROUP} calls done, {failures} failed", flush=True)
            for failure in task.get():
                failures += 1
                print(failure, flush=True)
    print(f"{arguments.count} calls, {failures} failed, {time.monotonic() - start:.0f} s")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m jax_flash doctor | explain | precompile: what is there, what runs a call, and compiling it ahead."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_flash import extension, fp8
from jax_flash.spec import AttentionSpec, Fp8, Operands

ARCHS = (80, 86, 89, 90, 100, 120)  # compute capabilities that kernels are compiled and checked for


# --- calls, described on the command line ----------------------------------------------------------------------------


class CustomCall(NamedTuple):
    title: str
    target: str
    attributes: dict[str, Any]


def within(kind: type, least: float, below: float = 2**31) -> Callable[[str], Any]:
    """The type of an option: numbers of a range."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"expected a number from {least} to below {below}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_call_options(parser: argparse.ArgumentParser) -> None:
    size = within(int, 1)
    parser.add_argument("--batch", type=size, default=4)
    parser.add_argument("--q-len", type=size, default=4096, metavar="T")
    parser.add_argument("--kv-len", type=size, metavar="S", help="default: T")
    parser.add_argument("--heads", type=size, default=16, metavar="N")
    parser.add_argument("--kv-heads", type=size, metavar="K", help="default: N")
    parser.add_argument("--head-dim", type=size, default=128, metavar="H")
    parser.add_argument("--value-dim", type=size, metavar="V", help="default: H")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=within(int, -1), nargs=2, metavar=("LEFT", "RIGHT"), help="-1: unbounded")
    parser.add_argument("--softcap", type=within(float, 0), default=0.0)
    parser.add_argument("--dropout-rate", type=within(float, 0, 1), default=0.0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--kv-splits", type=size, default=1, metavar="COUNT")
    for operand in ("q-offset", "segment-ids", "q-lengths", "kv-lengths", "mask", "bias", "alibi-slopes", "sinks"):
        parser.add_argument(f"--{operand}", action="store_true", help=f"the call has {operand.replace('-', ' ')}")
    parser.add_argument(
        "--fp8",
        choices=tuple(fp8.SCORE_DTYPES),
        nargs="?",
        const="e4m3",
        help="the forward pass quantises to 8 bits, query and key to these",
    )
    parser.add_argument("--lse-gradient", action="store_true", help="the lse is part of the loss")


def custom_calls(options: argparse.Namespace) -> list[CustomCall]:
    """The custom calls of one attention and its gradient."""
    kv_len, kv_heads = options.kv_len or options.q_len, options.kv_heads or options.heads
    # flash_attention fills head sizes up to multiples of 8.
    head_dim, value_dim = (-(-size // 8) * 8 for size in (options.head_dim, options.value_dim or options.head_dim))

    def array(*shape: int, dtype: Any = options.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((options.batch, *shape), jnp.dtype(dtype))

    left, right = (None if side < 0 else side for side in options.window or (-1, -1))
    spec = AttentionSpec(
        scale=options.head_dim**-0.5,
        causal=options.causal,
        window_left=left,
        window_right=right,
        softcap=options.softcap,
        dropout_rate=options.dropout_rate,
        deterministic=options.deterministic,
        kv_splits=options.kv_splits,
        precision=Fp8(scores=options.fp8) if options.fp8 else None,
    )
    seeded = options.dropout_rate > 0
    operands = Operands(
        q_offset=array(dtype="int32") if options.q_offset else None,
        q_segment_ids=array(options.q_len, dtype="int32") if options.segment_ids else None,
        kv_segment_ids=array(kv_len, dtype="int32") if options.segment_ids else None,
        q_lengths=array(dtype="int32") if options.q_lengths else None,
        kv_lengths=array(dtype="int32") if options.kv_lengths else None,
        mask=array(1, options.q_len, kv_len, dtype="bool") if options.mask else None,
        bias=array(options.heads, options.q_len, kv_len, dtype="float32") if options.bias else None,
        alibi_slopes=array(options.heads, dtype="float32") if options.alibi_slopes else None,
        sinks=jax.ShapeDtypeStruct((options.heads,), jnp.float32) if options.sinks else None,
        dropout_seed=array(2, dtype="uint32") if seeded else None,
        dropout_batch=array(dtype="int32") if seeded else None,
        dropout_head=jax.ShapeDtypeStruct((options.heads,), jnp.int32) if seeded else None,
    )
    q = array(options.q_len, options.heads, head_dim)
    k, v = array(kv_len, kv_heads, head_dim), array(kv_len, kv_heads, value_dim)
    if options.fp8:
        lengths = Operands(q_lengths=operands.q_lengths, kv_lengths=operands.kv_lengths)
        quantize = fp8.quantize_attributes(spec, q, k, v, lengths)
        forward = fp8.forward_attributes(spec, q, k, v, operands, q.dtype)
        calls = [
            CustomCall("quantize", "jax_flash_quantize", quantize),
            CustomCall("forward", "jax_flash_forward_fp8", forward),
        ]
    else:
        calls = [CustomCall("forward", "jax_flash_forward", spec.attributes(q, k, v, operands))]
    # The lse has the sinks in it already.
    attributes = spec.attributes(q, k, v, operands._replace(sinks=None)) | {"lse_cotangent": options.lse_gradient}
    calls.append(CustomCall("backward", "jax_flash_backward", attributes))
    if options.bias:
        calls.append(CustomCall("bias gradient", "jax_flash_bias_gradient", attributes))
    return calls


def arch_name(arch: int) -> str:
    return f"{arch // 10}.{arch % 10}"


def parse_arch(text: str) -> int:
    parts = re.fullmatch(r"(\d+)\.?(\d)", text)
    if not parts:
        raise argparse.ArgumentTypeError(f"expected a compute capability such as 9.0, got {text!r}")
    return int("".join(parts.groups()))


def archs_here() -> list[int]:
    try:
        return sorted({device["arch"] for device in extension.native().devices()})
    except RuntimeError:
        return []


def plans(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Title, architecture and plan (or reason) of each custom call on each architecture asked for."""
    for arch in options.arch or archs_here() or ARCHS:
        for call in custom_calls(options):
            yield call.title, arch, extension.native().plan(call.target, call.attributes, arch)


# --- commands --------------------------------------------------------------------------------------------------------


def explain(options: argparse.Namespace) -> int:
    for title, arch, plan in plans(options):
        print(f"{title} on compute capability {arch_name(arch)}:", plan.get("name") or f"XLA, {plan['reason']}")
        for name, value in plan.get("facts", {}).items():
            print(f"  {name:10} {value}")
        for kernel in plan.get("kernels", ()):
            size = f"{kernel['threads']} threads, {kernel['shared_bytes'] / 1024:.1f} KiB of shared memory a block"
            print(f"  {'kernel':10} {kernel['entry']} ({kernel['source']}): {size}")
        if plan.get("scratch_bytes"):
            print(f"  {'scratch':10} {plan['scratch_bytes'] / 2**20:.2f} MiB")
    return 0


def precompile(options: argparse.Namespace) -> int:
    compiled = 0
    _cache()  # raises if nothing would be kept
    for title, arch, plan in plans(options):
        if "reason" in plan:
            print(f"{title} on compute capability {arch_name(arch)}: no kernel, {plan['reason']}")
        for kernel in plan.get("kernels", ()):
            begin = time.perf_counter()
            made = extension.native().compile(kernel["source"], kernel["entry"], kernel["variant"], arch)
            how = "found in the cache" if made["cached"] else "compiled"
            seconds = time.perf_counter() - begin
            print(f"{kernel['entry']} for compute capability {arch_name(arch)}: {how}, {seconds:.2f} s")
            compiled += 1
    return 0 if compiled else 1


def doctor(_: argparse.Namespace) -> int:
    """What was found, and what to do about what is missing."""
    healthy = True

    def report(title: str, finding: Callable[[], str], advice: str) -> bool:
        nonlocal healthy
        try:
            print(f"{'ok':8}{title}: {finding()}")
            return True
        except (ImportError, OSError, RuntimeError) as error:
            healthy = False
            print(f"{'MISSING':8}{title}: {error}\n{'':8}-> {advice}")
            return False

    report("Python, JAX", lambda: f"{platform.python_version()}, {jax.__version__}", "")
    build = "build it: pip install . (or tools/build_native.sh)"
    if not report("extension", lambda: str(extension.native().__file__), build):
        return 1
    native = extension.native()
    report(
        "driver", lambda: f"CUDA {native.driver_version() / 1000:.1f}", "install NVIDIA's driver for CUDA 12 or newer"
    )
    report("GPUs", _gpus, "without a GPU of compute capability 8.0 or newer, attention runs in XLA")
    report("JAX's devices", _jax_gpus, "install JAX for the GPU: pip install 'jax_flash[cuda13]' (or [cuda12])")
    compiler = report(
        "NVRTC", lambda: "{path}, version {version[0]}.{version[1]}".format(**native.nvrtc()), "as for JAX's devices"
    )
    report("kernels", _kernels, "reinstall jax_flash")
    report("cache", _cache, f"point {extension.CACHE_DIR} at a folder that you alone can write")
    if compiler:
        report("a kernel compiles", _compile_one, "report this, with the message above")
    return 0 if healthy else 1


def _gpus() -> str:
    devices = extension.native().devices()
    if not any(device["arch"] >= 80 for device in devices):
        raise RuntimeError(f"none with kernels among {devices}")
    return ", ".join(f"{device['name']} ({arch_name(device['arch'])})" for device in devices)


def _jax_gpus() -> str:
    return ", ".join(str(device) for device in jax.devices("cuda"))


def _kernels() -> str:
    folder = extension.kernel_folder()
    return f"{len(list(folder.rglob('*.cuh')))} files in {folder.resolve(strict=True)}"


def _cache() -> str:
    if not extension.cache_folder():
        return f"switched off by an empty {extension.CACHE_DIR}"
    folder = Path(extension.cache_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # as the first kernel would
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not os.access(folder, os.W_OK):
        raise RuntimeError(f"{folder} is not yours alone to write, and therefore not used")
    sizes = [entry.stat().st_size for entry in folder.glob("*.cubin")]
    return f"{len(sizes)} kernels, {sum(sizes) / 2**20:.1f} MiB in {folder}"


def _compile_one() -> str:
    options = argument_parser().parse_args(["explain"])
    _, arch, plan = next(plans(options))
    if "reason" in plan:
        raise RuntimeError(plan["reason"])
    begin = time.perf_counter()
    for kernel in plan["kernels"]:
        extension.native().compile(kernel["source"], kernel["entry"], kernel["variant"], arch)
    return f"{plan['name']} for compute capability {arch_name(arch)}, {time.perf_counter() - begin:.2f} s"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_flash", description="What jax_flash finds and what it would run."
    )
    commands = parser.add_subparsers(required=True)
    described = {
        doctor: "what was found on this machine, and what to do about what is missing",
        explain: "the kernels that run a call, or the reason why it is left to XLA",
        precompile: "put the kernels of a call into the cache; needs NVRTC, but no GPU",
    }
    for command, text in described.items():
        subparser = commands.add_parser(command.__name__, help=text, description=text)
        subparser.set_defaults(command=command)
        if command is not doctor:
            add_call_options(subparser)
            subparser.add_argument(
                "--arch",
                type=parse_arch,
                nargs="+",
                help="compute capabilities, such as 9.0; default: this machine's GPUs",
            )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = argument_parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"python -m jax_flash: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

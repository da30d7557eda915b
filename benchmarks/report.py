"""Results as lines of JSON, as a table and as pictures."""

from __future__ import annotations

import json
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import jax

LABELS = {"jax_flash": "jax_flash", "cudnn": "cuDNN (jax.nn)", "xla": "XLA (jax.nn)", "pallas": "Pallas Mosaic GPU"}
COLORS = {"jax_flash": "#d95f02", "cudnn": "#1b9e77", "xla": "#999999", "pallas": "#7570b3"}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine(commit: str = "") -> dict[str, Any]:
    """What the figures were taken on: device, driver, clocks, versions, commit."""
    device = jax.devices()[0]
    query = "driver_version,clocks.sm,clocks.mem,power.limit"
    return {
        "device": getattr(device, "device_kind", device.platform)
        if device.platform == "gpu"
        else platform.processor() or "cpu",
        "driver, SM clock, memory clock, power limit": _output(
            "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"
        ).split("\n")[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
        "date": _output("date", "-u", "+%Y-%m-%d"),
    }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def pictures(rows: Iterable[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Pictures of a run: speed by length, with the matrix product's rate as the ceiling, and memory by length."""
    import matplotlib

    matplotlib.use("Agg")

    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    speeds = [row for row in rows if row.get("group") in ("grid", "quick", "fp8") and "tflops" in row]
    written = [
        _speed([row for row in speeds if (row["dir"], row["dtype"]) == kind], folder / "_".join((*kind, "speed.png")))
        for kind in sorted({(row["dir"], row["dtype"]) for row in speeds})
    ]
    memory = [row for row in rows if "scratch_MiB" in row]
    return [*written, _memory(memory, folder / "memory.png")] if memory else written


def _speed(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    dims, lengths = sorted({row["D"] for row in rows}), sorted({row["S"] for row in rows})
    top = 1.1 * max(max(row["tflops"], row.get("matmul_tflops", 0)) for row in rows)
    figure, axes = plt.subplots(2, len(dims), figsize=(3 * len(dims) + 0.6, 5.6), sharey=True, squeeze=False)
    for column, dim in enumerate(dims):
        for causal in (0, 1):
            axis = axes[causal][column]
            cell = [row for row in rows if row["D"] == dim and row["causal"] == causal]
            for impl in [name for name in LABELS if any(row["impl"] == name for row in cell)]:
                points = sorted((row["S"], row["tflops"]) for row in cell if row["impl"] == impl)
                axis.plot(*zip(*points, strict=True), marker="o", label=LABELS[impl], color=COLORS[impl])
            if rows[0].get("matmul_tflops") and rows[0]["dtype"] != "e4m3":
                axis.axhline(rows[0]["matmul_tflops"], color="black", linestyle=":", label="bf16 matrix product")
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
            axis.set_title(f"head size {dim}, {'causal' if causal else 'full'}", fontsize=11)
            axis.grid(alpha=0.3)
            axis.set_ylim(0, top)
            if causal:
                axis.set_xlabel("sequence length")
            if column == 0:
                axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=9, loc="lower right")
    direction = {"fwd": "forward", "bwd": "backward"}[rows[0]["dir"]]
    figure.suptitle(f"{direction}, {rows[0]['dtype']}, {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _memory(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for impl in [name for name in LABELS if any(row["impl"] == name for row in rows)]:
        points = sorted((row["S"], row["scratch_MiB"]) for row in rows if row["impl"] == impl)
        axis.plot(*zip(*points, strict=True), marker="o", label=LABELS[impl], color=COLORS[impl])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="sequence length", ylabel="MiB", title="Memory beside operands and results, forward + backward")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

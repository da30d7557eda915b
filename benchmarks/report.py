"""Results as lines of JSON, as a table and as pictures."""

from __future__ import annotations

import json
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import jax

LABELS = {
    "jax_flash": "jax_flash",
    "cudnn": "cuDNN (jax.nn)",
    "xla": "XLA (jax.nn)",
    "flax": "Flax's default",
    "pallas": "Pallas Mosaic GPU",
    "tokamax": "tokamax",
    "flash_attn_jax": "flash_attn_jax",
    "torch_flash": "torch, flash",
    "torch_cudnn": "torch, cuDNN",
}
COLORS = {
    "jax_flash": "#d95f02",
    "cudnn": "#1b9e77",
    "xla": "#999999",
    "flax": "#999999",
    "pallas": "#7570b3",
    "tokamax": "#66a61e",
    "flash_attn_jax": "#a6761d",
    "torch_flash": "#e7298a",
    "torch_cudnn": "#386cb0",
}


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


def write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures(rows: Iterable[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Pictures of a run: speed by length, with the matrix product's rate as the ceiling, how many times as fast as each
    peer, memory by length, training steps by length, and losses by step."""
    import matplotlib

    matplotlib.use("Agg")

    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    speeds = [row for row in rows if row.get("group") in ("grid", "quick", "fp8") and "tflops" in row]
    memory = [row for row in rows if "scratch_MiB" in row]
    steps = [row for row in rows if row.get("group") == "train" and (row["parallel"], row["devices"]) == ("jit", 1)]
    curves = [row for row in rows if "losses" in row]
    written = []
    for kind in sorted({(row["dir"], row["dtype"]) for row in speeds}):
        some = [row for row in speeds if (row["dir"], row["dtype"]) == kind]
        name = "_".join(kind).replace(" ", "-")
        written.append(_speed(some, folder / f"{name}_speed.png"))
        if {row["impl"] for row in some} - {"jax_flash"}:
            written.append(_ratios(some, folder / f"{name}_ratios.png"))
    if memory:
        written.append(_memory(memory, folder / "memory.png"))
    if {row["impl"] for row in steps} - {"jax_flash"}:
        written.append(_train(steps, folder / "train.png"))
    if curves:
        written.append(_curves(curves, folder / "fp8_training.png"))
    return written


def _log_axis(axis, lengths: list[int]):
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axis.set_xlabel("sequence length")
    axis.grid(alpha=0.3)


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
            _log_axis(axis, lengths)
            axis.set_title(f"head size {dim}, {'causal' if causal else 'full'}", fontsize=11)
            axis.set_ylim(0, top)
            if not causal:
                axis.set_xlabel("")
            ceiling = rows[0].get("matmul_tflops")
            if ceiling and column == len(dims) - 1:
                right = axis.secondary_yaxis(
                    "right", functions=(lambda x, c=ceiling: 100 * x / c, lambda x, c=ceiling: x * c / 100)
                )
                right.set_ylabel("% of a bf16 matrix product")
            if column == 0:
                axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=9, loc="lower right")
    direction = {"fwd": "forward", "bwd": "backward"}[rows[0]["dir"]]
    figure.suptitle(f"{direction}, {rows[0]['dtype']}, {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _ratios(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """How many times as fast as each peer; above the line at 1: faster."""
    import matplotlib.pyplot as plt

    peers = [name for name in LABELS if name != "jax_flash" and any(row["impl"] == name for row in rows)]
    lengths = sorted({row["S"] for row in rows})
    figure, axes = plt.subplots(1, len(peers), figsize=(5 * len(peers) + 1, 3.8), squeeze=False, layout="constrained")
    speed = {(row["impl"], row["D"], row["causal"], row["S"]): row["tflops"] for row in rows}
    for axis, peer in zip(axes[0], peers, strict=True):
        for color, dim in zip(
            ("#1b9e77", "#d95f02", "#7570b3", "#e7298a"), sorted({r["D"] for r in rows}), strict=False
        ):
            for causal, style in ((0, "-"), (1, "--")):
                points = [
                    (s, speed["jax_flash", dim, causal, s] / speed[peer, dim, causal, s])
                    for s in lengths
                    if {("jax_flash", dim, causal, s), (peer, dim, causal, s)} <= speed.keys()
                ]
                if points:
                    label = f"head size {dim}, {'causal' if causal else 'full'}"
                    axis.plot(*zip(*points, strict=True), style, marker="o", color=color, label=label)
        axis.axhline(1, color="black", linewidth=1)
        _log_axis(axis, lengths)
        axis.set_title(f"times as fast as {LABELS[peer]}", fontsize=11)
    axes[0][-1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _train(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("step_ms", "GiB"), ("ms a training step", "GiB a device"), strict=True):
        for impl in [name for name in LABELS if any(row["impl"] == name for row in rows)]:
            points = sorted((row["T"], row[key]) for row in rows if row["impl"] == impl and key in row)
            if points:
                style = "-" if impl == "jax_flash" else "--"  # equal memory: both lines show
                axis.plot(*zip(*points, strict=True), style, marker="o", label=LABELS[impl], color=COLORS[impl])
        _log_axis(axis, sorted({row["T"] for row in rows}))
        axis.set(title=title, ylim=(0, 1.1 * max(row.get(key, 0) for row in rows)))
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _memory(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for impl in [name for name in LABELS if any(row["impl"] == name for row in rows)]:
        points = sorted((row["S"], row["scratch_MiB"]) for row in rows if row["impl"] == impl)
        axis.plot(*zip(*points, strict=True), marker="o", label=LABELS[impl], color=COLORS[impl])
    _log_axis(axis, sorted({row["S"] for row in rows}))
    axis.set_yscale("log")
    axis.set(ylabel="MiB", title="Memory beside operands and results, forward + backward")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(rows: list[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for row in rows:
        axis.plot(row["losses"], label=row["impl"], linewidth=1)
    axis.set(xlabel="step", ylabel="loss (nats a byte)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

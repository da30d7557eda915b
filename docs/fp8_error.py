"""Draws docs/pictures/fp8_error.png and prints its numbers: `python docs/fp8_error.py`. A minute, no GPU needed."""

import pathlib

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import jax_flash as jf

LENGTH, HEADS, SIZE = 4096, 4, 128
METHODS = {
    "a scale for each tensor": jf.Fp8(rotate=False, scales="tensor", value_scales="tensor"),
    "a scale for each 32 tokens": jf.Fp8(rotate=False),
    "... and rotation: Fp8()": jf.Fp8(),
    '... and int8: Fp8(scores="int8")': jf.Fp8(scores="int8"),
}


def inputs(outliers: bool) -> list[np.ndarray]:
    """Query, key and value, N(0, 1), and with outliers N(0, 1) + N(0, 100) * Bernoulli(0.001)."""
    rng = np.random.default_rng(0)
    shape = (LENGTH, HEADS, SIZE)
    drawn = [(rng.standard_normal(shape), 10 * rng.standard_normal(shape) * (rng.random(shape) < 1e-3)) for _ in "qkv"]
    return [normal + rare * outliers for normal, rare in drawn]


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    out = np.empty_like(q)
    for head in range(HEADS):
        scores = q[:, head] @ k[:, head].T / np.sqrt(SIZE)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p @ v[:, head] / p.sum(-1, keepdims=True)
    return out


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, (title, outliers) in zip(axes, {"normal": False, "normal with outliers": True}.items(), strict=True):
        arrays = inputs(outliers)
        truth = exact(*arrays)
        errors = []
        for precision in METHODS.values():
            q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
            out = np.asarray(jf.flash_attention(q, k, v, precision=precision, implementation="xla"), np.float64)
            errors.append(np.sqrt(np.mean((out - truth) ** 2)) / np.sqrt(np.mean(truth**2)))
            rmse = errors[-1] * np.sqrt(np.mean(truth**2))
            print(f"{title}: {list(METHODS)[len(errors) - 1]}: RMSE {rmse:.2e}, relative {errors[-1]:.3f}")
        axis.barh(list(METHODS), np.multiply(errors, 100), color=["#b0b0b0", "#b0b0b0", "#2471a3", "#2471a3"])
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("relative error of the output, %")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # both share it
    path = pathlib.Path(__file__).parent / "pictures" / "fp8_error.png"
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

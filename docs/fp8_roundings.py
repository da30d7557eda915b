"""Prints how much of the error of FP8 attention each rounding makes: `python docs/fp8_roundings.py`. No GPU needed.

A study in NumPy, of single roundings and of formats that the kernel does not have. One head of 4096 tokens, head size
128, on the inputs of fp8_error.py.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

LENGTH, SIZE, BLOCK, SHIFT = 4096, 128, 32, 4
Rounding = Callable[[np.ndarray], np.ndarray]


def exactly(x: np.ndarray) -> np.ndarray:
    return x


def e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def block_e4m3(x: np.ndarray) -> np.ndarray:
    """With a power of two for each block of tokens, as the product has them."""
    blocks = x.reshape(-1, BLOCK, SIZE)
    scale = np.exp2(np.ceil(np.log2(np.abs(blocks).max((1, 2), keepdims=True) / 448)))
    return (e4m3(blocks / scale) * scale).reshape(x.shape)


def block_int8(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, BLOCK, SIZE)
    scale = np.abs(blocks).max((1, 2), keepdims=True) / 127
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


def tensor_e4m3(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max() / 448
    return e4m3(x / scale) * scale


def twice(rounding: Rounding) -> Rounding:
    """A value as the sum of two 8-bit ones: two products instead of one."""
    return lambda x: rounding(x) + rounding(x - rounding(x))


def less_mean(x: np.ndarray) -> np.ndarray:
    mean = x.mean(0, keepdims=True)
    return block_e4m3(x - mean) + mean


# Of query and key, of value, of p; whether p is summed after its rounding.
METHODS: dict[str, tuple[Rounding, Rounding, Rounding, bool]] = {
    "a scale for each tensor, no rotation": (tensor_e4m3, tensor_e4m3, e4m3, False),
    "Fp8()": (block_e4m3, block_e4m3, e4m3, False),
    "only query and key": (block_e4m3, exactly, exactly, False),
    "only query and key, int8": (block_int8, exactly, exactly, False),
    "only value": (exactly, block_e4m3, exactly, False),
    "only value, its mean taken off": (exactly, less_mean, exactly, False),
    "only value, int8": (exactly, block_int8, exactly, False),
    "only p": (exactly, exactly, e4m3, False),
    "only p, summed rounded": (exactly, exactly, e4m3, True),
    "query and key int8": (block_int8, block_e4m3, e4m3, False),
    "query and key int8, p summed rounded": (block_int8, block_e4m3, e4m3, True),
    "query and key int8, value twice": (block_int8, twice(block_e4m3), e4m3, False),
    "query and key int8, p twice": (block_int8, block_e4m3, twice(e4m3), False),
    "query and key int8, value and p twice": (block_int8, twice(block_e4m3), twice(e4m3), False),
    "query and key e4m3, value and p twice": (block_e4m3, twice(block_e4m3), twice(e4m3), False),
}


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def main() -> None:
    rng = np.random.default_rng(0)
    rotation = hadamard(SIZE) * rng.choice([-1, 1], SIZE).astype(np.float32)
    for title, outliers in {"normal": 0, "with outliers": 10}.items():
        shape = (LENGTH, SIZE)
        q, k, v = (
            (rng.standard_normal(shape) + outliers * rng.standard_normal(shape) * (rng.random(shape) < 1e-3)).astype(
                np.float32
            )
            for _ in "qkv"
        )
        scores = q.astype(np.float64) @ k.T.astype(np.float64) / np.sqrt(SIZE)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        truth = p @ v / p.sum(-1, keepdims=True)
        for name, (of_scores, of_value, of_p, summed_rounded) in METHODS.items():
            turned = (q, k) if of_scores is tensor_e4m3 else (q @ rotation.T, k @ rotation.T)
            x, y = (of_scores(operand) for operand in turned)
            scores = x @ y.T * np.float32(np.log2(np.e) / np.sqrt(SIZE))
            p = np.exp2(scores - np.ceil(scores.max(-1, keepdims=True)) + SHIFT)
            rounded = of_p(p)
            total = (rounded if summed_rounded else p).sum(-1, keepdims=True, dtype=np.float64)
            rmse = np.sqrt(np.mean((rounded @ of_value(v) / total - truth) ** 2))
            print(f"{title:13} | {name:37} | {rmse:.2e} | {100 * rmse / np.sqrt(np.mean(truth**2)):.2f} %", flush=True)


if __name__ == "__main__":
    main()

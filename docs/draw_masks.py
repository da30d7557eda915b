"""Draws docs/pictures/masks.png from the mask predicates themselves: `python docs/draw_masks.py`."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from jax_flash import masks
from jax_flash.spec import AttentionSpec, Operands

LENGTH, TILE = 32, 4
SKIPPED, HIDDEN, EDGE, INTERIOR = range(4)
COLORS = ListedColormap(["#f4f4f4", "#d9d9d9", "#7fb3d5", "#2471a3"])

documents = np.repeat(np.arange(4), [6, 10, 5, 11]).astype(np.int32)
CASES = {
    "causal": (AttentionSpec(scale=1.0, causal=True), Operands()),
    "causal, q_offset=8": (AttentionSpec(scale=1.0, causal=True), Operands(q_offset=np.int32(8))),
    "causal, window=(9, 0)": (AttentionSpec(scale=1.0, causal=True, window_left=9, window_right=0), Operands()),
    "causal, segment_ids": (
        AttentionSpec(scale=1.0, causal=True),
        Operands(q_segment_ids=documents[:, None], kv_segment_ids=documents[None, :]),
    ),
    "q_lengths=26, kv_lengths=21": (
        AttentionSpec(scale=1.0),
        Operands(q_lengths=np.int32(26), kv_lengths=np.int32(21)),
    ),
}


def classes(spec: AttentionSpec, operands: Operands) -> np.ndarray:
    """[LENGTH, LENGTH]: for each pair, what the kernel does with it."""
    query = np.arange(LENGTH, dtype=np.int32)[:, None]
    key = np.arange(LENGTH, dtype=np.int32)[None, :]
    seen = np.broadcast_to(np.asarray(masks.visible(spec, operands, query, key)), (LENGTH, LENGTH))
    tiles = seen.reshape(LENGTH // TILE, TILE, LENGTH // TILE, TILE)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, tiles.shape).reshape(LENGTH, LENGTH)

    some, every = spread(tiles.any((1, 3), keepdims=True)), spread(tiles.all((1, 3), keepdims=True))
    return np.select([every, some & seen, some], [INTERIOR, EDGE, HIDDEN], SKIPPED)


def main() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.6), layout="constrained")
    *panels, legend = axes.flat
    for axis, (title, (spec, operands)) in zip(panels, CASES.items(), strict=True):
        axis.imshow(classes(spec, operands), cmap=COLORS, vmin=0, vmax=3)
        axis.set_title(title, fontsize=12)
        axis.set_xticks(np.arange(-0.5, LENGTH, TILE), [])
        axis.set_yticks(np.arange(-0.5, LENGTH, TILE), [])
        axis.grid(color="white", linewidth=1.2)
        axis.tick_params(length=0)
        axis.set_xlabel("keys")
        axis.set_ylabel("queries")
    names = ["skipped tile", "hidden pair", "visible, edge tile", "visible, interior tile"]
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=COLORS(i), edgecolor="#999999") for i in range(len(names))]
    legend.legend(patches, names, loc="center", fontsize=13, frameon=False)
    legend.axis("off")
    path = pathlib.Path(__file__).parent / "pictures" / "masks.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

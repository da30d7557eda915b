"""Trains a small causal Transformer on characters, with jax_flash attention, on whatever device there is.

The text is source code of Python's standard library, which every machine has. Before training, gradients are checked
against exact attention (softmax over the full T x T matrix); after it, the loss must have fallen. Saves a picture of
the loss and prints what the model writes.

    python examples/train_small.py [--steps 300] [--picture out/train_small.png]
"""

import argparse
import functools
import inspect
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import jax_flash as jf

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_SIZE = 3, 128, 4, 2, 32
LENGTH, BATCH, LEARNING_RATE = 128, 8, 3e-3
VOCABULARY = 128  # ASCII


def load_text():
    """The text as an array of ASCII codes."""
    modules = (argparse, functools, inspect, textwrap)
    text = "\n".join(inspect.getsource(module) for module in modules)
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


def initial_parameters(key):
    keys = iter(jax.random.split(key, 2 + 6 * LAYERS))

    def matrix(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    def layer():
        return {
            "query": matrix(WIDTH, HEADS * HEAD_SIZE),
            "key": matrix(WIDTH, KV_HEADS * HEAD_SIZE),
            "value": matrix(WIDTH, KV_HEADS * HEAD_SIZE),
            "out": matrix(HEADS * HEAD_SIZE, WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH),
        }

    return {
        "embed": matrix(VOCABULARY, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "head": matrix(WIDTH, VOCABULARY),
    }


def normalise(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def flash(q, k, v):
    """Causal; the only notion of position is a bias by distance (ALiBi)."""
    slopes = 2.0 ** -jnp.arange(1, HEADS + 1)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else q.dtype
    out = jf.flash_attention(*(x.astype(dtype) for x in (q, k, v)), causal=True, alibi_slopes=slopes)
    return out.astype(q.dtype)


def exact(q, k, v):
    """The same by definition: [T, T] scores, softmax, weighted sum."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    slopes = 2.0 ** -jnp.arange(1, HEADS + 1)[:, None, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * HEAD_SIZE**-0.5 - slopes * distance
    weights = jax.nn.softmax(jnp.where(distance >= 0, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def logits(parameters, tokens, attention):
    """[B, T] -> [B, T, VOCABULARY]"""
    x = parameters["embed"][tokens] * WIDTH**0.5
    for layer in parameters["layers"]:
        h = normalise(x)
        q, k, v = ((h @ layer[name]).reshape(*h.shape[:2], -1, HEAD_SIZE) for name in ("query", "key", "value"))
        x = x + attention(q, k, v).reshape(h.shape[0], h.shape[1], -1) @ layer["out"]
        x = x + jax.nn.gelu(normalise(x) @ layer["up"]) @ layer["down"]
    return normalise(x) @ parameters["head"]


def loss(parameters, tokens, attention):
    """Mean cross entropy of each next character; tokens [B, T + 1]."""
    predicted = logits(parameters, tokens[:, :-1], attention)
    return optax.softmax_cross_entropy_with_integer_labels(predicted, tokens[:, 1:]).mean()


def check_gradients(parameters, tokens):
    by_flash, by_definition = (
        jax.jit(jax.grad(functools.partial(loss, attention=attention)))(parameters, tokens)
        for attention in (flash, exact)
    )
    by_flash, by_definition = (ravel_pytree(gradients)[0] for gradients in (by_flash, by_definition))
    error = float(jnp.linalg.norm(by_flash - by_definition) / jnp.linalg.norm(by_definition))
    limit = 2e-2 if jax.default_backend() == "gpu" else 1e-4  # bfloat16 attention, or float32
    print(f"gradients: relative difference from exact attention {error:.1e} (limit {limit:.0e})")
    assert error < limit


def train(parameters, text, steps):
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(parameters, state, tokens):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens, flash)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, losses, rng = optimizer.init(parameters), [], np.random.default_rng(0)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        for _ in range(steps):
            parameters, state, value = step(parameters, state, batch(text, rng))
            losses.append(float(value))
            progress.update(task, advance=1, loss=losses[-1])
    return parameters, losses


def batch(text, rng):
    starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
    return text[starts[:, None] + np.arange(LENGTH + 1)]


def write(parameters, prompt, count):
    """`count` characters after the prompt, each the likeliest of a few draws."""

    @jax.jit
    def next_character(tokens, last, key):
        return jax.random.categorical(key, logits(parameters, tokens[None], flash)[0, last] / 0.5)

    tokens = np.zeros(LENGTH, np.int32)
    tokens[: len(prompt)] = [ord(character) for character in prompt]
    for i, key in zip(range(len(prompt), len(prompt) + count), jax.random.split(jax.random.key(1), count), strict=True):
        tokens[i] = next_character(tokens, i - 1, key)
    return "".join(map(chr, tokens[: len(prompt) + count]))


def draw(losses, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color="0.75", label="each step")
    window = max(1, len(losses) // 30)
    axes.plot(
        np.arange(window - 1, len(losses)),
        np.convolve(losses, np.ones(window) / window, "valid"),
        label=f"mean of {window}",
    )
    axes.set(
        xlabel="step", ylabel="loss (nats per character)", title=f"{jax.devices()[0].device_kind}, jax_flash attention"
    )
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path("out/train_small.png"))
    options = parser.parse_args()

    text, parameters = load_text(), initial_parameters(jax.random.key(0))
    size = sum(x.size for x in jax.tree.leaves(parameters))
    print(f"device: {jax.devices()[0].device_kind}; {size:,} parameters, {len(text):,} characters")
    check_gradients(parameters, batch(text, np.random.default_rng(1)))
    parameters, losses = train(parameters, text, options.steps)
    draw(losses, options.picture)
    print(textwrap.indent(write(parameters, "def ", 120), "| "))
    first, last = np.mean(losses[:5]), np.mean(losses[-20:])
    print(f"loss: {first:.2f} -> {last:.2f}")
    assert last < 0.6 * first, "the loss did not fall"


if __name__ == "__main__":
    main()

"""A text to learn from, generated: sentences of a small grammar and sums in words, one document a line."""

from __future__ import annotations

import numpy as np

NAMES = ["Ada", "Bo", "Carl", "Dora", "Emil", "Fay", "Gus", "Hedda", "Ivo", "June"]
THINGS = ["apple", "book", "candle", "drum", "egg", "flute", "glove", "hat", "kite", "lamp"]
PLACES = ["garden", "kitchen", "harbour", "market", "mill", "tower"]
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip


def document(rng: np.random.Generator) -> str:
    """A short story: who carries what where, and a sum."""
    who, other = rng.choice(NAMES, 2, replace=False)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    a, b = rng.integers(0, 10, 2)
    return (
        f"{who} took the {thing} to the {place}. {other} asked: who has the {thing}? {who} has the {thing}. "
        f"Then {other} counted: {NUMBERS[a]} and {NUMBERS[b]} make {NUMBERS[a + b]}.\n"
    )


def tokens(text: str) -> np.ndarray:
    """The bytes of a text: int32 [len]."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def text(size: int = 1_000_000, seed: int = 0) -> str:
    """About `size` characters, always the same for a seed."""
    rng = np.random.default_rng(seed)
    documents, length = [], 0
    while length < size:
        documents.append(document(rng))
        length += len(documents[-1])
    return "".join(documents)


def batches(corpus: np.ndarray, batch: int, length: int, start: int):
    """Random sequences [batch, length + 1] of the corpus, without end, from step `start` on."""
    step = start
    while True:
        rng = np.random.default_rng(step)
        first = rng.integers(0, len(corpus) - length, batch)
        yield corpus[first[:, None] + np.arange(length + 1)]
        step += 1


def packed(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other: tokens and their documents' numbers, both [batch, length + 1]."""
    rows, ids = np.zeros((2, batch, length + 1), np.int32)
    for row, row_ids in zip(rows, ids, strict=True):
        end = number = 0
        while end <= length:
            story = tokens("".join(document(rng) for _ in range(rng.integers(1, 8))))
            part = row[end : end + len(story)]
            part[:] = story[: len(part)]
            row_ids[end : end + len(story)] = number
            end, number = end + len(story), number + 1
    return rows, ids

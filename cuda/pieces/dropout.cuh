// Dropout by counter: the bits of a pair depend on (seed, batch, head, query, key) alone, so that every path, tile and
// sharding drops the same pairs. jax_flash/xla.py has the same formula.
#pragma once
#include "pieces/fragment.cuh"

namespace jf {

constexpr JF_HOST_DEVICE unsigned mix_bits(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// One (batch entry, head).
struct Dropout {
  unsigned base;
  unsigned threshold;
  float scale;  // of a kept probability

  constexpr JF_HOST_DEVICE unsigned row(int query) const { return mix_bits(base + static_cast<unsigned>(query)); }
};

// Keys 2 * pair and 2 * pair + 1 take the low and the high half.
constexpr JF_HOST_DEVICE unsigned dropout_word(unsigned row, int pair) {
  return mix_bits(row + static_cast<unsigned>(pair) * 0x9E3779B1u);
}

constexpr JF_HOST_DEVICE unsigned dropout_base(unsigned seed0, unsigned seed1, int batch, int head) {
  return mix_bits(mix_bits(mix_bits(seed0) + seed1) + static_cast<unsigned>(batch) * 0x9E3779B1u +
                  static_cast<unsigned>(head) * 0x85EBCA77u);
}

JF_DEVICE Dropout dropout_of(const Problem& p, const Features& f, int b, int head) {
  const unsigned* seed = row_of<unsigned>(f.dropout_seed, b, 2);
  return {dropout_base(seed[0], seed[1], *row_of<int>(f.dropout_batch, b), f.dropout_head[head]), p.dropout_threshold,
          p.dropout_scale};
}

// Calls keep(i, kept) for each register of a fragment. A fragment's first column is even, so that columns come in the
// pairs that share a word when columns are keys.
template <int N, bool kTransposed, class Keep>
JF_DEVICE void for_each_kept(const Dropout& dropout, const Fragment<kTransposed>& at, Keep keep) {
  if constexpr (kTransposed) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const unsigned word = dropout_word(dropout.row(at.query(i)), at.key(i) >> 1);
      keep(i, (at.key(i) & 1 ? word >> 16 : word & 0xffffu) < dropout.threshold);
    }
  } else {
    const unsigned row[2] = {dropout.row(at.row[0]), dropout.row(at.row[1])};
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const unsigned word = dropout_word(row[fragment_row(i)], at.column_of(i) >> 1);
      keep(i, (word & 0xffffu) < dropout.threshold);
      keep(i + 1, (word >> 16) < dropout.threshold);
    }
  }
}

}  // namespace jf

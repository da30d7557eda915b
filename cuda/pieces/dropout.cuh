// Dropout by counter: the bits of a pair depend on (seed, batch, head, query, key) alone, so that every path, tile and
// sharding drops the same pairs. jax_flash/xla.py has the same formula.
#pragma once
#include "pieces/fragment.cuh"

namespace jf {

// mix_bits but for its last step.
constexpr JF_HOST_DEVICE unsigned stir_bits(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  return x * 0x846ca68bu;
}
constexpr JF_HOST_DEVICE unsigned mix_bits(unsigned x) {
  x = stir_bits(x);
  return x ^ (x >> 16);
}

// One (batch entry, head).
struct Dropout {
  unsigned base;
  unsigned last;  // a pair is kept if its 16 bits, with whatever 16 bits below them, are at most this
  float scale;    // of a kept probability

  constexpr JF_HOST_DEVICE unsigned row(int query) const { return mix_bits(base + static_cast<unsigned>(query)); }
  // Keys 2 * pair and 2 * pair + 1 take the low and the high half of mix_bits, whose last step changes the low half
  // only. fold: 2^16 for the even key, 0 for the odd one.
  constexpr JF_HOST_DEVICE bool keeps(unsigned word, unsigned fold) const { return (word ^ word * fold) <= last; }
};

// A pair's word is stir_bits(row + dropout_step(pair)).
constexpr JF_HOST_DEVICE unsigned dropout_step(int pair) { return static_cast<unsigned>(pair) * 0x9E3779B1u; }

constexpr JF_HOST_DEVICE unsigned dropout_base(unsigned seed0, unsigned seed1, int batch, int head) {
  return mix_bits(mix_bits(mix_bits(seed0) + seed1) + static_cast<unsigned>(batch) * 0x9E3779B1u +
                  static_cast<unsigned>(head) * 0x85EBCA77u);
}

JF_DEVICE Dropout dropout_of(const Problem& p, const Features& f, int b, int head) {
  const unsigned* seed = row_of<unsigned>(f.dropout_seed, b, 2);
  return {dropout_base(seed[0], seed[1], *row_of<int>(f.dropout_batch, b), f.dropout_head[head]),
          (p.dropout_threshold << 16) - 1, p.dropout_scale};
}

// Calls keep(i, kept) for each register of a fragment. A fragment's first column is even, so that columns come in the
// pairs that share a word when columns are keys.
template <int N, bool kTransposed, class Keep>
JF_DEVICE void for_each_kept(const Dropout& dropout, const Fragment<kTransposed>& at, Keep keep) {
  if constexpr (kTransposed) {
    unsigned step[2], fold[2];  // of the two keys
#pragma unroll
    for (int r = 0; r < 2; r++) step[r] = dropout_step(at.row[r] >> 1), fold[r] = at.row[r] & 1 ? 0 : 1 << 16;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const unsigned word = stir_bits(dropout.row(at.query(i)) + step[fragment_row(i)]);
      keep(i, dropout.keeps(word, fold[fragment_row(i)]));
    }
  } else {
    unsigned first[2];
#pragma unroll
    for (int r = 0; r < 2; r++) first[r] = dropout.row(at.row[r]) + dropout_step(at.column >> 1);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const unsigned word = stir_bits(first[fragment_row(i)] + dropout_step(fragment_column(i) / 2));
      keep(i, dropout.keeps(word, 1 << 16));
      keep(i + 1, dropout.keeps(word, 0));
    }
  }
}

}  // namespace jf

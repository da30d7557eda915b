// Attention forward on Hopper: out = softmax(logits(Q K^T)) V, lse = log sum exp(logits).
//
// Grid: a block for each multiprocessor. It computes one tile after another: kRows query rows of one head (or of a pack
// of heads that share their keys), over all key tiles that any row sees, from the last to the first. Tiles are numbered
// in sections of heads whose keys and values share the L2, those with the most keys first; they are drawn from a
// counter (kTiles.dynamic) or dealt out in advance.
//
// Roles: warpgroup 0 has two single threads at work, the others are consumers of 64 rows each.
//   producer (warp 0)   loads Q, and K and V into rings of kStages, by TMA
//   scheduler (warp 1)  decides the next tile and which keys it needs
//   consumer            S = Q K^T (wgmma), softmax in registers, O += P V (P from registers)
//
// Time, in a consumer; the other groups do the same a turn later, so that one's products run under another's softmax:
//
//   products   | S(n-1)  | P(n) V(n)            | S(n-2) | P(n-1) V(n-1) ...
//   registers            | softmax(n-1) -> P(n-1)        | softmax(n-2)  ...
//
// At the end of a tile the last P V is followed by the first S of the next tile (its Q is there already), under which
// the output is normalised and sent off. A group whose rows do not see a key tile that others of the block do see lets
// it pass (skip).
//
//   barrier            arrivals                      waited for by
//   q_full             producer + bytes              consumers, before the first S of a tile
//   q_free             each consumer warp            producer; Q was read
//   k_full, v_full     producer + bytes              consumers, before S, before P V
//   k_free, v_free     each consumer warp            producer
//   work_full          scheduler                     producer, consumers; two slots
//   work_free          producer, consumer warps      scheduler
//   work_wanted        producer                      scheduler, before it draws the next tile
//   named 1 + group    this group, the one before    of two groups, the group's turn to start products
//   named 1 + kGroups + group                        the group's own: staged output, zeroed values
//
// Shared memory: struct Shared. 128-byte rows with TMA's 128-byte swizzle: 64 elements of a row of a tile form an atom,
// atoms of a tile stand one after another. Rows and elements outside the arrays arrive as zeros.
//
// Numerics: scores, softmax and sums in fp32, P unnormalised and at most 2^8, rounded to 16 bits, one division at the
// end. The running maximum is left behind until a score far exceeds it (softmax.cuh): exact, since every P, the sum and
// O share the factor.
//
// Limits: head sizes are multiples of 8, scale > 0 (the running maximum is that of raw scores), at least one key, fewer
// than 2^30 rows and tiles.
#include "pieces/dropout.cuh"
#include "pieces/score.cuh"
#include "pieces/softmax.cuh"
#include "sm90/args.h"
#include "sm90/ptx.cuh"

namespace jf {

constexpr int kRows = kTiles.rows, kKeys = kTiles.keys, kStages = kTiles.stages, kQStages = kTiles.q_stages;
constexpr int kGroups = kRows / 64;  // consumer warpgroups
constexpr int kThreads = 128 * (1 + kGroups);
constexpr int kHeadSteps = (kSpec.head_dim + 15) / 16,
              kValueSteps = (kSpec.value_dim + 15) / 16;  // of 16: the k of a wgmma
constexpr int kHeadAtoms = (kSpec.head_dim + 63) / 64,
              kValueAtoms = (kSpec.value_dim + 63) / 64;  // of 64 elements: 128 bytes
constexpr int kQBytes = kHeadAtoms * kRows * 128, kKBytes = kHeadAtoms * kKeys * 128,
              kVBytes = kValueAtoms * kKeys * 128;
constexpr int kBiasAtoms = kTiles.bias_tiles ? (kKeys + 63) / 64 : 0, kBiasTileBytes = kBiasAtoms * kRows * 128,
              kKStageBytes = kKBytes + kBiasTileBytes;
constexpr int kOutBytes = kValueAtoms * kRows * 128;
// Where a second slot for Q, or Q in registers, leaves room, the output is staged in shared memory; else it is written
// from registers.
constexpr bool kStaged = kQStages == 2 || kTiles.q_registers;

// Two groups take turns to start their products, so that one's softmax runs under the other's products. Of three, two
// always have products to start: they are faster without.
constexpr bool kTurns = kGroups == 2;

// Whether the exponentials of a step are kept ahead of the wait for P V, by measurement: see hold_waits.
constexpr bool kHoldsWaits = kSpec.head_dim <= 64 && kSpec.value_dim <= 64 &&
                             !(kSpec.causal || kSpec.window_left || kSpec.window_right || kSpec.softcap ||
                               kSpec.bias() || kSpec.mask || kSpec.segment_ids);

// The diagonal cuts the last tile of keys. (With a mask array, the registers do not suffice for what is made of it.)
constexpr bool kDiagonal = (kSpec.causal || kSpec.window_right) && !kSpec.mask;

// Registers of a thread. The shares add up to what the launch allotted: 65536 / kThreads, in steps of 8. A producer
// that loads the bias as well needs more than 32.
constexpr int kProducerRegisters = kGroups == 2 ? 40 : kTiles.bias_tiles ? 56 : 32;
constexpr int kConsumerRegisters = kGroups == 2 ? 232 : kTiles.bias_tiles ? 152 : 160;
static_assert(kGroups == 2 || kGroups == 3, "two or three consumer warpgroups");
static_assert(kProducerRegisters + kGroups * kConsumerRegisters == (1 + kGroups) * (65536 / kThreads / 8 * 8));
static_assert(kKeys % 16 == 0 && kKeys <= 256 && kSpec.value_dim <= 256);
static_assert(kTiles.packed == 1 ||
                  (64 % kTiles.packed == 0 && !kSpec.bias() && !kSpec.mask && !kSpec.alibi && !kSpec.dropout),
              "a pack divides a warpgroup's rows and has no feature that depends on the head");

// One tile of the output: kRows rows of a head (or of a pack of heads: row r is query r / packed of head r % packed).
struct Work {
  int row0;  // negative: there is no more work
  int head, kv_head, batch;
  Range keys;  // key tiles that any row sees; at least one
  CallBand band;

  JF_DEVICE bool valid() const { return row0 >= 0; }
};

struct alignas(1024) Shared {
  unsigned char q[kQStages][kQBytes];
  unsigned char k[kStages][kKStageBytes];  // keys, and behind them their tile of the bias
  unsigned char v[kStages][kVBytes];
  unsigned char out[kStaged ? kOutBytes : 16];
  u64 q_full[kQStages], q_free[kQStages];
  u64 k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  u64 work_full[2], work_free[2], work_wanted;
  Work work[2];
};

static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");

// Place in a ring of kSize slots, and the parity of the phase in which its slot is filled for this use.
template <int kSize>
struct Ring {
  u32 slot = 0, parity = 0;
  JF_DEVICE void advance() {
    if (++slot == kSize) slot = 0, parity ^= 1;
  }
  JF_DEVICE Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
};

JF_DEVICE u32 barrier_of(const u64* barriers, u32 slot) { return shared_address(barriers) + 8 * slot; }

// One arrival a warp; its lanes are together, after a wgmma_wait or a __syncwarp (which, near a wgmma in flight, makes
// ptxas serialise all of them).
JF_DEVICE void release(const u64* barriers, u32 slot) {
  if (lane_id() == 0) barrier_arrive(barrier_of(barriers, slot));
}

// ---- Scheduler: one thread that decides which tile comes next and what it needs.

JF_DEVICE Work work_of(const Sm90ForwardArgs& args, int index) {
  const Problem& p = args.problem;
  const int heads = p.q_heads / kTiles.packed, pairs = heads * p.batch;
  if (index >= args.tiles * pairs) return {-1};
  // Sections of heads; inside one the last query tiles, which have the most keys under causal masks, come first.
  const int per_section = args.section * args.tiles, first_pair = index / per_section * args.section;
  const int width = min(args.section, pairs - first_pair), in_section = index % per_section;
  const int pair = first_pair + in_section % width, tile = args.tiles - 1 - in_section / width;
  Work work;
  work.row0 = tile * kRows;
  if (kTiles.bias_tiles && args.features.bias.head_stride != 0) {
    // Batch entries side by side: where they share the bias, they read it at about the same time. Heads that share
    // their keys stay together.
    const int group = kSpec.grouped ? p.q_heads / p.kv_heads : 1;
    work.batch = pair / group % p.batch;
    work.head = pair / (group * p.batch) * group + pair % group;
  } else {
    work.batch = pair / heads;
    work.head = pair % heads * kTiles.packed;
  }
  work.kv_head = kSpec.grouped ? work.head / (p.q_heads / p.kv_heads) : work.head;
  work.band = band_of(p, args.features, work.batch);
  work.keys = tiles_of(work.band.keys_of(work.row0 / kTiles.packed, kRows / kTiles.packed), kKeys);
  if constexpr (kSpec.segment_ids) {
    work.keys = meet(work.keys, args.segments.key_tiles[static_cast<long long>(work.batch) * args.tiles + tile]);
  }
  if (work.keys.size() == 0) work.keys = {0, 1};  // all masked: the rows come out as zeros
  return work;
}

JF_DEVICE void schedule(const Sm90ForwardArgs& args, Shared& shared) {
  const int blocks = gridDim.x, block = blockIdx.x;
  for (int round = 0, index = block;; round++) {
    const Work work = work_of(args, index);
    barrier_wait(barrier_of(shared.work_free, round & 1), (round >> 1 & 1) ^ 1);
    shared.work[round & 1] = work;
    barrier_arrive(barrier_of(shared.work_full, round & 1));
    if (!work.valid()) return;
    if constexpr (kTiles.dynamic) {  // as late as the producer lets it: a tile drawn early may be one too many
      barrier_wait(barrier_of(&shared.work_wanted, 0), round & 1);
      index = blocks + atomicAdd(args.counter, 1);
    } else {  // back and forth, so that no block always gets the longest of a round
      index = (round + 1) * blocks + (round & 1 ? block : blocks - 1 - block);
    }
  }
}

// The scheduler's tile number `round`, good until released.
JF_DEVICE const Work* wait_work(const Shared& shared, u32 round) {
  barrier_wait(barrier_of(shared.work_full, round & 1), round >> 1 & 1);
  return &shared.work[round & 1];
}

// ---- Producer: one thread that keeps the rings full.

JF_DEVICE void load_atoms(u32 to, const TensorMap& map, u32 barrier, int atoms, int rows, int head, int row,
                          int batch) {
  for (int atom = 0; atom < atoms; atom++) tma_load(to + atom * rows * 128, map, barrier, atom * 64, head, row, batch);
}

// Past the keys and values, which are to stay in the L2.
JF_DEVICE void load_bias(const Sm90ForwardArgs& args, const Work& work, int n, u32 to, u32 barrier) {
  const Dense& bias = args.features.bias;
  const int head = bias.head_stride != 0 ? work.head : 0, batch = bias.batch(work.batch);
  for (int atom = 0; atom < kBiasAtoms; atom++) {
    tma_load_once(to + atom * kRows * 128, args.bias, barrier, n * kKeys + atom * 64, head, work.row0, batch);
  }
}

JF_DEVICE void produce(const Sm90ForwardArgs& args, Shared& shared) {
  Ring<kQStages> q_ring;
  Ring<kStages> ring;
  for (u32 round = 0;; round++) {
    const Work work = *wait_work(shared, round);
    barrier_arrive(barrier_of(shared.work_free, round & 1));
    if (!work.valid()) return;

    const Problem& p = args.problem;
    const u32 q_full = barrier_of(shared.q_full, q_ring.slot);
    barrier_wait(barrier_of(shared.q_free, q_ring.slot), q_ring.parity ^ 1);
    barrier_arrive_expect(q_full, kQBytes);
    load_atoms(shared_address(shared.q[q_ring.slot]), args.q, q_full, kHeadAtoms, kRows, work.head,
               work.row0 / kTiles.packed, p.q_batch(work.batch));
    q_ring.advance();

    const int k_batch = p.k_batch(work.batch), v_batch = p.v_batch(work.batch);
    for (int n = work.keys.end - 1; n >= work.keys.begin; n--, ring.advance()) {
      const u32 k_full = barrier_of(shared.k_full, ring.slot), v_full = barrier_of(shared.v_full, ring.slot);
      barrier_wait(barrier_of(shared.k_free, ring.slot), ring.parity ^ 1);
      barrier_arrive_expect(k_full, kKStageBytes);
      load_atoms(shared_address(shared.k[ring.slot]), args.k, k_full, kHeadAtoms, kKeys, work.kv_head, n * kKeys,
                 k_batch);
      if constexpr (kTiles.bias_tiles) load_bias(args, work, n, shared_address(shared.k[ring.slot]) + kKBytes, k_full);
      if (kTiles.dynamic && n == work.keys.begin) barrier_arrive(barrier_of(&shared.work_wanted, 0));
      barrier_wait(barrier_of(shared.v_free, ring.slot), ring.parity ^ 1);
      barrier_arrive_expect(v_full, kVBytes);
      load_atoms(shared_address(shared.v[ring.slot]), args.v, v_full, kValueAtoms, kKeys, work.kv_head, n * kKeys,
                 v_batch);
    }
  }
}

// ---- Consumers: a warpgroup computes 64 rows of the tile.

// A group's 64 rows of Q: where they stand in shared memory, or the rows themselves as operand A.
struct QInShared {
  u64 descriptor;
};
struct QInRegisters {
  u32 words[kHeadSteps * 4];

  JF_DEVICE void load(u32 rows) {
    const u32 row = static_cast<u32>(threadIdx.x) / 32 % 4 * 16 + lane_id() % 16;
#pragma unroll
    for (int step = 0; step < kHeadSteps; step++) {
      load_matrix(words + 4 * step,
                  rows + step / 4 * (kRows * 128) + swizzled_offset(row, step % 4 * 2 + lane_id() / 16));
    }
  }
};

// S = Q K^T started, or S += Q K^T where S holds the bias. k: descriptor of the first step.
template <class Q>
JF_DEVICE void start_scores(float (&s)[kKeys / 2], const Q& q, u64 k) {
#pragma unroll
  for (int step = 0; step < kHeadSteps; step++) {
    const u64 k_step = descriptor_after(k, step / 4 * (kKeys * 128) + step % 4 * 32);
    if constexpr (kTiles.q_registers) {
      wgmma<kSpec.dtype>(s, q.words + 4 * step, k_step, kTiles.bias_tiles || step != 0);
    } else {
      wgmma<kSpec.dtype>(s, descriptor_after(q.descriptor, step / 4 * (kRows * 128) + step % 4 * 32), k_step,
                         kTiles.bias_tiles || step != 0);
    }
  }
  wgmma_commit();
}

// O (+)= P V, started.
JF_DEVICE void start_values(float (&o)[kValueSteps * 8], const u32 (&p)[kKeys / 4], u64 v, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; step++) {
    wgmma<kSpec.dtype, true>(o, p + 4 * step, descriptor_after(v, step * (16 * 128)), accumulate || step != 0);
  }
  wgmma_commit();
}

// Keys past the length may hold NaN, and 0 * NaN would reach the output: their values become zeros. Each warpgroup does
// it for itself.
JF_DEVICE void zero_values(u32 v, u32 from, int group) {
  const u32 rows = kKeys - from;
  for (u32 i = afresh(threadIdx.x) % 128; i < kValueAtoms * rows * 8; i += 128) {
    const u32 row = from + i / 8 % rows, atom = i / 8 / rows;
    store_zeros_16(v + (atom * kKeys + row) * 128 + i % 8 * 16);
  }
  async_fence();
  named_sync(1 + kGroups + group, 128);
}

// Whether a row may see its first key after the first tile that its group sees. Not so where the group's rows end at
// the same key, or each at its own, which then stand in one tile.
constexpr bool kStartsEmpty = kSpec.mask || kSpec.bias() || kSpec.segment_ids || kSpec.window_right ||
                              (kSpec.causal && (kSpec.q_offset || kKeys % 64 != 0));
using Softmax = OnlineSoftmax<kStartsEmpty>;

// The factors that normalise the thread's two rows; writes their lse. Rows at or past the length get 0 and -inf.
JF_DEVICE void finish(const Sm90ForwardArgs& args, const Work& work, int warp_row, Softmax& softmax,
                      float (&factor)[2]) {
  const Problem& p = args.problem;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = work.row0 + warp_row + lane_id() / 4 + 8 * r, query = row / kTiles.packed;
    const int head = work.head + row % kTiles.packed;
    float lse;
    if constexpr (kSpec.sinks) {
      factor[r] = softmax.template finish<true>(r, args.features.sinks[head], lse);
    } else {
      factor[r] = softmax.template finish<false>(r, 0.f, lse);
    }
    if constexpr (kSpec.dropout) factor[r] *= p.dropout_scale;
    if (kSpec.q_lengths && query >= work.band.q_end) {
      factor[r] = 0.f;
      lse = -infinity();
    }
    if (lane_id() % 4 == 0 && query < p.q_len) {
      args.lse[(static_cast<long long>(work.batch) * p.q_heads + head) * p.q_len + query] = lse;
    }
  }
}

// Two neighbours of row r of the output, normalised: columns 8 * block + 2 * (lane % 4) and the next.
JF_DEVICE u32 normalised(const float (&o)[kValueSteps * 8], const float (&factor)[2], int block, int r) {
  const float* pair = o + 4 * block + 2 * r;
  if (kSpec.q_lengths && factor[r] == 0.f) return 0;  // 0 times what a poisoned query left may not be 0
  return pack<kSpec.dtype>(pair[0] * factor[r], pair[1] * factor[r]);
}

// Stages a group's rows in shared memory and sends them off.
JF_DEVICE void send(const Sm90ForwardArgs& args, const Work& work, int group, const float (&o)[kValueSteps * 8],
                    const float (&factor)[2], u32 staging) {
  const int thread = static_cast<int>(threadIdx.x) % 128, barrier = 1 + kGroups + group;
  if (thread == 0) bulk_wait_read<0>();  // what the group's last tile left there has been read
  named_sync(barrier, 128);
  const int row = group * 64 + thread / 32 * 16 + lane_id() % 16;
#pragma unroll
  for (int step = 0; step < kValueSteps; step++) {  // 16 columns
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = normalised(o, factor, 2 * step + i / 2, i % 2);
    const u32 to = staging + step / 4 * (kRows * 128) + swizzled_offset(row, step % 4 * 2 + lane_id() / 16);
    store_matrix(to, words[0], words[1], words[2], words[3]);
  }
  async_fence();
  named_sync(barrier, 128);
  if (thread == 0) {
    for (int atom = 0; atom < kValueAtoms; atom++) {
      tma_store(args.out_map, staging + (atom * kRows + group * 64) * 128, atom * 64, work.head,
                (work.row0 + group * 64) / kTiles.packed, work.batch);
    }
    bulk_commit();
  }
}

// 4 x 4 words of the four lanes of a quad: lane q's word i becomes lane i's word q.
JF_DEVICE void transpose_quad(u32 (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane_id() & bit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const u32 other = __shfl_xor_sync(~0u, upper ? words[i] : words[i + bit], bit);
      (upper ? words[i] : words[i + bit]) = other;
    }
  }
}

// Writes a warp's rows from registers, 16 bytes a thread.
JF_DEVICE void write(const Sm90ForwardArgs& args, const Work& work, int warp_row, const float (&o)[kValueSteps * 8],
                     const float (&factor)[2]) {
  const Problem& p = args.problem;
  const int quad = lane_id() % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = work.row0 + warp_row + lane_id() / 4 + 8 * r, query = row / kTiles.packed;
    const long long place =
        (static_cast<long long>(work.batch) * p.q_len + query) * p.q_heads + work.head + row % kTiles.packed;
    char* out = static_cast<char*>(args.out) + place * (2 * kSpec.value_dim) + quad * 16;
#pragma unroll
    for (int block = 0; block < 2 * kValueSteps; block += 4) {  // four times 8 columns
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        words[i] = block + i < 2 * kValueSteps ? normalised(o, factor, min(block + i, 2 * kValueSteps - 1), r) : 0;
      }
      transpose_quad(words);
      if (query < p.q_len && 8 * (block + quad) < kSpec.value_dim) {
        *reinterpret_cast<uint4*>(out + block * 16) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

constexpr bool kCapsInSoftmax = kSpec.softcap && !kSpec.alibi && !kSpec.bias();
constexpr bool kRoomy = kHeadAtoms < 4 && kValueAtoms < 4;                                     // O leaves registers
constexpr int kSpareRegisters = kConsumerRegisters - kKeys / 2 - kKeys / 4 - kValueSteps * 8;  // beside S, P and O

// The bias in raw scores, from which the product goes on: matrices of 16 keys as ldmatrix deals them out.
template <int N>
JF_DEVICE void load_bias_tile(float (&s)[N], u32 tile, int warp_row, float inverse_scale) {
#pragma unroll
  for (int step = 0; step < N / 8; step++) {
    u32 words[4];
    load_matrix(words, tile + step / 4 * (kRows * 128) +
                           swizzled_offset(warp_row + lane_id() % 16, step % 4 * 2 + lane_id() / 16));
#pragma unroll
    for (int i = 0; i < 8; i++) s[8 * step + i] = bias_value(Words<2>::part(words[i / 2], i % 2)) * inverse_scale;
  }
}

struct TileIds {
  IdBounds q, kv;
};

// What the logits of a key tile read from global memory: on its way while the products run.
struct Fetched {
  DenseTile<kBiasBytes, kKeys / 2> bias;
  DenseTile<1, kKeys / 2> mask;
  TileIds ids;
};

JF_DEVICE void consume(const Sm90ForwardArgs& args, Shared& shared, int group) {
  const int warp_row = group * 64 + static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  const Problem& problem = args.problem;

  const auto wait_turn = [&] {
    if constexpr (kTurns) named_sync(1 + group, 256);
  };
  const auto pass_turn = [&] {
    if constexpr (kTurns) named_arrive(1 + (group + 1) % kGroups, 256);
  };
  if (kTurns && group == kGroups - 1) pass_turn();  // to the first group

  float s[kKeys / 2], o[kValueSteps * 8];
  u32 p[kKeys / 4];
  Ring<kStages> ring;
  u32 round = 0;  // tiles before this one
  const auto q_ring = [&] { return Ring<kQStages>{round % kQStages, round / kQStages & 1}; };

  const u64 k0 = descriptor_k_major(shared_address(shared.k[0])),
            v0 = descriptor_mn_major(shared_address(shared.v[0]), kKeys * 128);
  QInRegisters q_words;
  const auto q_rows = [&] { return shared_address(shared.q[q_ring().slot]) + group * (64 * 128); };
  const float inverse_scale = reciprocal(problem.scale);
  const auto prepare_scores_of = [&](u32 slot) {
    if constexpr (kTiles.bias_tiles) {
      load_bias_tile(s, shared_address(shared.k[slot]) + kKBytes, warp_row, inverse_scale);
    }
  };
  const auto start_scores_of = [&](u32 slot) {
    const u64 k = descriptor_after(k0, slot * kKStageBytes);
    if constexpr (kTiles.q_registers) {
      start_scores(s, q_words, k);
    } else {
      start_scores(s, QInShared{descriptor_k_major(q_rows())}, k);
    }
  };
  const auto start_values_of = [&](u32 slot, bool accumulate) {
    start_values(o, p, descriptor_after(v0, slot * kVBytes), accumulate);
  };

  // Keys that the rows of this group see.
  const auto seen_by_group = [&](const Work& work) {
    return work.band.keys_of((work.row0 + group * 64) / kTiles.packed, 64 / kTiles.packed);
  };
  // Key tiles that the rows of this group see; if none, one, whose scores are all masked.
  const auto keys_of_group = [&](const Work& work) {
    const Range own = meet(tiles_of(seen_by_group(work), kKeys), work.keys);
    return uniform(own.size() > 0 ? own : Range{work.keys.end - 1, work.keys.end});
  };
  // Lets key tiles pass by that only other groups see.
  const auto skip = [&](int count) {
    for (; count > 0; count--, ring.advance()) {
      barrier_wait(barrier_of(shared.k_full, ring.slot), ring.parity);
      __syncwarp();
      release(shared.k_free, ring.slot);
      wait_turn();
      pass_turn();  // before the wait for V, whose slot may depend on a group that waits for its turn
      barrier_wait(barrier_of(shared.v_full, ring.slot), ring.parity);
      __syncwarp();
      release(shared.v_free, ring.slot);
    }
  };
  const auto start_first_scores = [&](bool valid) {
    if (valid) {
      barrier_wait(barrier_of(shared.q_full, q_ring().slot), q_ring().parity);
      if constexpr (kTiles.q_registers) {
        q_words.load(q_rows());
        release(shared.q_free, q_ring().slot);
      }
      barrier_wait(barrier_of(shared.k_full, ring.slot), ring.parity);
      prepare_scores_of(ring.slot);
    }
    wait_turn();
    wgmma_fence();
    start_scores_of(ring.slot);
    pass_turn();
  };

  const Work* work = wait_work(shared, round);  // there is one: no more blocks than tiles are launched
  Range keys = keys_of_group(*work);
  skip(uniform(work->keys.end) - keys.end);
  start_first_scores(true);
  wgmma_wait<0>();
  pin(s);
  for (bool more = true; more;) {
    Score score = score_of(problem, args.features, work->batch, work->head);
    if constexpr (kPlainScores) score.unit = afresh(score.unit);  // or each step reads and multiplies it anew
    const auto interior = [&](int width) {  // tiles of so many keys, all of which the group's rows see
      return uniform(work->band.interior_tiles((work->row0 + group * 64) / kTiles.packed, 64 / kTiles.packed, width));
    };
    const Range inside = interior(kKeys);
    Softmax softmax;
    float rescale[2];
    Plane mask;
    if constexpr (kSpec.mask) mask = plane_of<1>(problem, args.features.mask, work->batch, work->head);
    Dropout dropout;
    if constexpr (kSpec.dropout) dropout = dropout_of(problem, args.features, work->batch, work->head);

    const auto fragment = [&](int n) {
      Fragment<false> at = warp_fragment<false>(work->row0 + warp_row, n * kKeys);
      if constexpr (kTiles.packed > 1) at.row[0] /= kTiles.packed, at.row[1] /= kTiles.packed;
      return at;
    };
    const auto fetch_ids = [&](int n) {
      const SegmentTiles& segments = args.segments;
      const long long batch = work->batch;
      return TileIds{segments.q_bounds[batch * args.tiles + work->row0 / kRows],
                     segments.kv_bounds[batch * ceil_div(problem.kv_len, kKeys) + n]};
    };
    const auto fetch = [&](int n) {
      Fetched fetched;
      if constexpr (kSpec.bias() && !kTiles.bias_tiles) fetched.bias.load(score.bias, fragment(n));
      if constexpr (kSpec.mask) fetched.mask.load(mask, fragment(n));
      if constexpr (kSpec.segment_ids && kRoomy) fetched.ids = fetch_ids(n);
      return fetched;
    };
    const auto logits = [&] {
      if constexpr (kCapsInSoftmax) {
        return CappedLogits<kSpareRegisters >= 48 ? 16 : 8>(problem);
      } else {
        const Linear linear{kTiles.bias_tiles ? score.scale_log2 : score.unit};
        if constexpr (kTiles.close_tops) {
          return CloseLinear{linear};
        } else {
          return linear;
        }
      }
    }();
    // Raw scores of key tile n become what `logits` takes, -inf where masked.
    const auto transform = [&](int n, const Fetched& fetched) {
      float none[1];
      if constexpr (!kCapsInSoftmax && !kTiles.bias_tiles) {
        transform_unbiased<false>(s, none, fragment(n), score);
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) {
        if constexpr (kSpec.bias() && !kTiles.bias_tiles) add_bias(s, i, fetched.bias.words[i / 2]);
        if constexpr (kSpec.mask) hide_masked(s, i, fetched.mask.words[i / 2]);
      }
      if (n < inside.begin || n >= inside.end) {
        CallBand band = work->band;
        band.q_end = kFar;  // rows past the end compute like the others and are dropped by the store
        const Range halves = interior(kKeys / 2);  // the diagonal of 64 rows often cuts no more than one
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if (2 * n + half >= halves.begin && 2 * n + half < halves.end) continue;
          Fragment<false> there = fragment(n);
          there.column += half * kKeys / 2;
          hide_outside_band(reinterpret_cast<float (&)[kKeys / 4]>(s[half * kKeys / 4]), there, band);
        }
      }
      if constexpr (kSpec.segment_ids) {
        const TileIds ids = kRoomy ? fetched.ids : fetch_ids(n);
        if (!ids.q.same_single_id(ids.kv)) {
          hide_other_segments<kRoomy>(s, fragment(n), segments_of(problem, args.features, work->band, work->batch));
        }
      }
    };
    const auto drop = [&](int n) {
      if constexpr (kSpec.dropout) {
        const Fragment<false> at = warp_fragment<false>(work->row0 + warp_row, n * kKeys);
        for_each_kept<kKeys / 2>(dropout, at, [&](int i, bool kept) { s[i] = kept ? s[i] : 0.f; });
      }
    };
    const auto round_probabilities = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; i++) p[i] = pack<kSpec.dtype>(s[2 * i], s[2 * i + 1]);
    };

    int n = keys.end - 1;
    release(shared.k_free, ring.slot);
    if (!kTiles.q_registers && n == keys.begin) release(shared.q_free, q_ring().slot);
    transform(n, fetch(n));
    // Keys of the second half of the diagonal's tile that no row of the group sees cost no exponentials.
    if (kDiagonal && uniform(seen_by_group(*work).end) <= n * kKeys + kKeys / 2) {
      softmax.template step<true>(reinterpret_cast<float (&)[kKeys / 4]>(s), rescale, logits);
#pragma unroll
      for (int i = kKeys / 4; i < kKeys / 2; i++) s[i] = 0.f;
    } else {
      softmax.template step<true>(s, rescale, logits);
    }
    pin(s);  // or ptxas finds no registers for both branches and serialises every wgmma
    drop(n);
    round_probabilities();
    if constexpr (kSpec.kv_lengths) {
      const int kv_end = work->band.kv_end;
      if ((n + 1) * kKeys > kv_end) {
        barrier_wait(barrier_of(shared.v_full, ring.slot), ring.parity);
        zero_values(shared_address(shared.v[ring.slot]), max(kv_end - n * kKeys, 0), group);
      }
    }

    bool accumulate = false;
    while (--n >= keys.begin) {
      const Ring<kStages> next = ring.next();
      const Fetched fetched = fetch(n);
      barrier_wait(barrier_of(shared.v_full, ring.slot), ring.parity);
      barrier_wait(barrier_of(shared.k_full, next.slot), next.parity);
      prepare_scores_of(next.slot);
      wait_turn();
      wgmma_fence();
      start_scores_of(next.slot);
      start_values_of(ring.slot, accumulate);
      accumulate = true;
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      release(shared.k_free, next.slot);
      if (!kTiles.q_registers && n == keys.begin) release(shared.q_free, q_ring().slot);
      transform(n, fetched);
      const bool grown = softmax.template step<false>(s, rescale, logits);
      drop(n);
      pin(s);
      if constexpr (kHoldsWaits) hold_waits(grown);
      wgmma_wait<0>();
      pin(o);
      release(shared.v_free, ring.slot);
      if (grown) {  // in some warps: no wait in here, since those of a warpgroup must execute the same ones
#pragma unroll
        for (int i = 0; i < kValueSteps * 8; i++) o[i] *= rescale[fragment_row(i)];
      }
      round_probabilities();
      ring = next;
    }

    // The last values of this tile, and the first scores of the next one beside them.
    barrier_wait(barrier_of(shared.v_full, ring.slot), ring.parity);
    wgmma_fence();
    start_values_of(ring.slot, accumulate);
    float factor[2];
    finish(args, *work, warp_row, softmax, factor);
    const u32 last = ring.slot;
    ring.advance();
    bool held = true;
    const auto let_go = [&] {  // the ring cannot move on by as many slots as it has while this group holds the last one
      wgmma_wait<0>();
      release(shared.v_free, last);
      held = false;
    };
    const int behind = keys.begin - uniform(work->keys.begin);
    if (behind > 0) {  // before the wait for more work, which is not drawn until all keys of this tile are on their way
      let_go();
      skip(behind);
    }
    const Work* next_work = wait_work(shared, ++round);
    more = uniform(next_work->row0) >= 0;
    int ahead = 0;
    if (more) {
      keys = keys_of_group(*next_work);
      ahead = uniform(next_work->keys.end) - keys.end;
    }
    if (held && ahead >= kStages) let_go();
    skip(ahead);
    start_first_scores(more);
    wgmma_wait<1>();
    pin(o);
    if (held) release(shared.v_free, last);
    if constexpr (kStaged) {
      send(args, *work, group, o, factor, shared_address(shared.out));
    } else {
      write(args, *work, warp_row, o, factor);
    }
    __syncwarp();
    release(shared.work_free, (round & 1) ^ 1);
    wgmma_wait<0>();
    pin(s);
    work = next_work;
  }
  if (kTurns && group == 0) wait_turn();  // the turn that the last group passed
  bulk_wait<0>();                         // shared memory must outlive the stores
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads, 1)
    sm90_forward(const __grid_constant__ jf::Sm90ForwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * kGroups;
    for (int i = 0; i < kQStages; i++) {
      barrier_init(barrier_of(shared.q_full, i), 1);
      barrier_init(barrier_of(shared.q_free, i), kConsumerWarps);
    }
    for (int i = 0; i < kStages; i++) {
      barrier_init(barrier_of(shared.k_full, i), 1);
      barrier_init(barrier_of(shared.v_full, i), 1);
      barrier_init(barrier_of(shared.k_free, i), kConsumerWarps);
      barrier_init(barrier_of(shared.v_free, i), kConsumerWarps);
    }
    barrier_init(barrier_of(&shared.work_wanted, 0), 1);
    for (int i = 0; i < 2; i++) {
      barrier_init(barrier_of(shared.work_full, i), 1);
      barrier_init(barrier_of(shared.work_free, i), kConsumerWarps + 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warpgroup == 0) {
    registers_release<kProducerRegisters>();
    if (lane_id() == 0) {
      if (warp == 0) produce(args, shared);
      if (warp == 1) schedule(args, shared);
    }
  } else {
    registers_acquire<kConsumerRegisters>();
    consume(args, shared, uniform(warpgroup) - 1);
  }
}

// Attention forward on 8-bit operands for Hopper: TMA, wgmma, warp specialisation. p and v are e4m3, q and k e4m3 or
// int8.
//
//   s = unit * (q' . k'),  unit = scale * q_scale * k_scale        one q_scale and k_scale for kScaleBlock tokens
//   p = 2^(s log2 e + log2 v_scale - m + 4), rounded to e4m3       m an integer, above the maximum up to a factor 2^4
//   out = sum(p v') / sum(p / v_scale),  lse = log sum exp(s)
//
// Grid: one block a multiprocessor; a work item is a (query tile, head, batch entry). The first is the block's own
// index, the next ones come from a counter. Full attention: tiles of a head side by side. Causal: inside sections of
// heads whose keys and values share the L2, tiles with the most keys first; where groups of a tile have no rows, it is
// the first tile, which has the fewest keys and begins below row 0. Key tiles are walked from the last to the first.
//
// Block: one producer warpgroup (one thread issues every load) and kGroups = queries / 64 consumer warpgroups.
// A group lets key tiles pass that none of its rows sees. A consumer computes S(n-1) = Q K(n-1)^T and O += P(n) V(n) in
// one batch of wgmma, waits for both, and turns S(n-1) into P(n-1). What hides its waits are the other groups; at head
// size 256 they take turns, so that the products of one run under the softmax of the other.
//
//   head   tile        groups  registers   stages
//   64     192 x 128   3       32 + 3*160  8
//   128    192 x 96    3       32 + 3*160  4
//   256    128 x 128   2       24 + 2*240  2       (scores with features: 128 x 96 or 128 x 64 with two groups)
//
//   shared memory   Q stages x queries x head | out queries x head (16-bit) | K, V stages x keys x head each
//   Q, K: rows of 128 (64) bytes, swizzled; V: [keys / 16, head, 16], whose 128-byte core matrices wgmma reads
//   unswizzled. Inside 16 keys V is permuted so that accumulator registers of S, converted in place, are the A operand
//   of P V.
//
//   barrier     arrives                     waits
//   q_full      producer + TMA              consumers, before a tile's first product
//   q_free      each group                  producer: all groups have read Q of the slot
//   k_full      producer, its scales + TMA  consumers
//   v_full      producer + TMA              consumers
//   k_free      each group                  producer, with two stages: all groups are done with K of the slot
//   v_free      each group                  producer: ... with V, and with K
//   item_full   producer                    consumers: an item and the scales of its queries are there
//   item_free   each group                  producer: all are done with the item of the slot
//   named 1 + group            the group's own
//   named 1 + kGroups + group  this group, the one before: the group's turn to start products
//
// Softmax: the maximum is computed for the first tile only. Exponentials of the others go ahead with m as it is; if any
// sum of 8 of them reaches 2^8 (e4m3 ends at 448), the warp finds the true maximum, raises m and does the tile again.
// So a tile costs one FMA, one exponential, one addition and half a conversion an element. m is an integer: rescaling
// is exact, and the rounding of p does not depend on the order of tiles.
//
// Numerics: products are exact; wgmma keeps about 14 bits of the sums of e4m3, and all of those of int8; softmax, sums
// and rescaling in fp32.
// Limits: head sizes up to 256, value not wider than the tile's head, no dropout.
#include "pieces/score.cuh"
#include "sm90/fp8_args.h"
#include "sm90/ptx.cuh"

namespace jf {

constexpr int kQueries = kTiles.queries, kKeys = kTiles.keys, kHead = kTiles.head, kStages = kTiles.stages,
              kQStages = kTiles.q_stages;
constexpr int kGroups = kQueries / 64;
constexpr bool kIntegers = kSpec.dtype == DType::kInt8;  // query and key
constexpr int kThreads = 128 * (kGroups + 1);
// Tiles of 64 keys leave registers to the producer.
constexpr int kProducerRegisters = kGroups == 3 ? 32 : (kKeys == 64 ? 40 : 24);
constexpr int kConsumerRegisters = kGroups == 3 ? 160 : (kKeys == 64 ? 232 : 240);
constexpr int kScores = kKeys / 2, kOutputs = kHead / 2;  // accumulator registers of a thread
constexpr int kBlocks = kKeys / kScaleBlock;              // scales of a key tile; 8 scores of a row each, in a thread
constexpr int kRowBytes = kHead < 128 ? kHead : 128;      // of a swizzled row of Q and K
constexpr int kAtoms = kHead / kRowBytes;                 // such rows in a row of Q or K
constexpr int kLag = 4;                                   // steps between the stages of the exponentials' pipeline
constexpr int kTileBytes = kKeys * kHead;
// With two stages K of the next tile must not wait for V of the one before last.
constexpr bool kFreesKeysFirst = kStages == 2;
constexpr bool kTurns = kHead == 256 && kGroups == 2;
// At the diagonal a group of 64 rows often sees no more than 64 keys of its last tile: the others cost no exponentials.
constexpr int kFewKeys = kKeys == 96 ? 64 : kKeys / 2;
constexpr bool kSeesFew = (kSpec.causal || kSpec.window_right) && kKeys > 64;
constexpr int kScaleSlots = kFreesKeysFirst ? 2 * kStages : kStages;  // scales may be read a little longer than K
constexpr float kTop = 4.f;                                           // p is 2^kTop where the score is m
constexpr float kOverflow = 256.f;  // of a sum of 8 values of p: then none exceeds what e4m3 holds
// Least k_scale, and least factor of it: their product times a score, -inf included, is never NaN.
constexpr float kLeastKeyScale = 1.f / (1ull << 58), kLeastFactor = 1.f / (1ull << 63);
constexpr float kNothingSeen = -1e30f;  // offset of a row that has seen no key: any visible score overflows
static_assert(kGroups == 2 || kGroups == 3);
static_assert((kStages & (kStages - 1)) == 0);
static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (kGroups == 2 ? 3 * 168 : 4 * 128),
              "what the launch allots");
static_assert(kHead == 64 || kHead == 128 || kHead == 256);
static_assert(kKeys % kScaleBlock == 0 && kSpec.head_dim == kHead && kSpec.value_dim <= kHead && !kSpec.dropout);

// Of kScaleBlock keys.
struct alignas(16) BlockScale {
  float unit;     // k_scale; with the factors of a row's own, what takes its products to log2 units
  float lift;     // log2 of the value's scale
  float inverse;  // 1 / the value's scale
};

struct Item {
  int row0, head, kv_head, batch;  // head < 0: there is no more work
  Range key_tiles;
  IdBounds q_ids;  // with segment ids
};

struct alignas(1024) Shared {
  unsigned char q[kQStages][kQueries * kHead];
  unsigned char out[kQueries * kHead * 2];
  unsigned char k[kStages][kTileBytes];
  unsigned char v[kStages][kTileBytes];
  BlockScale scales[kScaleSlots][kBlocks];
  u64 q_full[kQStages], q_free[kQStages], item_full[kItems], item_free[kItems];
  u64 k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  Item items[kItems];
  float q_scales[kItems][kQueries / kScaleBlock];  // of an item's queries
  unsigned char nan_rows[2 * kQueries];            // bit r: row r of a consumer thread holds NaN; only of int8
};
static_assert(sizeof(Shared) <= 232448);

// How far a role has come: the key tiles and items it has passed. Each has a slot of its ring, and the parity of the
// pass over it.
struct Progress {
  u32 tiles = 0, items = 0;
  JF_DEVICE u32 slot() const { return tiles % kStages; }
  JF_DEVICE u32 scales() const { return tiles % kScaleSlots; }
  JF_DEVICE u32 pass() const { return tiles / kStages % 2; }
  JF_DEVICE u32 item() const { return items % kItems; }
  JF_DEVICE u32 item_pass() const { return items / kItems % 2; }
  JF_DEVICE u32 q() const { return items % kQStages; }
  JF_DEVICE u32 q_pass() const { return items / kQStages % 2; }
};

JF_DEVICE Item item_of(const Sm90Fp8Args& args, u32 index) {
  const Problem& p = args.problem;
  const u32 tiles = args.q_tiles, pairs = args.pairs, heads = p.q_heads;  // unsigned: divisions are shorter
  if (index >= tiles * pairs) return {0, -1};
  u32 tile, pair;
  if constexpr (kSpec.causal) {
    const u32 section = args.section, first = index / (section * tiles) * section, inside = index - first * tiles;
    const u32 width = min(section, pairs - first);
    pair = first + inside % width;
    tile = tiles - 1 - inside / width;
  } else {
    pair = index / tiles;
    tile = index % tiles;
  }
  Item item;
  item.row0 = args.row0 + static_cast<int>(tile) * kQueries;
  item.head = pair % heads;
  item.batch = pair / heads;
  item.kv_head = kSpec.grouped ? item.head / (p.q_heads / p.kv_heads) : item.head;
  item.key_tiles = tiles_of(band_of(p, args.features, item.batch).keys_of(item.row0, kQueries), kKeys);
  if constexpr (kSpec.segment_ids) {
    const long long at = static_cast<long long>(item.batch) * tiles + tile;
    item.key_tiles = meet(item.key_tiles, args.segments.key_tiles[at]);
    item.q_ids = args.segments.q_bounds[at];
  }
  return item;
}

// Matrix descriptors of wgmma: the low half holds the address in units of 16 bytes and one stride, the high half the
// other stride and the swizzle. Steps along the rows, and slots, add to the low half.
//   Q, K  rows of kRowBytes, swizzled over 8 of them
//   V     core matrices of 8 x 16 bytes, packed along the head, kHead * 16 bytes apart along the keys
constexpr u32 kRowsHigh = 8 * kRowBytes / 16 | (kRowBytes == 128 ? 1u : 2u) << 30, kValuesHigh = 128 / 16;
JF_DEVICE u32 rows_low(u32 address) { return address / 16 | 1u << 16; }
JF_DEVICE u32 values_low(u32 address) { return address / 16 | (kHead * kValueChunk / 16) << 16; }
JF_DEVICE u64 descriptor(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

// What the products of query and key are summed in.
template <bool kOfIntegers>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<true> {
  using Type = int;
};
using Sum = SumOf<kIntegers>::Type;

// The sums in floating point: themselves, or copied to `floats`.
using Scores = float[kScores];
JF_DEVICE Scores& as_floats(float (&sums)[kScores], Scores&) { return sums; }
JF_DEVICE Scores& as_floats(const int (&sums)[kScores], Scores& floats) {
#pragma unroll
  for (int i = 0; i < kScores; i++) floats[i] = static_cast<float>(sums[i]);
  return floats;
}

// S = Q K^T of 64 queries. q, k: low halves of descriptors.
JF_DEVICE void scores(Sum (&s)[kScores], u32 q, u32 k) {
  q = afresh(q);
#pragma unroll
  for (int step = 0; step < kHead / 32; step++) {
    const u32 atom = step * 32 / kRowBytes, column = step * 32 % kRowBytes;
    wgmma<kSpec.dtype>(s, descriptor(q + (atom * kQueries * kRowBytes + column) / 16, kRowsHigh),
                       descriptor(k + (atom * kKeys * kRowBytes + column) / 16, kRowsHigh), step != 0);
  }
}

// O += P V, O = P V if `first`.
JF_DEVICE void accumulate(float (&o)[kOutputs], const u32 (&p)[kScores / 4], u32 v, bool first) {
#pragma unroll
  for (int step = 0; step < kKeys / 32; step++) {
    wgmma<DType::kE4M3>(o, p + 4 * step, descriptor(v + step * 32 * kHead / 16, kValuesHigh), !first || step != 0);
  }
}

// -inf over scores that a row does not see, of columns kBegin to kEnd of the tile from `key0` on, unless its group's
// rows see all of them.
template <int kBegin, int kEnd>
JF_DEVICE void hide_unseen(float (&s)[kScores], int group_row, int warp_row, int key0, const CallBand& band) {
  if (band.interior(group_row, 64, key0 + kBegin, kEnd - kBegin)) return;
  hide_outside_band(reinterpret_cast<float (&)[(kEnd - kBegin) / 2]>(s[kBegin / 2]),
                    warp_fragment<false>(warp_row, key0 + kBegin), band);
}

// The scale, but of a size of at least `least`. The sign is a mark, with kNaNByte.
JF_DEVICE float bounded(float scale, float least) {
  if constexpr (kIntegers) return copysignf(fmaxf(fabsf(scale), least), scale);
  return fmaxf(scale, least);
}

// Place of a head's first scale. (Their tokens fit the GPU's memory, so that an int holds it.)
JF_DEVICE int first_scale(int b, int heads, int head, int blocks) { return (b * heads + head) * blocks; }

struct Fp8Softmax {
  float offset[2];  // m - kTop of the thread's two rows
  float sum[2];     // of p / v_scale over this thread's columns

  JF_DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < 2; r++) offset[r] = kNothingSeen, sum[r] = 0.f;
  }

  // Scores of the first kSeen columns become p. Returns whether m was raised: then O must be multiplied by `rescale`.
  // `first` (a constant): there is no m yet, and no exponential goes ahead.
  template <int kSeen = kKeys>
  JF_DEVICE bool step(const float (&s)[kScores], const BlockScale (&scales)[kBlocks], u32 (&p)[kScores / 4],
                      float (&rescale)[2], bool first) {
    float tile_sum[2];
    bool raised = first;
    if (first) raise<kSeen>(s, scales, rescale);
    while (true) {
      const float largest = exponentials<kSeen>(s, scales, p, tile_sum);
      if (raised || !__any_sync(~0u, largest >= kOverflow)) break;
      raise<kSeen>(s, scales, rescale);
      raised = true;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) sum[r] += tile_sum[r];
#pragma unroll
    for (int i = kSeen / 8; i < kScores / 4; i++) p[i] = 0;
    return raised;
  }

 private:
  // Value n in the order of p's bytes: of row n / 4 % 2, from register `score_of(n)` of the scores, of block n / 16.
  static constexpr JF_HOST_DEVICE int row_of(int n) { return n / 4 % 2; }
  static constexpr JF_HOST_DEVICE int score_of(int n) {
    return n / 16 * 16 + n / 8 % 2 * 8 + n / 4 % 2 * 2 + n % 2 + n / 2 % 2 * 4;
  }

  // p, the sums of p / v_scale, and (as the result) the largest sum of 8 values of p. In a software pipeline over
  // chunks of 8: exponents of one, exponentials of the one before, sums and conversions of the one before that.
  template <int kSeen>
  JF_DEVICE float exponentials(const float (&s)[kScores], const BlockScale (&scales)[kBlocks], u32 (&p)[kScores / 4],
                               float (&sums)[2]) const {
    constexpr int kCount = kSeen / 2;
    float x[kCount], part[2], largest = 0.f;
    sums[0] = sums[1] = 0.f;
#pragma unroll
    for (int i = 0; i < kCount + 2 * kLag; i++) {
      if (const int n = i; n < kCount) {
        x[n] = fma_ordered(s[score_of(n)], scales[n / 16].unit, scales[n / 16].lift - offset[row_of(n)]);
      }
      if (const int n = i - kLag; n >= 0 && n < kCount) x[n] = exp2_ordered(x[n]);
      if (const int n = i - 2 * kLag; n >= 0) {
        float& sum = part[row_of(n)];
        sum = n % 16 == 0 || n % 16 == 4 ? x[n] : add_ordered(sum, x[n]);
        if (n % 4 == 3) p[n / 4] = pack_e4m3_ordered(&x[n - 3]);
        if (n % 16 == 11 || n % 16 == 15) {  // 8 of the row
          sums[row_of(n)] = fmaf(sum, scales[n / 16].inverse, sums[row_of(n)]);
          largest = fmaxf(largest, sum);
        }
      }
    }
    return largest;
  }

  template <int kSeen>
  JF_DEVICE void raise(const float (&s)[kScores], const BlockScale (&scales)[kBlocks], float (&rescale)[2]) {
    float highest[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int b = 0; b < kSeen / kScaleBlock; b++) {
      float of_block[2] = {-infinity(), -infinity()};
#pragma unroll
      for (int i = 0; i < 16; i++) of_block[fragment_row(i)] = fmaxf(of_block[fragment_row(i)], s[16 * b + i]);
#pragma unroll
      for (int r = 0; r < 2; r++) highest[r] = fmaxf(highest[r], fmaf(of_block[r], scales[b].unit, scales[b].lift));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float raised = fmaxf(offset[r], ceilf(row_maximum(highest[r])) - kTop);
      rescale[r] = exp2_fast(offset[r] - raised);
      offset[r] = raised;
      sum[r] *= rescale[r];
    }
  }
};

// Scale of the item's queries in block number `lane`.
JF_DEVICE float q_scale_of(const Sm90Fp8Args& args, const Item& item) {
  const Problem& p = args.problem;
  const int blocks = ceil_div(p.q_len, kScaleBlock);
  return __ldg(args.q_scale + first_scale(p.q_batch(item.batch), p.q_heads, item.head, blocks) +
               min(max(item.row0 / kScaleBlock + lane_id(), 0), blocks - 1));
}

// Puts an item into a slot; a warp does it, and a barrier must follow.
JF_DEVICE void publish(Shared& shared, u32 slot, const Item& item, float q_scale) {
  if (lane_id() == 0) shared.items[slot] = item;
  if (lane_id() < kQueries / kScaleBlock) shared.q_scales[slot][lane_id()] = q_scale;
}

// For the producer's warp: no lane still waits for a phase when the leader lets the next one come.
JF_DEVICE void wait_together(u32 barrier, u32 parity) {
  barrier_wait(barrier, parity);
  __syncwarp();
}

// Loads of every item this block takes, and the taking of items: one warp. What it reads itself is asked for ahead: the
// scales of a key tile with the tile before it.
JF_DEVICE void produce(const Sm90Fp8Args& args, Shared& shared) {
  const Problem& p = args.problem;
  const bool leads = threadIdx.x == 0;
  const int blocks = ceil_div(p.kv_len, kScaleBlock);
  Progress at;
  for (u32 index = blockIdx.x;; index = gridDim.x + uniform(leads ? atomicAdd(args.counter, 1) : 0)) {
    const Item item = item_of(args, index);
    const bool valid = item.head >= 0;
    const float q_scale = valid ? q_scale_of(args, item) : 0.f;
    const int k_entry = p.k_batch(item.batch), v_entry = p.v_batch(item.batch);
    const auto scales_of_tile = [&](int n) {
      const int block = min(max(n, 0) * kBlocks + lane_id(), blocks - 1);
      return float2{__ldg(args.k_scale + first_scale(k_entry, p.kv_heads, item.kv_head, blocks) + block),
                    __ldg(args.v_scale + first_scale(v_entry, p.kv_heads, item.kv_head, blocks) + block)};
    };
    float2 scales{};
    if (valid) {
      scales = scales_of_tile(item.key_tiles.end - 1);
      const u32 q_full = shared_address(&shared.q_full[at.q()]);
      wait_together(shared_address(&shared.q_free[at.q()]), at.q_pass() ^ 1);
      if (leads) {
        barrier_arrive_expect(q_full, kQueries * kHead);
#pragma unroll
        for (int atom = 0; atom < kAtoms; atom++) {
          tma_load(shared_address(shared.q[at.q()]) + atom * kQueries * kRowBytes, args.q, q_full, atom * kRowBytes,
                   item.head, item.row0, p.q_batch(item.batch));
        }
      }
    }
    publish(shared, at.item(), item, q_scale);
    __syncwarp();
    if (leads) barrier_arrive(shared_address(&shared.item_full[at.item()]));
    if (!valid) return;
#pragma unroll 1
    for (int n = item.key_tiles.end - 1; n >= item.key_tiles.begin; n--, at.tiles++) {
      const u32 k_full = shared_address(&shared.k_full[at.slot()]), v_full = shared_address(&shared.v_full[at.slot()]);
      wait_together(shared_address(&(kFreesKeysFirst ? shared.k_free : shared.v_free)[at.slot()]), at.pass() ^ 1);
      if (leads) {
        barrier_arrive_expect(k_full, kTileBytes);
#pragma unroll
        for (int atom = 0; atom < kAtoms; atom++) {
          tma_load(shared_address(shared.k[at.slot()]) + atom * kKeys * kRowBytes, args.k, k_full, atom * kRowBytes,
                   item.kv_head, n * kKeys, k_entry);
        }
      }
      if (lane_id() < kBlocks) {
        shared.scales[at.scales()][lane_id()] = {bounded(scales.x, kLeastKeyScale), log2_fast(scales.y),
                                                 reciprocal(scales.y)};
      }
      scales = scales_of_tile(n - 1);
      __syncwarp();  // before the leader's arrival, which hands the scales over
      if (leads) {
        barrier_arrive(k_full);
        barrier_wait(shared_address(&shared.v_free[at.slot()]), at.pass() ^ 1);
        barrier_arrive_expect(v_full, kTileBytes);
        tma_load(shared_address(shared.v[at.slot()]), args.v, v_full, 0, 0, n * (kKeys / kValueChunk),
                 v_entry * p.kv_heads + item.kv_head);
      }
      __syncwarp();
    }
    at.items++;  // and no item is taken before there is a slot for it: taken early, it may be one too many
    wait_together(shared_address(&shared.item_free[at.item()]), at.item_pass() ^ 1);
  }
}

// One consumer warpgroup.
struct Consumer {
  const Sm90Fp8Args& args;
  Shared& shared;
  const int turn = kTurns ? uniform(group()) : 0;  // the group's place in their order
  Progress progress;
  Fp8Softmax softmax = {};

  // Recomputed where they are used: see afresh.
  static JF_DEVICE int thread() { return afresh(threadIdx.x) % 128; }
  static JF_DEVICE int group() { return afresh(threadIdx.x) / 128 - 1; }
  static JF_DEVICE int row_in_tile() { return afresh(threadIdx.x) / 32 * 16 - 64; }  // first row of this warp

  JF_DEVICE void wait_k() const { barrier_wait(shared_address(&shared.k_full[progress.slot()]), progress.pass()); }
  JF_DEVICE void wait_v(Progress at) const { barrier_wait(shared_address(&shared.v_full[at.slot()]), at.pass()); }
  JF_DEVICE void arrive(u64& barrier) const {
    if (thread() == 0) barrier_arrive(shared_address(&barrier));
  }
  JF_DEVICE void free_k() const {
    if constexpr (kFreesKeysFirst) arrive(shared.k_free[progress.slot()]);
  }

  // One turn of each group for every key tile of an item, passed on before anything that waits for the other group.
  JF_DEVICE void wait_turn() const {
    if constexpr (kTurns) named_sync(1 + kGroups + turn, 256);
  }
  JF_DEVICE void pass_turn() const {
    if constexpr (kTurns) named_arrive(1 + kGroups + (turn + 1) % kGroups, 256);
  }

  JF_DEVICE const Item& item() const { return shared.items[progress.item()]; }

  // The scores of keys that hold NaN become NaN, and the marks are taken off the scales.
  JF_DEVICE void restore_nan_keys(float (&s)[kScores], BlockScale (&scales)[kBlocks]) const {
    bool any = false;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) any |= scales[b].unit < 0.f;
    if (__any_sync(~0u, any)) {
      const unsigned char* first = shared.k[progress.slot()] + lane_id() % 4 * 2 * kRowBytes;
#pragma unroll
      for (int i = 0; i < kScores; i++) {
        if (scales[i / 16].unit < 0.f && first[fragment_column(i) * kRowBytes] == kNaNByte) s[i] = not_a_number();
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; b++) scales[b].unit = fabsf(scales[b].unit);
  }

  // Queries that hold NaN are kept for `finish`: in registers they would be in the way of everything between.
  JF_DEVICE unsigned char& nan_rows() const { return shared.nan_rows[afresh(threadIdx.x) - 128]; }
  JF_DEVICE void find_nan_rows(bool marked) const {
    nan_rows() = 0;
    if (!marked) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row_in_tile() + lane_id() / 4 + 8 * r;
      if (shared.q[progress.q()][row * kRowBytes] == kNaNByte) nan_rows() |= 1 << r;
    }
  }

  // Lets key tiles pass that no row of this group sees.
  JF_DEVICE void skip(int count) {
#pragma unroll 1
    for (; count > 0; count--, progress.tiles++) {
      wait_k();
      wait_turn();
      pass_turn();
      wait_v(progress);
      named_sync(1 + group(), 128);  // no warp still waits for these phases when the next ones may end
      free_k();
      arrive(shared.v_free[progress.slot()]);
    }
  }

  JF_DEVICE void compute() {
    const Problem& problem = args.problem;
    const Item& item = this->item();
    const CallBand band = band_of(problem, args.features, item.batch);
    const int group_row = item.row0 + group() * 64, warp_row = item.row0 + row_in_tile();
    const u32 q = rows_low(shared_address(shared.q[progress.q()]) + group() * 64 * kRowBytes),
              k = rows_low(shared_address(shared.k)), v = values_low(shared_address(shared.v));
    const Range seen = uniform(group_row < 0 ? Range{0, 0} : band.keys_of(group_row, 64)),
                tiles = meet(item.key_tiles, tiles_of(seen, kKeys));
    const int ahead = tiles.size() == 0 ? item.key_tiles.size() : item.key_tiles.end - tiles.end;
    CallBand keys_band = band;
    keys_band.q_end = kFar;  // rows past the end are dropped by the store: a partial tile masks no more than a full one
    const Score score = score_of(problem, args.features, item.batch, item.head);
    const float q_scale = shared.q_scales[progress.item()][row_in_tile() / kScaleBlock];
    const float factor =
        fmaxf((kIntegers ? fabsf(q_scale) : q_scale) * (kPlainScores ? score.scale_log2 : 1.f), kLeastFactor);

    Sum sums[kScores];
    float o[kOutputs], rescale[2];
    u32 p[kScores / 4];
    BlockScale scales[kBlocks];
    softmax.reset();

    const auto interior = [&](int n) {
      if (!keys_band.interior(group_row, 64, n * kKeys, kKeys)) return false;
      if constexpr (!kSpec.segment_ids) return true;
      return item.q_ids.same_single_id(
          args.segments.kv_bounds[static_cast<long long>(item.batch) * ceil_div(problem.kv_len, kKeys) + n]);
    };
    const auto load_scales = [&] {
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        scales[b] = shared.scales[progress.scales()][b];
        scales[b].unit *= factor;
      }
    };
    // Products of tile n -> P(n); whether O must be rescaled.
    const auto probabilities = [&](int n, bool first) {
      Scores floats;
      Scores& s = as_floats(sums, floats);
      if constexpr (kIntegers) {
        restore_nan_keys(s, scales);
        if constexpr (kFreesKeysFirst) named_sync(1 + group(), 128);  // every warp has read its keys
      }
      free_k();
      const Fragment<false> at = warp_fragment<false>(warp_row, n * kKeys);
      const bool few = kSeesFew && first && seen.end <= n * kKeys + kFewKeys;
      if constexpr (!kPlainScores) {
#pragma unroll
        for (int i = 0; i < kScores; i++) s[i] *= scales[i / 16].unit;
        transform_scores(s, at, score);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) scales[b].unit = 1.f;
      }
      if constexpr (kSpec.mask) hide_masked(s, at, problem, args.features, item.batch, item.head);
      if (!interior(n)) {
        if (kSeesFew && first) {
          hide_unseen<0, kFewKeys>(s, group_row, warp_row, n * kKeys, keys_band);
          if (!few) hide_unseen<kFewKeys, kKeys>(s, group_row, warp_row, n * kKeys, keys_band);
        } else {
          hide_outside_band(s, at, keys_band);
        }
        if constexpr (kSpec.segment_ids) {
          hide_other_segments(s, at, segments_of(problem, args.features, band, item.batch));
        }
      }
      return few ? softmax.step<kFewKeys>(s, scales, p, rescale, first) : softmax.step(s, scales, p, rescale, first);
    };

    barrier_wait(shared_address(&shared.q_full[progress.q()]), progress.q_pass());
    if constexpr (kIntegers) find_nan_rows(q_scale < 0.f);
    skip(uniform(ahead));
    progress.tiles = uniform(progress.tiles);  // as before the branch: addresses of slots stay in uniform registers
    if (tiles.size() == 0) {
      named_sync(1 + group(), 128);  // as in run: without products nothing else keeps the warps together
      arrive(shared.q_free[progress.q()]);
    } else {
      wait_k();
      wait_turn();
      wgmma_fence();
      scores(sums, q, k + progress.slot() * (kTileBytes / 16));
      wgmma_commit();
      pass_turn();
      load_scales();
      wgmma_wait<0>();
      pin(sums);
      if (tiles.size() == 1) arrive(shared.q_free[progress.q()]);
      probabilities(tiles.end - 1, true);

      for (int n = tiles.end - 2; n >= tiles.begin; n--) {
        const Progress values = progress;
        progress.tiles++;
        wait_k();
        wait_turn();
        pin(p);
        wgmma_fence();
        scores(sums, q, k + progress.slot() * (kTileBytes / 16));
        wgmma_commit();
        wait_v(values);
        accumulate(o, p, v + values.slot() * (kTileBytes / 16), n == tiles.end - 2);
        wgmma_commit();
        pass_turn();
        load_scales();
        wgmma_wait<0>();
        pin(sums);
        pin(o);
        pin(p);
        arrive(shared.v_free[values.slot()]);
        if (n == tiles.begin) arrive(shared.q_free[progress.q()]);  // the next item's Q may come while this one ends
        if (probabilities(n, false)) {
#pragma unroll
          for (int i = 0; i < kOutputs; i++) o[i] *= rescale[fragment_row(i)];
        }
      }
      wait_v(progress);
      wgmma_fence();
      accumulate(o, p, v + progress.slot() * (kTileBytes / 16), tiles.size() == 1);
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
      arrive(shared.v_free[progress.slot()]);
      progress.tiles++;
      if constexpr (kSpec.window_left) skip(uniform(tiles.begin - this->item().key_tiles.begin));
    }
    finish(o);
  }

  // Normalises, and writes out and lse of this group's rows: zeros and -inf for rows that saw no key or are past their
  // length.
  JF_DEVICE void finish(float (&o)[kOutputs]) const {
    const Problem& problem = args.problem;
    const Item& item = this->item();
    const int q_end = band_of(problem, args.features, item.batch).q_end;
    const int row0 = item.row0 + row_in_tile() + lane_id() / 4;
    float* lse = args.lse + (static_cast<long long>(item.batch) * problem.q_heads + item.head) * problem.q_len + row0;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row0 + 8 * r;
      float total = row_sum(softmax.sum[r]);
      const bool empty = total == 0.f || row >= q_end;
      if (kIntegers && nan_rows() >> r & 1) total = not_a_number();
      if constexpr (kSpec.sinks) total += exp2_fast(args.features.sinks[item.head] * kLog2E - softmax.offset[r]);
      factor[r] = empty ? 0.f : reciprocal(total);
      if (lane_id() % 4 == 0 && static_cast<u32>(row) < static_cast<u32>(problem.q_len)) {
        lse[8 * r] = empty ? -infinity() : (softmax.offset[r] + log2_fast(total)) * kLn2;
      }
    }
    const auto packed = [&](int i) {  // zeros where the row is empty, whatever O holds
      const float scale = factor[fragment_row(i)];
      return scale == 0.f ? 0u : pack<kTiles.out>(o[i] * scale, o[i + 1] * scale);
    };
    if (thread() == 0) bulk_wait_read<0>();  // the store of the item before must have read its rows
    named_sync(1 + group(), 128);
    const u32 row = row_in_tile() + lane_id() % 16;
#pragma unroll
    for (int i = 0; i < kOutputs / 8; i++) {  // 16 columns
      const u32 out = shared_address(shared.out) + i / 4 * kQueries * 128, chunk = i % 4 * 2 + lane_id() / 16;
      store_matrix(out + swizzled_offset(row, chunk), packed(8 * i), packed(8 * i + 2), packed(8 * i + 4),
                   packed(8 * i + 6));
    }
    async_fence();
    named_sync(1 + group(), 128);
    // A group below row 0 stores nothing: TMA stops the kernel at a box that lies wholly before the tensor.
    if (thread() == 0 && item.row0 + group() * 64 >= 0) {
#pragma unroll
      for (int c = 0; c < kSpec.value_dim; c += 64) {
        tma_store(args.out, shared_address(shared.out) + c / 64 * kQueries * 128 + group() * 64 * 128, c, item.head,
                  item.row0 + group() * 64, item.batch);
      }
      bulk_commit();
    }
  }

  JF_DEVICE void run() {
    if (kTurns && turn == kGroups - 1) pass_turn();  // to the first
    while (true) {
      barrier_wait(shared_address(&shared.item_full[progress.item()]), progress.item_pass());
      if (item().head < 0) break;
      compute();
      arrive(shared.item_free[progress.item()]);  // by the thread that read it last
      progress.items++;
    }
    if (kTurns && turn == 0) wait_turn();  // what the last group passed
    if (thread() == 0) bulk_wait<0>();
  }
};

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads, 1)
    sm90_forward_fp8(const __grid_constant__ jf::Sm90Fp8Args args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQStages; i++) {
      barrier_init(shared_address(&shared.q_full[i]), 1);
      barrier_init(shared_address(&shared.q_free[i]), kGroups);
    }
    for (int i = 0; i < kItems; i++) {
      barrier_init(shared_address(&shared.item_full[i]), 1);
      barrier_init(shared_address(&shared.item_free[i]), kGroups);
    }
    for (int i = 0; i < kStages; i++) {
      barrier_init(shared_address(&shared.k_full[i]), 2);
      barrier_init(shared_address(&shared.v_full[i]), 1);
      barrier_init(shared_address(&shared.k_free[i]), kGroups);
      barrier_init(shared_address(&shared.v_free[i]), kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_release<kProducerRegisters>();
    if (threadIdx.x < 32) produce(args, shared);
  } else {
    registers_acquire<kConsumerRegisters>();
    Consumer{args, shared}.run();
  }
}

// Attention backward on Hopper for head sizes up to 128. Of each visible pair, with x = q . k and the logit l(scale x):
//
//   p = exp(l - lse), dp = dout . v, dl = p (dp - delta), delta = sum(dout * out) - dlse
//   dv = sum_q p dout, dk = scale sum_q l' dl q, dq = scale sum_k l' dl k
//
// Grid: a block takes 128 keys of a key head and walks the query tiles that see any of them, head by head of the group;
// dk and dv stay in registers. Blocks come in sections of (batch entry, key head) pairs, the first keys of all pairs of
// a section first. dq leaves as fp32 additions to global memory, in the order of the registers (support/dq.cuh puts it
// right); the sums were cleared by support/delta.cuh. With first_keys_store they were not: a pair's first key tile
// stores, comes early, and the others begin when it is done (FirstKeys). Where all key tiles take the same time, those
// of the last round may be cut into pieces by queries: the last piece to end adds up dk and dv of all. With own_dq a
// block walks all keys of a pair, one key tile after the other: the first stores, the last adds, converts and writes
// dq, and nothing needs clearing or converting. With two stages of K and V a block stays and draws its next key tile
// from a counter. A deterministic kernel draws every tile from it, and the tiles add to a query tile's dq in the order
// in which they were drawn.
//
// Roles: warpgroup 0 loads (one thread, TMA; if deterministic, one more waits for turns, one passes them on);
// warpgroups 1 and 2 have 64 keys each and compute, for every query tile,
//   S^T = K Q^T and dP^T = V dO^T     operands in shared memory, but for a part of K and V (HeldRows)
//   dV += P^T dO and dK += dS^T Q     P^T and dS^T from registers: an accumulator is an A operand
//   dQ = dS K                         dS^T of both warpgroups from shared memory; half of dQ each
//
// Tiles (queries x keys): 128 x 128 at head size 64, else 64 x 128 (at head size 64, too, where the scores need more
// registers than the plain ones). Rings: two stages of Q + lse_log2 and of dO + delta, two buffers of dS^T, one or two
// of K and V, in that order of struct Shared: 160 KiB at head size 128 with one stage of K and V, 224 KiB with two.
//
// mbarriers       arrives                              waits
//   kv_full       producer + bytes; first_keys_store:  consumers, once a key tile
//                 once more when dq may be added to
//   kv_free       one thread a warpgroup, when dK and  producer, before the key tile that takes the slot
//                 dV, which leave from K's and V's
//                 place, have been read
//   q_full        producer + bytes                     consumers, before S^T
//   q_free        one thread a warpgroup, after dK     producer
//   dout_full     producer + bytes                     consumers, before dP^T
//   dout_free     one thread a warpgroup, after dV     producer
// deterministic, for every other step:
//   turn_came     the thread that awaits the flag      consumers, before they add dQ
//   turn_used     consumers, after they added dQ       the thread that passes the flag on
//   turn_passed   the thread that passes the flag on   the one that awaits it, two steps on
// and both of these threads arrive at kv_free, having read what the slot's work is.
// Named barriers: kAllConsumers between writing dS^T and reading the other's; kWarpgroup + g before a store by TMA.
//
// Registers: 168 a thread at launch; 24 for the producer, 240 for the consumers, or 40 and 232 (kServesMore). Of those
// dk, dv take 64 + 64, S^T, dP^T 32 + 32 or 64 + 64, P^T and dS^T as operands 16 + 16 or 32 + 32 once the former are
// spent; dq takes the place of S^T.
//
// Numerics: fp32 throughout but for P and dS, rounded to the operands' type. Rows that see nothing come with lse_log2 =
// +inf and give p = 0. What lies past a length may be NaN: it is cleared in shared memory. Limits: float16 and
// bfloat16, head sizes multiples of 8 up to 128.
#include "sm90/backward_common.cuh"

namespace jf {

constexpr int kScores = kQueries / 2;  // accumulator registers of a thread: S^T and dP^T, 64 keys x queries
constexpr int kStages = kQStages;

// Steps, of 16 elements, of K's and V's rows that stay in registers: as many as fit; whose, by measurement.
constexpr bool kCrowded = kSpec.bias() || kSpec.mask || kSpec.softcap || kSpec.dropout ||
                          (kTurns && (!kMasks || kSpec.alibi || kSpec.q_lengths || kSpec.kv_lengths));
struct HeldSteps {
  int keys, values;
};
constexpr JF_HOST_DEVICE HeldSteps held_steps() {
  const int size = larger(kHead, kValue);
  if (size <= 64) return kMasks || kPersistent || kCrowded ? HeldSteps{3, 0} : HeldSteps{3, 2};
  if (size <= 96) return kPersistent || kCrowded ? HeldSteps{6, 0} : HeldSteps{6, 3};
  if (kCrowded) return {0, 0};
  if (kPersistent || kSpec.grouped) return {2, 0};
  return kMasks ? HeldSteps{0, 3} : HeldSteps{3, 1};
}

// Whether half of a step's exponentials are kept ahead of the wait for dP^T (hold_waits), behind which ptxas puts
// nearly all. By measurement.
constexpr bool kHoldsWaits = !(kCrowded || kPersistent || kSpec.alibi || kSpec.segment_ids) &&
                             (kMasks ? kHead <= 64 : kHead > 96 && kFirstKeysStore);

// Whether dQ comes ahead of dV, so that its additions leave while dV and dK are computed; else dV starts before the
// warpgroups meet. By measurement.
constexpr bool kDqFirst =
    kHead > 96 ? !(kSpec.mask || kSpec.window_left) : kHead <= 64 && kPersistent && !(kOwnDq || kTurns);

constexpr int kSoftwareExp2 = kHead <= 64 ? 0 : 2;  // of every 16 exponentials; by measurement
static_assert(kKeys == 128 && kQStages == kDoutStages && kHead <= 128 && kValue <= 128);

// A warpgroup's share of dQ = dS K is 64 queries x 64 elements: half of the queries, of the elements, or (if there are
// just so many of both) of the keys.
constexpr bool kSplitQueries = kQueries == 128, kSplitElements = kHead > 64,
               kSplitKeys = !kSplitQueries && !kSplitElements;
constexpr int kDqKeys = kSplitKeys ? 64 : kKeys;
static_assert((kQueries == 64 || kQueries == 128) && !(kSplitQueries && kSplitElements) &&
              !((kOwnDq || kFirstKeysStore) && kSplitKeys));

// A group none of whose keys the queries see has no part in the step but dQ of the other's keys.
constexpr bool kSkips = kQueries == 64 && !kSplitKeys && kMasks;

struct Shared : Rings {
  alignas(1024) unsigned char ds[2][kQueries / 64][kKeys * 128];  // dS^T: rows are keys
};
static_assert(sizeof(Shared) == Sm90BackwardSharedBytes(kSpec, kTiles));

// 64 rows of K or V as the A operand of S^T or dP^T. The first kSteps steps, of 16 elements, stay in registers: the
// products read that much less of shared memory, whose bandwidth bounds the loop.
template <int kSteps>
struct HeldRows {
  u32 held[kSteps == 0 ? 1 : 4 * kSteps];
  u64 descriptor;

  JF_DEVICE HeldRows(u32 tile, int row0) : descriptor(descriptor_k_major(tile + row0 * 128)) {
    const u32 row = row0 + threadIdx.x / 32 % 4 * 16 + lane_id() % 16;
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      load_matrix(held + 4 * i, tile + i / 4 * kKeys * 128 + swizzled_offset(row, i % 4 * 2 + lane_id() / 16));
    }
  }
  // Starts x = rows * queries^T.
  template <int kProductSteps>
  JF_DEVICE void multiply(float (&x)[kScores], u64 queries) const {
#pragma unroll
    for (int i = 0; i < kProductSteps; i++) {
      const u64 step = descriptor_after(queries, i / 4 * kQueries * 128 + i % 4 * 32);
      if (i < kSteps) {
        wgmma<kSpec.dtype, false>(x, held + 4 * i, step, i != 0);
      } else {
        wgmma<kSpec.dtype>(x, descriptor_after(descriptor, i / 4 * kKeys * 128 + i % 4 * 32), step, i != 0);
      }
    }
    wgmma_commit();
  }
};

// A 64 x N accumulator to rows [row0, row0 + 64) of a tile in shared memory.
template <int N>
JF_DEVICE void store_accumulator(u32 tile, int atom_bytes, int row0, const float (&x)[N], float scale) {
  const u32 row = row0 + lane_id() % 16;
#pragma unroll
  for (int i = 0; i < N; i += 8) {
    const u32 chunk = i / 4 % 8 + lane_id() / 16;
    store_matrix(
        tile + i / 32 * atom_bytes + swizzled_offset(row, chunk), pack<kSpec.dtype>(x[i] * scale, x[i + 1] * scale),
        pack<kSpec.dtype>(x[i + 2] * scale, x[i + 3] * scale), pack<kSpec.dtype>(x[i + 4] * scale, x[i + 5] * scale),
        pack<kSpec.dtype>(x[i + 6] * scale, x[i + 7] * scale));
  }
}

JF_DEVICE void store_dq(const Sm90BackwardArgs& args, const float (&dq)[32], const KeyTile& tile, int head, int row,
                        int column) {
  const Problem& p = args.problem;
  u32* out = static_cast<u32*>(args.dq);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + 8 * half >= p.q_len) break;
    const long long base =
        ((static_cast<long long>(tile.batch) * p.q_len + row + 8 * half) * p.q_heads + head) * kSpec.head_dim;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + 8 * i >= kSpec.head_dim) break;
      out[(base + column + 8 * i) / 2] =
          pack<kSpec.dtype>(dq[4 * i + 2 * half] * p.scale, dq[4 * i + 2 * half + 1] * p.scale);
    }
  }
}

JF_DEVICE void consume(const Sm90BackwardArgs& args, Shared& shared) {
  const Problem& p = args.problem;
  const int g = uniform(threadIdx.x / 128) - 1, thread = threadIdx.x % 128, warp = thread / 32;
  const int dq_query0 = kSplitQueries ? 64 * g : 0, dq_element0 = kSplitElements ? 64 * g : 0,
            dq_key0 = kSplitKeys ? 64 * g : 0;
  const int dq_block0 = kSplitKeys ? 0 : 8 * g;
  float dk[kHead / 2], dv[kValue / 2], s[kScores], dp[kScores], dq[32];
  u32 p16[kScores / 2], ds16[kScores / 2];  // P^T and dS^T as A operands
  Ring<kKvStages> kv;
  Ring<kStages> ring;
  u32 step = 0;

  do {
    barrier_wait(barrier_of(shared.kv_full, kv.slot), kv.parity);
    const int work = work_in(shared, kv.slot);
    if (work < 0) return;
    const KeyTile tile = key_tile_of(args, work);
    const int key0 = tile.index * kKeys;
    const u32 k_tile = shared_address(shared.k[kv.slot]), v_tile = shared_address(shared.v[kv.slot]);
    const u64 k_columns = descriptor_mn_major(k_tile + dq_element0 / 64 * kKeys * 128 + dq_key0 * 128, 0);
#pragma unroll
    for (int i = 0; i < kHead / 2; i++) dk[i] = 0.f;
#pragma unroll
    for (int i = 0; i < kValue / 2; i++) dv[i] = 0.f;
    if constexpr (kSpec.kv_lengths) {
      if (key0 + kKeys > tile.band.kv_end) {
        clear_rows<kKeys, kHeadAtoms>(shared.k[kv.slot], tile.band.kv_end - key0);
        clear_rows<kKeys, kValueAtoms>(shared.v[kv.slot], tile.band.kv_end - key0);
        async_fence();
        named_sync(kAllConsumers, 256);
      }
    }

    const HeldRows<held_steps().keys> k_rows(k_tile, g * 64);
    const HeldRows<held_steps().values> v_rows(v_tile, g * 64);
    // Query tiles that see any of the group's 64 keys, and those that see all of them.
    const int own_key0 = key0 + g * 64;
    const Range seen = tiles_of(tile.band.queries_of(own_key0, 64), kQueries),
                inside = tile.band.interior_query_tiles(own_key0, 64, kQueries);
    for_each_step(args, tile, [&](int head, int m, bool) {
      const int query0 = m * kQueries;
      const u32 q_tile = shared_address(shared.q[ring.slot]), dout_tile = shared_address(shared.dout[ring.slot]);
      // Where this lane writes dS^T: from 16 queries to the next, the swizzled address changes by an exclusive or.
      const u32 ds_tile = shared_address(shared.ds[step & 1]);
      const u32 ds_place = ds_tile + swizzled_offset(g * 64 + warp * 16 + lane_id() % 16, lane_id() / 16);
      const u64 q_rows = descriptor_k_major(q_tile), dout_rows = descriptor_k_major(dout_tile);
      const u64 q_columns = descriptor_mn_major(q_tile, kQueries * 128);
      const u64 dout_columns = descriptor_mn_major(dout_tile, kQueries * 128);
      const u64 ds_columns = descriptor_mn_major(ds_tile + dq_query0 / 64 * kKeys * 128 + dq_key0 * 128, 0);
      barrier_wait(barrier_of(shared.q_full, ring.slot), ring.parity);
      if constexpr (kSpec.q_lengths) {
        if (query0 + kQueries > tile.band.q_end) {
          barrier_wait(barrier_of(shared.dout_full, ring.slot), ring.parity);
          clear_rows<kQueries, kHeadAtoms>(shared.q[ring.slot], tile.band.q_end - query0);
          clear_rows<kQueries, kValueAtoms>(shared.dout[ring.slot], tile.band.q_end - query0);
          async_fence();
          named_sync(kAllConsumers, 256);
        }
      }
      const auto start_dq = [&] {
#pragma unroll
        for (int i = 0; i < kDqKeys / 16; i++) {  // dQ = dS K
          wgmma<kSpec.dtype, true, true>(dq, descriptor_after(ds_columns, i * 2048),
                                         descriptor_after(k_columns, i * 2048), i != 0);
        }
        wgmma_commit();
      };
      const auto wait_dq = [&](bool behind) {  // behind: dV, dK have been started after it
        if (behind) {
          wgmma_wait<kDqFirst ? 2 : 1>();
        } else {
          wgmma_wait<0>();
        }
        pin(dq);
      };
      const auto send_dq = [&](bool behind) {
        const int group = kSpec.grouped ? p.q_heads / p.kv_heads : 1;
        const long long dq_head = kOwnDq ? static_cast<long long>(blockIdx.x) * group + head % group
                                         : static_cast<long long>(tile.batch) * p.q_heads + head;
        const int last_key = kOwnDq ? tile.band.keys_of(query0, kQueries).end - 1 : 0;
        const DqSum sum{args.dq_sums + ((dq_head * args.q_tiles + m) * kDqBlocks + dq_block0) * 512 + thread * 4,
                        kDqBlocks - dq_block0, tile.index == 0, tile.index == last_key / kKeys};
        bool finished = false;
        if constexpr (kOwnDq) {
          finished = sum.last;
          if (finished) {
            float earlier[32];
            sum.load_earlier(earlier);
            wait_dq(behind);
#pragma unroll
            for (int i = 0; i < 32; i++) dq[i] += earlier[i];
            store_dq(args, dq, tile, head, query0 + dq_query0 + warp * 16 + lane_id() / 4,
                     dq_element0 + lane_id() % 4 * 2);
          }
        }
        if (!finished) {
          wait_dq(behind);
          if constexpr (kTurns) barrier_wait(barrier_of(shared.turn_came, step & 1), step >> 1 & 1);
          sum.add(dq);
          if constexpr (kTurns) barrier_arrive(barrier_of(shared.turn_used, step & 1));
        }
      };
      if constexpr (kSkips) {
        if (!seen.contains(m)) {
          barrier_wait(barrier_of(shared.dout_full, ring.slot), ring.parity);
#pragma unroll
          for (int i = 0; i < kScores / 8; i++) {
            store_matrix((ds_place ^ i % 4 * 32) + i / 4 * kKeys * 128, 0, 0, 0, 0);
          }
          async_fence();
          if (thread == 0) barrier_arrive(barrier_of(shared.dout_free, ring.slot));
          named_sync(kAllConsumers, 256);
          wgmma_fence();
          start_dq();
          send_dq(false);
          if (thread == 0) barrier_arrive(barrier_of(shared.q_free, ring.slot));
          ring.advance();
          step++;
          return;
        }
      }
      wgmma_fence();
      k_rows.multiply<kHead / 16>(s, q_rows);  // S^T = K Q^T
      barrier_wait(barrier_of(shared.dout_full, ring.slot), ring.parity);
      v_rows.multiply<kValue / 16>(dp, dout_rows);  // dP^T = V dO^T

      wgmma_wait<1>();
      pin(s);
      const Fragment<true> at = warp_fragment<true>(own_key0 + warp * 16, query0);
      const Score score = score_of(p, args.features, tile.batch, head);
      float derivative[kSpec.softcap ? kScores : 1];
      make_logits(s, derivative, at, args, tile, inside.contains(m), head, m, score);
      const auto exponentials = [&](int begin, int end) {
#pragma unroll
        for (int i = begin; i < end; i += 4) {
          const float2 lse_log2 =
              *reinterpret_cast<const float2*>(&shared.lse_log2[ring.slot][2 * i + lane_id() % 4 * 2]);
#pragma unroll
          for (int j = 0; j < 4; j++)
            s[i + j] = exp2_shared<kSoftwareExp2>(fmaf(s[i + j], score.unit, j & 1 ? -lse_log2.y : -lse_log2.x), i + j);
        }
      };
      constexpr int kAhead = kHoldsWaits ? kScores / 2 : kScores;
      exponentials(0, kAhead);
      if constexpr (kHoldsWaits) {
        pin(s);
        hold_waits(query0 < 0);
      }
      wgmma_wait<0>();
      pin(dp);
      exponentials(kAhead, kScores);
      if constexpr (kSpec.dropout) {
        const Dropout dropout = dropout_of(p, args.features, tile.batch, head);
        for_each_kept<kScores>(dropout, at, [&](int i, bool kept) {
          dp[i] = kept ? dp[i] * dropout.scale : 0.f;
          const float dropped = kept ? s[i] * dropout.scale : 0.f;
          if (i & 1) {
            p16[i / 2] |= pack<kSpec.dtype>(0.f, dropped);
          } else {
            p16[i / 2] = pack<kSpec.dtype>(dropped, 0.f);
          }
        });
      }
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[ring.slot][2 * i + lane_id() % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          dp[i + j] = s[i + j] * (dp[i + j] - (j & 1 ? delta.y : delta.x));
          if constexpr (kSpec.softcap) dp[i + j] *= derivative[i + j];
        }
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          if constexpr (!kSpec.dropout) p16[(i + j) / 2] = pack<kSpec.dtype>(s[i + j], s[i + j + 1]);
          ds16[(i + j) / 2] = pack<kSpec.dtype>(dp[i + j], dp[i + j + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < kScores / 2; i += 4) {
        store_matrix((ds_place ^ i % 16 * 8) + i / 16 * kKeys * 128, ds16[i], ds16[i + 1], ds16[i + 2], ds16[i + 3]);
      }
      const auto start_dv = [&] {
#pragma unroll
        for (int i = 0; i < kQueries / 16; i++) {  // dV += P^T dO
          wgmma<kSpec.dtype, true>(dv, &p16[4 * i], descriptor_after(dout_columns, i * 2048), true);
        }
        wgmma_commit();
      };
      const auto free_dout = [&] {
        pin(dv);
        if (thread == 0) barrier_arrive(barrier_of(shared.dout_free, ring.slot));
      };
      async_fence();
      wgmma_fence();
      if constexpr (!kDqFirst) start_dv();
      // Both warpgroups have written their dS^T, and are done with the dQ that reads the buffer written next.
      named_sync(kAllConsumers, 256);
      start_dq();
      if constexpr (kDqFirst) start_dv();
#pragma unroll
      for (int i = 0; i < kQueries / 16; i++) {  // dK += dS^T Q
        wgmma<kSpec.dtype, true>(dk, &ds16[4 * i], descriptor_after(q_columns, i * 2048), true);
      }
      wgmma_commit();

      if constexpr (kDqFirst) {
        send_dq(true);
        wgmma_wait<1>();
        free_dout();
      } else {
        wgmma_wait<2>();
        free_dout();
        send_dq(true);
      }
      wgmma_wait<0>();
      pin(dk);
      if (thread == 0) barrier_arrive(barrier_of(shared.q_free, ring.slot));
      ring.advance();
      step++;
    });

    named_sync(kAllConsumers, 256);  // all reads of K and V are over: dK and dV take their place
    pass_stored(args, tile);
    if constexpr (kSplits) {
      if (tile.pieces > 1 && !sum_pieces<kHead / 2, kValue / 2>(args, shared, tile, dk, dv)) return;
    }
    store_accumulator(k_tile, kKeys * 128, g * 64 + warp * 16, dk, p.scale);
    store_accumulator(v_tile, kKeys * 128, g * 64 + warp * 16, dv, 1.f);
    async_fence();
    named_sync(kWarpgroup + g, 128);
    if (thread == 0) {
      for (int atom = 0; atom < kHeadAtoms; atom++) {
        tma_store(args.dk, k_tile + atom * kKeys * 128 + g * 8192, atom * 64, tile.kv_head, key0 + g * 64, tile.batch);
      }
      for (int atom = 0; atom < kValueAtoms; atom++) {
        tma_store(args.dv, v_tile + atom * kKeys * 128 + g * 8192, atom * 64, tile.kv_head, key0 + g * 64, tile.batch);
      }
      bulk_commit();
      bulk_wait_read<0>();
      barrier_arrive(barrier_of(shared.kv_free, kv.slot));
    }
    kv.advance();
  } while (kPersistent);
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(384, 1) sm90_backward(const __grid_constant__ jf::Sm90BackwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) init_rings(shared);
  __syncthreads();
  dependency_wait();  // lse_log2, delta and the cleared dq_sums come from the kernel ahead
  if (threadIdx.x < 128) {
    serve(args, shared);
  } else {
    registers_acquire<kConsumerRegisters>();
    consume(args, shared);
  }
}

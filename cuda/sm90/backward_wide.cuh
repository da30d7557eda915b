// Attention backward on Hopper for head sizes above 128: formula, grid, producer, barriers and numerics as in
// sm90/backward.cuh. dk and dv of 80 keys fill the registers only if both warpgroups share them:
//
//   S = Q K^T and dP = dO V^T        64 queries x 40 keys a warpgroup, operands in shared memory
//   dK^T += Q^T dS, dV^T += dO^T P   two blocks of 64 elements a warpgroup, P and dS of both from shared memory
//   dQ = dS K                        64 queries x two blocks of 64 elements a warpgroup, one block after the other
//
// P and dS lie in shared memory with keys as rows. dK^T of a step runs under the softmax of the next, so that Q has two
// stages and dO one; S of the next step, where registers allow it, under the last addition to dq. Shared memory at head
// size 256: K and V 40 KiB each, Q 2 x 32, dO 32, P and dS 2 x 10 each: 216. Registers of a consumer: dk, dv 80 + 80, S
// and dP 20 + 20, dq 32 in their place.
#include "sm90/backward_common.cuh"

namespace jf {

constexpr int kScores = kKeys / 4;                                     // accumulator registers: 64 queries x kKeys / 2
constexpr int kHeadBlocks = kHead / 128, kValueBlocks = kValue / 128;  // of a warpgroup, 64 elements each
// Whether S of the next step starts under the last addition to dq; turns and some features leave too few registers.
constexpr bool kStartsEarly = !kTurns && !kSpec.softcap && !kSpec.bias() && !kSpec.mask && !kSpec.segment_ids;
static_assert(kQueries == 64 && kKeys % 16 == 0 && kKvStages == 1 && kQStages == 2 && kDoutStages == 1 && !kOwnDq);

struct Shared : Rings {
  alignas(1024) unsigned char p[2][kKeys * 128];  // rows are keys
  alignas(1024) unsigned char ds[2][kKeys * 128];
};
static_assert(sizeof(Shared) == Sm90BackwardSharedBytes(kSpec, kTiles));

// A warpgroup's 64 rows x N accumulator to columns [64 atom, 64 atom + 64) of N rows from row0, transposed.
template <int N>
JF_DEVICE void store_transposed(u32 tile, int row0, const float (&x)[N], float scale) {
  const u32 warp = threadIdx.x / 32 % 4, lane = lane_id(), chunk = 2 * warp + lane / 8 % 2;
  const u32 row = row0 + lane / 16 * 8 + lane % 8;
  auto pair = [&](int i) { return pack<kSpec.dtype>(x[i] * scale, x[i + 1] * scale); };
#pragma unroll
  for (int i = 0; i < N; i += 8) {
    const u32 to = tile + swizzled_offset(row + 2 * i, chunk);
    if (i + 8 <= N) {
      store_matrix_transposed(to, pair(i), pair(i + 2), pair(i + 4), pair(i + 6));
    } else {
      store_matrix_transposed(to, pair(i), pair(i + 2));
    }
  }
}

JF_DEVICE void consume(const Sm90BackwardArgs& args, Shared& shared) {
  const Problem& p = args.problem;
  const int g = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, thread = threadIdx.x % 128, warp = thread / 32;
  float dk[kHeadBlocks][kKeys / 2], dv[kValueBlocks][kKeys / 2], s[kScores], dp[kScores], dq[32];
  Ring<kQStages> q_ring;
  Ring<kDoutStages> dout_ring;
  u32 step = 0;

  barrier_wait(barrier_of(shared.kv_full, 0), 0);
  const KeyTile tile = key_tile_of(args, work_in(shared, 0));
  const int key0 = tile.index * kKeys;
  const u32 k_tile = shared_address(shared.k[0]), v_tile = shared_address(shared.v[0]);
  const u64 k_rows = descriptor_k_major(k_tile + g * kKeys * 64), v_rows = descriptor_k_major(v_tile + g * kKeys * 64);
  const u64 k_columns = descriptor_mn_major(k_tile + g * kHeadBlocks * kKeys * 128, 0);
#pragma unroll
  for (int i = 0; i < kKeys / 2; i++) {
#pragma unroll
    for (int x = 0; x < kHeadBlocks; x++) dk[x][i] = 0.f;
#pragma unroll
    for (int x = 0; x < kValueBlocks; x++) dv[x][i] = 0.f;
  }
  // dK^T += Q^T dS of a step. The one before the first has dS = 0.
  auto issue_dk = [&](u32 of, u32 q_slot) {
    const u64 q_columns = descriptor_mn_major(shared_address(shared.q[q_slot]) + g * kHeadBlocks * kQueries * 128, 0);
    const u64 ds_rows = descriptor_k_major(shared_address(shared.ds[of & 1]));
#pragma unroll
    for (int x = 0; x < kHeadBlocks; x++) {
#pragma unroll
      for (int i = 0; i < kQueries / 16; i++) {
        wgmma<kSpec.dtype, true, false>(dk[x], descriptor_after(q_columns, x * kQueries * 128 + i * 2048),
                                        descriptor_after(ds_rows, i * 32), true);
      }
    }
    wgmma_commit();
  };
  auto pin_dk = [&] {
#pragma unroll
    for (int x = 0; x < kHeadBlocks; x++) pin(dk[x]);
  };
  if constexpr (kSpec.kv_lengths) {
    if (key0 + kKeys > tile.band.kv_end) {
      clear_rows<kKeys, kHeadAtoms>(shared.k[0], tile.band.kv_end - key0);
      clear_rows<kKeys, kValueAtoms>(shared.v[0], tile.band.kv_end - key0);
      async_fence();
      named_sync(kAllConsumers, 256);
    }
  }

  // Read ahead of the products, beside whose operands they would wait for shared memory.
  const int row = warp * 16 + lane_id() / 4;
  float lse_log2[2];
  // S = Q K^T of the step whose Q is in the ring's slot.
  auto start_scores = [&](int m) {
    const u64 q_rows = descriptor_k_major(shared_address(shared.q[q_ring.slot]));
    barrier_wait(barrier_of(shared.q_full, q_ring.slot), q_ring.parity);
#pragma unroll
    for (int r = 0; r < 2; r++) lse_log2[r] = shared.lse_log2[q_ring.slot][row + 8 * r];
    if constexpr (kSpec.q_lengths) {
      if ((m + 1) * kQueries > tile.band.q_end) {
        barrier_wait(barrier_of(shared.dout_full, 0), dout_ring.parity);
        clear_rows<kQueries, kHeadAtoms>(shared.q[q_ring.slot], tile.band.q_end - m * kQueries);
        clear_rows<kQueries, kValueAtoms>(shared.dout[0], tile.band.q_end - m * kQueries);
        async_fence();
        named_sync(kAllConsumers, 256);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < (kSpec.head_dim + 15) / 16; i++) {
      wgmma<kSpec.dtype>(s, descriptor_after(q_rows, i / 4 * kQueries * 128 + i % 4 * 32),
                         descriptor_after(k_rows, i / 4 * kKeys * 128 + i % 4 * 32), i != 0);
    }
  };
  if constexpr (kStartsEarly) {
    if (tile.query_tiles.size() > 0) start_scores(tile.query_tiles.begin);
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
  }

  const int own_key0 = key0 + g * (kKeys / 2);
  const Range inside = tile.band.interior_query_tiles(own_key0, kKeys / 2, kQueries);
  for_each_step(args, tile, [&](int head, int m, bool last) {
    const int query0 = m * kQueries;
    const u32 dout_tile = shared_address(shared.dout[0]);
    const u64 dout_rows = descriptor_k_major(dout_tile);
    const u64 dout_columns = descriptor_mn_major(dout_tile + g * kValueBlocks * kQueries * 128, 0);
    const u32 p_tile = shared_address(shared.p[step & 1]), ds_tile = shared_address(shared.ds[step & 1]);
    const u64 p_rows = descriptor_k_major(p_tile), ds_columns = descriptor_mn_major(ds_tile, 0);
    if constexpr (!kStartsEarly) {
      start_scores(m);
      wgmma_commit();
    }
    barrier_wait(barrier_of(shared.dout_full, 0), dout_ring.parity);
    const float delta[2] = {shared.delta[0][row], shared.delta[0][row + 8]};
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < (kSpec.value_dim + 15) / 16; i++) {  // dP = dO V^T
      wgmma<kSpec.dtype>(dp, descriptor_after(dout_rows, i / 4 * kQueries * 128 + i % 4 * 32),
                         descriptor_after(v_rows, i / 4 * kKeys * 128 + i % 4 * 32), i != 0);
    }
    wgmma_commit();
    issue_dk(step - 1, step == 0 ? 0 : q_ring.slot ^ 1);  // slot 1 is being filled in step 0

    if constexpr (!kStartsEarly) {
      wgmma_wait<2>();
      pin(s);
    }
    const Fragment<false> at = warp_fragment<false>(query0 + warp * 16, own_key0);
    const Score score = score_of(p, args.features, tile.batch, head);
    float derivative[kSpec.softcap ? kScores : 1];
    make_logits(s, derivative, at, args, tile, inside.contains(m), head, m, score);
#pragma unroll
    for (int i = 0; i < kScores; i++) s[i] = exp2_fast(fmaf(s[i], score.unit, -lse_log2[fragment_row(i)]));
    if constexpr (!kSpec.dropout) store_transposed(p_tile, g * (kKeys / 2), s, 1.f);

    wgmma_wait<1>();
    pin(dp);
    if constexpr (kSpec.dropout) {
      const Dropout dropout = dropout_of(p, args.features, tile.batch, head);
      float dropped[kScores];
      for_each_kept<kScores>(dropout, at, [&](int i, bool kept) {
        dropped[i] = kept ? s[i] * dropout.scale : 0.f;
        dp[i] = kept ? dp[i] * dropout.scale : 0.f;
      });
      store_transposed(p_tile, g * (kKeys / 2), dropped, 1.f);
    }
#pragma unroll
    for (int i = 0; i < kScores; i++) {
      dp[i] = s[i] * (dp[i] - delta[fragment_row(i)]);
      if constexpr (kSpec.softcap) dp[i] *= derivative[i];
    }
    store_transposed(ds_tile, g * (kKeys / 2), dp, 1.f);
    async_fence();
    wgmma_wait<0>();
    pin_dk();
    if (thread == 0 && step > 0) barrier_arrive(barrier_of(shared.q_free, q_ring.slot ^ 1));
    // P and dS of both warpgroups are written, and what reads the buffers written next is done.
    named_sync(kAllConsumers, 256);

    auto issue_dq = [&](int x) {  // dQ = dS K
#pragma unroll
      for (int i = 0; i < kKeys / 16; i++) {
        wgmma<kSpec.dtype, true, true>(dq, descriptor_after(ds_columns, i * 2048),
                                       descriptor_after(k_columns, x * kKeys * 128 + i * 2048), i != 0);
      }
      wgmma_commit();
    };
    auto add_dq = [&](int x) {
      const int block0 = (g * kHeadBlocks + x) * 8;
      if (block0 * 8 >= kSpec.head_dim) return;
      const long long dq_head = static_cast<long long>(tile.batch) * p.q_heads + head;
      const DqSum sum{args.dq_sums + ((dq_head * args.q_tiles + m) * kDqBlocks + block0) * 512 + thread * 4, 8,
                      tile.index == 0, false};
      sum.add(dq);
    };
    wgmma_fence();
#pragma unroll
    for (int x = 0; x < kValueBlocks; x++) {  // dV^T += dO^T P
#pragma unroll
      for (int i = 0; i < kQueries / 16; i++) {
        wgmma<kSpec.dtype, true, false>(dv[x], descriptor_after(dout_columns, x * kQueries * 128 + i * 2048),
                                        descriptor_after(p_rows, i * 32), true);
      }
    }
    wgmma_commit();
    issue_dq(0);
    wgmma_wait<1>();
#pragma unroll
    for (int x = 0; x < kValueBlocks; x++) pin(dv[x]);
    if (thread == 0) barrier_arrive(barrier_of(shared.dout_free, 0));
    wgmma_wait<0>();
    pin(dq);
    if constexpr (kTurns) barrier_wait(barrier_of(shared.turn_came, step & 1), step >> 1 & 1);
    if constexpr (kHeadBlocks == 2) {
      add_dq(0);
      wgmma_fence();
      issue_dq(1);
      wgmma_wait<0>();
      pin(dq);
    }
    q_ring.advance();
    dout_ring.advance();
    if constexpr (kStartsEarly) {
      if (!last) start_scores(m + 1 == tile.query_tiles.end ? tile.query_tiles.begin : m + 1);
      wgmma_commit();
    }
    add_dq(kHeadBlocks - 1);
    if constexpr (kTurns) barrier_arrive(barrier_of(shared.turn_used, step & 1));
    if constexpr (kStartsEarly) {
      wgmma_wait<0>();
      pin(s);
    }
    step++;
  });

  wgmma_fence();
  issue_dk(step - 1, q_ring.slot ^ 1);
  wgmma_wait<0>();
  pin_dk();
  named_sync(kAllConsumers, 256);  // all reads of K and V are over: dK and dV take their place
  pass_stored(args, tile);
  if constexpr (kSplits) {
    constexpr int kHeadSums = kHeadBlocks * kKeys / 2, kValueSums = kValueBlocks * kKeys / 2;
    if (tile.pieces > 1 && !sum_pieces<kHeadSums, kValueSums>(args, shared, tile, dk[0], dv[0])) return;
  }
#pragma unroll
  for (int x = 0; x < kHeadBlocks; x++) {
    store_transposed(k_tile + (g * kHeadBlocks + x) * kKeys * 128, 0, dk[x], p.scale);
  }
#pragma unroll
  for (int x = 0; x < kValueBlocks; x++) {
    store_transposed(v_tile + (g * kValueBlocks + x) * kKeys * 128, 0, dv[x], 1.f);
  }
  async_fence();
  named_sync(kWarpgroup + g, 128);
  if (thread == 0) {
    for (int atom = g * kHeadBlocks; atom < (g + 1) * kHeadBlocks; atom++) {
      tma_store(args.dk, k_tile + atom * kKeys * 128, atom * 64, tile.kv_head, key0, tile.batch);
    }
    for (int atom = g * kValueBlocks; atom < (g + 1) * kValueBlocks; atom++) {
      tma_store(args.dv, v_tile + atom * kKeys * 128, atom * 64, tile.kv_head, key0, tile.batch);
    }
    bulk_commit();
    bulk_wait_read<0>();
  }
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(384, 1)
    sm90_backward_wide(const __grid_constant__ jf::Sm90BackwardArgs args) {
  using namespace jf;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  if (threadIdx.x == 0) init_rings(shared);
  // dS of the step before the first, and its Q if there is no first: see issue_dk.
  for (int i = threadIdx.x; i < sizeof shared.q[1] / 16; i += 384) {
    reinterpret_cast<uint4*>(shared.q[1])[i] = uint4{0, 0, 0, 0};
  }
  for (int i = threadIdx.x; i < sizeof shared.ds[1] / 16; i += 384) {
    reinterpret_cast<uint4*>(shared.ds[1])[i] = uint4{0, 0, 0, 0};
  }
  async_fence();
  __syncthreads();
  dependency_wait();  // lse_log2, delta and the cleared dq_sums come from the kernel ahead
  if (threadIdx.x < 128) {
    serve(args, shared);
  } else {
    registers_acquire<kConsumerRegisters>();
    consume(args, shared);
  }
}

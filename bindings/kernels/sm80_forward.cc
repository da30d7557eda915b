// Plan and launch of cuda/sm80/forward.cuh.
#include <algorithm>
#include <string>

#include "kernels/segments.h"
#include "kernels/sm80.h"
#include "support/combine.h"

namespace jf {
namespace {

constexpr long long kFillingBlocks = 264;  // blocks that keep a large GPU busy: two on each of 132 multiprocessors

size_t SharedBytes(const Sm80Tiles& tiles) {
  const int rows = std::max(tiles.head_dim, tiles.value_dim) * tiles.queries;
  return 2 * static_cast<size_t>(rows + tiles.keys * (tiles.head_dim + tiles.value_dim));
}

Sm80Tiles ChooseTiles(const Call& call) {
  const Spec& spec = call.spec;
  Sm80Tiles tiles{128, 64, Sm80HeadTile(spec.head_dim), Sm80HeadTile(spec.value_dim), 4, false, false};
  const int head = std::max(tiles.head_dim, tiles.value_dim);
  const int group = call.problem.q_heads / call.problem.kv_heads;
  const bool head_dependent = spec.bias() || spec.mask || spec.alibi || spec.dropout || spec.segment_ids;
  const long long rows = static_cast<long long>(call.problem.q_len) * group;
  tiles.packed = group > 1 && !head_dependent && rows <= 64;
  if (HasScoreFeatures(spec)) {
    tiles.queries = 64;
    if (head > 64) tiles.keys = 32;
  } else if (tiles.packed || call.problem.q_len <= 64) {
    // Mostly decoding: what counts are the bytes on their way.
    tiles.queries = 64;
    if (head <= 128) tiles.keys = head <= 64 && !spec.segment_ids ? 192 : 128;
  } else if (head > 128) {
    tiles.queries = 64;
  } else if (head == 64) {
    tiles.keys = 96;
  }
  return tiles;
}

// Parts of the keys, enough of them to fill the GPU when there are few query tiles.
int ChooseSplits(const Call& call, const Sm80Tiles& tiles, long long blocks) {
  if (call.kv_splits > 1) return call.kv_splits;
  const long long key_tiles = CeilDiv(call.problem.kv_len, tiles.keys);
  return static_cast<int>(std::max(1LL, std::min(kFillingBlocks / blocks, key_tiles / 4)));
}

}  // namespace

Planned PlanSm80Forward(const Call& call) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (const std::string reason = Sm80Refusal(spec); !reason.empty()) return Refusal{reason};

  Plan plan{"sm80_forward"};
  Sm80Tiles tiles = ChooseTiles(call);
  const int group = problem.q_heads / problem.kv_heads;
  const long long rows = static_cast<long long>(problem.q_len) * (tiles.packed ? group : 1);
  const int q_tiles = CeilDiv(rows, tiles.queries);
  const long long blocks =
      static_cast<long long>(q_tiles) * problem.batch * (tiles.packed ? problem.kv_heads : problem.q_heads);
  const int splits = ChooseSplits(call, tiles, blocks);
  tiles.split = splits > 1;
  const int section = L2Section(call);

  plan.kernels.push_back(
      {"sm80/forward.cuh", "sm80_forward", VariantText(spec, TilesText(tiles)), 32 * tiles.warps, SharedBytes(tiles)});
  const size_t all_rows = static_cast<size_t>(problem.batch) * problem.q_len * problem.q_heads;
  size_t partial_out = 0, partial_lse = 0;
  if (tiles.split) {
    Spec combined{};
    combined.dtype = spec.dtype;
    combined.value_dim = spec.value_dim;
    combined.sinks = spec.sinks;
    plan.kernels.push_back({"support/combine.cuh", "combine", VariantText(combined, ""), 32 * kCombineWarps, 0});
    partial_out = plan.AddScratch(splits * all_rows * spec.value_dim * sizeof(float));
    partial_lse = plan.AddScratch(splits * all_rows * sizeof(float));
  }
  const SegmentPass segments = AddSegmentPass(call, tiles.queries, tiles.keys, true, false, &plan);
  plan.facts = {{"tile", std::to_string(tiles.queries) + " x " + std::to_string(tiles.keys)},
                {"blocks", std::to_string(blocks * splits)},
                {"key splits", std::to_string(splits)}};

  plan.launch = [=](const Launch& launch) {
    const Problem& problem = launch.call.problem;
    const Buffers& buffers = launch.buffers;
    float* const lse_parts = launch.Scratch<float>(partial_lse);
    float* const out_parts = launch.Scratch<float>(partial_out);
    launch.Run(0, {{static_cast<unsigned>(blocks * splits)}},
               Sm80ForwardArgs{problem, launch.features, buffers.q, buffers.k, buffers.v, buffers.out, buffers.lse,
                               out_parts, lse_parts, segments.Run(launch), q_tiles, splits, section});
    if (splits > 1) {
      const size_t combining_warps = all_rows * CeilDiv(spec.value_dim, kCombineElements);
      launch.Run(1, {{CeilDiv(combining_warps, kCombineWarps)}},
                 CombineArgs{out_parts, lse_parts, launch.features.sinks, buffers.out, buffers.lse, splits,
                             problem.batch, problem.q_len, problem.q_heads});
    }
  };
  return plan;
}

}  // namespace jf

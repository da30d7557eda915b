#include "kernels/segments.h"

namespace jf {
namespace {

constexpr int kWarps = 4;  // of a block: see support/segments.cuh

}  // namespace

SegmentPass AddSegmentPass(const Call& call, int queries, int keys, bool key_tiles, bool query_tiles, Plan* plan) {
  SegmentPass pass;
  if (!call.spec.segment_ids) return pass;
  pass.present = true;
  pass.queries = queries;
  pass.keys = keys;
  pass.key_tiles = key_tiles;
  pass.query_tiles = query_tiles;

  Spec spec{};
  spec.segment_ids = true;
  spec.q_lengths = call.spec.q_lengths;
  spec.kv_lengths = call.spec.kv_lengths;
  const std::string variant = VariantText(spec, "");
  pass.first_kernel = plan->kernels.size();
  plan->kernels.push_back({"support/segments.cuh", "segment_bounds", variant, 32 * kWarps, 0});
  plan->kernels.push_back({"support/segments.cuh", "segment_ranges", variant, 32 * kWarps, 0});

  const size_t batch = call.problem.batch;
  const size_t q_tiles = batch * CeilDiv(call.problem.q_len, queries);
  const size_t kv_tiles = batch * CeilDiv(call.problem.kv_len, keys);
  pass.q_bounds = plan->AddScratch(q_tiles * sizeof(IdBounds));
  pass.kv_bounds = plan->AddScratch(kv_tiles * sizeof(IdBounds));
  if (key_tiles) pass.key_ranges = plan->AddScratch(q_tiles * sizeof(Range));
  if (query_tiles) pass.query_ranges = plan->AddScratch(kv_tiles * sizeof(Range));
  return pass;
}

SegmentTiles SegmentPass::Run(const Launch& launch) const {
  if (!present) return {};
  const Problem& problem = launch.call.problem;
  const SegmentArgs args{problem,
                         launch.features,
                         queries,
                         keys,
                         launch.Scratch<IdBounds>(q_bounds),
                         launch.Scratch<IdBounds>(kv_bounds),
                         key_tiles ? launch.Scratch<Range>(key_ranges) : nullptr,
                         query_tiles ? launch.Scratch<Range>(query_ranges) : nullptr};
  const unsigned tiles = CeilDiv(problem.q_len, queries) + CeilDiv(problem.kv_len, keys);
  const LaunchShape shape{{static_cast<unsigned>(problem.batch), CeilDiv(tiles, kWarps)}};
  launch.Run(first_kernel, shape, args);
  launch.Run(first_kernel + 1, shape, args);
  return {args.q_bounds, args.kv_bounds, args.key_tiles, args.query_tiles};
}

}  // namespace jf

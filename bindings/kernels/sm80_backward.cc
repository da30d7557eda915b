// Plans and launches of cuda/sm80/backward.cuh, query_gradient.cuh and bias_gradient.cuh.
#include <algorithm>
#include <string>

#include "kernels/segments.h"
#include "kernels/sm80.h"
#include "support/delta.h"

namespace jf {
namespace {

constexpr int kDeltaThreads = 256, kDeltaRows = 64;  // of a block: see support/delta.cuh
constexpr int kConvertWarps = 4;                     // of a block, 16 rows each: see sm80/convert_dq.cuh

size_t SharedBytes(const Sm80BackwardTiles& tiles) {
  const int head_dims = tiles.head_dim + tiles.value_dim;
  return 2 *
         static_cast<size_t>((tiles.keys + tiles.stages * tiles.queries) * head_dims + 2 * tiles.queries * tiles.keys);
}

// Of the kernels whose warps own 16 queries each.
size_t SharedBytesOfRows(const Sm80BackwardTiles& tiles) {
  const size_t inputs = 2 * static_cast<size_t>((tiles.keys + tiles.queries) * (tiles.head_dim + tiles.value_dim));
  return std::max(inputs, sizeof(float) * tiles.queries * tiles.keys);
}

std::string TilesText(const Sm80BackwardTiles& tiles) {
  std::string fields;
  for (int field : {tiles.queries, tiles.keys, tiles.head_dim, tiles.value_dim, tiles.warps, tiles.score_rows,
                    tiles.key_rows, tiles.query_rows, tiles.stages}) {
    fields += std::to_string(field) + ", ";
  }
  fields += tiles.query_gradient ? "true" : "false";
  return "#include \"sm80/args.h\"\nconstexpr jf::Sm80BackwardTiles kTiles{" + fields + "};\n";
}

// The first of the tiles, from the fastest down, that fits the registers and the shared memory. Four warps hold more of
// a tile each and read less shared memory; two such blocks or three run on a multiprocessor.
Sm80BackwardTiles ChooseTiles(const Call& call) {
  const Spec& spec = call.spec;
  int head_tile = Sm80HeadTile(spec.head_dim), value_tile = Sm80HeadTile(spec.value_dim);
  if (head_tile != value_tile) {  // six blocks of 16 columns divide over two columns of warps only: all or nothing
    if (head_tile == 96) head_tile = 128;
    if (value_tile == 96) value_tile = 128;
  }
  const bool crowded = HasScoreFeatures(spec) || spec.segment_ids || spec.q_lengths || spec.kv_lengths;
  struct Choice {
    Sm80BackwardTiles tiles;
    int largest_head;    // tile
    bool crowded;        // whether its registers have room for many features
    int fewest_queries;  // of a call
    int blocks;          // that must fit a multiprocessor
  };
  constexpr Choice kTable[] = {
      // queries, keys, head sizes, warps, rows of warps for scores, keys and queries, stages
      {{128, 64, 0, 0, 4, 2, 2, 2, 2, true}, 64, false, 4096, 2},
      {{64, 64, 0, 0, 4, 2, 2, 2, 2, true}, 64, true, 0, 1},
      {{64, 64, 0, 0, 4, 2, 2, 2, 1, true}, 128, false, 0, 1},
      {{64, 64, 0, 0, 8, 4, 2, 4, 2, true}, 256, true, 0, 1},
      {{64, 64, 0, 0, 8, 4, 2, 2, 1, true}, 256, true, 0, 1},
      {{64, 32, 0, 0, 8, 4, 2, 2, 1, true}, 256, true, 0, 1},
      {{32, 32, 0, 0, 4, 2, 2, 2, 1, true}, 256, true, 0, 1},
  };
  for (Choice choice : kTable) {
    Sm80BackwardTiles& tiles = choice.tiles;
    if (std::max(head_tile, value_tile) > choice.largest_head || (crowded && !choice.crowded)) continue;
    if (call.problem.q_len < choice.fewest_queries) continue;
    tiles.head_dim = head_tile;
    tiles.value_dim = value_tile;
    if (head_tile == 96 && tiles.warps == 8) tiles.key_rows = tiles.query_rows = 4;
    tiles.query_gradient = !spec.deterministic;
    if (choice.blocks * SharedBytes(tiles) <= SharedLimit(call.arch)) return tiles;
  }
  throw Error("no tile of the sm80 backward fits the shared memory");
}

// For the kernels whose warps own 16 queries each.
Sm80BackwardTiles ChooseRowTiles(const Spec& spec) {
  Sm80BackwardTiles tiles{};
  tiles.queries = 64;
  tiles.head_dim = Sm80HeadTile(spec.head_dim);
  tiles.value_dim = Sm80HeadTile(spec.value_dim);
  const int score_features = spec.bias() + spec.mask + spec.alibi + spec.softcap + spec.dropout;
  tiles.keys = std::max(tiles.head_dim, tiles.value_dim) > 128 ? 32 : 64;
  if (score_features > 1) tiles.keys /= 2;  // or registers spill
  tiles.warps = 4;
  return tiles;
}

// support/delta.cuh: what the rows need.
struct DeltaPass {
  size_t kernel, lse_log2, delta;
  int padded_len;

  // Clears dq_sums, rows of `sums_size`, unless it is null.
  void Run(const Launch& launch, float* dq_sums, int sums_size) const {
    const Problem& problem = launch.call.problem;
    const Buffers& buffers = launch.buffers;
    launch.Run(kernel, {{static_cast<unsigned>(problem.batch) * problem.q_heads, CeilDiv(padded_len, kDeltaRows)}},
               DeltaArgs{problem, launch.features, buffers.out, buffers.dout, buffers.lse, buffers.dlse,
                         launch.Scratch<float>(lse_log2), launch.Scratch<float>(delta), padded_len, dq_sums, sums_size,
                         nullptr, 0});
  }
};

DeltaPass AddDeltaPass(const Call& call, int queries, Plan* plan) {
  Spec spec{};
  spec.dtype = call.spec.dtype;
  spec.value_dim = call.spec.value_dim;
  spec.q_lengths = call.spec.q_lengths;
  spec.lse_cotangent = call.spec.lse_cotangent;
  DeltaPass pass;
  pass.kernel = plan->kernels.size();
  plan->kernels.push_back({"support/delta.cuh", "delta", VariantText(spec, ""), kDeltaThreads, 0});
  pass.padded_len = CeilDiv(call.problem.q_len, queries) * queries;
  const size_t rows = static_cast<size_t>(call.problem.batch) * call.problem.q_heads * pass.padded_len;
  pass.lse_log2 = plan->AddScratch(rows * sizeof(float));
  pass.delta = plan->AddScratch(rows * sizeof(float));
  return pass;
}

Sm80BackwardArgs Args(const Launch& launch, const DeltaPass& delta) {
  const Buffers& buffers = launch.buffers;
  Sm80BackwardArgs args{};
  args.problem = launch.call.problem;
  args.features = launch.features;
  args.q = buffers.q;
  args.k = buffers.k;
  args.v = buffers.v;
  args.dout = buffers.dout;
  args.dq = buffers.dq;
  args.dk = buffers.dk;
  args.dv = buffers.dv;
  args.dbias = buffers.dbias;
  args.lse_log2 = launch.Scratch<float>(delta.lse_log2);
  args.delta = launch.Scratch<float>(delta.delta);
  args.padded_len = delta.padded_len;
  return args;
}

std::string TileFact(const Sm80BackwardTiles& tiles) {
  return std::to_string(tiles.queries) + " x " + std::to_string(tiles.keys);
}

}  // namespace

Planned PlanSm80Backward(const Call& call) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (const std::string reason = Sm80Refusal(spec); !reason.empty()) return Refusal{reason};

  Plan plan{"sm80_backward"};
  const Sm80BackwardTiles tiles = ChooseTiles(call);
  const DeltaPass delta = AddDeltaPass(call, std::max(tiles.queries, 64), &plan);
  const SegmentPass segments = AddSegmentPass(call, tiles.queries, tiles.keys, false, true, &plan);
  const int section = L2Section(call), group = problem.q_heads / problem.kv_heads;
  const unsigned key_tiles = CeilDiv(problem.kv_len, tiles.keys);
  const size_t main_kernel = plan.kernels.size();
  plan.kernels.push_back({"sm80/backward.cuh", "sm80_backward", VariantText(spec, TilesText(tiles)), 32 * tiles.warps,
                          SharedBytes(tiles)});
  plan.facts = {{"tile", TileFact(tiles)},
                {"blocks", std::to_string(static_cast<size_t>(key_tiles) * problem.kv_heads * problem.batch)}};
  const auto run_main = [=](const Launch& launch, float* dq_sums) {
    Sm80BackwardArgs args = Args(launch, delta);
    args.segments = segments.Run(launch);
    args.dq_sums = dq_sums;
    args.tiles = key_tiles;
    args.section = std::max(1, section / group);
    launch.Run(main_kernel, {{key_tiles * problem.kv_heads * problem.batch}}, args);
  };

  if (spec.deterministic) {
    const Sm80BackwardTiles row_tiles = ChooseRowTiles(spec);
    const SegmentPass row_segments = AddSegmentPass(call, row_tiles.queries, row_tiles.keys, true, false, &plan);
    const unsigned q_tiles = CeilDiv(problem.q_len, row_tiles.queries);
    const size_t dq_kernel = plan.kernels.size();
    plan.kernels.push_back({"sm80/query_gradient.cuh", "sm80_query_gradient", VariantText(spec, TilesText(row_tiles)),
                            32 * row_tiles.warps, SharedBytesOfRows(row_tiles)});
    plan.facts.push_back({"dq", "a pass of its own, tile " + TileFact(row_tiles)});
    plan.launch = [=](const Launch& launch) {
      delta.Run(launch, nullptr, 0);
      run_main(launch, nullptr);
      Sm80BackwardArgs args = Args(launch, delta);
      args.segments = row_segments.Run(launch);
      args.tiles = q_tiles;
      args.section = section;
      launch.Run(dq_kernel, {{q_tiles * problem.q_heads * problem.batch}}, args);
    };
    return plan;
  }

  Spec converted{};
  converted.dtype = spec.dtype;
  converted.head_dim = spec.head_dim;
  Sm80BackwardTiles convert_tiles{};
  convert_tiles.head_dim = tiles.head_dim;
  convert_tiles.warps = kConvertWarps;
  const size_t convert_kernel = plan.kernels.size();
  plan.kernels.push_back({"sm80/convert_dq.cuh", "sm80_convert_dq", VariantText(converted, TilesText(convert_tiles)),
                          32 * kConvertWarps, 0});
  const size_t pairs = static_cast<size_t>(problem.batch) * problem.q_heads;
  const size_t sums = plan.AddScratch(pairs * delta.padded_len * tiles.head_dim * sizeof(float));
  plan.launch = [=](const Launch& launch) {
    float* const dq_sums = launch.Scratch<float>(sums);
    delta.Run(launch, dq_sums, tiles.head_dim);
    run_main(launch, dq_sums);
    Sm80BackwardArgs args = Args(launch, delta);
    args.dq_sums = dq_sums;
    launch.Run(convert_kernel, {{static_cast<unsigned>(pairs), CeilDiv(problem.q_len, 16 * kConvertWarps)}}, args);
  };
  return plan;
}

Planned PlanSm80BiasGradient(const Call& call) {
  const Spec& spec = call.spec;
  if (const std::string reason = Sm80Refusal(spec); !reason.empty()) return Refusal{reason};

  Plan plan{"sm80_bias_gradient"};
  const Sm80BackwardTiles tiles = ChooseRowTiles(spec);
  const DeltaPass delta = AddDeltaPass(call, tiles.queries, &plan);
  const SegmentPass segments = AddSegmentPass(call, tiles.queries, tiles.keys, true, false, &plan);
  const size_t kernel = plan.kernels.size();
  plan.kernels.push_back({"sm80/bias_gradient.cuh", "sm80_bias_gradient", VariantText(spec, TilesText(tiles)),
                          32 * tiles.warps, SharedBytesOfRows(tiles)});
  plan.facts = {{"tile", TileFact(tiles)}};
  plan.launch = [=](const Launch& launch) {
    const Problem& problem = launch.call.problem;
    const Dense& bias = launch.features.bias;
    delta.Run(launch, nullptr, 0);
    Sm80BackwardArgs args = Args(launch, delta);
    args.segments = segments.Run(launch);
    const unsigned q_tiles = bias.q_stride ? CeilDiv(problem.q_len, tiles.queries) : 1;
    const unsigned key_tiles = bias.k_stride ? CeilDiv(problem.kv_len, tiles.keys) : 1;
    const unsigned heads = bias.head_stride ? problem.q_heads : 1;
    launch.Run(kernel, {{q_tiles * key_tiles * heads * bias.batch.mod}}, args);
  };
  return plan;
}

}  // namespace jf

// Plan and launch of cuda/sm90/backward.cuh, backward_wide.cuh and of the kernels around it, support/delta.cuh and
// support/dq.cuh.
#include <algorithm>
#include <string>

#include "kernels/segments.h"
#include "sm90/backward_args.h"
#include "support/delta.h"
#include "support/dq.h"

namespace jf {
namespace {

constexpr int kThreads = 384, kSupportThreads = 256, kSupportRows = 64;
constexpr int kMultiprocessors = 132;  // of the largest Hopper GPU: as many blocks run at a time

// Whether scores need registers beside those of the plain products.
bool HasScoreFeatures(const Spec& spec) {
  return spec.bias() || spec.mask || spec.alibi || spec.softcap || spec.dropout || spec.segment_ids;
}

long long Pairs(const Call& call) {  // (batch entry, key head)
  return static_cast<long long>(call.problem.batch) * call.problem.kv_heads;
}

// Query rows that a tile of keys meets at most.
int RowsOfKeyTile(const Call& call, int keys) {
  const Problem& problem = call.problem;
  const bool bounded = call.spec.window_left && (call.spec.causal || call.spec.window_right);
  const long long right = call.spec.causal ? 0 : problem.window_right;
  return bounded ? std::min<long long>(problem.q_len, problem.window_left + right + keys) : problem.q_len;
}

// Scores as they are, and no mask but the causal one.
bool IsPlain(const Spec& spec) {
  return !HasScoreFeatures(spec) && !spec.q_offset && !spec.q_lengths && !spec.kv_lengths && !spec.window_left &&
         !spec.window_right;
}

// One block for all keys of a (batch entry, key head) finishes its dq alone: no sums to clear, add up and convert, and
// the same bits from run to run. It pays where such blocks fill the GPU and their sums stay in the L2.
bool BlocksOwnDq(const Call& call, int queries) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (!IsPlain(spec)) return false;
  const long long pairs = Pairs(call), rounds = CeilDiv(pairs, kMultiprocessors);
  const long long rows =
      static_cast<long long>(CeilDiv(problem.q_len, queries)) * queries * problem.q_heads / problem.kv_heads;
  const long long bytes = rows * Sm90BackwardTileSize(spec, spec.head_dim) * sizeof(float) * kMultiprocessors;
  return pairs * 10 >= rounds * kMultiprocessors * 9 && bytes <= 20ll << 20;
}

// Where every query sees the first keys, their tiles can store dq instead of adding to it, and nobody need clear the
// sums. The other tiles of a pair wait for the first to end: it pays where about as many pairs as multiprocessors begin
// with theirs, and up to lengths by measurement, since longer calls spend less of their time on clearing.
bool FirstKeysStore(const Call& call, const Sm90BackwardTiles& tiles) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  const bool seen_by_all = IsPlain(spec) && (!spec.causal || problem.kv_len >= problem.q_len);
  const bool others = problem.kv_len > tiles.keys;
  const long long rows = static_cast<long long>(problem.q_len) * (problem.q_heads / problem.kv_heads);
  const int longest = Sm90BackwardIsWide(spec) ? 512 : spec.causal ? 2048 : 1024;
  return seen_by_all && others && !tiles.own_dq && !spec.deterministic && Pairs(call) * 10 >= kMultiprocessors * 9 &&
         rows <= longest;
}

FirstKeys ChooseFirstKeys(int section, int key_tiles, long long pairs) {
  const auto sections_of = [&](long long pairs) { return static_cast<int>(CeilDiv(pairs, section)); };
  const int ahead = std::min(sections_of(kMultiprocessors), sections_of(pairs));
  return {ahead, std::min(ahead, sections_of(CeilDiv(2 * kMultiprocessors, key_tiles)))};
}

// Blocks that go from key tile to key tile hide the start and the end of each; with many steps a tile they gain nothing
// and read less in step with one another, which costs L2 hits.
bool BlocksStay(const Call& call, int queries, int keys) {
  const unsigned steps = CeilDiv(RowsOfKeyTile(call, keys), queries) * (call.problem.q_heads / call.problem.kv_heads);
  return !HasScoreFeatures(call.spec) && steps <= (queries == 128 ? 16u : 8u);
}

// (batch entry, key head) pairs in a section: what they read and add to at a time, one head of a group after the other,
// stays in the L2. A power of two, of which the number of pairs mostly is a multiple: a small last section would start
// the longest key tiles of causal attention when the GPU has little else left. Limits by measurement.
int SectionOf(const Call& call, int keys, long long pairs) {
  const long long bytes = 8LL * RowsOfKeyTile(call, keys) * Sm90BackwardTileSize(call.spec, call.spec.head_dim);
  const long long limit = (Sm90BackwardIsWide(call.spec) ? 32LL : 16LL) << 20;
  int section = 1;
  while (2 * section <= pairs && 2 * section * bytes <= limit) section *= 2;
  return section;
}

// Key tiles that all take the same time leave multiprocessors idle in their last round: there they are cut into pieces,
// unless adding up what the pieces found (about as long as eight steps of 64 queries) takes longer than that saves.
PieceGroups ChoosePieces(const Call& call, const Sm90BackwardTiles& tiles, long long items) {
  PieceGroups best{static_cast<int>(items), 1};
  if (!Sm90BackwardMaySplit(call.spec, tiles)) return best;
  const int q_tiles = CeilDiv(call.problem.q_len, tiles.queries);
  const double steps =
      static_cast<double>(CeilDiv(call.problem.q_len, 64)) * call.problem.q_heads / call.problem.kv_heads;
  const long long rounds = items / kMultiprocessors;
  double least = CeilDiv(items, kMultiprocessors) - 8 / steps;
  const long long uncut = tiles.first_keys_store ? Pairs(call) : 0;
  for (long long whole : {rounds, std::max(rounds - 1, 0ll)}) {
    if (whole * kMultiprocessors < uncut) continue;
    for (int pieces = 2; pieces <= std::min(4, q_tiles); pieces++) {
      const long long cut = items - whole * kMultiprocessors;
      const double time = whole + static_cast<double>(CeilDiv(cut * pieces, kMultiprocessors)) / pieces;
      if (time < least) least = time, best = {static_cast<int>(whole * kMultiprocessors), pieces};
    }
  }
  return best;
}

Sm90BackwardTiles ChooseTiles(const Call& call) {
  const Spec& spec = call.spec;
  Sm90BackwardTiles tiles{64, 80, 1, 2, 1, false, false};
  if (!Sm90BackwardIsWide(spec)) {
    const bool small = spec.head_dim <= 64 && spec.value_dim <= 64 && !HasScoreFeatures(spec);
    tiles = {small ? 128 : 64, 128, 1, 2, 2, false, false};
    tiles.own_dq = small && BlocksOwnDq(call, tiles.queries);
    if (tiles.own_dq || BlocksStay(call, tiles.queries, tiles.keys)) tiles.kv_stages = 2;
  }
  tiles.first_keys_store = FirstKeysStore(call, tiles);
  return tiles;
}

std::string TilesText(const Sm90BackwardTiles& tiles) {
  std::string fields;
  for (int field : {tiles.queries, tiles.keys, tiles.kv_stages, tiles.q_stages, tiles.dout_stages}) {
    fields += std::to_string(field) + ", ";
  }
  fields += tiles.own_dq ? "true, " : "false, ";
  fields += tiles.first_keys_store ? "true" : "false";
  return "#include \"sm90/backward_args.h\"\nconstexpr jf::Sm90BackwardTiles kTiles{" + fields + "};\n";
}

}  // namespace

Planned PlanSm90Backward(const Call& call) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (spec.dtype != DType::kF16 && spec.dtype != DType::kBF16)
    return Refusal{"the sm90 backward takes float16 and bfloat16"};
  for (int size : {spec.head_dim, spec.value_dim}) {
    if (size % 8 != 0 || size > 256) return Refusal{"the sm90 backward has no head size " + std::to_string(size)};
  }

  const int head_tile = Sm90BackwardTileSize(spec, spec.head_dim);
  const bool wide = Sm90BackwardIsWide(spec);
  const Sm90BackwardTiles tiles = ChooseTiles(call);
  const bool takes_turns = spec.deterministic && !tiles.own_dq;
  if (takes_turns && spec.segment_ids)
    return Refusal{"the sm90 backward takes no turns where segment ids cut the band"};
  if (takes_turns && spec.softcap) return Refusal{"the sm90 backward has no registers for turns with softcap"};

  Plan plan{"sm90_backward"};
  const int key_tiles = CeilDiv(problem.kv_len, tiles.keys), q_tiles = CeilDiv(problem.q_len, tiles.queries);
  const int padded_len = q_tiles * tiles.queries, row_blocks = padded_len / kSupportRows,
            group = problem.q_heads / problem.kv_heads;
  const long long pairs = Pairs(call);

  const SegmentPass segments = AddSegmentPass(call, tiles.queries, tiles.keys, false, true, &plan);
  const size_t first = plan.kernels.size();
  Spec delta_spec{};
  delta_spec.dtype = spec.dtype;
  delta_spec.value_dim = spec.value_dim;
  delta_spec.q_lengths = spec.q_lengths;
  delta_spec.lse_cotangent = spec.lse_cotangent;
  plan.kernels.push_back({"support/delta.cuh", "delta", VariantText(delta_spec, ""), kSupportThreads, 0});
  plan.kernels.push_back({wide ? "sm90/backward_wide.cuh" : "sm90/backward.cuh",
                          wide ? "sm90_backward_wide" : "sm90_backward", VariantText(spec, TilesText(tiles)), kThreads,
                          static_cast<size_t>(Sm90BackwardSharedBytes(spec, tiles))});
  if (!tiles.own_dq) {
    Spec dq_spec{};
    dq_spec.dtype = spec.dtype;
    dq_spec.head_dim = spec.head_dim;
    const std::string rest =
        "#include \"support/dq.h\"\nconstexpr jf::DqTiles kTiles{" + std::to_string(head_tile) + "};\n";
    plan.kernels.push_back({"support/dq.cuh", "dq_from_sums", VariantText(dq_spec, rest), kSupportThreads, 0});
  }

  const size_t rows = static_cast<size_t>(problem.batch) * problem.q_heads * padded_len;
  const long long acc_heads = tiles.own_dq ? std::min<long long>(kMultiprocessors, pairs) * group : pairs * group;
  const size_t lse_log2 = plan.AddScratch(rows * sizeof(float)), delta = plan.AddScratch(rows * sizeof(float));
  const size_t dq_sums = plan.AddScratch(static_cast<size_t>(acc_heads) * padded_len * head_tile * sizeof(float));
  const size_t turn_bytes = takes_turns ? static_cast<size_t>(pairs) * group * q_tiles * sizeof(int) : 0;
  const size_t turns = plan.AddScratch(turn_bytes);
  const int section = SectionOf(call, tiles.keys, pairs);
  const FirstKeys first_keys = ChooseFirstKeys(section, key_tiles, pairs);
  const bool persistent = tiles.kv_stages == 2;
  const long long items = tiles.own_dq ? pairs : pairs * key_tiles;
  const PieceGroups split = ChoosePieces(call, tiles, items);
  const int cut = static_cast<int>(items) - split.first, first_flag = std::max(cut, 1);
  const int counter_count = first_flag + (tiles.first_keys_store ? static_cast<int>(pairs) : 0);
  const size_t counters = plan.AddScratch(counter_count * sizeof(int));
  const int value_tile = Sm90BackwardTileSize(spec, spec.value_dim);
  const size_t piece_sums =
      plan.AddScratch(cut * static_cast<size_t>(split.pieces) * tiles.keys * (head_tile + value_tile) * sizeof(float));
  const unsigned blocks = persistent ? std::min<long long>(kMultiprocessors, items) : split.first + cut * split.pieces;
  plan.facts = {{"tile", std::to_string(tiles.queries) + " x " + std::to_string(tiles.keys)},
                {"blocks", std::to_string(blocks)},
                {"dq", tiles.own_dq             ? "one block per batch entry and key head"
                       : takes_turns            ? "added up in float32, in turn"
                       : tiles.first_keys_store ? "stored by the first keys, added up in float32"
                                                : "added up in float32"}};

  const Extent support_grid{static_cast<unsigned>(pairs) * group, static_cast<unsigned>(row_blocks)};
  plan.launch = [=](const Launch& launch) {
    const Problem& problem = launch.call.problem;
    const Buffers& buffers = launch.buffers;
    const DType dtype = spec.dtype;
    auto map = [&](const void* data, int batch, int length, int heads, int size, unsigned box_rows) {
      return EncodeTensorMap(
          HeadsTensor(data, dtype, batch, length, heads, size, {64, 1, box_rows, 1}, Swizzle::k128Bytes));
    };
    const unsigned queries = tiles.queries, keys = tiles.keys, out_keys = wide ? keys : 64;
    Sm90BackwardArgs args{};
    args.q = map(buffers.q, problem.q_batch.mod, problem.q_len, problem.q_heads, spec.head_dim, queries);
    args.dout = map(buffers.dout, problem.batch, problem.q_len, problem.q_heads, spec.value_dim, queries);
    args.k = map(buffers.k, problem.k_batch.mod, problem.kv_len, problem.kv_heads, spec.head_dim, keys);
    args.v = map(buffers.v, problem.v_batch.mod, problem.kv_len, problem.kv_heads, spec.value_dim, keys);
    args.dk = map(buffers.dk, problem.batch, problem.kv_len, problem.kv_heads, spec.head_dim, out_keys);
    args.dv = map(buffers.dv, problem.batch, problem.kv_len, problem.kv_heads, spec.value_dim, out_keys);
    args.problem = problem;
    args.features = launch.features;
    args.segments = segments.Run(launch);
    args.lse_log2 = launch.Scratch<float>(lse_log2);
    args.delta = launch.Scratch<float>(delta);
    args.dq_sums = launch.Scratch<float>(dq_sums);
    args.dq = buffers.dq;
    args.counters = launch.Scratch<int>(counters);
    args.turns = launch.Scratch<int>(turns);
    args.stored = args.counters + first_flag;
    args.key_tiles = key_tiles;
    args.q_tiles = q_tiles;
    args.section = section;
    args.first_keys = first_keys;
    args.split = split;
    args.piece_sums = launch.Scratch<float>(piece_sums);

    float* cleared_sums = tiles.own_dq || tiles.first_keys_store ? nullptr : args.dq_sums;
    if (takes_turns) launch.Zero(args.turns, turn_bytes);
    launch.Run(first, {support_grid},
               DeltaArgs{problem, launch.features, buffers.out, buffers.dout, buffers.lse, buffers.dlse,
                         launch.Scratch<float>(lse_log2), launch.Scratch<float>(delta), padded_len, cleared_sums,
                         head_tile, args.counters, counter_count});
    launch.Run(first + 1, {{blocks}, {}, true}, args);
    if (!tiles.own_dq) {
      launch.Run(first + 2, {support_grid, {}, true},
                 DqArgs{args.dq_sums, buffers.dq, problem.q_len, problem.q_heads, padded_len, problem.scale});
    }
  };
  return plan;
}

}  // namespace jf

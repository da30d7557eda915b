// Plan and launch of cuda/sm90/forward.cuh.
#include <algorithm>
#include <string>

#include "kernels/segments.h"
#include "sm90/args.h"

namespace jf {
namespace {

constexpr long long kSectionBytes = 32ll << 20;  // keys and values that may share the L2
constexpr int kMultiprocessors = 132;

int RoundUp(int value, int step) { return (value + step - 1) / step * step; }

bool Masks(const Spec& spec) { return spec.causal || spec.window_left || spec.window_right || spec.segment_ids; }

// Registers that features take from the scores, in columns of 16 keys: measured, so that no variant spills. `tight`:
// plain scores leave none.
int FeatureColumns(const Spec& spec, int head, bool slim) {
  const bool tight = head > 192 || (head > 96 && head <= 128);
  const int several = spec.bias() + spec.mask + spec.segment_ids + spec.softcap > 1 ? (head <= 128 ? 2 : 3) : 0;
  return several + (tight && spec.bias()) + (slim && head <= 64 && (spec.softcap || spec.dropout));
}

// Whether TMA can bring the bias in tiles, as far as the call says: its strides are known at the launch only.
bool BiasTiles(const Spec& spec) {
  const bool alone = !spec.mask && !spec.segment_ids && !spec.softcap && !spec.alibi;
  return (spec.bias_dtype == DType::kF16 || spec.bias_dtype == DType::kBF16) && alone &&
         std::max(spec.head_dim, spec.value_dim) <= 128;
}
bool BiasTiles(const Dense& bias) {
  constexpr int kStep = 8;  // elements in 16 bytes
  return bias.k_stride == 1 && bias.q_stride > 0 && reinterpret_cast<uintptr_t>(bias.data) % 16 == 0 &&
         bias.q_stride % kStep == 0 && bias.head_stride % kStep == 0 && bias.batch_stride % kStep == 0;
}

// Three consumer warpgroups where a row's registers allow it, else two.
Sm90ForwardTiles ChooseTiles(const Call& call, bool bias_tiles = false) {
  const Spec& spec = call.spec;
  const int head = std::max(spec.head_dim, spec.value_dim);
  const bool slim = !spec.bias() && !spec.mask && !spec.segment_ids;
  const int columns = FeatureColumns(spec, head, slim);
  const bool window = spec.window_left || spec.window_right;
  const bool long_plain = call.problem.q_len >= 8192 && !window && !spec.dropout;
  const bool dynamic = Masks(spec) || spec.q_lengths || spec.kv_lengths;
  // Where rows see many keys: with few, sums are small and tops rise often.
  const bool close_tops = call.problem.kv_len >= 16384 && !window && !spec.segment_ids && !spec.softcap;
  Sm90ForwardTiles tiles{128, 128, 2, 2, false, 1, dynamic, close_tops, bias_tiles};
  if (bias_tiles) {  // take no registers, but shared memory
    // With more rows there is less of the keys and values to load for a row, beside its bias.
    tiles.rows = 192;
    tiles.keys = head <= 64 ? 96 : 64;
    tiles.stages = head <= 64 ? 2 : 3;
    tiles.q_stages = head <= 64 ? 2 : 1;
    return tiles;
  }
  if (head <= 96) {
    if (slim) tiles.rows = 192;
    if (slim && spec.causal && head <= 64) tiles.stages = 3;  // groups drift apart at the diagonal
    if (head > 64) {
      tiles.keys = slim || spec.mask ? 96 : 112;
      tiles.q_stages = 1;
    }
  } else if (head <= 128 && slim && (spec.softcap || spec.alibi || long_plain)) {
    // The products of two other groups hide a longer softmax. Where the GPU is at its power limit, it counts that 192
    // rows read their keys and values as often as 128 do.
    tiles.rows = 192;
    tiles.keys = 80;
    tiles.q_stages = 1;
  } else if (head <= 128) {
    tiles.q_registers = slim && !spec.dropout;
    tiles.q_stages = tiles.q_registers ? 1 : 2;
  } else {
    tiles.keys = head <= 192 ? 96 : 80;
    tiles.q_stages = 1;
  }
  tiles.keys = std::max(tiles.keys - 16 * columns, 32);
  return tiles;
}

long long QueryTiles(const Problem& problem, const Sm90ForwardTiles& tiles) {  // of a head, or of a pack
  return CeilDiv(static_cast<long long>(problem.q_len) * tiles.packed, tiles.rows);
}

// Query heads of a key head that share tiles: all or one. They do where their queries are few and each by itself would
// leave much of a tile empty, if that saves a round of the GPU.
int PackedHeads(const Call& call, Sm90ForwardTiles tiles) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  const int group = problem.q_heads / problem.kv_heads;
  const bool same_for_heads = !spec.bias() && !spec.mask && !spec.alibi && !spec.dropout;
  if (64 % group != 0 || !same_for_heads) return 1;
  const auto rounds = [&](int packed) {
    tiles.packed = packed;
    return CeilDiv(QueryTiles(problem, tiles) * problem.batch * (problem.q_heads / packed), kMultiprocessors);
  };
  return rounds(group) * 8 <= rounds(1) * 7 ? group : 1;
}

size_t SharedBytes(const Spec& spec, const Sm90ForwardTiles& tiles) {
  const size_t head = RoundUp(spec.head_dim, 64), value = RoundUp(spec.value_dim, 64);
  const bool staged = tiles.q_stages == 2 || tiles.q_registers;
  const size_t q = tiles.q_stages * head + (staged ? value : 0);
  const size_t bias = tiles.bias_tiles ? tiles.stages * RoundUp(tiles.keys, 64) : 0;
  constexpr size_t kBarriersAndWork = 1024;
  return 2 * (tiles.rows * (q + bias) + tiles.stages * tiles.keys * (head + value)) + kBarriersAndWork;
}

std::string TilesText(const Sm90ForwardTiles& tiles) {
  std::string text = "#include \"sm90/args.h\"\nconstexpr jf::Sm90ForwardTiles kTiles{";
  const auto number = [](int n) { return std::to_string(n) + ", "; };
  const auto flag = [](bool yes) { return yes ? "true, " : "false, "; };
  text +=
      number(tiles.rows) + number(tiles.keys) + number(tiles.stages) + number(tiles.q_stages) + flag(tiles.q_registers);
  text += number(tiles.packed) + flag(tiles.dynamic) + flag(tiles.close_tops) + flag(tiles.bias_tiles);
  return text + "};\n";
}

std::string Reason(const Call& call) {
  const Spec& spec = call.spec;
  if (spec.dtype != DType::kF16 && spec.dtype != DType::kBF16) return "wgmma needs float16 or bfloat16";
  if (spec.head_dim % 8 != 0 || spec.value_dim % 8 != 0) return "TMA needs head sizes that are multiples of 8";
  if (spec.head_dim > 256 || spec.value_dim > 256) return "head sizes are at most 256";
  if (call.problem.scale <= 0) return "the running maximum of raw scores needs a positive scale";
  if (call.kv_splits > 1) return "split keys run on the sm80 kernel";
  return "";
}

}  // namespace

Planned PlanSm90Forward(const Call& call) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (const std::string reason = Reason(call); !reason.empty()) return Refusal{reason};

  Sm90ForwardTiles tiles = ChooseTiles(call);
  tiles.packed = PackedHeads(call, tiles);
  const int pairs = problem.batch * (problem.q_heads / tiles.packed);
  const long long all_tiles = QueryTiles(problem, tiles) * pairs;
  // Tiles of sm80/forward.cuh hold all query heads of a key head: a decoding step reads the keys once.
  const bool decoding = static_cast<long long>(problem.q_len) * problem.q_heads <= 64ll * problem.kv_heads;
  if ((decoding || all_tiles * 2 <= kMultiprocessors) && problem.kv_len >= 1024) {
    return Refusal{"few queries and many keys: the keys are better split over the GPU"};
  }
  if (all_tiles >= 1 << 30) return Refusal{"there are 2^30 tiles or more"};

  Plan plan{"sm90_forward"};
  const auto add_kernel = [&](const Sm90ForwardTiles& tiles) {
    plan.kernels.push_back({"sm90/forward.cuh", "sm90_forward", VariantText(spec, TilesText(tiles)),
                            128 * (1 + tiles.rows / 64), SharedBytes(spec, tiles)});
  };
  add_kernel(tiles);
  const bool may_tile_bias = BiasTiles(spec);  // the second kernel
  const Sm90ForwardTiles bias_tiles = ChooseTiles(call, true);
  if (may_tile_bias) add_kernel(bias_tiles);
  const size_t counter = tiles.dynamic ? plan.AddScratch(sizeof(int)) : 0;
  const SegmentPass segments = AddSegmentPass(call, tiles.rows / tiles.packed, tiles.keys, true, false, &plan);

  // Heads that are worked on side by side: under masks, whole groups of as many as have their keys and values in the
  // L2.
  int section = 1;
  if (Masks(spec)) {
    const int group = problem.q_heads / problem.kv_heads / tiles.packed;
    const long long bytes = 2ll * problem.kv_len * (spec.head_dim + spec.value_dim);
    section = static_cast<int>(std::clamp<long long>(kSectionBytes / bytes * group, 1, pairs));
  }
  plan.facts = {{"tile", std::to_string(tiles.rows) + " x " + std::to_string(tiles.keys)},
                {"tiles", std::to_string(all_tiles)},
                {"schedule", tiles.dynamic ? "drawn from a counter" : "dealt out in advance"}};
  if (tiles.packed > 1) plan.facts.push_back({"heads", std::to_string(tiles.packed) + " share a tile"});

  plan.launch = [=](const Launch& launch) {
    const Problem& problem = launch.call.problem;
    const Buffers& buffers = launch.buffers;
    const Dense& bias = launch.features.bias;
    const bool tile_bias = may_tile_bias && BiasTiles(bias);
    const Sm90ForwardTiles& chosen = tile_bias ? bias_tiles : tiles;
    const auto packed = static_cast<uint32_t>(chosen.packed), rows = static_cast<uint32_t>(chosen.rows),
               keys = static_cast<uint32_t>(chosen.keys);
    const auto map = [&](const void* data, const BatchMap& batch, int length, int heads, int size, uint32_t box_heads,
                         uint32_t box_rows) {
      return EncodeTensorMap(HeadsTensor(data, spec.dtype, batch.mod, length, heads, size, {64, box_heads, box_rows, 1},
                                         Swizzle::k128Bytes));
    };
    Sm90ForwardArgs args{};
    args.q = map(buffers.q, problem.q_batch, problem.q_len, problem.q_heads, spec.head_dim, packed, rows / packed);
    args.k = map(buffers.k, problem.k_batch, problem.kv_len, problem.kv_heads, spec.head_dim, 1, keys);
    args.v = map(buffers.v, problem.v_batch, problem.kv_len, problem.kv_heads, spec.value_dim, 1, keys);
    args.out_map =
        map(buffers.out, {1, problem.batch}, problem.q_len, problem.q_heads, spec.value_dim, packed, 64 / packed);
    if (tile_bias) {
      // An axis of size 1 needs a stride that TMA takes.
      const auto stride = [&](long long own) { return static_cast<uint64_t>(own != 0 ? own : bias.q_stride); };
      const auto size = [](long long own, int full) { return static_cast<uint64_t>(own != 0 ? full : 1); };
      args.bias = EncodeTensorMap({bias.data,
                                   spec.bias_dtype,
                                   {static_cast<uint64_t>(problem.kv_len), size(bias.head_stride, problem.q_heads),
                                    static_cast<uint64_t>(problem.q_len), size(bias.batch_stride, bias.batch.mod)},
                                   {stride(bias.head_stride), stride(bias.q_stride), stride(bias.batch_stride)},
                                   {64, 1, rows, 1},
                                   Swizzle::k128Bytes});
    }
    args.problem = problem;
    args.features = launch.features;
    args.out = buffers.out;
    args.lse = buffers.lse;
    args.segments = segments.Run(launch);
    args.tiles = static_cast<int>(QueryTiles(problem, chosen));
    args.section = section;
    if (tiles.dynamic) {
      args.counter = launch.Scratch<int>(counter);
      launch.Zero(args.counter, sizeof(int));
    }
    const long long blocks = std::min<long long>(QueryTiles(problem, chosen) * pairs, launch.multiprocessors);
    launch.Run(tile_bias ? 1 : 0, {{static_cast<unsigned>(blocks)}}, args);
  };
  return plan;
}

}  // namespace jf

// Plans and launches of cuda/sm90/forward_fp8.cuh and cuda/support/quantize.cuh.
#include <algorithm>
#include <string>

#include "kernels/segments.h"
#include "sm90/fp8_args.h"
#include "support/quantize.h"

namespace jf {
namespace {

// 64, 128 or 256; 0: too large.
int HeadTile(const Spec& spec) {
  const int size = std::max(spec.head_dim, spec.value_dim);
  return size <= 64 ? 64 : size <= 128 ? 128 : size <= 256 ? 256 : 0;
}

std::string DTypeText(DType dtype) { return "jf::DType(" + std::to_string(static_cast<int>(dtype)) + ")"; }

// Features that work on each score cost registers: such variants take smaller tiles.
Sm90Fp8Tiles ChooseTiles(const Call& call) {
  const Spec& spec = call.spec;
  const int head = spec.head_dim;
  const bool features = spec.segment_ids || spec.mask || spec.bias() || spec.alibi || spec.softcap;
  const int queries = features || head == 256 ? 128 : 192, keys = features ? 64 : head == 128 ? 96 : 128;
  return {queries, keys, head, 512 / head, 256 / head, call.out_dtype};
}

// sizeof the kernel's struct Shared.
size_t SharedBytes(const Sm90Fp8Tiles& tiles) {
  const size_t row_tile = tiles.queries * tiles.head, slot = 2 * tiles.keys * tiles.head;
  const size_t scales = std::max(4, tiles.stages) * (tiles.keys / kScaleBlock) * 16;
  const size_t barriers = 8 * (2 * kItems + 2 * tiles.q_stages + 4 * tiles.stages),
               items = kItems * (32 + tiles.queries / kScaleBlock * 4), nan_rows = 2 * tiles.queries;
  return ((tiles.q_stages + 2) * row_tile + tiles.stages * slot + scales + barriers + items + nan_rows + 1023) / 1024 *
         1024;
}

constexpr int kQuantizeThreads = 256;

QuantizeArray ArrayOf(const void* from, void* to, float* scales, int entries, int length, int heads, int head_tile,
                      const Rows& lengths) {
  const int chunks = CeilDiv(CeilDiv(length, kScaleBlock), kQuantizeThreads / head_tile);
  return {from, to, scales, entries, length, heads, chunks, lengths};
}

}  // namespace

Planned PlanSm90ForwardFp8(const Call& call) {
  const Spec& spec = call.spec;
  const Problem& problem = call.problem;
  if (spec.dropout) return Refusal{"fp8 has no dropout"};
  if (HeadTile(spec) != spec.head_dim) return Refusal{"query and key in fp8 have the head size of the kernel"};

  const Sm90Fp8Tiles tiles = ChooseTiles(call);
  Plan plan{"sm90_forward_fp8"};
  plan.kernels.push_back(
      {"sm90/forward_fp8.cuh", "sm90_forward_fp8",
       VariantText(spec, "#include \"sm90/fp8_args.h\"\nconstexpr jf::Sm90Fp8Tiles kTiles{" +
                             std::to_string(tiles.queries) + ", " + std::to_string(tiles.keys) + ", " +
                             std::to_string(tiles.head) + ", " + std::to_string(tiles.stages) + ", " +
                             std::to_string(tiles.q_stages) + ", " + DTypeText(tiles.out) + "};\n"),
       128 * (tiles.queries / 64 + 1), SharedBytes(tiles)});
  const SegmentPass segments = AddSegmentPass(call, tiles.queries, tiles.keys, true, false, &plan);
  const size_t counter = plan.AddScratch(sizeof(int));
  const int q_tiles = CeilDiv(problem.q_len, tiles.queries), pairs = problem.q_heads * problem.batch,
            items = q_tiles * pairs;
  // Groups of 64 rows that the tiles have too many stand where the fewest keys are.
  const int row0 = spec.causal && !spec.segment_ids ? (problem.q_len - q_tiles * tiles.queries) / 64 * 64 : 0;
  const long long head_bytes = 2LL * problem.kv_len * tiles.head;
  const int section = std::max(1, static_cast<int>(std::min<long long>(pairs, (32LL << 20) / head_bytes)));
  plan.facts = {{"scores", spec.dtype == DType::kInt8 ? "int8" : "e4m3"},
                {"tile", std::to_string(tiles.queries) + " x " + std::to_string(tiles.keys)},
                {"items", std::to_string(items)},
                {"grid", "one block a multiprocessor"}};

  plan.launch = [=](const Launch& launch) {
    const Problem& problem = launch.call.problem;
    const Fp8Buffers& in = launch.buffers.fp8;
    const auto size = [](int value) { return static_cast<uint32_t>(value); };
    const uint32_t row = size(std::min(tiles.head, 128));  // bytes of a swizzled row
    const Swizzle swizzle = row == 128 ? Swizzle::k128Bytes : Swizzle::k64Bytes;
    // [kv_batch * kv_heads, keys / 16, head / 16, 256 bytes]: a key tile is one run of it.
    const uint64_t run = 16 * kValueChunk, chunk = size(tiles.head * kValueChunk);
    const uint64_t chunks = CeilDiv(problem.kv_len, kScaleBlock) * (kScaleBlock / kValueChunk);
    const TiledTensor values{in.v,
                             DType::kE4M3,
                             {run, size(tiles.head / 16), chunks, size(problem.v_batch.mod * problem.kv_heads)},
                             {run, chunk, chunk * chunks},
                             {size(16 * kValueChunk), size(tiles.head / 16), size(tiles.keys / kValueChunk), 1},
                             Swizzle::kNone};
    launch.Zero(launch.Scratch<int>(counter), sizeof(int));
    const SegmentTiles segment_tiles = segments.Run(launch);
    launch.Run(
        0, {{static_cast<unsigned>(std::min(items, launch.multiprocessors))}},
        Sm90Fp8Args{EncodeTensorMap(HeadsTensor(in.q, spec.dtype, problem.q_batch.mod, problem.q_len, problem.q_heads,
                                                tiles.head, {row, 1, size(tiles.queries), 1}, swizzle)),
                    EncodeTensorMap(HeadsTensor(in.k, spec.dtype, problem.k_batch.mod, problem.kv_len, problem.kv_heads,
                                                tiles.head, {row, 1, size(tiles.keys), 1}, swizzle)),
                    EncodeTensorMap(values),
                    EncodeTensorMap(HeadsTensor(launch.buffers.out, tiles.out, problem.batch, problem.q_len,
                                                problem.q_heads, spec.value_dim, {64, 1, 64, 1}, Swizzle::k128Bytes)),
                    problem, launch.features, in.q_scale, in.k_scale, in.v_scale, launch.buffers.lse, segment_tiles,
                    launch.Scratch<int>(counter), q_tiles, row0, pairs, section});
  };
  return plan;
}

Planned PlanQuantize(const Call& call) {
  const int head = HeadTile(call.spec);
  if (head == 0) return Refusal{"fp8 has head sizes up to 256"};
  if (call.spec.dtype != DType::kF16 && call.spec.dtype != DType::kBF16) return Refusal{"quantize takes 16-bit types"};
  if (call.spec.head_dim % 8 != 0 || call.spec.value_dim % 8 != 0) return Refusal{"head sizes must be multiples of 8"};

  Spec spec{};
  spec.dtype = call.spec.dtype;
  spec.head_dim = call.spec.head_dim;
  spec.value_dim = call.spec.value_dim;
  spec.q_lengths = call.spec.q_lengths;
  spec.kv_lengths = call.spec.kv_lengths;
  Plan plan{"quantize"};
  plan.kernels.push_back(
      {"support/quantize.cuh", "quantize",
       VariantText(spec, "#include \"support/quantize.h\"\nconstexpr jf::QuantizeTiles kTiles{" + std::to_string(head) +
                             ", " + (call.rotate ? "true" : "false") + ", " + DTypeText(call.quantized) + "};\n"),
       kQuantizeThreads, 0});
  plan.facts = {{"scale block", std::to_string(kScaleBlock) + " tokens"}};
  plan.launch = [=](const Launch& launch) {
    const Problem& p = launch.call.problem;
    const Buffers& in = launch.buffers;
    const Fp8Buffers& out = in.fp8;
    const Features& features = launch.features;
    const QuantizeArgs args{
        ArrayOf(in.q, out.q, out.q_scale, p.q_batch.mod, p.q_len, p.q_heads, head, features.q_lengths),
        ArrayOf(in.k, out.k, out.k_scale, p.k_batch.mod, p.kv_len, p.kv_heads, head, features.kv_lengths),
        ArrayOf(in.v, out.v, out.v_scale, p.v_batch.mod, p.kv_len, p.kv_heads, head, features.kv_lengths)};
    unsigned blocks = 0;
    for (const QuantizeArray& array : {args.q, args.k, args.v}) blocks += array.entries * array.chunks * array.heads;
    launch.Run(0, {{blocks}}, args);
  };
  return plan;
}

}  // namespace jf

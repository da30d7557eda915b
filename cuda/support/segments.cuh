// Ranges of tiles that segment ids allow to meet, so that the attention kernels never compute the others.
//
// segment_bounds: least and largest id of every query tile and every key tile, lengths heeded; a tile past the length
// meets nothing. segment_ranges: for every query tile the smallest range of key tiles that holds all those whose bounds
// meet its own, and the same for key tiles. For ids in order (packed sequences) that is exact. Grid: x over batch
// entries, y over tiles, kWarps a block; one warp a tile.
#include "pieces/mask.cuh"
#include "support/segments.h"

namespace jf {

constexpr int kWarps = 4;

struct TileOfWarp {
  bool of_queries;
  int index;
};

// Tiles of queries first, then those of keys.
JF_DEVICE bool tile_of_warp(const SegmentArgs& args, TileOfWarp& tile) {
  const int query_tiles = ceil_div(args.problem.q_len, args.queries),
            key_tiles = ceil_div(args.problem.kv_len, args.keys);
  const int index = blockIdx.y * kWarps + threadIdx.x / 32;
  tile = {index < query_tiles, index < query_tiles ? index : index - query_tiles};
  return index < query_tiles + key_tiles;
}

}  // namespace jf

extern "C" __global__ void __launch_bounds__(32 * jf::kWarps)
    segment_bounds(const __grid_constant__ jf::SegmentArgs args) {
  using namespace jf;
  TileOfWarp tile;
  if (!tile_of_warp(args, tile)) return;
  const Problem& p = args.problem;
  const int b = blockIdx.x;
  const Segments segments = segments_of(p, args.features, band_of(p, args.features, b), b);
  const int* ids = tile.of_queries ? segments.q_ids : segments.kv_ids;
  const int width = tile.of_queries ? args.queries : args.keys;
  const int end = min((tile.index + 1) * width, tile.of_queries ? segments.q_end : segments.kv_end);
  int low = 0x7fffffff, high = -0x7fffffff - 1;
  for (int i = tile.index * width + lane_id(); i < end; i += 32) {
    low = min(low, ids[i]);
    high = max(high, ids[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    low = min(low, __shfl_xor_sync(~0u, low, step));
    high = max(high, __shfl_xor_sync(~0u, high, step));
  }
  if (lane_id() == 0) {
    const int tiles = ceil_div(tile.of_queries ? p.q_len : p.kv_len, width);
    (tile.of_queries ? args.q_bounds : args.kv_bounds)[static_cast<long long>(b) * tiles + tile.index] = {low, high};
  }
}

extern "C" __global__ void __launch_bounds__(32 * jf::kWarps)
    segment_ranges(const __grid_constant__ jf::SegmentArgs args) {
  using namespace jf;
  TileOfWarp tile;
  if (!tile_of_warp(args, tile)) return;
  Range* ranges = tile.of_queries ? args.key_tiles : args.query_tiles;
  if (ranges == nullptr) return;
  const long long b = blockIdx.x;
  const int query_tiles = ceil_div(args.problem.q_len, args.queries),
            key_tiles = ceil_div(args.problem.kv_len, args.keys);
  const int rows = tile.of_queries ? query_tiles : key_tiles, columns = tile.of_queries ? key_tiles : query_tiles;
  const IdBounds own = (tile.of_queries ? args.q_bounds : args.kv_bounds)[b * rows + tile.index];
  const IdBounds* others = (tile.of_queries ? args.kv_bounds : args.q_bounds) + b * columns;
  int begin = columns, end = 0;
  for (int i = lane_id(); i < columns; i += 32) {
    if (own.meets(others[i])) {
      begin = min(begin, i);
      end = max(end, i + 1);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    begin = min(begin, __shfl_xor_sync(~0u, begin, step));
    end = max(end, __shfl_xor_sync(~0u, end, step));
  }
  if (lane_id() == 0) ranges[b * rows + tile.index] = begin < end ? Range{begin, end} : Range{0, 0};
}

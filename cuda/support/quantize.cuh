// Query, key and value to 8 bits for sm90/forward_fp8.cuh: the same bits as jax_flash/fp8.py. The value becomes e4m3,
// query and key e4m3 or int8.
//
//   q, k  rotated (random signs, then the Hadamard butterflies of width 1, 2, 4, ...), divided by the scale of their
//   block v     divided by its scale, stored [heads, keys / 16, head, 16] with the 16 keys in the order of the
//   registers of P
//
// A scale is for kScaleBlock tokens of a head: a power of two, for int8 the largest magnitude / 127. Grid: one block of
// kThreads for kBlocksPerChunk scale blocks of one head of one array, heads innermost: blocks side by side read and
// write whole rows. A scale block has kHead threads; a thread holds 32 values of one token, kLanes threads next to each
// other hold a token: 8 values, then 8 of the next lane's, ... So a butterfly is between registers (widths 1, 2, 4 and
// the largest two) or between lanes. Everything is read and written once.
#include "pieces/math.cuh"
#include "support/quantize.h"

namespace jf {

constexpr int kThreads = 256;
constexpr int kHead = kTiles.head;
// Thread blocks of a multiprocessor: as many as have registers without spills, so that loads of some run under the
// arithmetic of others.
constexpr int kResident = kTiles.scores == DType::kInt8 || kSpec.q_lengths || kSpec.kv_lengths ? 4 : 5;
constexpr int kLanes = kHead / 32;                      // of a token
constexpr int kBlocksPerChunk = kThreads / kHead;       // scale blocks of a thread block
constexpr int kRuns = 4;                                // of 8 values, in a thread
constexpr int kPadded = kHead + 8;                      // bytes of a row of values in shared memory: banks differ
constexpr int kLeastExponent = -50;                     // of a scale of e4m3
constexpr float kLeastOfIntegers = 1.f / (1ull << 43);  // magnitude that a scale of int8 is for
static_assert(kBlocksPerChunk >= 1 && kHead >= 64);

// Of the columns of each lane: shifted left by i, bits 15 and 31 say whether the rotation turns the signs of its pair
// number i.
struct Signs {
  u32 words[kLanes];
};
constexpr JF_HOST_DEVICE Signs make_signs() {
  Signs signs{};
  for (u32 d = 0; d < kSpec.head_dim; d++) {  // padding keeps its sign: a -0 would be another byte
    u32 x = d;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    const u32 run = d / (8 * kLanes), pair = run * 4 + d % 8 / 2;
    signs.words[d / 8 % kLanes] |= (x >> 16 & 1) << (d % 2 * 16 + 15 - pair);
  }
  return signs;
}
__constant__ const Signs kSigns = make_signs();

// A pair of values bounded by 2^60; NaN stays NaN. No float16 is larger.
JF_DEVICE u32 bounded(u32 pair) { return kSpec.dtype == DType::kBF16 ? bounded_bf16x2(pair, 0x5d805d80) : pair; }

struct Place {
  int lane;   // of the token
  int block;  // scale block, within the chunk
  int token;  // within the scale block
  JF_DEVICE int column(int run) const { return (run * kLanes + lane) * 8; }
};

// Butterflies over blocks of kSize columns.
template <int kSize>
JF_DEVICE void rotate(float (&x)[8 * kRuns], const Place& at) {
  const auto between_registers = [&](int distance) {
#pragma unroll
    for (int i = 0; i < 8 * kRuns; i++) {
      if (i & distance) continue;
      const float low = x[i], high = x[i + distance];
      x[i] = low + high;
      x[i + distance] = low - high;
    }
  };
#pragma unroll
  for (int width = 1; width < kSize; width *= 2) {
    if (width < 8) {
      between_registers(width);
    } else if (width < 8 * kLanes) {
      const int distance = width / 8;
      const float own = at.lane & distance ? -1.f : 1.f;  // the upper one gets low - high
#pragma unroll
      for (int i = 0; i < 8 * kRuns; i++) x[i] = fmaf(x[i], own, __shfl_xor_sync(~0u, x[i], distance));
    } else {
      between_registers(width / kLanes);
    }
  }
}

template <DType kTo>
JF_DEVICE u32 pack8(float a, float b, float c, float d) {
  return kTo == DType::kInt8 ? pack_int8(a, b, c, d) : pack_e4m3(a, b, c, d);
}

// Of a block, from its largest magnitude: what its values are multiplied by, and what takes that back.
struct Scale {
  float inverse, scale;
};

template <DType kTo>
JF_DEVICE Scale scale_of(float largest) {
  if constexpr (kTo == DType::kInt8) {
    largest = fmaxf(largest, kLeastOfIntegers);
    // 127 / largest from the first 16 bits of it, without a division that is rounded elsewhere than in
    // jax_flash/fp8.py.
    const u32 bits = __float_as_int(largest), digits = (bits & 0x7fffff | 0x800000) >> 8;
    const float power = __int_as_float((244 - (bits >> 23)) << 23);
    return {static_cast<float>((127u << 25) / digits) * power, largest * (1.f / 127.f)};
  }
  // The least power of two that takes the largest value to at most 448 = 1.75 * 2^8.
  const int exponent = largest == 0.f ? 0 : max(((__float_as_int(largest) + 0x1fffff) >> 23) - 135, kLeastExponent);
  return {__int_as_float((127 - exponent) << 23), __int_as_float((127 + exponent) << 23)};
}

// What this thread block does.
struct Chunk {
  int entry, head, block0;  // first scale block
};

JF_DEVICE Chunk chunk_of(const QuantizeArray& array, u32 index) {
  const u32 heads = array.heads, chunks = array.chunks, rest = index / heads;
  return {static_cast<int>(rest / chunks), static_cast<int>(index % heads),
          static_cast<int>(rest % chunks) * kBlocksPerChunk};
}

// kSize: of a head, as it comes. kRotate: query and key. kTranspose: value. kGrowth: what the scales are divided by.
template <int kSize, DType kTo, bool kRotate, int kGrowth, bool kTranspose, bool kLengths>
JF_DEVICE void quantize(const QuantizeArray& array, int index) {
  constexpr bool kIntegers = kTo == DType::kInt8;
  __shared__ float largest_of_warp[kThreads / 32];
  alignas(16) __shared__ unsigned char values[kTranspose ? kBlocksPerChunk * kScaleBlock * kPadded : 1];
  const Chunk chunk = chunk_of(array, index);
  const u32 thread = threadIdx.x;  // as an int, it would be divided with an eye to its sign
  const Place at{static_cast<int>(thread % kLanes), static_cast<int>(thread / kHead),
                 static_cast<int>(thread % kHead / kLanes)};
  const int token = (chunk.block0 + at.block) * kScaleBlock + at.token;
  int end = array.length;
  if constexpr (kLengths) end = min(end, *row_of<int>(array.lengths, chunk.entry));

  float x[8 * kRuns];
  const long long row = (static_cast<long long>(chunk.entry) * array.length + token) * array.heads + chunk.head;
  const uint4* from =
      reinterpret_cast<const uint4*>(static_cast<const char*>(array.from) + row * (2 * kSize)) + at.lane;
  uint4 words[kRuns];
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    words[run] = token < end && at.column(run) < kSize ? __ldg(from + run * kLanes) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    u32 pairs[4] = {words[run].x, words[run].y, words[run].z, words[run].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      pairs[i] = bounded(pairs[i]);
      if constexpr (kRotate) pairs[i] ^= kSigns.words[at.lane] << (4 * run + i) & 0x80008000;
      x[8 * run + 2 * i] = to_float<kSpec.dtype>(static_cast<unsigned short>(pairs[i]));
      x[8 * run + 2 * i + 1] = to_float<kSpec.dtype>(static_cast<unsigned short>(pairs[i] >> 16));
    }
  }
  if constexpr (kRotate) rotate<kSize & -kSize>(x, at);

  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < 8 * kRuns; i++) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  u32 nan_lanes = 0;       // of the warp
  bool nan_block = false;  // whether the scale block has any
  if constexpr (kIntegers) {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < 8 * kRuns; i++) nan |= x[i] != x[i];
    nan_lanes = __ballot_sync(~0u, nan);
    if (nan_lanes != 0) largest = -largest;  // the sign tells the other warps
  }
  if (thread % 32 == 0) largest_of_warp[thread / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kHead / 32; warp++) {
    const float of_warp = largest_of_warp[at.block * (kHead / 32) + warp];
    nan_block |= kIntegers && __float_as_int(of_warp) < 0;
    largest = fmaxf(largest, kIntegers ? fabsf(of_warp) : of_warp);
  }
  const auto [inverse, scale] = scale_of<kTo>(largest);

  const int blocks = (array.length + kScaleBlock - 1) / kScaleBlock, block = chunk.block0 + at.block;
  const long long head = static_cast<long long>(chunk.entry) * array.heads + chunk.head;
  if (thread % kHead == 0 && block < blocks) {
    array.scales[head * blocks + block] = (nan_block ? -scale : scale) / kGrowth;
  }
#pragma unroll
  for (int run = 0; run < kRuns; run++) {
    const float* y = &x[8 * run];
    uint2 packed{pack8<kTo>(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse),
                 pack8<kTo>(y[4] * inverse, y[5] * inverse, y[6] * inverse, y[7] * inverse)};
    if (nan_lanes >> thread % 32 / kLanes * kLanes & (1u << kLanes) - 1)
      packed = {kNaNByte * 0x01010101u, kNaNByte * 0x01010101u};
    if constexpr (kTranspose) {
      *reinterpret_cast<uint2*>(&values[(at.block * kScaleBlock + at.token) * kPadded + at.column(run)]) = packed;
    } else if (token < array.length) {
      reinterpret_cast<uint2*>(static_cast<char*>(array.to) + row * kHead)[run * kLanes + at.lane] = packed;
    }
  }
  if constexpr (kTranspose) {
    __syncthreads();
    constexpr int kColumns = kBlocksPerChunk * kScaleBlock / kValueChunk * kHead;  // of 16 keys
#pragma unroll
    for (int first = 0; first < kColumns; first += kThreads) {
      const int column = (first + thread) % kHead, group = (first + thread) / kHead;
      if (chunk.block0 + group * kValueChunk / kScaleBlock >= blocks) break;
      u32 words[4];
#pragma unroll
      for (int w = 0; w < 4; w++) {
        words[w] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = 2 * w + (i < 2 ? i : 6 + i);  // the order of P's registers
          words[w] |= static_cast<u32>(values[(group * kValueChunk + key) * kPadded + column]) << 8 * i;
        }
      }
      const long long place =
          (head * blocks + chunk.block0) * (kScaleBlock / kValueChunk) + group;  // of 16 keys, in this array
      *reinterpret_cast<uint4*>(static_cast<char*>(array.to) + (place * kHead + column) * kValueChunk) =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

JF_DEVICE int chunks_of(const QuantizeArray& array) { return array.entries * array.chunks * array.heads; }

}  // namespace jf

extern "C" __global__ void __launch_bounds__(jf::kThreads, jf::kResident)
    quantize(const __grid_constant__ jf::QuantizeArgs args) {
  using namespace jf;
  // The butterflies of q and k grow q . k by their size: the scales of k take that back.
  constexpr int kGrowth = kTiles.rotate ? kSpec.head_dim & -kSpec.head_dim : 1;
  const int index = blockIdx.x, q = chunks_of(args.q), k = chunks_of(args.k);
  if (index < q) {
    quantize<kSpec.head_dim, kTiles.scores, kTiles.rotate, 1, false, kSpec.q_lengths>(args.q, index);
  } else if (index < q + k) {
    quantize<kSpec.head_dim, kTiles.scores, kTiles.rotate, kGrowth, false, kSpec.kv_lengths>(args.k, index - q);
  } else {
    quantize<kSpec.value_dim, DType::kE4M3, false, 1, true, kSpec.kv_lengths>(args.v, index - q - k);
  }
}

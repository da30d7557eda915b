#include "kernels/sm80.h"

#include <algorithm>

namespace jf {

std::string Sm80Refusal(const Spec& spec) {
  if (spec.dtype != DType::kF16 && spec.dtype != DType::kBF16) return "the sm80 kernels take float16 and bfloat16";
  for (int size : {spec.head_dim, spec.value_dim}) {
    if (size < 8 || size > 256 || size % 8 != 0) {
      return "head size " + std::to_string(size) + " is not a multiple of 8 up to 256";
    }
  }
  return "";
}

int Sm80HeadTile(int size) {
  for (int tile : {64, 96, 128, 192}) {
    if (size <= tile) return tile;
  }
  return 256;
}

size_t SharedLimit(int arch) {
  if (arch == 80 || arch == 87) return 163 << 10;
  if (arch >= 90 && arch < 120) return 227 << 10;
  return 99 << 10;
}

bool HasScoreFeatures(const Spec& spec) {
  return spec.bias() || spec.mask || spec.alibi || spec.softcap || spec.dropout;
}

std::string TilesText(const Sm80Tiles& tiles) {
  std::string fields;
  for (int field : {tiles.queries, tiles.keys, tiles.head_dim, tiles.value_dim, tiles.warps}) {
    fields += std::to_string(field) + ", ";
  }
  fields += tiles.packed ? "true, " : "false, ";
  fields += tiles.split ? "true" : "false";
  return "#include \"sm80/args.h\"\nconstexpr jf::Sm80Tiles kTiles{" + fields + "};\n";
}

int L2Section(const Call& call) {
  constexpr long long kBytes = 32 << 20;
  const long long bytes = 2LL * call.problem.kv_len * (call.spec.head_dim + call.spec.value_dim);
  const int group = call.problem.q_heads / call.problem.kv_heads;
  return static_cast<int>(std::clamp(kBytes / bytes, 1LL, 1LL << 20)) * group;
}

}  // namespace jf

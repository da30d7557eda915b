#include "kernel.h"

#include <cstring>
#include <type_traits>

#include "driver.h"

namespace jf {
namespace {

// Element types and their sizes, as cuTensorMapEncodeTiled numbers them.
struct Element {
  int type, bytes;
};

Element TmaElement(DType dtype) {
  switch (dtype) {
    case DType::kE4M3:
    case DType::kInt8:
      return {0, 1};
    case DType::kF16:
      return {6, 2};
    case DType::kF32:
      return {7, 4};
    case DType::kBF16:
      return {9, 2};
    case DType::kNone:
      break;
  }
  throw Error("a tensor map needs a data type");
}

constexpr int kClusterAttribute = 4, kProgrammaticAttribute = 6;

}  // namespace

std::string VariantText(const Spec& spec, const std::string& rest) {
  std::string fields;
  ForEachField(spec, [&](const auto& field) {
    using Field = std::decay_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, DType>) {
      fields += "jf::DType(" + std::to_string(static_cast<int>(field)) + "), ";
    } else if constexpr (std::is_same_v<Field, bool>) {
      fields += field ? "true, " : "false, ";
    } else {
      fields += std::to_string(field) + ", ";
    }
  });
  return "#pragma once\n#include \"spec.h\"\nconstexpr jf::Spec kSpec{" + fields + "};\n" + rest;
}

void Launch::RunKernel(size_t index, const LaunchShape& shape, const void* const* args) const {
  const KernelVariant& kernel = plan->kernels.at(index);
  const Extent &grid = shape.grid, &cluster = shape.cluster;
  driver::LaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (cluster.x * cluster.y * cluster.z > 1) {
    attributes[count].id = kClusterAttribute;
    const unsigned extent[3] = {cluster.x, cluster.y, cluster.z};
    std::memcpy(attributes[count++].cluster, extent, sizeof extent);
  }
  if (shape.programmatic) {
    attributes[count].id = kProgrammaticAttribute;
    attributes[count++].programmatic = 1;
  }
  driver::LaunchKernel({{grid.x, grid.y, grid.z},
                        {static_cast<unsigned>(kernel.threads), 1, 1},
                        static_cast<unsigned>(kernel.shared_bytes),
                        stream,
                        attributes,
                        count},
                       functions[index], args);
}

void Launch::Zero(void* data, size_t bytes) const { driver::ZeroAsync(data, bytes, stream); }

TensorMap EncodeTensorMap(const TiledTensor& tensor) {
  const Element element = TmaElement(tensor.dtype);
  uint64_t byte_strides[3];
  for (int axis = 0; axis < 3; ++axis) byte_strides[axis] = tensor.strides[axis] * element.bytes;
  return driver::EncodeTiled(element.type, tensor.data, tensor.sizes.data(), byte_strides, tensor.box.data(),
                             static_cast<int>(tensor.swizzle));
}

TiledTensor HeadsTensor(const void* data, DType dtype, int batch, int length, int heads, int size,
                        std::array<uint32_t, 4> box, Swizzle swizzle) {
  const uint64_t row = size, position = row * heads, entry = position * length;
  return {data,
          dtype,
          {row, static_cast<uint64_t>(heads), static_cast<uint64_t>(length), static_cast<uint64_t>(batch)},
          {row, position, entry},
          box,
          swizzle};
}

}  // namespace jf

#include "buffers.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "sm90/fp8_args.h"

namespace jf {
namespace {

namespace ffi = xla::ffi;

ffi::DataType ElementType(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return ffi::DataType::F16;
    case DType::kBF16:
      return ffi::DataType::BF16;
    case DType::kF32:
      return ffi::DataType::F32;
    case DType::kE4M3:
      return ffi::DataType::F8E4M3FN;
    case DType::kInt8:
      return ffi::DataType::S8;
    case DType::kNone:
      break;
  }
  return ffi::DataType::INVALID;
}

// One buffer: `leading` batch axes, then `own` ones.
class Array {
 public:
  Array(const char* name, const ffi::AnyBuffer& buffer) : name_(name), buffer_(buffer) {}

  void* data() const { return buffer_.untyped_data(); }
  int rank() const { return static_cast<int>(buffer_.dimensions().size()); }
  int64_t size(int axis) const { return buffer_.dimensions()[axis]; }
  size_t bytes() const { return buffer_.size_bytes(); }

  void Expect(bool condition, const char* what) const {
    if (!condition) throw Error(std::string(name_) + " has the wrong " + what + " for its custom call");
  }

  void ExpectType(ffi::DataType type) const { Expect(buffer_.element_type() == type, "type"); }

  // `sizes` are those of the axes behind `first`.
  void ExpectSizes(int first, std::initializer_list<int64_t> sizes) const {
    Expect(rank() == first + static_cast<int>(sizes.size()), "rank");
    for (int64_t wanted : sizes) Expect(size(first++) == wanted, "shape");
  }

 private:
  const char* name_;
  ffi::AnyBuffer buffer_;
};

class Binder {
 public:
  Binder(const ffi::RemainingArgs& args, const ffi::RemainingRets& results, Launch* launch)
      : args_(args), results_(results), launch_(*launch), spec_(launch->call.spec), problem_(launch->call.problem) {}

  void Bind() {
    switch (launch_.call.direction) {
      case Direction::kQuantize:
        BindQuantize();
        break;
      case Direction::kForwardFp8:
        BindForwardFp8();
        break;
      default:
        BindAttention();
    }
  }

 private:
  void BindAttention() {
    const Array q = Next("query"), k = Next("key"), v = Next("value");
    const bool forward = launch_.call.direction == Direction::kForward;
    const Array out = forward ? NextResult("out") : Next("out");
    const Array lse = forward ? NextResult("lse") : Next("lse");
    BindLeading(out);

    Buffers& buffers = launch_.buffers;
    buffers.q = Heads(q, problem_.q_len, problem_.q_heads, spec_.head_dim, &problem_.q_batch);
    buffers.k = Heads(k, problem_.kv_len, problem_.kv_heads, spec_.head_dim, &problem_.k_batch);
    buffers.v = Heads(v, problem_.kv_len, problem_.kv_heads, spec_.value_dim, &problem_.v_batch);
    buffers.out = FullHeads(out, problem_.q_len, problem_.q_heads, spec_.value_dim);
    buffers.lse = FullRows(lse);
    if (!forward) {
      buffers.dout = FullHeads(Next("dout"), problem_.q_len, problem_.q_heads, spec_.value_dim);
      if (spec_.lse_cotangent) buffers.dlse = FullRows(Next("dlse"));
    }
    BindFeatures();
    if (next_arg_ != args_.size()) throw Error("the custom call has more operands than its attributes name");

    if (launch_.call.direction == Direction::kBackward) {
      buffers.dq = FullHeads(NextResult("dq"), problem_.q_len, problem_.q_heads, spec_.head_dim);
      buffers.dk = FullHeads(NextResult("dk"), problem_.kv_len, problem_.kv_heads, spec_.head_dim);
      buffers.dv = FullHeads(NextResult("dv"), problem_.kv_len, problem_.kv_heads, spec_.value_dim);
    } else if (launch_.call.direction == Direction::kBiasGradient) {
      const Array dbias = NextResult("dbias");
      const Dense shape = Scores(dbias, ElementType(spec_.bias_dtype));
      const Dense& bias = launch_.features.bias;
      dbias.Expect(shape.batch.div == bias.batch.div && shape.batch.mod == bias.batch.mod &&
                       shape.head_stride == bias.head_stride && shape.q_stride == bias.q_stride &&
                       shape.k_stride == bias.k_stride,
                   "shape");
      buffers.dbias = dbias.data();
    }
    BindScratch();
  }

  // Batch axes of query, key and value: each is full in one of them at least.
  void BindQuantize() {
    const Array q = Next("query"), k = Next("key"), v = Next("value");
    q.Expect(q.rank() >= 3 && k.rank() == q.rank() && v.rank() == q.rank(), "rank");
    for (int axis = 0; axis + 3 < q.rank(); ++axis) {
      leading_.push_back(std::max({q.size(axis), k.size(axis), v.size(axis)}));
    }
    Buffers& buffers = launch_.buffers;
    buffers.q = Heads(q, problem_.q_len, problem_.q_heads, spec_.head_dim, &problem_.q_batch);
    buffers.k = Heads(k, problem_.kv_len, problem_.kv_heads, spec_.head_dim, &problem_.k_batch);
    buffers.v = Heads(v, problem_.kv_len, problem_.kv_heads, spec_.value_dim, &problem_.v_batch);
    BindFeatures();
    BindFp8(launch_.call.quantized, [&](const char* name) { return NextResult(name); });
    BindScratch();
  }

  void BindForwardFp8() {
    const Array out = NextResult("out");
    BindLeading(out);
    BindFp8(spec_.dtype, [&](const char* name) { return Next(name); });
    BindFeatures();
    if (next_arg_ != args_.size()) throw Error("the custom call has more operands than its attributes name");
    launch_.buffers.out = FullHeads(out, problem_.q_len, problem_.q_heads, spec_.value_dim, launch_.call.out_dtype);
    launch_.buffers.lse = FullRows(NextResult("lse"));
    BindScratch();
  }

  // jax_flash.fp8.Quantized; scores: the type of query and key.
  template <typename NextArray>
  void BindFp8(DType scores, NextArray next) {
    Fp8Buffers& fp8 = launch_.buffers.fp8;
    const Array q = next("query"), k = next("key"), v = next("value");
    const auto blocks = [](int length) { return CeilDiv(length, kScaleBlock); };
    const int64_t head = q.size(q.rank() - 1);
    const auto bind = [&](const Array& array, DType dtype, std::initializer_list<int64_t> sizes, BatchMap* batch) {
      array.ExpectType(ElementType(dtype));
      array.ExpectSizes(leading(), sizes);
      *batch = Map(array);
      return array.data();
    };
    fp8.q = bind(q, scores, {problem_.q_len, problem_.q_heads, head}, &problem_.q_batch);
    fp8.k = bind(k, scores, {problem_.kv_len, problem_.kv_heads, head}, &problem_.k_batch);
    fp8.v = bind(v, DType::kE4M3,
                 {problem_.kv_heads, blocks(problem_.kv_len) * kScaleBlock / kValueChunk, head * kValueChunk},
                 &problem_.v_batch);
    const auto bind_scales = [&](const char* name, int heads, int length, const BatchMap& like) {
      const Array scales = next(name);
      scales.ExpectType(ffi::DataType::F32);
      scales.ExpectSizes(leading(), {heads, blocks(length)});
      const BatchMap batch = Map(scales);
      scales.Expect(batch.div == like.div && batch.mod == like.mod, "shape");
      return static_cast<float*>(scales.data());
    };
    fp8.q_scale = bind_scales("query_scale", problem_.q_heads, problem_.q_len, problem_.q_batch);
    fp8.k_scale = bind_scales("key_scale", problem_.kv_heads, problem_.kv_len, problem_.k_batch);
    fp8.v_scale = bind_scales("value_scale", problem_.kv_heads, problem_.kv_len, problem_.v_batch);
  }

  // The full batch axes, as `out` has them.
  void BindLeading(const Array& out) {
    out.Expect(out.rank() >= 3, "rank");
    for (int axis = 0; axis + 3 < out.rank(); ++axis) leading_.push_back(out.size(axis));
    int64_t batch = 1;
    for (int64_t size : leading_) batch *= size;
    out.Expect(batch == problem_.batch, "shape");
  }

  void BindScratch() {
    const Array scratch = NextResult("scratch");
    scratch.Expect(scratch.bytes() >= launch_.plan->scratch_bytes, "size");
    launch_.buffers.scratch = static_cast<unsigned char*>(scratch.data());
  }

  // In the order of jax_flash.spec.Operands.
  void BindFeatures() {
    Features& features = launch_.features;
    if (spec_.q_offset) features.q_offset = Vector(Next("q_offset"), ffi::DataType::S32, {});
    if (spec_.segment_ids) {
      features.q_segment_ids = Vector(Next("q_segment_ids"), ffi::DataType::S32, {problem_.q_len});
      features.kv_segment_ids = Vector(Next("kv_segment_ids"), ffi::DataType::S32, {problem_.kv_len});
    }
    if (spec_.q_lengths) features.q_lengths = Vector(Next("q_lengths"), ffi::DataType::S32, {});
    if (spec_.kv_lengths) features.kv_lengths = Vector(Next("kv_lengths"), ffi::DataType::S32, {});
    if (spec_.mask) features.mask = Scores(Next("mask"), ffi::DataType::PRED);
    if (spec_.bias()) features.bias = Scores(Next("bias"), ElementType(spec_.bias_dtype));
    if (spec_.alibi) features.alibi_slopes = Vector(Next("alibi_slopes"), ffi::DataType::F32, {problem_.q_heads});
    if (spec_.sinks) features.sinks = static_cast<const float*>(PerHead(Next("sinks"), ffi::DataType::F32));
    if (spec_.dropout) {
      features.dropout_seed = Vector(Next("dropout_seed"), ffi::DataType::U32, {2});
      features.dropout_batch = Vector(Next("dropout_batch"), ffi::DataType::S32, {});
      features.dropout_head = static_cast<const int*>(PerHead(Next("dropout_head"), ffi::DataType::S32));
    }
  }

  Array Next(const char* name) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
    if (buffer.has_error()) throw Error(std::string("the custom call has no operand ") + name);
    return {name, *buffer};
  }

  Array NextResult(const char* name) {
    auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
    if (buffer.has_error()) throw Error(std::string("the custom call has no result ") + name);
    return {name, **buffer};
  }

  int leading() const { return static_cast<int>(leading_.size()); }

  // Leading axes are full or 1; those that are full must lie together.
  BatchMap Map(const Array& array) const {
    array.Expect(array.rank() >= leading(), "rank");
    BatchMap map{1, 1};
    bool inside = false, behind = false;
    for (int axis = 0; axis < leading(); ++axis) {
      const int full = static_cast<int>(leading_[axis]);
      if (full == 1) {
        array.Expect(array.size(axis) == 1, "shape");
      } else if (array.size(axis) == full) {
        array.Expect(!behind, "batch axes: the broadcast ones lie between others");
        inside = true;
        map.mod *= full;
      } else {
        array.Expect(array.size(axis) == 1, "shape");
        behind = inside;
        if (inside) map.div *= full;
      }
    }
    return map;
  }

  void ExpectFull(const Array& array) const {
    for (int axis = 0; axis < leading(); ++axis) array.Expect(array.size(axis) == leading_[axis], "shape");
  }

  // [*B, length, heads, size] with full batch axes.
  void* FullHeads(const Array& array, int length, int heads, int size) const {
    return FullHeads(array, length, heads, size, spec_.dtype);
  }
  void* FullHeads(const Array& array, int length, int heads, int size, DType dtype) const {
    array.ExpectType(ElementType(dtype));
    array.ExpectSizes(leading(), {length, heads, size});
    ExpectFull(array);
    return array.data();
  }

  const void* Heads(const Array& array, int length, int heads, int size, BatchMap* batch) const {
    array.ExpectType(ElementType(spec_.dtype));
    array.ExpectSizes(leading(), {length, heads, size});
    *batch = Map(array);
    return array.data();
  }

  // float [*B, N, T] with full batch axes.
  float* FullRows(const Array& array) const {
    array.ExpectType(ffi::DataType::F32);
    array.ExpectSizes(leading(), {problem_.q_heads, problem_.q_len});
    ExpectFull(array);
    return static_cast<float*>(array.data());
  }

  Rows Vector(const Array& array, ffi::DataType type, std::initializer_list<int64_t> sizes) const {
    array.ExpectType(type);
    array.ExpectSizes(leading(), sizes);
    return {array.data(), Map(array)};
  }

  const void* PerHead(const Array& array, ffi::DataType type) const {
    array.ExpectType(type);
    array.ExpectSizes(0, {problem_.q_heads});
    return array.data();
  }

  // [*B, N, T, S] where each axis may be 1.
  Dense Scores(const Array& array, ffi::DataType type) const {
    array.ExpectType(type);
    array.Expect(array.rank() == leading() + 3, "rank");
    const int64_t full[] = {problem_.q_heads, problem_.q_len, problem_.kv_len};
    int64_t strides[3], stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
      const int64_t size = array.size(leading() + axis);
      array.Expect(size == 1 || size == full[axis], "shape");
      strides[axis] = size == 1 ? 0 : stride;
      stride *= size;
    }
    return {array.data(), Map(array), stride, strides[0], strides[1], strides[2]};
  }

  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& results_;
  Launch& launch_;
  const Spec& spec_;
  Problem& problem_;
  std::vector<int64_t> leading_;
  size_t next_arg_ = 0, next_result_ = 0;
};

}  // namespace

void BindBuffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& results, Launch* launch) {
  Binder(args, results, launch).Bind();
}

}  // namespace jf

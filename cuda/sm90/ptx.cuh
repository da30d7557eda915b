// Hopper's instructions as functions: mbarriers, TMA, wgmma, register shares, named barriers, stmatrix. Shared-memory
// addresses are 32-bit (`shared_address`), so that a ring's slot is base + stage * size. What each means: the PTX ISA's
// pages of that name.
#pragma once
#include "sm90/descriptors.cuh"
#include "tensor_map.h"

namespace jf {

// mbarriers: a phase ends when `arrivals` threads arrived and all expected bytes came. wait(parity) returns once the
// phase of that parity has ended; before the first phase ends, wait(1) returns at once.
JF_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to TMA and to the cluster; a block or cluster barrier must follow.
JF_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
JF_DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
JF_DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
JF_DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Hardware barriers 1 to 15 (0 is __syncthreads); `threads` counts those that arrive and those that wait.
// Not the aligned form: warps may meet here from different places of the program.
JF_DEVICE void named_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
JF_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of a thread from here on; every warp of the warpgroup executes it. The shares of a block must not exceed
// what the launch allotted.
template <int kCount>
JF_DEVICE void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
JF_DEVICE void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// TMA: boxes of 4-D tensors (innermost coordinate first) and plain runs of bytes. Called by one thread.
JF_DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
JF_DEVICE void tma_load(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same of what is hardly read again: the L2 gives it up before anything else.
JF_DEVICE void tma_load_once(u32 to, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5, %6}], [%2], policy;\n}" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
JF_DEVICE void tma_store(const TensorMap& map, u32 from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
JF_DEVICE void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
JF_DEVICE void bulk_reduce_add_f32(float* to, u32 from, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
JF_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's committed groups of stores still read shared memory.
template <int kPending>
JF_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... or are still to be seen in global memory.
template <int kPending>
JF_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// Flags between blocks: what happened before pass_flag, in this thread or in those it has synchronised with, is visible
// after await_flag has seen its value.
JF_DEVICE void await_flag(const int* flag, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}
JF_DEVICE void pass_flag(int* flag, int value) {
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Adds one, in the same sense, and returns what was there: who counts last sees what happened before the others did.
JF_DEVICE int count_up(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
JF_DEVICE void store_zeros_16(u32 to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
// Orders this thread's ordinary writes to shared memory before later reads by TMA and wgmma (after a barrier,
// anyone's).
JF_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The other way: four tiles of registers to rows in shared memory.
JF_DEVICE void store_matrix(u32 row, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}
JF_DEVICE void store_matrix_transposed(u32 row, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
// The same for two tiles; lanes 16 to 31 give no address.
JF_DEVICE void store_matrix_transposed(u32 row, u32 r0, u32 r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r0), "r"(r1)
               : "memory");
}

// Before the first wgmma of a batch, when registers it touches were written by ordinary instructions.
JF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
JF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
JF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// ptxas moves a wait up to where the last product was started, past work that does not need the product, but not across
// the instruction in here, which it must believe to run now and then. (Where it does, a kernel behind may start early:
// its dependency_wait waits for the end of this one all the same.)
JF_DEVICE void hold_waits(bool seldom) {
  if (seldom) dependents_launch();
}
// The compiler must not move uses of the registers across this point: a wgmma in flight reads or writes them.
template <class T, int N>
JF_DEVICE void pin(T (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if constexpr (sizeof(T) == 4 && T(0.5f) != T(0)) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// Arithmetic in program order. The compiler's own order puts each conversion right behind its exponentials, and the
// warp waits for every one of them.
JF_DEVICE float fma_ordered(float a, float b, float c) {
  float y;
  asm volatile("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}
JF_DEVICE float add_ordered(float a, float b) {
  float y;
  asm volatile("add.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
JF_DEVICE float exp2_ordered(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
JF_DEVICE u32 pack_e4m3_ordered(const float* x) {
  u32 r;
  asm volatile(
      "{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(r)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  return r;
}

// wgmma: d (64 x N, N = 2 * size of d) (+)= A B, A 64 x K from shared memory or registers, B K x N from shared memory,
// K = 32 bytes. An operand from shared memory is K-major, or MN-major if its kTranspose is set (16-bit types only).
// Asynchronous: see pin.
//
//   wgmma<DType::kBF16>(d, descriptor_a, descriptor_b, accumulate)                A and B K-major
//   wgmma<DType::kBF16, false, true>(d, descriptor_a, descriptor_b, accumulate)   B MN-major
//   wgmma<DType::kBF16, true>(d, registers_a, descriptor_b, accumulate)           A from four registers, B MN-major
//   wgmma<DType::kInt8>(d, descriptor_a, descriptor_b, accumulate)                d: integers, whose sums are exact
// clang-format off
#define JF_REGS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JF_REGS_32 JF_REGS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JF_REGS_40 JF_REGS_32 ", %16, %17, %18, %19"
#define JF_REGS_48 JF_REGS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JF_REGS_64 JF_REGS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JF_REGS_80 JF_REGS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JF_REGS_96 JF_REGS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JF_REGS_112 JF_REGS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JF_REGS_128 JF_REGS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JF_REGS_144 JF_REGS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JF_REGS_160 JF_REGS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JF_REGS_176 JF_REGS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JF_REGS_192 JF_REGS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JF_REGS_208 JF_REGS_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define JF_REGS_224 JF_REGS_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define JF_REGS_240 JF_REGS_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define JF_REGS_256 JF_REGS_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define JF_ACCUMULATORS_16 JF_EIGHT(0)
#define JF_ACCUMULATORS_32 JF_ACCUMULATORS_16, JF_EIGHT(8)
#define JF_ACCUMULATORS_40 \
  JF_ACCUMULATORS_32, JF_SUM(d[16]), JF_SUM(d[17]), JF_SUM(d[18]), JF_SUM(d[19])
#define JF_ACCUMULATORS_48 JF_ACCUMULATORS_32, JF_EIGHT(16)
#define JF_ACCUMULATORS_64 JF_ACCUMULATORS_48, JF_EIGHT(24)
#define JF_ACCUMULATORS_80 JF_ACCUMULATORS_64, JF_EIGHT(32)
#define JF_ACCUMULATORS_96 JF_ACCUMULATORS_80, JF_EIGHT(40)
#define JF_ACCUMULATORS_112 JF_ACCUMULATORS_96, JF_EIGHT(48)
#define JF_ACCUMULATORS_128 JF_ACCUMULATORS_112, JF_EIGHT(56)
#define JF_ACCUMULATORS_144 JF_ACCUMULATORS_128, JF_EIGHT(64)
#define JF_ACCUMULATORS_160 JF_ACCUMULATORS_144, JF_EIGHT(72)
#define JF_ACCUMULATORS_176 JF_ACCUMULATORS_160, JF_EIGHT(80)
#define JF_ACCUMULATORS_192 JF_ACCUMULATORS_176, JF_EIGHT(88)
#define JF_ACCUMULATORS_208 JF_ACCUMULATORS_192, JF_EIGHT(96)
#define JF_ACCUMULATORS_224 JF_ACCUMULATORS_208, JF_EIGHT(104)
#define JF_ACCUMULATORS_240 JF_ACCUMULATORS_224, JF_EIGHT(112)
#define JF_ACCUMULATORS_256 JF_ACCUMULATORS_240, JF_EIGHT(120)
#define JF_EIGHT(i) \
  JF_SUM(d[i]), JF_SUM(d[i + 1]), JF_SUM(d[i + 2]), JF_SUM(d[i + 3]), \
  JF_SUM(d[i + 4]), JF_SUM(d[i + 5]), JF_SUM(d[i + 6]), JF_SUM(d[i + 7])

// MODIFIERS: the operands' signs and transposes, as far as the types have them.
#define JF_WGMMA_TEXT(N, K_AND_TYPES, A, B, ACCUMULATE, MODIFIERS) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" #N K_AND_TYPES " {" JF_REGS_##N \
  "}, " A ", " B ", p" MODIFIERS ";\n}"

#define JF_WGMMA_SHARED(N, K_AND_TYPES, A, B, ACCUMULATE, MODIFIERS, ...) \
  asm volatile(JF_WGMMA_TEXT(N, K_AND_TYPES, A, B, ACCUMULATE, MODIFIERS) \
               : JF_ACCUMULATORS_##N \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)) __VA_ARGS__)

#define JF_WGMMA_REGISTERS(N, K_AND_TYPES, A, B, ACCUMULATE, MODIFIERS, ...) \
  asm volatile(JF_WGMMA_TEXT(N, K_AND_TYPES, A, B, ACCUMULATE, MODIFIERS) \
               : JF_ACCUMULATORS_##N \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)) __VA_ARGS__)

// I0 to I6: the numbers of the operands after the N / 2 accumulators.
#define JF_WGMMA(N, I0, I1, I2, I3, I4, I5, I6) \
  template <DType kType, bool kTransposeA = false, bool kTransposeB = false> \
  JF_DEVICE void wgmma(float (&d)[N / 2], u64 a, u64 b, bool accumulate) { \
    if constexpr (kType == DType::kBF16) { \
      JF_WGMMA_SHARED(N, "k16.f32.bf16.bf16", I0, I1, I2, ", 1, 1, " I3 ", " I4, \
                      , "n"(static_cast<int>(kTransposeA)), "n"(static_cast<int>(kTransposeB))); \
    } else if constexpr (kType == DType::kF16) { \
      JF_WGMMA_SHARED(N, "k16.f32.f16.f16", I0, I1, I2, ", 1, 1, " I3 ", " I4, \
                      , "n"(static_cast<int>(kTransposeA)), "n"(static_cast<int>(kTransposeB))); \
    } else { \
      static_assert(kType == DType::kE4M3 && !kTransposeA && !kTransposeB, "8-bit operands are K-major"); \
      JF_WGMMA_SHARED(N, "k32.f32.e4m3.e4m3", I0, I1, I2, ", 1, 1"); \
    } \
  } \
  template <DType kType, bool kTransposeB = false> \
  JF_DEVICE void wgmma(float (&d)[N / 2], const u32* a, u64 b, bool accumulate) { \
    if constexpr (kType == DType::kBF16) { \
      JF_WGMMA_REGISTERS(N, "k16.f32.bf16.bf16", "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, ", 1, 1, " I6, \
                         , "n"(static_cast<int>(kTransposeB))); \
    } else if constexpr (kType == DType::kF16) { \
      JF_WGMMA_REGISTERS(N, "k16.f32.f16.f16", "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, ", 1, 1, " I6, \
                         , "n"(static_cast<int>(kTransposeB))); \
    } else { \
      static_assert(kType == DType::kE4M3 && !kTransposeB, "8-bit operands are K-major"); \
      JF_WGMMA_REGISTERS(N, "k32.f32.e4m3.e4m3", "{" I0 ", " I1 ", " I2 ", " I3 "}", I4, I5, ", 1, 1"); \
    } \
  }

#define JF_SUM(x) "+f"(x)
JF_WGMMA(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
JF_WGMMA(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
JF_WGMMA(40, "%20", "%21", "%22", "%23", "%24", "%25", "%26")
JF_WGMMA(48, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
JF_WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
JF_WGMMA(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
JF_WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
JF_WGMMA(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
JF_WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
JF_WGMMA(144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
JF_WGMMA(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
JF_WGMMA(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
JF_WGMMA(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
JF_WGMMA(208, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
JF_WGMMA(224, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
JF_WGMMA(240, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
JF_WGMMA(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef JF_SUM
#define JF_SUM(x) "+r"(x)

#define JF_WGMMA_INT8(N, I0, I1, I2) \
  template <DType kType> \
  JF_DEVICE void wgmma(int (&d)[N / 2], u64 a, u64 b, bool accumulate) { \
    static_assert(kType == DType::kInt8, "sums in integers are those of int8"); \
    JF_WGMMA_SHARED(N, "k32.s32.s8.s8", I0, I1, I2, ""); \
  }

JF_WGMMA_INT8(64, "%32", "%33", "%34")
JF_WGMMA_INT8(96, "%48", "%49", "%50")
JF_WGMMA_INT8(128, "%64", "%65", "%66")
// clang-format on

}  // namespace jf

// What emulated kernels ask of the emulator: who they are, warps that act together, shared memory and its barriers,
// asynchronous copies and products. Every function acts for the CUDA thread that calls it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Place {
  Index thread, block, block_size, grid;
};
const Place& place();

// Ends the kernel with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// An instruction of a whole warp: once all 32 lanes have called it, `act` gets what each of them brought, and all go
// on. It is an error if they meet in different instructions.
void collective(const char* instruction, void* operand, const std::function<void(void* const* operands)>& act);

// Lets another thread run. For loops that wait for global memory.
void yield();

// Shared memory. Addresses are 32-bit, as in PTX.
uint32_t shared_address(const void* pointer);
unsigned char* shared_pointer(uint32_t address, size_t bytes);  // checked to lie inside

void named_barrier(const char* instruction, int id, int threads, bool wait);

void mbarrier_init(uint32_t barrier, int arrivals);
void mbarrier_arrive(uint32_t barrier, int expected_bytes);
void mbarrier_complete(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);

// Work that runs by itself at any time between here and whatever waits for it. When is drawn at random, often as late
// as is allowed: what does not wait, or lets others write too early, gives wrong results.
using Work = std::function<void()>;
void in_background(Work work);  // nothing of the thread waits for it, it completes an mbarrier

// A thread's queues of such work, which it commits in groups and waits for.
enum class Queue { kCopies, kStores };
void enqueue(Queue queue, Work work);
void commit(Queue queue);
void wait(Queue queue, size_t pending_groups);

// A 4-D tensor as cuTensorMapEncodeTiled leaves it in a TensorMap.
void tensor_load(uint32_t to, const void* map, uint32_t barrier, const int (&at)[4]);
void tensor_store(const void* map, uint32_t from, const int (&at)[4]);

// Types as in jf::DType.
float to_float(int dtype, const void* element);
uint32_t pack16(int dtype, float low, float high);
uint32_t pack_e4m3(float a, float b, float c, float d);
uint32_t pack_int8(float a, float b, float c, float d);

// wgmma: D (+)= A B. a: registers, or null for A by descriptor.
struct Product {
  void* d;  // float, or int for int8
  const uint32_t* a;
  uint64_t descriptor_a, descriptor_b;
  int dtype, columns;
  bool accumulate, transpose_a, transpose_b;
};
void wgmma_fence();
void wgmma(Product product);
void wgmma_commit();
void wgmma_wait(size_t pending_groups);

template <class... Args>
void invoke(void (*kernel)(Args...), void* const* args) {
  size_t i = 0;
  std::tuple<const Args*...> all{static_cast<const Args*>(args[i++])...};
  std::apply([&](const Args*... arg) { kernel(*arg...); }, all);
}

}  // namespace emulator

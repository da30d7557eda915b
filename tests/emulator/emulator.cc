// Runs kernels on the CPU, each CUDA thread as a fiber.
//
// Blocks run on threads of the host, as many at a time as there are multiprocessors. Inside a block the warps have
// random priorities, which change now and then, so that any of them may run far ahead of the others; and asynchronous
// work happens at a random time: see emulator.h. A kernel whose threads all wait, whose warps diverge where they must
// not, or that touches what it must not, fails with a message.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "host.h"

constexpr size_t kSharedBytes = 227 << 10;
alignas(1024) thread_local unsigned char dynamic_shared[kSharedBytes];

namespace emulator {
namespace {

// Addresses: 18 bits, as wgmma has them, for dynamic shared memory, from kFirst on (0 is nowhere); above them windows
// for static arrays.
constexpr uint32_t kWindow = 1 << 18, kFirst = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr std::chrono::minutes kPatience{3};  // of a block that polls global memory
constexpr int kConstancy = 256;               // steps for which priorities last, on average

struct Fiber;

// Work in groups, the oldest first; `open` is not committed yet.
struct Groups {
  std::deque<std::vector<Work>> closed;
  std::vector<Work> open;

  static void Run(std::vector<Work>& group) {
    for (Work& work : std::exchange(group, {})) work();
  }
  void Wait(size_t pending) {
    for (; closed.size() > pending; closed.pop_front()) Run(closed.front());
  }
  bool empty() const { return closed.empty() && open.empty(); }
};

struct Warp {
  unsigned priority;
  std::vector<Fiber*> ready;
  const char* instruction = nullptr;
  int arrived = 0;
  unsigned generation = 0;
  void* operands[32];
  std::vector<Fiber*> waiting;
  size_t instructions = 0;        // of its warpgroup, that this warp has come to
  size_t products = 0;            // that this warp has issued
  std::vector<size_t> committed;  // how many of them each group ends with
};

// wgmma belongs to four warps: it begins when all have issued it, and is complete for all at once.
struct Warpgroup {
  std::deque<std::array<std::function<void()>, 4>> issued;  // each warp's part, null if it has not come yet
  size_t done = 0;                                          // products ahead of these
  std::vector<Fiber*> waiting;
  std::vector<std::pair<std::string_view, uint64_t>> instructions;  // that its warps come to, and their operands

  bool Begun(size_t product) const {
    if (product < done) return true;
    if (product - done >= issued.size()) return false;
    const auto& parts = issued[product - done];
    return std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part != nullptr; });
  }
  void RunUntil(size_t count) {
    for (; done < count; done++, issued.pop_front()) {
      for (const auto& part : issued.front()) part();
    }
  }
};

struct Fiber {
  Place place;
  Warp* warp;
  Warpgroup* warpgroup;
  ucontext_t start;
  std::jmp_buf resume;
  bool started = false;
  const char* waits_for = nullptr;
  Groups copies, stores;
};

struct Mbarrier {
  int arrivals, pending, bytes = 0;
  unsigned phase = 0;
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> waiting;
};

// A block that runs, on a thread of the host.
struct Block {
  Kernel kernel;
  void* const* args;
  std::mt19937 random;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<Fiber*> polling;
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<unsigned char*> shared{dynamic_shared};  // and the static arrays that had their address taken
  NamedBarrier named[16];
  std::multimap<uint64_t, Work> background;  // by the step in which it is due
  uint64_t steps = 0;
  std::jmp_buf scheduler;
  Fiber* running = nullptr;
  size_t alive = 0;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  std::string error;

  bool Coin() { return random() & 1; }
  void Run(const Place& first, unsigned char* stacks);
  void Step();
  void Leave() {
    if (!_setjmp(running->resume)) _longjmp(scheduler, 1);
  }
  void WaitFor(std::vector<Fiber*>& waiting, const char* what) {
    running->waits_for = what;
    waiting.push_back(running);
    Leave();
  }
  void Wake(std::vector<Fiber*>& waiting);
  Warp* NextWarp();
  std::string Deadlock() const;
};

thread_local Block* block = nullptr;

// A fiber's first function.
void Enter() {
  block->kernel(block->args);
  block->alive--;
  _longjmp(block->scheduler, 1);
}

void Block::Wake(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : std::exchange(waiting, {})) fiber->warp->ready.push_back(fiber);
}

// The warp of the highest priority that can run.
Warp* Block::NextWarp() {
  if (random() % kConstancy == 0) warps[random() % warps.size()].priority = random();
  Warp* next = nullptr;
  for (Warp& warp : warps) {
    if (!warp.ready.empty() && (!next || warp.priority > next->priority)) next = &warp;
  }
  return next;
}

// Lets a fiber run, or some of the work in the background.
void Block::Step() {
  steps++;
  Warp* const warp = NextWarp();
  if (!background.empty() && (!warp || background.begin()->first <= steps)) {
    const Work work = std::move(background.begin()->second);
    background.erase(background.begin());
    work();
  } else if (warp) {
    running = warp->ready.back();
    warp->ready.pop_back();
    running->waits_for = nullptr;
    if (running->started) _longjmp(running->resume, 1);
    running->started = true;
    setcontext(&running->start);
  } else if (!polling.empty() && std::chrono::steady_clock::now() - start < kPatience) {
    std::this_thread::yield();
    Wake(polling);
  } else {
    error = Deadlock();
  }
}

std::string Block::Deadlock() const {
  std::map<std::string, int> counts;
  for (const Fiber& fiber : fibers) {
    if (fiber.waits_for) counts[fiber.waits_for]++;
  }
  std::string text = "deadlock: ";
  for (const auto& [what, count] : counts) text += std::to_string(count) + " threads wait for " + what + ", ";
  return text + "in block " + std::to_string(fibers[0].place.block.x);
}

void Block::Run(const Place& first, unsigned char* stacks) {
  const unsigned threads = first.block_size.x;
  if (threads % 32 != 0) {
    error = "a block of " + std::to_string(threads) + " threads";
    return;
  }
  block = this;
  std::memset(dynamic_shared, 0xff, sizeof dynamic_shared);  // NaN
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>(threads / 32);
  for (Warp& warp : warps) warp.priority = random();
  warpgroups = std::vector<Warpgroup>((threads + 127) / 128);
  alive = threads;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.place = first;
    fiber.place.thread.x = i;
    fiber.warp = &warps[i / 32];
    fiber.warpgroup = &warpgroups[i / 128];
    getcontext(&fiber.start);
    fiber.start.uc_stack = {stacks + i * kStackBytes, 0, kStackBytes};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, Enter, 0);
    fiber.warp->ready.push_back(&fiber);
  }
  while (alive > 0 && error.empty()) {
    if (!_setjmp(scheduler)) Step();  // else a fiber has left, or something failed
  }
  for (const Fiber& fiber : fibers) {
    if (error.empty() && !fiber.stores.empty()) error = "a block ends before its stores have read shared memory";
  }
  for (const Warpgroup& warpgroup : warpgroups) {
    if (error.empty() && !warpgroup.issued.empty()) error = "a block ends before its products";
  }
}

// ---- Memory that TMA and wgmma see

// XORs the number of a row into the 16-byte chunks within 16 << swizzle bytes.
uint32_t Swizzled(uint32_t address, int swizzle) { return address ^ (address >> 3 & ((1 << swizzle) - 1) << 4); }

// Calls visit(element in global memory or null if outside, its place in shared memory, bytes) for each of a box, for
// runs of 16 bytes.
template <class Visit>
void ForBox(const Tensor& tensor, uint32_t shared, const int (&at)[4], Visit visit) {
  const uint32_t run = 16 / tensor.bytes;
  uint32_t offset = 0;
  for (uint32_t i3 = 0; i3 < tensor.box[3]; i3++) {
    for (uint32_t i2 = 0; i2 < tensor.box[2]; i2++) {
      for (uint32_t i1 = 0; i1 < tensor.box[1]; i1++) {
        for (uint32_t i0 = 0; i0 < tensor.box[0]; i0 += run, offset += 16) {
          const int64_t i[4] = {at[0] + int64_t(i0), at[1] + int64_t(i1), at[2] + int64_t(i2), at[3] + int64_t(i3)};
          bool inside = true;
          for (int axis = 0; axis < 4; axis++) inside &= i[axis] >= 0 && i[axis] < int64_t(tensor.sizes[axis]);
          unsigned char* element = nullptr;
          size_t bytes = 0;
          if (inside) {
            element = tensor.data + i[0] * tensor.bytes;
            for (int axis = 1; axis < 4; axis++) element += i[axis] * int64_t(tensor.strides[axis - 1]);
            bytes = std::min<size_t>(16, (tensor.sizes[0] - i[0]) * tensor.bytes);
          }
          visit(element, shared_pointer(Swizzled(shared + offset, tensor.swizzle), 16), bytes);
        }
      }
    }
  }
}

size_t BoxBytes(const Tensor& tensor) {
  return size_t(tensor.box[0]) * tensor.box[1] * tensor.box[2] * tensor.box[3] * tensor.bytes;
}

Tensor TensorOf(const void* map, uint32_t shared) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a tensor map that is not aligned");
  if (shared % 128 != 0) fail("TMA: shared memory that is not aligned");
  Tensor tensor;
  std::memcpy(&tensor, map, sizeof tensor);
  return tensor;
}

// Element (row, byte of the row) of an operand of wgmma; transposed: rows are the summed axis.
struct Operand {
  uint32_t address, leading, stride;
  int swizzle;

  explicit Operand(uint64_t descriptor)
      : address((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle((4 - int(descriptor >> 62)) % 4) {}  // 1: 128 bytes, 2: 64, 3: 32

  const unsigned char* KMajor(uint32_t row, uint32_t byte) const {
    const uint32_t width = 16 << swizzle;
    return shared_pointer(
        Swizzled(address + row / 8 * stride + row % 8 * width + byte / width * leading + byte % width, swizzle), 1);
  }
  const unsigned char* MnMajor(uint32_t row, uint32_t k) const {  // 16-bit types, swizzle of 128 bytes
    return shared_pointer(Swizzled(address + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2, swizzle),
                          2);
  }
};

constexpr int kF16 = 1, kBF16 = 2, kF32 = 3, kE4M3 = 4, kInt8 = 5;  // as jf::DType

float E4m3ToFloat(unsigned char bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float x = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  if ((bits & 127) == 127) x = NAN;
  return bits & 128 ? -x : x;
}

unsigned char FloatToE4m3(float x) {
  const unsigned char sign = std::signbit(x) ? 128 : 0;
  if (std::isnan(x)) return sign | 127;
  const float size = std::min(std::fabs(x), 448.f);
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 4, -9);  // of the last bit
  const float rounded = std::nearbyint(std::ldexp(size, -unit));
  const float value = std::ldexp(rounded, unit);
  if (value == 0.f) return sign;
  std::frexp(value, &exponent);
  if (exponent < -5) return sign | static_cast<unsigned char>(std::ldexp(value, 9));
  return sign | (exponent + 6) << 3 | (static_cast<int>(std::ldexp(value, 4 - exponent)) & 7);
}

struct WarpProduct {
  Product lanes[32];
  int warp;  // of its warpgroup

  void operator()() const {
    const Product& any = lanes[0];
    const int bytes = any.dtype == kE4M3 || any.dtype == kInt8 ? 1 : 2, k_size = 32 / bytes, pack = 4 / bytes;
    float a[16][32];
    if (any.a) {
      for (int lane = 0; lane < 32; lane++) {
        for (int r = 0; r < 4; r++) {
          const auto* elements = reinterpret_cast<const unsigned char*>(lanes[lane].a + r);
          for (int i = 0; i < pack; i++) {
            a[lane / 4 + r % 2 * 8][lane % 4 * pack + r / 2 * (k_size / 2) + i] =
                to_float(any.dtype, elements + i * bytes);
          }
        }
      }
    } else {
      const Operand operand(any.descriptor_a);
      for (int row = 0; row < 16; row++) {
        for (int k = 0; k < k_size; k++) {
          a[row][k] = to_float(any.dtype, any.transpose_a ? operand.MnMajor(16 * warp + row, k)
                                                          : operand.KMajor(16 * warp + row, k * bytes));
        }
      }
    }
    const Operand operand(any.descriptor_b);
    for (int column = 0; column < any.columns; column++) {
      float b[32];
      for (int k = 0; k < k_size; k++) {
        b[k] = to_float(any.dtype, any.transpose_b ? operand.MnMajor(column, k) : operand.KMajor(column, k * bytes));
      }
      for (int row = 0; row < 16; row++) {
        float sum = 0.f;
        for (int k = 0; k < k_size; k++) sum += a[row][k] * b[k];
        const auto add = [&](auto* d) {
          d += column / 8 * 4 + row / 8 * 2 + column % 2;
          *d = any.accumulate ? *d + sum : sum;
        };
        void* d = lanes[row % 8 * 4 + column % 8 / 2].d;
        any.dtype == kInt8 ? add(static_cast<int*>(d)) : add(static_cast<float*>(d));
      }
    }
  }
};

Groups& QueueOf(Queue queue) { return queue == Queue::kCopies ? block->running->copies : block->running->stores; }

}  // namespace

const Place& place() { return block->running->place; }

void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  block->error = text;
  _longjmp(block->scheduler, 1);
}

void collective(const char* instruction, void* operand, const std::function<void(void* const*)>& act) {
  Warp& warp = *block->running->warp;
  if (warp.arrived > 0 && std::strcmp(warp.instruction, instruction) != 0) {
    fail("lanes of a warp meet in %s and %s (thread %u)", warp.instruction, instruction, place().thread.x);
  }
  warp.instruction = instruction;
  warp.operands[place().thread.x % 32] = operand;
  if (++warp.arrived == 32) {
    act(warp.operands);
    warp.arrived = 0;
    warp.generation++;
    block->Wake(warp.waiting);
    return;
  }
  for (const unsigned generation = warp.generation; warp.generation == generation;) {
    block->WaitFor(warp.waiting, instruction);
  }
}

void yield() {
  block->running->waits_for = "global memory";
  block->polling.push_back(block->running);
  block->Leave();
}

uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  for (size_t i = 0; i < block->shared.size(); i++) {
    const auto offset = byte - block->shared[i];
    if (offset >= 0 && size_t(offset) < kSharedBytes) return i * kWindow + kFirst + offset;
  }
  block->shared.push_back(reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(byte) / 1024 * 1024));
  return shared_address(pointer);
}

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  const size_t window = address / kWindow, offset = address % kWindow - kFirst;
  if (window >= block->shared.size() || offset > kSharedBytes - bytes) fail("outside of shared memory");
  return block->shared[window] + offset;
}

void named_barrier(const char* instruction, int id, int threads, bool wait) {
  NamedBarrier& barrier = block->named[id];
  struct Lane {
    int id;
    unsigned generation;
  } lane{id, 0};
  collective(instruction, &lane, [&](void* const* lanes) {
    for (int i = 0; i < 32; i++) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      if (lane.id != id) fail("lanes of a warp meet at barriers %d and %d", id, lane.id);
      lane.generation = barrier.generation;
    }
    if (barrier.arrived > 0 && barrier.threads != threads) {
      fail("barrier %d counts %d and %d threads", id, barrier.threads, threads);
    }
    barrier.threads = threads;
    barrier.arrived += 32;
    if (barrier.arrived > threads) fail("barrier %d: more than %d threads arrive", id, threads);
    if (barrier.arrived == threads) {
      barrier.arrived = 0;
      barrier.generation++;
      block->Wake(barrier.waiting);
    }
  });
  while (wait && barrier.generation == lane.generation) block->WaitFor(barrier.waiting, instruction);
}

namespace {

Mbarrier& MbarrierAt(uint32_t address) {
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) fail("an mbarrier at %u that was not initialised", address);
  return found->second;
}

void EndPhase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase++;
  block->Wake(barrier.waiting);
}

}  // namespace

void mbarrier_init(uint32_t address, int arrivals) {
  if (address % 8 != 0) fail("an mbarrier that is not aligned");
  Mbarrier barrier{arrivals, arrivals};
  block->mbarriers[address] = barrier;
}

void mbarrier_arrive(uint32_t address, int expected_bytes) {
  Mbarrier& barrier = MbarrierAt(address);
  barrier.bytes += expected_bytes;
  if (barrier.pending-- == 0) fail("more arrivals at an mbarrier than it counts");
  EndPhase(barrier);
}

void mbarrier_complete(uint32_t address, int bytes) {
  Mbarrier& barrier = MbarrierAt(address);
  barrier.bytes -= bytes;
  EndPhase(barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier& barrier = MbarrierAt(address);
  while ((barrier.phase & 1) == parity) block->WaitFor(barrier.waiting, "an mbarrier");
}

void in_background(Work work) {
  // Mostly soon, sometimes after all others have gone as far as they can.
  block->background.emplace(block->steps + (block->random() >> block->random() % 32), std::move(work));
}

void enqueue(Queue queue, Work work) { QueueOf(queue).open.push_back(std::move(work)); }

void commit(Queue queue) {
  Groups& groups = QueueOf(queue);
  groups.closed.push_back(std::exchange(groups.open, {}));
  if (block->Coin()) groups.Wait(0);
}

void wait(Queue queue, size_t pending_groups) { QueueOf(queue).Wait(pending_groups); }

void tensor_load(uint32_t to, const void* map, uint32_t barrier, const int (&at)[4]) {
  const Tensor tensor = TensorOf(map, to);
  const std::array<int, 4> corner{at[0], at[1], at[2], at[3]};
  in_background([=] {
    const int at[4] = {corner[0], corner[1], corner[2], corner[3]};
    ForBox(tensor, to, at, [](unsigned char* element, unsigned char* shared, size_t bytes) {
      std::memset(shared, 0, 16);
      if (element) std::memcpy(shared, element, bytes);
    });
    mbarrier_complete(barrier, BoxBytes(tensor));
  });
}

void tensor_store(const void* map, uint32_t from, const int (&at)[4]) {
  const Tensor tensor = TensorOf(map, from);
  for (int x : at) {
    if (x < 0) fail("TMA: a store from before the tensor");  // an illegal instruction on an H200
  }
  const std::array<int, 4> corner{at[0], at[1], at[2], at[3]};
  enqueue(Queue::kStores, [=] {
    const int at[4] = {corner[0], corner[1], corner[2], corner[3]};
    ForBox(tensor, from, at, [](unsigned char* element, const unsigned char* shared, size_t bytes) {
      if (element) std::memcpy(element, shared, bytes);
    });
  });
}

float to_float(int dtype, const void* element) {
  uint16_t half;
  if (dtype == kE4M3) {
    static const auto* table = [] {
      auto* values = new std::array<float, 256>;
      for (int i = 0; i < 256; i++) (*values)[i] = E4m3ToFloat(i);
      return values;
    }();
    return (*table)[*static_cast<const unsigned char*>(element)];
  }
  if (dtype == kInt8) return *static_cast<const int8_t*>(element);
  std::memcpy(&half, element, 2);
  if (dtype == kBF16) {
    const uint32_t word = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  _Float16 x;
  std::memcpy(&x, &half, 2);
  return x;
}

uint32_t pack16(int dtype, float low, float high) {
  const auto round = [&](float x) -> uint32_t {
    if (dtype == kF16) {
      const _Float16 half = static_cast<_Float16>(x);
      uint16_t bits;
      std::memcpy(&bits, &half, 2);
      return bits;
    }
    uint32_t word;
    std::memcpy(&word, &x, 4);
    return std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}

uint32_t pack_e4m3(float a, float b, float c, float d) {
  return FloatToE4m3(a) | FloatToE4m3(b) << 8 | FloatToE4m3(c) << 16 | uint32_t(FloatToE4m3(d)) << 24;
}

uint32_t pack_int8(float a, float b, float c, float d) {
  const auto round = [](float x) -> uint32_t {
    return std::isnan(x) ? 0 : static_cast<int>(std::clamp(std::nearbyint(x), -128.f, 127.f)) & 255;
  };
  return round(a) | round(b) << 8 | round(c) << 16 | round(d) << 24;
}

// An instruction of a warpgroup: its warps come to the same ones, with the same operand, in the same order.
static void warpgroup_collective(const char* instruction, uint64_t operand, void* of_lane,
                                 const std::function<void(void* const*)>& act) {
  collective(instruction, of_lane, [&](void* const* of_lanes) {
    auto& instructions = block->running->warpgroup->instructions;
    const size_t at = block->running->warp->instructions++;
    if (at == instructions.size()) instructions.emplace_back(instruction, operand);
    if (instructions[at] != std::pair<std::string_view, uint64_t>(instruction, operand)) {
      fail("a warp comes to %s where another of its warpgroup comes to %s, or to one with another operand (thread %u)",
           instruction, instructions[at].first.data(), place().thread.x);
    }
    act(of_lanes);
  });
}

void wgmma_fence() {
  warpgroup_collective("wgmma.fence", 0, nullptr, [](void* const*) {});
}

void wgmma(Product product) {
  warpgroup_collective("wgmma", product.descriptor_b, &product, [](void* const* lanes) {
    auto part = std::make_shared<WarpProduct>();
    part->warp = place().thread.x / 32 % 4;
    for (int i = 0; i < 32; i++) {
      part->lanes[i] = *static_cast<Product*>(lanes[i]);
      const Product &one = part->lanes[i], &first = part->lanes[0];
      if (one.descriptor_a != first.descriptor_a || one.descriptor_b != first.descriptor_b ||
          one.accumulate != first.accumulate) {
        fail("wgmma: lanes of a warp bring different operands");
      }
    }
    Warpgroup& warpgroup = *block->running->warpgroup;
    const size_t product = block->running->warp->products++;
    if (product - warpgroup.done >= warpgroup.issued.size()) warpgroup.issued.emplace_back();
    warpgroup.issued[product - warpgroup.done][part->warp] = [part] { (*part)(); };
    if (warpgroup.Begun(product)) block->Wake(warpgroup.waiting);
  });
}

void wgmma_commit() {
  warpgroup_collective("wgmma.commit_group", 0, nullptr, [](void* const*) {
    Warp& warp = *block->running->warp;
    Warpgroup& warpgroup = *block->running->warpgroup;
    warp.committed.push_back(warp.products);
    if (warp.products > 0 && warpgroup.Begun(warp.products - 1) && block->Coin()) warpgroup.RunUntil(warp.products);
  });
}

void wgmma_wait(size_t pending_groups) {
  warpgroup_collective("wgmma.wait_group", pending_groups, nullptr, [](void* const*) {});
  const std::vector<size_t>& committed = block->running->warp->committed;
  if (committed.size() <= pending_groups) return;
  const size_t count = committed[committed.size() - 1 - pending_groups];
  Warpgroup& warpgroup = *block->running->warpgroup;
  while (count > 0 && !warpgroup.Begun(count - 1)) block->WaitFor(warpgroup.waiting, "the warpgroup's wgmma");
  warpgroup.RunUntil(count);
}

// ---- For the driver

std::string run_grid(Kernel kernel, void* const* args, Index grid, unsigned threads, int multiprocessors,
                     unsigned seed) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::atomic<unsigned> next{0};
  std::mutex mutex;
  std::string error;
  const auto multiprocessor = [&] {
    const size_t bytes = threads * kStackBytes;
    auto* stacks = static_cast<unsigned char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (unsigned i = next++; i < blocks; i = next++) {
      Block block;
      block.kernel = kernel;
      block.args = args;
      block.random.seed(seed + i);
      block.Run({{}, {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, {threads, 1, 1}, grid}, stacks);
      if (!block.error.empty()) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = block.error;
        next = blocks;
      }
    }
    munmap(stacks, bytes);
  };
  std::vector<std::thread> running;
  for (int i = 0; i < multiprocessors; i++) running.emplace_back(multiprocessor);
  for (std::thread& thread : running) thread.join();
  return error;
}

}  // namespace emulator

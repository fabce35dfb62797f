// How CUDA runs a grid, on one CPU thread: a fiber for every CUDA thread of a block, the blocks one
// after another. A fiber runs until it has to wait (at a barrier, or for its warp) or has finished;
// then the schedule, which a seed decides, says who is next.
//
// What is undefined on a GPU is made to show: shared memory starts out as NaN, a copy that nobody
// waited for may not have happened, a barrier that some threads never reach is reported, and under
// ThreadSanitizer nothing orders two threads' accesses but barriers and launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace grood_fast::emulation {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;           // in a block
inline constexpr std::size_t kMaxShared = 232448;  // bytes, of an sm_90 or sm_100 block
inline constexpr int kMultiprocessors = 2;         // few, so that blocks have several tiles each

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// What a kernel did that CUDA forbids, in words.
class Violation : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The order threads and blocks run in, and when asynchronous copies happen. Seed 0: first to last;
// 1: last to first; others: drawn anew at every step. Even seeds put a copy off until somebody
// waits for it, odd ones copy at once.
void set_seed(std::uint64_t seed);

struct Launch {
  Index grid, block;
  std::size_t dynamic_shared = 0;
  std::function<void()> kernel;
};

// Runs the whole grid; returns when it has finished.
void run(const Launch& launch);

// --- what a running CUDA thread may ask
// -----------------------------------------------------------

struct Position {
  Index thread, block, block_size, grid_size;
  int lane, warp;
};
extern const Position* running_position;  // the running thread's
inline const Position& position() { return *running_position; }

// The block's array that belongs to `tag`; of the same size each time.
void* shared_array(const void* tag, std::size_t bytes);
void* dynamic_shared();

// Until every thread of the block is at this same line.
void block_barrier(int line);

// Until every lane of `mask` has called with the same `perform` and mask; it is then called once,
// with each lane's `argument` (null for those not in the mask).
using Perform = void (*)(void* const (&arguments)[kWarp]);
void warp_meeting(const char* what, int line, std::uint32_t mask, Perform perform, void* argument);
// Memory written before it by one lane is another's to read after it; other meetings order nothing.
void warp_barrier(int line, std::uint32_t mask);

// Ends the grid with a Violation; what the thread holds is not destroyed.
[[noreturn]] void violate(const char* what, const char* more = "");

// Asynchronous copies of the running thread: `copy` is called when they happen.
struct Copy {
  void* to;
  const void* from;
  std::uint32_t bytes;  // 4, 8 or 16
};
using PerformCopy = void (*)(const Copy& copy);
void copy_later(const Copy& copy, PerformCopy perform);
void close_copy_group();
void finish_copies(int groups_left);

}  // namespace grood_fast::emulation

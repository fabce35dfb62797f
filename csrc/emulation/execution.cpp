#include "execution.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <vector>

#include "fiber.h"

// ThreadSanitizer must not look in here: this file is compiled without its instrumentation.
namespace grood_fast::emulation {

const Position* running_position = nullptr;

namespace {

constexpr int kMaxCopies = 256;  // outstanding, of one thread

enum class State { ready, at_barrier, at_meeting, finished };

struct Thread {
  Thread() : fiber(&Thread::live) {}
  static void live();

  Fiber fiber;
  Position position;
  State state = State::finished;
  const char* what = nullptr;  // it waits for
  int line = 0;
  std::uint32_t mask = 0;
  Perform perform = nullptr;
  void* argument = nullptr;
  struct {
    Copy copy;
    int group;
  } copies[kMaxCopies];
  int copy_count = 0;
  int copy_groups = 0;
  PerformCopy perform_copy = nullptr;
};

struct SharedArray {
  const void* tag;
  void* memory;
  std::size_t bytes;
};

struct Grid {
  std::mutex one_at_a_time;
  std::uint64_t seed = 0;
  std::mt19937_64 random;
  Fiber* host = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  const Launch* launch = nullptr;
  Thread* running = nullptr;
  const char* violation[2] = {};  // of the running thread, in words
  SharedArray shared[64];
  int shared_count = 0;
  std::size_t shared_bytes = 0;
  std::vector<void*> retired;  // shared memory of blocks that have run
  // Two by turns: a thread may arrive at the next barrier before another has left this one.
  char barrier_order[2];
  int barrier_turn = 0;
  char warp_order[kMaxThreads / kWarp][2];
  int warp_turn[kMaxThreads / kWarp] = {};
  int meeting[kMaxThreads / kWarp] = {};  // lanes that wait for their warp
  char launch_order, finish_order;
};

Grid& grid() {
  static Grid instance;
  return instance;
}

void Thread::live() {
  for (;;) {
    Grid& g = grid();
    Thread& self = *g.running;
    happens_after(&g.launch_order);
    g.launch->kernel();
    happens_before(&g.finish_order);
    self.state = State::finished;
    self.fiber.switch_to(*g.host);
  }
}

void wait(State state, const char* what, int line) {
  Grid& g = grid();
  Thread& self = *g.running;
  self.state = state;
  self.what = what;
  self.line = line;
  self.fiber.switch_to(*g.host);
}

std::string name_of(const Thread& thread) {
  const Index t = thread.position.thread, b = thread.position.block;
  std::ostringstream name;
  name << "thread (" << t.x << ", " << t.y << ", " << t.z << ") of block (" << b.x << ", " << b.y
       << ", " << b.z << ")";
  return name.str();
}

std::string deadlock(int count) {
  const Grid& g = grid();
  std::ostringstream report;
  report << "deadlock: no thread can go on";
  int listed = 0;
  const Thread* previous = nullptr;
  for (int t = 0; t < count && listed < 8; ++t) {
    const Thread& thread = *g.threads[t];
    const bool as_before = previous != nullptr && previous->state == thread.state &&
                           (thread.state == State::finished || previous->line == thread.line);
    previous = &thread;
    if (as_before) continue;
    ++listed;
    report << "; from " << name_of(thread) << " on: ";
    if (thread.state == State::finished) {
      report << "finished";
    } else {
      report << "waits at " << thread.what << ", line " << thread.line;
      if (thread.state == State::at_meeting)
        report << ", mask 0x" << std::hex << thread.mask << std::dec;
    }
  }
  return report.str();
}

// `thread` has come to a meeting: lets its warp go on if all that its mask names have.
void complete_meeting(Thread& thread, int count) {
  Grid& g = grid();
  int& meeting = g.meeting[thread.position.warp];
  if (++meeting < std::popcount(thread.mask)) return;
  const int first = thread.position.warp * kWarp;
  void* arguments[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    if (first + lane >= count) return;
    Thread& other = *g.threads[first + lane];
    if (other.state != State::at_meeting || other.mask != thread.mask ||
        other.perform != thread.perform || other.what != thread.what)
      return;
    arguments[lane] = other.argument;
  }
  if (thread.perform != nullptr) {
    const Unobserved unobserved;
    thread.perform(arguments);
  } else {
    g.warp_turn[thread.position.warp] ^= 1;
  }
  const std::uint32_t mask = thread.mask;
  meeting -= std::popcount(mask);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) g.threads[first + lane]->state = State::ready;
  }
}

bool complete_barrier(int count) {
  Grid& g = grid();
  const Thread* first = g.threads[0].get();
  for (int t = 0; t < count; ++t) {
    const Thread& thread = *g.threads[t];
    if (thread.state != State::at_barrier || thread.line != first->line) return false;
  }
  g.barrier_turn ^= 1;
  for (int t = 0; t < count; ++t) g.threads[t]->state = State::ready;
  return true;
}

// The schedule: who runs first.
template <typename T>
void arrange(std::vector<T>& items) {
  Grid& g = grid();
  if (g.seed == 1) std::sort(items.rbegin(), items.rend());
  if (g.seed > 1) std::shuffle(items.begin(), items.end(), g.random);
}

void retire_shared() {
  Grid& g = grid();
  for (int i = 0; i < g.shared_count; ++i) {
#if defined(GROOD_FAST_TSAN)
    g.retired.push_back(g.shared[i].memory);  // used again, blocks would seem to race for it
#else
    std::free(g.shared[i].memory);
#endif
  }
  g.shared_count = 0;
  g.shared_bytes = 0;
}

// Empty, or what went wrong.
std::string run_block(const Launch& launch, Index block, int count) {
  Grid& g = grid();
  const Index size = launch.block;
  // Other fibers than in the block before: ThreadSanitizer is to see two blocks' accesses as two
  // threads'.
  std::rotate(g.threads.begin(), g.threads.begin() + count / 2 + 1, g.threads.begin() + count + 1);
  std::vector<int> order(count);
  for (int t = 0; t < count; ++t) {
    Thread& thread = *g.threads[t];
    const unsigned n = static_cast<unsigned>(t);
    const Index index{n % size.x, n / size.x % size.y, n / size.x / size.y};
    thread.position = {index, block, size, launch.grid, t % kWarp, t / kWarp};
    thread.state = State::ready;
    thread.copy_count = thread.copy_groups = 0;
    order[t] = t;
  }
  std::fill(std::begin(g.meeting), std::end(g.meeting), 0);
  happens_before(&g.launch_order);
  for (int finished = 0; finished < count;) {
    arrange(order);
    bool progress = false;
    for (const int t : order) {
      Thread& thread = *g.threads[t];
      if (thread.state != State::ready) continue;
      progress = true;
      g.running = &thread;
      running_position = &thread.position;
      g.host->switch_to(thread.fiber);
      if (g.violation[0] != nullptr)
        return std::string(g.violation[0]) + g.violation[1] + "; " + name_of(thread);
      finished += thread.state == State::finished;
      if (thread.state == State::at_meeting) complete_meeting(thread, count);
    }
    if (!progress && finished < count && !complete_barrier(count)) return deadlock(count);
  }
  retire_shared();
  return "";
}

void check(bool condition, const char* otherwise) {
  if (!condition) throw Violation(otherwise);
}

}  // namespace

void set_seed(std::uint64_t seed) {
  Grid& g = grid();
  g.seed = seed;
  g.random.seed(seed);
}

void run(const Launch& launch) {
  Grid& g = grid();
  const std::lock_guard<std::mutex> lock(g.one_at_a_time);
  const Index size = launch.block, blocks = launch.grid;
  check(size.x > 0 && size.y > 0 && size.z > 0, "a block must have threads");
  check(
      size.x <= kMaxThreads && size.y <= kMaxThreads && size.z <= 64 &&
          size.x * size.y * size.z <= kMaxThreads,
      "a block has at most 1024 threads");
  check(
      blocks.x > 0 && blocks.y > 0 && blocks.z > 0 && blocks.x <= 2147483647u &&
          blocks.y <= 65535 && blocks.z <= 65535,
      "a grid has 1 to 2147483647 x 65535 x 65535 blocks");
  check(launch.dynamic_shared <= kMaxShared, "a block has at most 227 KiB of shared memory");
  const int count = static_cast<int>(size.x * size.y * size.z);
  while (g.threads.size() < static_cast<std::size_t>(count) + 1)
    g.threads.push_back(std::make_unique<Thread>());
  Fiber host;
  g.host = &host;
  g.launch = &launch;
  g.violation[0] = nullptr;

  std::vector<std::uint64_t> order;
  const std::uint64_t total = std::uint64_t{blocks.x} * blocks.y * blocks.z;
  for (std::uint64_t b = 0; b < total; ++b) order.push_back(b);
  arrange(order);
  std::string violation;
  for (const std::uint64_t b : order) {
    const Index block{
        static_cast<unsigned>(b % blocks.x), static_cast<unsigned>(b / blocks.x % blocks.y),
        static_cast<unsigned>(b / blocks.x / blocks.y)};
    violation = run_block(launch, block, count);
    if (!violation.empty()) break;
  }
  happens_after(&g.finish_order);
  if (!violation.empty()) {
    const Unobserved unobserved;
    retire_shared();
    g.threads.clear();  // some were left in the middle
  }
  for (void* memory : g.retired) std::free(memory);
  g.retired.clear();
  g.host = nullptr;
  if (!violation.empty()) throw Violation(violation);
}

void* shared_array(const void* tag, std::size_t bytes) {
  Grid& g = grid();
  for (int i = 0; i < g.shared_count; ++i) {
    if (g.shared[i].tag == tag) return g.shared[i].memory;
  }
  g.shared_bytes += bytes;
  if (g.shared_bytes > kMaxShared) violate("more than 227 KiB of shared memory");
  if (g.shared_count == static_cast<int>(std::size(g.shared))) violate("too many shared arrays");
  const Unobserved unobserved;
  // Memory of its own for each array, ended where it ends: the address sanitizer sees the rest.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  g.shared[g.shared_count++] = {tag, memory, bytes};
  return memory;
}

void* dynamic_shared() {
  Grid& g = grid();
  if (g.launch->dynamic_shared == 0) violate("this launch has no dynamic shared memory");
  return shared_array(&g, g.launch->dynamic_shared);
}

void block_barrier(int line) {
  Grid& g = grid();
  char* order = &g.barrier_order[g.barrier_turn];
  happens_before(order);
  wait(State::at_barrier, "__syncthreads", line);
  happens_after(order);
}

void warp_meeting(const char* what, int line, std::uint32_t mask, Perform perform, void* argument) {
  Thread& self = *grid().running;
  if (!(mask >> self.position.lane & 1))
    violate(what, ": the mask does not name the lane that calls");
  self.mask = mask;
  self.perform = perform;
  self.argument = argument;
  wait(State::at_meeting, what, line);
}

void warp_barrier(int line, std::uint32_t mask) {
  Grid& g = grid();
  const int warp = g.running->position.warp;
  char* order = &g.warp_order[warp][g.warp_turn[warp]];
  happens_before(order);
  warp_meeting("__syncwarp", line, mask, nullptr, nullptr);
  happens_after(order);
}

void violate(const char* what, const char* more) {
  Grid& g = grid();
  g.violation[0] = what;
  g.violation[1] = more;
  g.running->fiber.switch_to(*g.host);
  std::abort();  // nobody comes back here
}

void copy_later(const Copy& copy, PerformCopy perform) {
  Grid& g = grid();
  Thread& self = *g.running;
  if (g.seed % 2 == 1) return perform(copy);
  if (self.copy_count == kMaxCopies) violate("too many asynchronous copies at once");
  self.perform_copy = perform;
  self.copies[self.copy_count++] = {copy, self.copy_groups};
}

void close_copy_group() { ++grid().running->copy_groups; }

void finish_copies(int groups_left) {
  Thread& self = *grid().running;
  int done = 0;
  while (done < self.copy_count && self.copies[done].group < self.copy_groups - groups_left)
    self.perform_copy(self.copies[done++].copy);
  for (int i = done; i < self.copy_count; ++i) self.copies[i - done] = self.copies[i];
  self.copy_count -= done;
}

}  // namespace grood_fast::emulation

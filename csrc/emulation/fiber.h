// A stack of its own to run on, left and entered again at will: what one CUDA thread is here.
//
// The sanitizers are told of every switch. For ThreadSanitizer a switch orders nothing: only what
// the execution model says (barriers, launches) makes one thread's writes another's to read.
#pragma once

#include <cstddef>

namespace grood_fast::emulation {

class Fiber {
 public:
  Fiber();                         // the caller's own stack
  explicit Fiber(void (*body)());  // a new stack; `body` must never return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves this fiber, which must be the running one, and goes on where `next` was left.
  void switch_to(Fiber& next);

 private:
  static void begin();

  void (*body_)() = nullptr;
  void* memory_ = nullptr;   // of the stack, with its guard page; null for the caller's own
  void* context_ = nullptr;  // where this fiber was left
  void* bottom_ = nullptr;   // of the stack
  std::size_t size_ = 0;
  void* sanitizer_ = nullptr;   // ThreadSanitizer's name for this fiber
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// Orders memory accesses for ThreadSanitizer: what stood before a release of `address` happened
// before what follows a later acquire of it.
void happens_before(void* address);
void happens_after(void* address);

// While one lives, ThreadSanitizer overlooks this fiber's accesses: they are the emulator's own.
class Unobserved {
 public:
  Unobserved();
  ~Unobserved();
};

}  // namespace grood_fast::emulation

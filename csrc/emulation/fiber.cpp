#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_THREAD__)
#define GROOD_FAST_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#define GROOD_FAST_ASAN 1
#endif
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GROOD_FAST_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define GROOD_FAST_ASAN 1
#endif
#endif

#if defined(GROOD_FAST_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(GROOD_FAST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a function call must preserve, and continues on the other stack.
extern "C" void grood_fast_switch_stack(void** left, void* entered);
asm(R"(
.text
.type grood_fast_switch_stack, @function
grood_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size grood_fast_switch_stack, .-grood_fast_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace grood_fast::emulation {
namespace {

constexpr std::size_t kStackBytes = std::size_t{1} << 18;  // sanitizers make frames large

Fiber* entered = nullptr;  // the fiber being switched to
Fiber* left = nullptr;     // the one that was left for it

}  // namespace

Fiber::Fiber() {
#if !defined(__x86_64__)
  context_ = new ucontext_t;
#endif
#if defined(GROOD_FAST_TSAN)
  sanitizer_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(void (*body)()) : body_(body), size_(kStackBytes) {
  const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  memory_ = mmap(
      nullptr, size_ + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1, 0);
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory_, guard, PROT_NONE);
  bottom_ = static_cast<char*>(memory_) + guard;
#if defined(__x86_64__)
  // As grood_fast_switch_stack leaves a stack: six registers, then where to return to.
  void** top = reinterpret_cast<void**>(static_cast<char*>(bottom_) + size_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context_ = top;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = bottom_;
  context->uc_stack.ss_size = size_;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::begin, 0);
  context_ = context;
#endif
#if defined(GROOD_FAST_TSAN)
  sanitizer_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(context_);
#endif
  if (memory_ == nullptr) return;
#if defined(GROOD_FAST_TSAN)
  __tsan_destroy_fiber(sanitizer_);
#endif
#if defined(GROOD_FAST_ASAN)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  munmap(
      memory_,
      static_cast<std::size_t>(static_cast<char*>(bottom_) - static_cast<char*>(memory_)) + size_);
}

// The first thing on a new stack.
void Fiber::begin() {
#if defined(GROOD_FAST_ASAN)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  left->bottom_ = const_cast<void*>(bottom);
  left->size_ = size;
#endif
  entered->body_();
}

void Fiber::switch_to(Fiber& next) {
  left = this;
  entered = &next;
#if defined(GROOD_FAST_ASAN)
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#if defined(GROOD_FAST_TSAN)
  __tsan_switch_to_fiber(next.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  grood_fast_switch_stack(&context_, next.context_);
#else
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(next.context_));
#endif
#if defined(GROOD_FAST_ASAN)
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  left->bottom_ = const_cast<void*>(bottom);
  left->size_ = size;
#endif
}

#if defined(GROOD_FAST_TSAN)

void happens_before(void* address) { __tsan_release(address); }
void happens_after(void* address) { __tsan_acquire(address); }

Unobserved::Unobserved() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Unobserved::~Unobserved() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

#else

void happens_before(void*) {}
void happens_after(void*) {}
Unobserved::Unobserved() {}
Unobserved::~Unobserved() {}

#endif

}  // namespace grood_fast::emulation

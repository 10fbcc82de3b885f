// A program that occupies the device without the host's help: the thread that runs it sleeps for `nanoseconds`, and notes
// on the clock of time.perf_counter() when it began and when it ended.

#include <sys/prctl.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int64_t kRoom = 1 << 20;
static int64_t began[kRoom], ended[kRoom];
static std::atomic<int64_t> count{0};

static int64_t Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static ffi::Error OccupyImpl(int64_t nanoseconds, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  // The kernel rounds sleeps up by 50 µs otherwise; a property of the thread, and XLA has several.
  thread_local const int exact = prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  (void)exact;
  const int64_t start = Now(), until = start + nanoseconds;
  const timespec at{until / 1000000000LL, until % 1000000000LL};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) != 0) {
  }
  std::memcpy(y->typed_data(), x.typed_data(), x.size_bytes());
  const int64_t mine = count.fetch_add(1);
  if (mine < kRoom) {
    began[mine] = start;
    ended[mine] = Now();
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Occupy, OccupyImpl,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("nanoseconds")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

extern "C" int64_t Count() { return count.load(); }
extern "C" void Reset() { count.store(0); }
extern "C" void Times(int64_t* into_began, int64_t* into_ended) {
  const int64_t n = count.load() < kRoom ? count.load() : kRoom;
  std::memcpy(into_began, began, n * sizeof(int64_t));
  std::memcpy(into_ended, ended, n * sizeof(int64_t));
}

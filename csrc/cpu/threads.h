// Work on several threads: those of PyTorch, or a small pool of sleeping ones. Not an OpenMP of our
// own: two copies of that runtime spin against each other on the same cores.
#pragma once

#include <cstdint>

namespace zorba {

// Calls task(context, begin, end) over [0, count) in pieces of at most `grain`, on up to `threads`
// threads, the caller included, and returns when all is done. Which thread gets which piece is not
// defined: results must not depend on it. Safe to call from several threads and after fork().
void parallel_for(int64_t count, int64_t grain, int threads,
                  void (*task)(void* context, int64_t begin, int64_t end), void* context);

// The same for a callable object.
template <typename Task>
void parallel_for(int64_t count, int64_t grain, int threads, Task task) {
  parallel_for(
      count, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Task*>(context))(begin, end); },
      &task);
}

}  // namespace zorba

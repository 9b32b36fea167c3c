#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace zorba {
namespace {

struct Job {
  int64_t count, grain;
  void (*task)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void run() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain);
      if (begin >= count) return;
      task(context, begin, std::min(begin + grain, count));
    }
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::lock_guard<std::mutex> one_job(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < helpers) {
        try {
          std::thread(&Pool::work, this).detach();
        } catch (const std::system_error&) {
          break;  // the system grants no more threads: those there are do the work
        }
        ++workers_;
      }
      job_ = &job;
      seats_ = std::min(helpers, workers_);
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;
    done_.wait(lock, [&] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return seats_ > 0; });
      --seats_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0;  // threads that exist
  int seats_ = 0;    // workers that may still join the job
  int busy_ = 0;     // workers inside the job
};

// Never destroyed: its threads outlive static destruction. A forked child has none of the threads
// and may have inherited a locked mutex, so it starts with a pool of its own.
Pool* g_pool = new Pool;

// What compilers call for `#pragma omp parallel`, in the runtime that PyTorch has loaded. After an
// operation of PyTorch its workers stay awake for a while, on the very cores that a pool of our own
// would have to wake up. Null where PyTorch came without OpenMP, and in a forked child: there the
// runtime would wait for workers that the fork has not copied.
using OpenMp = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
OpenMp g_openmp = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

const int g_at_fork = pthread_atfork(nullptr, nullptr, [] {
  g_pool = new Pool;
  g_openmp = nullptr;
});

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, void (*task)(void*, int64_t, int64_t),
                  void* context) {
  if (count <= 0) return;
  Job job{count, grain, task, context};
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers <= 0) {
    job.run();
  } else if (g_openmp != nullptr) {
    // All threads even for two pieces: with fewer, the runtime would end the others.
    g_openmp([](void* data) { static_cast<Job*>(data)->run(); }, &job, threads, 0);
  } else {
    g_pool->run(job, helpers);
  }
}

}  // namespace zorba

#include "threads.h"

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
Pool* g_pool = nullptr;
std::once_flag g_once;

Pool& pool() {
  std::call_once(g_once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, void (*task)(void*, int64_t, int64_t),
                  void* context) {
  if (count <= 0) return;
  Job job{count, grain, task, context};
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers <= 0) {
    job.run();
  } else {
    pool().run(job, helpers);
  }
}

}  // namespace zorba

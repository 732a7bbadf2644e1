// Threads that run the independent tasks of a loop; all operators share them.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace kernels {

// Each thread takes the next task when it is free. Idle threads yield at once and soon sleep, because MindSpore's own
// threads need the cores, too: with OpenMP, whose threads keep a core busy while they wait, every fourth decoded token took
// twice the time.
class ThreadPool {
 public:
  static ThreadPool &instance() {
    static ThreadPool *pool = new ThreadPool;  // never deleted: its threads run as long as the process
    return *pool;
  }

  // Call task(0), …, task(count - 1) on at most `threads` threads, and return when all have returned.
  template <typename Task>
  void parallel_for(int64_t count, const Task &task, int64_t threads = kMaxThreads) {
    std::unique_lock<std::mutex> free(busy_, std::try_to_lock);
    if (!free) {  // the pool is busy with a loop of another thread
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    threads_ = threads;
    for (int64_t first = 0; first < count; first += kMask)
      run_tasks(std::min<int64_t>(kMask, count - first), [&](int64_t i) { task(first + i); });
  }

 private:
  ThreadPool() {
    const int64_t threads = std::min<int64_t>(std::thread::hardware_concurrency(), kMaxThreads);
    for (int64_t i = 1; i < threads; ++i) std::thread([this, i] { work(i); }).detach();
  }

  // The tasks of one ticket, which has room for kMask.
  template <typename Task>
  void run_tasks(int64_t count, const Task &task) {
    call_ = [](const void *task, int64_t i) { (*static_cast<const Task *>(task))(i); };
    task_ = &task;
    returned_ = 0;
    ticket_ = ((ticket_ >> 2 * kBits) + 1) << 2 * kBits | uint64_t(count) << kBits;
    if (sleeping_ > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (run_task(0)) {
    }
    while (returned_ < count) std::this_thread::yield();
  }

  // Run a task, if there is one for this thread.
  bool run_task(int64_t thread) {
    uint64_t ticket = ticket_;
    while (has_task(thread, ticket)) {
      // They belong to this ticket only if it is still the newest; the exchange checks that.
      const auto call = call_.load();
      const void *task = task_;
      if (ticket_.compare_exchange_weak(ticket, ticket + 1)) {
        call(task, ticket & kMask);
        ++returned_;
        return true;
      }
    }
    return false;
  }

  bool has_task(int64_t thread, uint64_t ticket) const {
    return thread < threads_ && (ticket & kMask) < (ticket >> kBits & kMask);
  }

  void work(int64_t thread) {
    auto last = std::chrono::steady_clock::now();
    for (;;) {
      const auto now = std::chrono::steady_clock::now();
      if (run_task(thread)) {
        last = now;
      } else if (now - last < kIdleTime) {
        std::this_thread::yield();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, [&] { return has_task(thread, ticket_); });
        --sleeping_;
      }
    }
  }

  static constexpr int64_t kMaxThreads = 64;
  static constexpr auto kIdleTime = std::chrono::microseconds(100);  // before a thread sleeps: more than between operators
  static constexpr int kBits = 20;
  static constexpr uint64_t kMask = (1 << kBits) - 1;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<int64_t> sleeping_{0}, returned_{0}, threads_{0};
  std::atomic<uint64_t> ticket_{0};  // from the highest bits on: number of the loop, its tasks, how many were taken
  std::atomic<void (*)(const void *, int64_t)> call_{nullptr};
  std::atomic<const void *> task_{nullptr};
};

}  // namespace kernels

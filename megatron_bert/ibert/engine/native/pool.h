// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work: they spin for a short while, since layers follow each other within microseconds, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "model.h"

namespace ibert {

class Threads : public Pool {
 public:
  explicit Threads(int count) {
    threads = count;
    run = [](Pool* pool, void (*part)(void*, int), void* argument) { static_cast<Threads*>(pool)->all(part, argument); };
    for (int i = 1; i < count; i++) workers_.emplace_back([this, i] { work(i); });
  }
  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> round_{0};
  std::atomic<int> running_{0}, asleep_{0};
  bool ending_ = false;
  void (*part_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  static constexpr int SPINS = 4000;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
  void all(void (*part)(void*, int), void* argument) {
    if (threads == 1) return part(argument, 0);
    part_ = part;
    argument_ = argument;
    running_.store(threads - 1);
    round_.fetch_add(1);
    if (asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    part(argument, 0);
    for (int spins = 0; running_.load() > 0; spins++)
      if (spins < SPINS)
        pause();
      else
        std::this_thread::yield();
  }
  void work(int thread) {
    for (unsigned seen = 0;;) {
      int spins = 0;
      while (round_.load() == seen && spins++ < SPINS) pause();
      if (round_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return round_.load() != seen; });
        asleep_.fetch_sub(1);
      }
      seen = round_.load();
      if (ending_) return;
      part_(argument_, thread);
      running_.fetch_sub(1);
    }
  }
};

}  // namespace ibert

#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/cpu/attention_kernel.h"

namespace drrl::cpu {

/// Runs work(task, worker-local scratch) for all tasks, each taken by the next free thread in the
/// order of their numbers.
template <typename Work>
void for_each_task(int64_t tasks, int64_t scratch_size, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto scratch = at::empty({scratch_size}, at::kFloat);
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
      work(task, scratch.data_ptr<float>());
    }
  });
}

/// A backward pass: problems of any shapes, run together.
struct BackwardProblem {
  Shape shape;
  BackwardOperands operands;
};

/// Gradients of all problems. Those that add to the same rows of grad_q must not be in one call.
/// Does not depend on the number of threads.
void run_backward(const std::vector<BackwardProblem>& problems);

}  // namespace drrl::cpu

#include "core/cpu/tasks.h"

#include <algorithm>

namespace drrl::cpu {
namespace {

// Key blocks add to a block of grad_q in their order, whichever thread each one is on. They are
// taken in that order too, so the one waited for is always running.
class Turns {
 public:
  explicit Turns(const Shape& shape)
      : blocks_(shape.query_blocks()), next_(static_cast<size_t>(shape.heads * blocks_)) {}

  Order order(int64_t key_block) {
    return {this, key_block,
            [](void* self, int64_t mine, int64_t head, int64_t block) {
              static_cast<Turns*>(self)->wait(mine, head, block);
            },
            [](void* self, int64_t mine, int64_t head, int64_t block) {
              static_cast<Turns*>(self)->at(head, block).store(mine + 1, std::memory_order_release);
            }};
  }

 private:
  std::atomic<int64_t>& at(int64_t head, int64_t block) {
    return next_[static_cast<size_t>(head * blocks_ + block)];
  }
  void wait(int64_t key_block, int64_t head, int64_t block) {
    for (int spins = 0; at(head, block).load(std::memory_order_acquire) != key_block; ++spins) {
      if (spins > 1000) {
        std::this_thread::yield();
      }
    }
  }

  int64_t blocks_;
  std::vector<std::atomic<int64_t>> next_;
};

struct Task {
  size_t problem;
  int64_t index;
};

template <typename Count>
std::vector<Task> tasks_of(const std::vector<BackwardProblem>& problems, const Count& count) {
  std::vector<Task> tasks;
  for (size_t p = 0; p < problems.size(); ++p) {
    for (int64_t i = 0; i < count(problems[p].shape); ++i) {
      tasks.push_back({p, i});
    }
  }
  return tasks;
}

}  // namespace

void run_backward(const std::vector<BackwardProblem>& problems) {
  std::vector<int64_t> begin;  // of each problem's packed queries
  int64_t packed_size = 0, scratch_size = 0;
  std::vector<std::unique_ptr<Turns>> turns;
  for (const BackwardProblem& problem : problems) {
    begin.push_back(packed_size);
    packed_size += packed_queries_size(problem.shape);
    scratch_size = std::max(scratch_size, backward_scratch_size(problem.shape));
    turns.push_back(std::make_unique<Turns>(problem.shape));
  }
  const auto packed = at::empty({packed_size}, at::kFloat);
  const auto packed_of = [&](size_t p) { return packed.data_ptr<float>() + begin[p]; };

  const auto heads = tasks_of(problems, [](const Shape& shape) { return shape.heads; });
  for_each_task(static_cast<int64_t>(heads.size()), 0, [&](int64_t task, float*) {
    const auto [p, head] = heads[static_cast<size_t>(task)];
    pack_queries(problems[p].shape, problems[p].operands, head, packed_of(p));
  });
  const auto blocks = tasks_of(problems, [](const Shape& shape) { return shape.key_blocks(); });
  for_each_task(static_cast<int64_t>(blocks.size()), scratch_size,
                [&](int64_t task, float* scratch) {
                  const auto [p, block] = blocks[static_cast<size_t>(task)];
                  backward_block(problems[p].shape, problems[p].operands, packed_of(p), block,
                                 turns[p]->order(block), scratch);
                });
}

}  // namespace drrl::cpu

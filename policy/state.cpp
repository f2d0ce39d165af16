#include "policy/state.h"

#include <cmath>

#include "core/basis.h"
#include "core/cost.h"

namespace drrl {
namespace {

constexpr double kFloor = 6.144e-6;  // e^-12

}  // namespace

at::Tensor pair_state(const PairGrams& grams, const at::Tensor& w_o, const at::Tensor& start, const BlockTree& tree, int64_t first_pair,
                      const std::vector<int64_t>& ranks) {
  at::NoGradGuard no_grad;
  const int64_t batch = grams.keys.size(0), groups = grams.keys.size(1), count = grams.keys.size(2), d = grams.keys.size(4);
  const auto output = output_gram(w_o, groups, d).unsqueeze(1).expand_as(grams.values).flatten(0, 2);
  std::vector<double> keys, level, position;
  for (int64_t pair = first_pair; pair < first_pair + count; ++pair) {
    const PairRun& run = tree.run_of(pair);
    keys.push_back(static_cast<double>(run.key_rows));
    level.push_back(static_cast<double>(run.level) / 8);
    const int64_t begin = run.query_begin + (pair - run.first_pair) * run.stride - tree.sinks();
    position.push_back(std::log2(1 + static_cast<double>(begin) / static_cast<double>(tree.geometry().near_block)) / 8);
  }
  const auto by_pair = [&](const std::vector<double>& x) { return at::tensor(x, at::kDouble).expand({batch, groups, count}); };
  const auto rows = by_pair(keys);

  const auto columns = at::tensor(ranks, at::kLong).to(grams.keys.device());
  const auto losses = [&](int64_t kind, const at::Tensor& gram_x, const at::Tensor& gram_y) {
    const auto from = start.select(1, kind).unsqueeze(1).expand({-1, count, -1, -1}).flatten(0, 1);
    return stale_loss(from, gram_x, gram_y).to(at::kCPU).unflatten(0, {batch, groups, count});  // [B, G, count, d + 1]
  };
  const auto features = [&](const at::Tensor& loss, const at::Tensor& size) {
    const auto total = loss.narrow(3, 0, 1).clamp_min(1e-300);
    return at::cat({(loss.index_select(3, columns.to(at::kCPU)) / total).clamp_min(kFloor).log(), (total / size.unsqueeze(3)).clamp_min(1e-12).log()}, 3);
  };
  const auto scores = losses(0, grams.queries.flatten(0, 2), grams.keys.flatten(0, 2));
  const auto values = losses(1, grams.values.flatten(0, 2), output);
  const double heads = static_cast<double>(w_o.size(1)) / static_cast<double>(groups * d);
  return at::cat({features(scores, rows * rows * heads * static_cast<double>(d)), features(values, rows), by_pair(level).unsqueeze(3),
                  by_pair(position).unsqueeze(3)},
                 3)
      .to(at::kFloat);
}

double pair_state_flops(int64_t d) { return 2 * stale_loss_flops(d); }

}  // namespace drrl

#include "policy/calibration/pair_features.h"

#include <cmath>

#include "core/attention/far_bases.h"
#include "core/attention/flops.h"
#include "core/linalg/basis.h"

namespace drrl {
namespace {

constexpr double kFloor = 6.144e-6;  // e^-12

}  // namespace

StartLoss start_loss(const PairGrams& grams, const at::Tensor& w_o, const at::Tensor& start) {
  at::NoGradGuard no_grad;
  const int64_t count = grams.keys.size(2);
  const auto loss = [&](int64_t kind, const at::Tensor& gram_x, const at::Tensor& gram_y) {
    const auto from = start.select(1, kind).unsqueeze(1).expand({-1, count, -1, -1}).flatten(0, 1);
    return stale_loss(from, gram_x.flatten(0, 2), gram_y.flatten(0, 2)).to(at::kCPU);
  };
  return {loss(0, grams.queries, grams.keys),
          loss(1, grams.values, output_of(grams, w_o).unsqueeze(1).expand_as(grams.values))};
}

at::Tensor pair_state(const PairGrams& grams, const at::Tensor& w_o, int64_t heads_per_group,
                      const at::Tensor& start, const BlockTree& tree, int64_t first_pair,
                      const std::vector<int64_t>& ranks) {
  at::NoGradGuard no_grad;
  const int64_t batch = grams.keys.size(0), groups = grams.keys.size(1), count = grams.keys.size(2),
                d = grams.keys.size(4);
  std::vector<double> keys, level, position;
  for (int64_t pair = first_pair; pair < first_pair + count; ++pair) {
    const PairRun& run = tree.run_of(pair);
    keys.push_back(static_cast<double>(run.key_rows));
    level.push_back(static_cast<double>(run.level) / 8);
    const int64_t begin = run.query_begin + (pair - run.first_pair) * run.stride - tree.sinks();
    position.push_back(std::log2(1 + static_cast<double>(begin) /
                                         static_cast<double>(tree.geometry().near_block)) /
                       8);
  }
  const auto by_pair = [&](const std::vector<double>& x) {
    return at::tensor(x, at::kDouble).expand({batch, groups, count});
  };
  const auto rows = by_pair(keys);

  const StartLoss loss = start_loss(grams, w_o, start);
  const auto columns = at::tensor(ranks, at::kLong);
  const auto features = [&](const at::Tensor& of_kind, const at::Tensor& size) {
    const auto lost = of_kind.unflatten(0, {batch, groups, count});
    const auto total = lost.narrow(3, 0, 1).clamp_min(1e-300);
    return at::cat({(lost.index_select(3, columns) / total).clamp_min(kFloor).log(),
                    (total / size.unsqueeze(3)).clamp_min(1e-12).log()},
                   3);
  };
  return at::cat({features(loss.scores, rows * rows * static_cast<double>(heads_per_group * d)),
                  features(loss.values, rows), by_pair(level).unsqueeze(3),
                  by_pair(position).unsqueeze(3)},
                 3)
      .to(at::kFloat);
}

double start_loss_flops(int64_t d) {
  return 2 * stale_loss_flops(d);
}

}  // namespace drrl

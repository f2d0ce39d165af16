#include "policy/online/online_balance.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace drrl {

OnlineBalance::OnlineBalance(std::shared_ptr<LowRankController> controller, RankBalance balance,
                             Group tp, int64_t every, bool on_cpu)
    : controller_(std::move(controller)),
      balance_(std::move(balance)),
      tp_(std::move(tp)),
      every_(every),
      on_cpu_(on_cpu),
      ranks_(balance_.plain()),
      measured_(static_cast<size_t>(tp_.size()), 1.0) {
  check(ErrorKind::kUsage, every_ >= 1, "ranks that are balanced every ", every_,
        " steps, expected at least 1");
  check(ErrorKind::kUsage, controller_->context().size() == 1,
        "balance of ranks does not go with sequences split over ", controller_->context().size(),
        " processes");
  check(ErrorKind::kUsage, !controller_->shares_kv_head(),
        "balance of ranks does not go with tensor-parallel processes that share a KV head");
}

void OnlineBalance::begin_step(int64_t step) {
  step_ = step;
  controller_->set_timing(on_cpu_ ||
                          step % every_ == 0);  // on CUDA a clock costs a synchronization
}

void OnlineBalance::end_step(AttentionStatistics& spent) {
  if (std::exchange(warm_, true) &&
      spent.attention_ms > 0) {  // the first step of a run is no measure: memory is new, and
                                 // kernels are being chosen
    samples_.push_back(ranks_.cost(static_cast<size_t>(tp_.rank())) / spent.attention_ms);
  }
  if (step_ % every_ != 0) {
    return;
  }
  const auto middle = samples_.begin() + static_cast<std::ptrdiff_t>(samples_.size() / 2);
  std::nth_element(samples_.begin(), middle, samples_.end());
  const at::Tensor own = at::full({1}, samples_.empty() ? 0.0 : *middle, at::kDouble)
                             .to(tp_.message_device());
  samples_.clear();
  at::Tensor all = at::empty({tp_.size()}, own.options());
  tp_.all_gather(all, own);
  all = all.cpu();
  const double fastest = all.max().item<double>();
  if (fastest == 0) {
    return;
  }
  for (size_t p = 0; p < measured_.size(); ++p) {
    const double speed = all.const_data_ptr<double>()[p];
    measured_[p] = speed > 0 ? std::max(0.01, std::round(100 * speed / fastest) / 100)
                             : 1;  // 0: it holds no KV groups
  }
  BalancedRanks next = balance_.ranks(measured_);
  if (next.time(measured_) > (1 - kWorthwhile) * ranks_.time(measured_)) {
    return;
  }
  ranks_ = std::move(next);
  speeds_ = measured_;
  controller_->set_policy(
      make_table_policy(ranks_.table, c10::str("dp, balanced for speeds ", speeds_)));
}

std::vector<std::pair<std::string, double>> OnlineBalance::figures() {
  return {{"balance_slowest", *std::min_element(measured_.begin(), measured_.end())},
          {"balance_time", ranks_.time(measured_) / balance_.plain().time(measured_)},
          {"balance_damage", ranks_.damage - balance_.plain().damage}};
}

}  // namespace drrl

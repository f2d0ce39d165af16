#include "policy/online/online_policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "distributed/collectives/agreement.h"

namespace drrl {
namespace {

// A record: these, then ms of each layer, then the sampler's sums.
enum Header : int64_t {
  kFirstGroup,
  kGroups,
  kFactorsHigh,
  kFactorsLow,
  kGuardRaises,
  kDecisions,
  kTimedSteps,
  kHeader
};

// What follows the factors in the message that comes back.
enum Figure : int64_t {
  kUpdates,
  kDistance,
  kDamage,
  kCalibratedDamage,
  kAttentionMs,
  kSlowest,
  kGuarded,
  kFigures
};
constexpr const char* kFigureKeys[kFigures] = {
    "policy_updates",      "policy_distance", "policy_damage", "policy_damage_calibrated",
    "policy_attention_ms", "policy_slowest",  "policy_guarded"};

// A saved state: these, then factors, figures, a message that is not in effect yet, sums and
// counters, and rank 0's trainer.
enum Saved : int64_t {
  kSavedWorld,
  kSavedFirstGroup,
  kSavedGroups,
  kSavedReceived,
  kSavedSteps,
  kSavedGuardRaises,
  kSavedDecisions,
  kSaved
};

std::vector<double> padded(std::vector<double> values, int64_t size) {
  values.resize(static_cast<size_t>(size), 0.0);
  return values;
}

}  // namespace

OnlinePolicy::OnlinePolicy(std::shared_ptr<LowRankController> controller, Calibration calibration,
                           int64_t first_group, int64_t groups, at::Device device, Group channel,
                           Options options)
    : controller_(std::move(controller)),
      calibration_(std::move(calibration)),
      first_group_(first_group),
      groups_(groups),
      options_(std::move(options)),
      on_cpu_(device.is_cpu()),
      sampler_(std::make_shared<DamageSampler>(calibration_, first_group, groups, device,
                                               options_.sampling)),
      trainer_(calibration_),
      factors_(at::zeros_like(calibration_.damage)),
      figures_(at::zeros({kFigures}, at::kDouble)),
      world_rank_(channel.rank()),
      world_size_(channel.size()),
      channel_(std::move(channel), kHeader + calibration_.layers() + sampler_->sums().numel(),
               factors_.numel() + kFigures,
               [this](const std::vector<at::Tensor>& records) { return train(records); }) {
  check(ErrorKind::kUsage, options_.update_every >= 1, "a policy that is updated every ",
        options_.update_every, " steps, expected at least 1");
  check(ErrorKind::kUsage, controller_->context().size() == 1,
        "online training of the rank policy does not go with sequences split over ",
        controller_->context().size(), " processes");
  check(ErrorKind::kUsage, !controller_->shares_kv_head(),
        "online training of the rank policy does not go with tensor-parallel processes that share "
        "a KV head");
  controller_->policy()->set_calibration(calibration_);  // refuses if it decides by none
  controller_->set_sampler(sampler_);
}

void OnlinePolicy::begin_step(int64_t step) {
  step_ = step;
  sampler_->begin(step);
  controller_->set_timing(on_cpu_ || step % options_.update_every ==
                                         0);  // on CUDA a clock costs a synchronization
}

void OnlinePolicy::end_step(AttentionStatistics& spent) {
  sampler_->pause();
  spent_ += spent;
  steps_ += spent.layer_ms.empty() ? 0 : 1;
  if (step_ % options_.update_every != 0) {
    return;
  }
  receive();
  apply_received();
  channel_.post(record());
  sampler_->reset();
  spent_ = {};
  steps_ = 0;
}

void OnlinePolicy::receive() {
  if (channel_.under_way()) {
    received_ = channel_.take();
  }
}

void OnlinePolicy::apply_received() {
  if (!received_) {
    return;
  }
  factors_ = received_->narrow(0, 0, factors_.numel()).view(factors_.sizes()).clone();
  figures_ = received_->narrow(0, factors_.numel(), kFigures).clone();
  received_.reset();
  controller_->policy()->set_calibration(calibration());
}

void OnlinePolicy::finish() {
  receive();
  apply_received();
}

at::Tensor OnlinePolicy::record() const {
  const uint64_t hash = hash_bytes(factors_.const_data_ptr(), factors_.nbytes());
  const std::vector<double> head = {static_cast<double>(first_group_),
                                    static_cast<double>(groups_),
                                    static_cast<double>(hash >> 32),
                                    static_cast<double>(hash & 0xffffffffU),
                                    static_cast<double>(spent_.guard_raises),
                                    static_cast<double>(spent_.decisions),
                                    steps_};
  const auto ms = padded(spent_.layer_ms, calibration_.layers());
  return at::cat({at::tensor(head, at::kDouble), at::tensor(ms, at::kDouble),
                  sampler_->sums().flatten().cpu()});
}

at::Tensor OnlinePolicy::train(const std::vector<at::Tensor>& records) {
  const int64_t layers = calibration_.layers();
  auto sizes = calibration_.damage.sizes().vec();
  sizes.insert(sizes.begin(), DamageSampler::kSums);
  auto sums = at::zeros(sizes, at::kDouble);
  double raises = 0, decisions = 0, all_ms = 0, most_ms = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    const double* head = records[i].const_data_ptr<double>();
    const double* first = records[0].const_data_ptr<double>();
    const bool agrees = head[kFactorsHigh] == first[kFactorsHigh] &&
                        head[kFactorsLow] == first[kFactorsLow];
    check(ErrorKind::kCommunication, agrees, "update ", trainer_.updates() + 1,
          " of the rank policy: world rank ", i,
          " decides ranks by other damages than world rank 0");
    const auto begin = static_cast<int64_t>(head[kFirstGroup]),
               count = static_cast<int64_t>(head[kGroups]);
    sizes[2] = count;
    sums.narrow(
        2, begin,
        count) += records[i].narrow(0, kHeader + layers, c10::multiply_integers(sizes)).view(sizes);
    const double ms = records[i].narrow(0, kHeader, layers).sum().item<double>() /
                      std::max(head[kTimedSteps], 1.0);
    raises += head[kGuardRaises];
    decisions += head[kDecisions];
    all_ms += ms;
    most_ms = std::max(most_ms, ms);
  }
  trainer_.update(sums);
  const at::Tensor& factors = trainer_.log_factors();
  auto figures = at::zeros({kFigures}, at::kDouble);
  double* of = figures.data_ptr<double>();
  of[kUpdates] = static_cast<double>(trainer_.updates());
  of[kDistance] = (factors - factors.mean(at::IntArrayRef{0, 1, 3, 4}, /*keepdim=*/true))
                      .pow(2)
                      .mean()
                      .sqrt()
                      .item<double>();
  of[kDamage] = of[kCalibratedDamage] = std::nan("");
  if (options_.allocate) {
    const Calibration learned = scaled(calibration_, factors);
    of[kDamage] = expected_damage(learned, options_.allocate(learned));
    of[kCalibratedDamage] = expected_damage(learned, options_.allocate(calibration_));
  }
  of[kAttentionMs] = all_ms / static_cast<double>(records.size());
  of[kSlowest] = all_ms > 0 ? most_ms / of[kAttentionMs] : 1;
  of[kGuarded] = decisions > 0 ? raises / decisions : 0;
  return at::cat({factors.flatten(), figures});
}

std::vector<std::pair<std::string, double>> OnlinePolicy::figures() {
  std::vector<std::pair<std::string, double>> result;
  for (int64_t i = 0; i < kFigures && updates() > 0; ++i) {
    result.emplace_back(kFigureKeys[i], figures_[i].item<double>());
  }
  result.emplace_back("policy_sample_ms", sampler_->take_ms());
  result.emplace_back("policy_wait_ms",
                      channel_.waited_ms() - std::exchange(waited_ms_, channel_.waited_ms()));
  return result;
}

int64_t OnlinePolicy::updates() const {
  return figures_[kUpdates].item<int64_t>();
}

std::string OnlinePolicy::save() {
  receive();
  const auto head = at::tensor(
      {static_cast<double>(world_size_), static_cast<double>(first_group_),
       static_cast<double>(groups_), received_ ? 1.0 : 0.0, steps_,
       static_cast<double>(spent_.guard_raises), static_cast<double>(spent_.decisions)},
      at::kDouble);
  std::vector<at::Tensor> all = {
      head,
      factors_.flatten(),
      figures_,
      received_ ? *received_ : at::zeros({factors_.numel() + kFigures}, at::kDouble),
      at::tensor(padded(spent_.layer_ms, calibration_.layers()), at::kDouble),
      sampler_->sums().flatten().cpu()};
  if (world_rank_ == 0) {
    all.push_back(trainer_.state());
  }
  const auto flat = at::cat(all).contiguous();
  return {reinterpret_cast<const char*>(flat.const_data_ptr<double>()), flat.nbytes()};
}

void OnlinePolicy::load(const std::string& state) {
  auto flat = at::empty({static_cast<int64_t>(state.size() / sizeof(double))}, at::kDouble);
  std::memcpy(flat.data_ptr<double>(), state.data(), flat.nbytes());
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    check(ErrorKind::kCheckpoint, at + count <= flat.numel(), "the rank policy's state has ",
          flat.numel(), " elements, expected at least ", at + count);
    at += count;
    return flat.narrow(0, at - count, count);
  };
  const at::Tensor head = take(kSaved);
  const double* saved = head.const_data_ptr<double>();
  factors_ = take(factors_.numel()).view(factors_.sizes()).clone();
  figures_ = take(kFigures).clone();
  const at::Tensor message = take(factors_.numel() + kFigures);
  received_ = saved[kSavedReceived] != 0 ? std::optional(message.clone()) : std::nullopt;
  const at::Tensor ms = take(calibration_.layers());
  auto sizes = sampler_->sums().sizes().vec();
  sizes[2] = static_cast<int64_t>(saved[kSavedGroups]);
  const at::Tensor sums = take(c10::multiply_integers(sizes));
  const bool same_layout = saved[kSavedWorld] == static_cast<double>(world_size_) &&
                           saved[kSavedFirstGroup] == static_cast<double>(first_group_) &&
                           saved[kSavedGroups] == static_cast<double>(groups_);
  spent_ = {};
  sampler_->reset();
  steps_ = 0;
  if (same_layout) {
    sampler_->reset(sums.view(sizes));
    steps_ = saved[kSavedSteps];
    spent_.guard_raises = static_cast<int64_t>(saved[kSavedGuardRaises]);
    spent_.decisions = static_cast<int64_t>(saved[kSavedDecisions]);
    spent_.layer_ms.assign(ms.const_data_ptr<double>(), ms.const_data_ptr<double>() + ms.numel());
  }
  if (world_rank_ == 0) {
    trainer_.load(flat.narrow(0, at, flat.numel() - at));
  }
  controller_->policy()->set_calibration(calibration());
}

}  // namespace drrl

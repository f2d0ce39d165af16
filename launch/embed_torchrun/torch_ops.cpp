// drrl for Python programs: torch.ops.load_library("libdrrl_torch_ops.so") adds the class
// torch.classes.drrl.LowRankAttention. The program's own process groups are found by their names;
// none is made here. Errors are RuntimeErrors with drrl's messages.
#include <cmath>

#include <ATen/autocast_mode.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/library.h>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "policy/attention/lowrank_controller.h"
#include "policy/calibration/calibration.h"
#include "policy/rank_policy.h"

namespace drrl {
namespace {

/// The options of the programs that say which ranks: --rank (not 0: --rank_policy=fixed),
/// --rank_budget (--rank_policy=dp) with --policy, --basis_updates.
LowRankController make_controller(int64_t head_dim, int64_t rank, const std::string& policy,
                                  double rank_budget, Geometry geometry, int64_t basis_updates,
                                  const at::Device& device) {
  check(ErrorKind::kUsage, geometry.near_block >= 1 && geometry.sink_tokens >= 0,
        "near_block must be at least 1 and sink_tokens not negative, got ", geometry.near_block,
        " and ", geometry.sink_tokens);
  check(ErrorKind::kUsage, basis_updates >= BasisOptions::kSolve,
        "basis_updates must be at least -1, got ", basis_updates);
  check(
      ErrorKind::kUsage, rank != 0 || !policy.empty(),
      "neither a rank nor a policy file: give rank=..., or policy=... from drrl-policy calibrate");
  BasisOptions bases{.update_steps = basis_updates, .start = {}};
  if (policy.empty()) {
    return {make_fixed_policy(rank, head_dim), geometry, bases};
  }
  Calibration calibration = Calibration::load(policy);
  check(ErrorKind::kUsage, calibration.head_dim() == head_dim, "policy ", policy,
        " is of a model with head_dim ", calibration.head_dim(), ", not ", head_dim);
  check(ErrorKind::kUsage, rank != 0 || calibration.geometry == geometry, "policy ", policy,
        " was calibrated with near_block ", calibration.geometry.near_block, " and sink_tokens ",
        calibration.geometry.sink_tokens, ", these are ", geometry.near_block, " and ",
        geometry.sink_tokens);
  bases.start = calibration.bases.to(device);
  auto ranks = rank != 0 ? make_fixed_policy(rank, head_dim)
                         : make_dp_policy(std::move(calibration), rank_budget,
                                          rank_buckets(device, head_dim), basis_updates);
  return {std::move(ranks), geometry, bases};
}

/// A LowRankController of a model whose layers are whole on every process.
class LowRankAttention : public torch::CustomClassHolder {
 public:
  LowRankAttention(int64_t head_dim, int64_t rank, const std::string& policy, double rank_budget,
                   int64_t near_block, int64_t sink_tokens, int64_t basis_updates,
                   const at::Device& device)
      : controller_(make_controller(head_dim, rank, policy, rank_budget, {near_block, sink_tokens},
                                    basis_updates, device)) {}

  /// LowRankController::attend. Under an activation checkpoint it is simply called again: it
  /// decides the same and makes the same bases once more.
  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o) {
    const c10::impl::ExcludeDispatchKeyGuard precision_as_given(
        c10::autocast_dispatch_keyset);  // or Grams would be rounded to it
    std::shared_ptr<LayerPlan> plan;
    return controller_.attend(layer, q, k, v, w_o.detach(), plan);
  }

  /// Throws on all processes of the c10d group of this name, and names those that differ, unless
  /// all have one policy and decided alike since the last call.
  void check_agreement(const std::string& group, double timeout_s) {
    const std::chrono::milliseconds timeout(std::llround(1000 * timeout_s));
    drrl::check_agreement(Group(group, c10d::resolve_process_group(group), timeout),
                          controller_.take_decisions_digest(), "rank decisions");
  }

  /// What was spent since the last call (AttentionStatistics), with means in place of sums.
  c10::Dict<std::string, double> take_statistics() {
    const AttentionStatistics s = controller_.take_statistics();
    const double decisions = static_cast<double>(std::max<int64_t>(s.decisions, 1));
    c10::Dict<std::string, double> figures;
    figures.insert("calls", static_cast<double>(s.calls));
    figures.insert("flops", s.flops);
    figures.insert("exact_flops", s.exact_flops);
    figures.insert("mean_rank_qk", s.rank_qk / decisions);
    figures.insert("mean_rank_v", s.rank_v / decisions);
    figures.insert("decompositions", static_cast<double>(s.decompositions));
    return figures;
  }

  std::string describe() const { return controller_.describe(); }

 private:
  LowRankController controller_;
};

TORCH_LIBRARY(drrl, library) {
  using torch::arg;
  library.class_<LowRankAttention>("LowRankAttention")
      .def(torch::init<int64_t, int64_t, const std::string&, double, int64_t, int64_t, int64_t,
                       const at::Device&>(),
           "",
           {arg("head_dim"), arg("rank") = 0, arg("policy") = "", arg("rank_budget") = 0.585,
            arg("near_block") = 256, arg("sink_tokens") = 4, arg("basis_updates") = 2,
            arg("device") = at::Device(at::kCPU)})
      .def("attend", &LowRankAttention::attend, "",
           {arg("layer"), arg("q"), arg("k"), arg("v"), arg("w_o")})
      .def("check_agreement", &LowRankAttention::check_agreement, "",
           {arg("group"), arg("timeout_s") = 600.0})
      .def("take_statistics", &LowRankAttention::take_statistics)
      .def("describe", &LowRankAttention::describe);
}

}  // namespace
}  // namespace drrl

#include "launch/eval/audit_report.h"

#include <cmath>
#include <cstdint>
#include <iostream>
#include <utility>

namespace drrl {
namespace {

nlohmann::ordered_json quantiles(const Sample& sample) {
  return {{"median", sample.quantile(0.5)},
          {"p10", sample.quantile(0.1)},
          {"p90", sample.quantile(0.9)},
          {"least", sample.quantile(0)},
          {"most", sample.quantile(1)}};
}

}  // namespace

void add_audit(const AuditReport& report, nlohmann::ordered_json& json) {
  int64_t pairs = 0, violations = report.block_violations;
  auto levels = nlohmann::ordered_json::array();
  Sample tightness, lagged;
  for (const AuditReport::Level& level : report.levels) {
    pairs += level.pairs;
    violations += level.violations;
    tightness.add(level.tightness);
    lagged.add(level.lagged_prediction);
    levels.push_back({{"audited_pairs", level.pairs},
                      {"certificate_violations", level.violations},
                      {"score_bound_tightness", quantiles(level.tightness)},
                      {"lagged_prediction_ratio", quantiles(level.lagged_prediction)}});
  }
  json["audited_pairs"] = pairs;
  json["audited_blocks"] = report.blocks;
  json["certificate_violations"] = violations;
  json["score_bound_tightness"] = quantiles(tightness);
  json["output_bound_tightness"] = quantiles(report.output_tightness);
  json["eq9_bound_tightness"] = quantiles(report.eq9_tightness);
  json["output_error"] = quantiles(report.output_error);
  json["score_loss_share"] = quantiles(report.score_loss);
  json["value_loss_share"] = quantiles(report.value_loss);
  json["lagged_prediction_ratio"] = quantiles(lagged);
  json["weyl_bound"] = quantiles(report.weyl);
  json["weyl_true"] = quantiles(report.shift);
  json["davis_kahan_bound"] = quantiles(report.davis_kahan);
  json["davis_kahan_true"] = quantiles(report.sine);
  json["audit_levels"] = std::move(levels);
}

void print_audit(const nlohmann::ordered_json& json) {
  const auto quantile_of = [](const nlohmann::ordered_json& from, const char* name,
                              const char* quantile) {
    return from[name][quantile].is_null() ? std::nan("") : from[name][quantile].get<double>();
  };
  const auto line = [&](const nlohmann::ordered_json& from) {
    return c10::str(
        from["audited_pairs"].get<int64_t>(), " pairs, ",
        from["certificate_violations"].get<int64_t>(), " violations, score bound / error ",
        quantile_of(from, "score_bound_tightness", "median"),
        " (90 %: ", quantile_of(from, "score_bound_tightness", "p90"),
        "), lagged prediction / loss ", quantile_of(from, "lagged_prediction_ratio", "median"));
  };
  std::cout << "audit: " << line(json) << "; " << json["audited_blocks"]
            << " blocks, output bound / error "
            << quantile_of(json, "output_bound_tightness", "median")
            << " (90 %: " << quantile_of(json, "output_bound_tightness", "p90") << "), Eq. 9 alone "
            << quantile_of(json, "eq9_bound_tightness", "median") << "\n";
  for (size_t i = 0; i < json["audit_levels"].size(); ++i) {
    std::cout << "  level " << i << ": " << line(json["audit_levels"][i]) << "\n";
  }
  std::cout << "  start to own subspace: Weyl " << quantile_of(json, "weyl_bound", "median")
            << " (true " << quantile_of(json, "weyl_true", "median") << "), Davis-Kahan "
            << quantile_of(json, "davis_kahan_bound", "median") << " (true "
            << quantile_of(json, "davis_kahan_true", "median") << ")\n";
}

}  // namespace drrl

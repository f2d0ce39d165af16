#pragma once

#include <memory>
#include <optional>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/types/block_tree.h"
#include "policy/attention/attention_controller.h"

namespace drrl {

/// Attention by `inner`, unchanged, and what it decided for every far pair. Not part of any time
/// that `inner` measures.
class DecisionRecorder final : public AttentionController {
 public:
  DecisionRecorder(std::shared_ptr<AttentionController> inner, Geometry geometry);

  at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) override;

  /// The calls that follow are about this sequence, batch 1; none: they are not written down.
  void set_sequence(std::optional<int64_t> sequence) { sequence_ = sequence; }

  /// {"sequence", "layer", and for each far pair "level", "query_begin" and "query_rows" [tokens];
  /// for each KV group and pair "rank_qk", "rank_v" and, under gates, "exact", the share of the
  /// pair's entries (those of all heads of the group) that were exact; else null}
  const std::vector<nlohmann::ordered_json>& lines() const { return lines_; }

 private:
  std::shared_ptr<AttentionController> inner_;
  Geometry geometry_;
  std::optional<int64_t> sequence_;
  std::vector<nlohmann::ordered_json> lines_;
};

}  // namespace drrl

#include "launch/eval/decisions.h"

#include <utility>

#include "core/attention/lowrank_attention.h"
#include "policy/attention/layer_plan.h"

namespace drrl {

DecisionRecorder::DecisionRecorder(std::shared_ptr<AttentionController> inner, Geometry geometry)
    : inner_(std::move(inner)), geometry_(geometry) {}

at::Tensor DecisionRecorder::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& w_o,
                                    std::shared_ptr<LayerPlan>& plan) {
  auto out = inner_->attend(layer, q, k, v, w_o, plan);
  if (!sequence_) {
    return out;
  }
  TORCH_CHECK(q.size(0) == 1 && plan != nullptr && plan->context == nullptr,
              "decisions are written down of one whole sequence at a time, got q ", q.sizes());
  const LowRankPlan* low = plan->lowrank.get();  // null: exact
  const BlockTree tree(q.size(2), geometry_);
  const int64_t groups = k.size(1), heads = q.size(1) / groups, d = q.size(3),
                pairs = tree.num_pairs();
  const ExactEntries& entries = plan->served.exact;

  std::vector<int64_t> level, query_begin, query_rows, key_begin, key_rows;
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      level.push_back(run.level);
      query_begin.push_back(run.query_begin + i * run.stride);
      query_rows.push_back(run.query_rows);
      key_begin.push_back(run.key_begin + i * run.stride);
      key_rows.push_back(run.key_rows);
    }
  }
  std::vector<std::vector<int64_t>> rank_qk, rank_v;
  std::vector<std::vector<double>> exact;
  for (int64_t group = 0; group < groups; ++group) {
    rank_qk.emplace_back();
    rank_v.emplace_back();
    exact.emplace_back();
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto p = static_cast<size_t>(pair);
      const Ranks ranks = low != nullptr ? low->ranks[static_cast<size_t>(group * pairs + pair)]
                                         : Ranks{d, d};
      rank_qk.back().push_back(ranks.qk);
      rank_v.back().push_back(ranks.v);
      if (entries.defined()) {
        int64_t count = 0;
        for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
          count += entries.count(head * q.size(2) + query_begin[p], query_rows[p], key_begin[p],
                                 key_rows[p]);
        }
        exact.back().push_back(static_cast<double>(count) /
                               static_cast<double>(heads * query_rows[p] * key_rows[p]));
      }
    }
  }
  lines_.push_back(
      {{"sequence", *sequence_},
       {"layer", layer},
       {"level", level},
       {"query_begin", query_begin},
       {"query_rows", query_rows},
       {"rank_qk", rank_qk},
       {"rank_v", rank_v},
       {"exact", entries.defined() ? nlohmann::ordered_json(exact) : nlohmann::ordered_json()}});
  return out;
}

}  // namespace drrl

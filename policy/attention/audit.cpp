#include "policy/attention/audit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/attention/far_bases.h"
#include "core/attention/kv_cache.h"
#include "core/attention/rows.h"
#include "core/linalg/gram.h"
#include "policy/attention/layer_plan.h"

namespace drrl {
namespace {

// Grams of the queries that each pair serves, [B G pairs, d, d].
at::Tensor served_grams(const at::Tensor& q, int64_t groups, const BlockTree& tree) {
  std::vector<at::Tensor> grams;
  for (const PairRun& run : tree.runs()) {
    const auto rows = query_rows(q, groups, run);
    grams.push_back(at::matmul(rows.transpose(1, 2), rows).unflatten(0, {-1, run.count}));
  }
  return at::cat(grams, 1).flatten(0, 1);
}

// Evenly spread tokens of a block, at most all, not the same ones in each layer.
at::Tensor sampled_tokens(int64_t begin, int64_t rows, int64_t tokens, int64_t layer) {
  const int64_t n = std::min(rows, tokens);
  return begin + (((2 * at::arange(n) + 1) * rows).div(2 * n, "floor") + layer).remainder(rows);
}

}  // namespace

void Sample::add(double value) {
  if (!std::isnan(value)) {
    values_.push_back(value);
  }
}

double Sample::quantile(double p) const {
  if (values_.empty()) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  auto sorted = values_;
  const auto index = static_cast<size_t>(
      std::max(0.0, std::ceil(p * static_cast<double>(sorted.size())) - 1));
  std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(index),
                   sorted.end());
  return sorted[index];
}

AuditController::AuditController(std::shared_ptr<AttentionController> inner, int64_t tokens,
                                 at::Tensor start)
    : inner_(std::move(inner)), tokens_(tokens), start_(std::move(start)) {
  TORCH_CHECK(tokens_ >= 1, "AuditController: ", tokens_, " tokens, expected at least 1");
}

at::Tensor AuditController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const at::Tensor& w_o,
                                   std::shared_ptr<LayerPlan>& plan) {
  const bool replay = plan != nullptr;
  auto out = inner_->attend(layer, q, k, v, w_o, plan);
  if (!replay && plan != nullptr && plan->lowrank != nullptr) {
    at::NoGradGuard no_grad;
    const auto wide = [](const at::Tensor& x) { return x.detach().to(at::kCPU, at::kDouble); };
    audit(*plan, layer, wide(q), wide(k), wide(v), wide(w_o), wide(out));
  }
  return out;
}

std::unique_ptr<KvCache> AuditController::make_cache(int64_t layers, int64_t horizon) const {
  return inner_->make_cache(layers, horizon);
}

at::Tensor AuditController::extend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const at::Tensor& w_o, KvCache& cache) {
  return inner_->extend(layer, q, k, v, w_o, cache);
}

void AuditController::audit(const LayerPlan& layer_plan, int64_t layer, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                            const at::Tensor& out) {
  const LowRankPlan& plan = *layer_plan.lowrank;
  const BlockTree& tree = plan.tree;
  const int64_t groups = k.size(1), sequences = q.size(0) * groups, d = q.size(3),
                pairs = tree.num_pairs();
  report_.levels.resize(static_cast<size_t>(
      std::max<int64_t>(tree.num_levels(), static_cast<int64_t>(report_.levels.size()))));
  const FarErrors far = far_errors(plan, k, v);

  // All queries of each pair: the exact losses, what the left node's queries predict of them, and
  // the starting subspace.
  const PairGrams grams = pair_grams(q, k, v, tree);
  const auto served = served_grams(q, groups, tree);
  const auto start = (start_.defined() ? for_batch(start_[layer].to(at::kCPU), q.size(0))
                                       : first_pair_bases(grams, w_o))
                         .select(1, 0);  // [B G, d, d]
  const FarLoss scores = far_loss(far.scores, served, far.key_gram),
                lagged = far_loss(far.scores, grams.queries.flatten(0, 2), far.key_gram);
  const auto
      output = output_gram(w_o, groups, d).unsqueeze(1).expand_as(grams.values).flatten(0, 2);
  const FarLoss values = far_loss(dropped(plan, FarKind::kValues, d), grams.values.flatten(0, 2),
                                  output);
  const SubspaceChange change = subspace_change(start.repeat_interleave(pairs, 0), plan.ranks,
                                                served, far.key_gram);

  // Sampled rows of each block, one by one.
  auto score_true = at::zeros({sequences * pairs}, at::kDouble),
       score_bound = at::zeros_like(score_true);
  auto score_violated = at::zeros({sequences * pairs}, at::kBool);
  const auto by_group = [&](const at::Tensor& x) {
    return x.reshape({sequences, -1, x.size(2), d});
  };  // [B G, H / G or 1, L, d]
  const auto q_of = by_group(q), k_of = by_group(k).squeeze(1), v_of = by_group(v).squeeze(1),
             out_of = by_group(out);
  const int64_t heads = q_of.size(1);
  for (int64_t s = 0; s < sequences; ++s) {
    auto seen_gram = at::zeros({d, d}, at::kDouble);  // of all values up to the block's end
    double value_radius = 0;
    for (int64_t block = 0, seen_end = 0; block < tree.num_blocks(); ++block) {
      const int64_t begin = tree.sinks() + block * tree.geometry().near_block,
                    end = std::min(tree.sequence_length(), begin + tree.geometry().near_block);
      const auto fresh = v_of[s].slice(0, seen_end, end);
      seen_gram += at::matmul(fresh.t(), fresh);
      value_radius = std::max(value_radius,
                              at::linalg_vector_norm(fresh, 2, {1}).max().item<double>());
      seen_end = end;

      std::vector<SeenPair> seen = seen_pairs(tree, block);
      const auto ranks_of = [&](const SeenPair& pair) {
        return plan.ranks[static_cast<size_t>(s * pairs + pair.pair)];
      };
      if (std::all_of(seen.begin(), seen.end(),
                      [&](const SeenPair& pair) { return ranks_of(pair) == Ranks{d, d}; })) {
        continue;
      }
      const auto tokens = sampled_tokens(begin, end - begin, tokens_, layer);
      const auto rows_of = [&](const at::Tensor& x) {
        return x[s].index_select(1, tokens).flatten(0, 1);
      };  // [H / G tokens, d]
      const auto rows = ((s * heads + at::arange(heads)).unsqueeze(1) * tree.sequence_length() +
                         tokens)
                            .flatten();  // of all [B, H, L]
      const RowScores row = row_scores(plan, layer_plan.served.exact, rows_of(q_of), rows, k_of[s],
                                       block, s * pairs);
      const auto weights = at::softmax(row.served, 1);
      const ServedPairs served_here = served_pairs(row, weights, seen);
      const auto index = s * pairs + served_here.pairs;
      const auto returned = rows_of(out_of);
      const double value_norm = std::sqrt(at::linalg_eigvalsh(seen_gram)[d - 1].item<double>());
      const RowBounds bounds = certify_rows(
          far, index,
          {rows_of(q_of), returned, served_here.mass, served_here.norm, served_here.largest,
           served_here.spared, value_norm, value_radius});

      const at::Tensor& error = served_here.error;
      score_true.index_add_(0, index, error.pow(2).sum(1));
      score_bound.index_add_(0, index, bounds.scores.pow(2).sum(1));
      const auto exceeded = (error > bounds.scores * (1 + kAuditTolerance)).any(1);
      score_violated.index_copy_(0, index,
                                 score_violated.index_select(0, index).logical_or(exceeded));

      const auto exact = at::matmul(at::softmax(row.exact, 1),
                                    v_of[s].narrow(0, 0, row.exact.size(1)));
      const auto output_error = at::linalg_vector_norm(returned - exact, 2, {1});
      const double true_norm = output_error.norm().item<double>();
      report_.blocks += 1;
      report_.block_violations += (output_error > bounds.output * (1 + kAuditTolerance) +
                                                      kAuditTolerance * value_radius)
                                          .any()
                                          .item<bool>()
                                      ? 1
                                      : 0;
      report_.output_error.add(true_norm / exact.norm().item<double>());
      report_.output_tightness.add(bounds.output.norm().item<double>() / true_norm);
      report_.eq9_tightness.add(bounds.eq9.norm().item<double>() / true_norm);
    }
  }

  const auto figure = [](const at::Tensor& x, int64_t i) { return x[i].item<double>(); };
  for (const PairRun& run : tree.runs()) {
    AuditReport::Level& level = report_.levels[static_cast<size_t>(run.level)];
    for (int64_t i = 0; i < sequences * run.count; ++i) {
      const int64_t item = i / run.count * pairs + run.first_pair + i % run.count;
      const Ranks& ranks = plan.ranks[static_cast<size_t>(item)];
      if (ranks.v < d) {
        report_.value_loss.add(figure(values.loss, item) / figure(values.energy, item));
      }
      if (ranks.qk < d) {
        const double rows = static_cast<double>(run.query_rows) / static_cast<double>(run.key_rows);
        level.pairs += 1;
        level.violations += score_violated[item].item<bool>() ? 1 : 0;
        level.tightness.add(std::sqrt(figure(score_bound, item) / figure(score_true, item)));
        level.lagged_prediction.add(
            std::sqrt(figure(lagged.loss, item) * rows / figure(scores.loss, item)));
        report_.score_loss.add(figure(scores.loss, item) / figure(scores.energy, item));
        report_.weyl.add(figure(change.weyl, item));
        report_.shift.add(figure(change.shift, item));
        report_.davis_kahan.add(figure(change.davis_kahan, item));
        report_.sine.add(figure(change.sine, item));
      }
    }
  }
}

}  // namespace drrl

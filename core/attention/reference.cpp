#include "core/attention/reference.h"

#include <cmath>
#include <limits>
#include <vector>

#include "core/attention/tiles.h"

namespace drrl::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One far pair of one head: tokens, and its place in the plan.
struct FarPair {
  int64_t item, query_begin, queries, key_begin, keys;

  at::Tensor query_rows(const at::Tensor& x) const { return x.narrow(0, query_begin, queries); }
  at::Tensor key_rows(const at::Tensor& x) const { return x.narrow(0, key_begin, keys); }
  // The pair's entries of a matrix [L, L].
  at::Tensor entries(const at::Tensor& x) const { return query_rows(x).narrow(1, key_begin, keys); }
};

std::vector<FarPair> far_pairs(const BlockTree& tree, int64_t first_item) {
  std::vector<FarPair> pairs;
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      pairs.push_back({first_item + run.first_pair + i, run.query_begin + i * run.stride,
                       run.query_rows, run.key_begin + i * run.stride, run.key_rows});
    }
  }
  return pairs;
}

at::Tensor columns(const at::Tensor& basis, int64_t item, int64_t rank, const at::Tensor& like) {
  return basis[item].narrow(1, 0, rank).to(like.scalar_type());
}

// [queries, keys]
at::Tensor low_scores(const FarPair& pair, const at::Tensor& q, const at::Tensor& k,
                      const LowRankPlan& plan, double scale) {
  const int64_t rank = plan.ranks[static_cast<size_t>(pair.item)].qk;
  const auto rows = pair.query_rows(q);
  const auto low_q = at::matmul(rows, columns(plan.scores.left, pair.item, rank, q)),
             low_k = at::matmul(pair.key_rows(k), columns(plan.scores.right, pair.item, rank, k));
  const auto scores = at::matmul(low_q, low_k.t()) * scale;
  if (!plan.residual.defined()) {
    return scores;
  }
  const auto factor = plan.residual[pair.item].to(q.scalar_type());
  return scores + at::matmul(rows.detach(), factor).pow(2).sum(1, /*keepdim=*/true);
}

// All scores of a head [L, L], future ones too.
at::Tensor scores_of_head(const at::Tensor& exact, const std::vector<FarPair>& pairs,
                          const at::Tensor& q, const at::Tensor& k, const LowRankPlan& plan,
                          double scale) {
  auto scores = exact.clone();
  for (const FarPair& pair : pairs) {
    if (plan.ranks[static_cast<size_t>(pair.item)].qk < q.size(1)) {
      pair.entries(scores).copy_(low_scores(pair, q, k, plan, scale));
    }
  }
  return scores;
}

// The log-sum-exp of each row's near part, [L]: its own block up to itself, and the sinks.
at::Tensor near_logsumexp(const at::Tensor& scores, const BlockTree& tree) {
  const auto token = at::arange(scores.size(0)), row = token.unsqueeze(1);
  const int64_t sinks = tree.sinks(), block = tree.geometry().near_block;
  const auto own_block = (row - sinks).div(block, "floor") * block + sinks;
  const auto near = (token <= row).logical_and((token < sinks).logical_or(token >= own_block));
  return scores.masked_fill(near.logical_not(), -kInfinity).logsumexp(1);
}

// Which far entries are served otherwise than at low rank, [L, L] bool each.
struct Decided {
  at::Tensor exact, dropped;
};

Decided decide(const at::Tensor& scores, const at::Tensor& exact, const std::vector<FarPair>& pairs,
               const LowRankPlan& plan, int64_t d) {
  at::NoGradGuard no_grad;
  const auto nothing = at::zeros(scores.sizes(), scores.options().dtype(at::kBool));
  const Decided decided{nothing, nothing.clone()};
  const auto met = near_logsumexp(scores, plan.tree);
  for (const FarPair& pair : pairs) {
    const Ranks& ranks = plan.ranks[static_cast<size_t>(pair.item)];
    auto so_far = pair.query_rows(met);  // of the pair's rows
    for (int64_t begin = 0; begin < pair.keys; begin += kGateChunk) {
      const int64_t count = std::min(kGateChunk, pair.keys - begin);
      const auto chunk = [&](const at::Tensor& x) {
        return pair.entries(x).narrow(1, begin, count);
      };
      auto low = chunk(scores);
      if (ranks.drops()) {
        const double log_drop = std::log(static_cast<double>(ranks.drop));
        const auto largest = low.unflatten(1, {count / kTileKeys, kTileKeys}).amax(2);
        const auto kept = kept_tiles(largest >= so_far.unsqueeze(1) + log_drop,
                                     plan.tree.geometry().near_block);
        chunk(decided.dropped).copy_(kept.logical_not().repeat_interleave(kTileKeys, 1));
        low = low.masked_fill(chunk(decided.dropped), -kInfinity);
      }
      if (ranks.gated(d)) {
        const double log_gate = std::log(static_cast<double>(ranks.gate));
        const auto with_chunk = at::logaddexp(so_far, low.logsumexp(1));
        chunk(decided.exact).copy_(low >= with_chunk.unsqueeze(1) + log_gate);
      }
      const auto served = at::where(chunk(decided.exact), chunk(exact), low);
      so_far.copy_(at::logaddexp(so_far, served.logsumexp(1)));
    }
  }
  return decided;
}

// Output [L, d]: weights times values, those of far entries through their bases unless they are
// exact.
at::Tensor output_of_head(const at::Tensor& weights, const at::Tensor& v, const at::Tensor& heavy,
                          const std::vector<FarPair>& pairs, const LowRankPlan& plan) {
  auto out = at::matmul(weights, v);
  for (const FarPair& pair : pairs) {
    const int64_t rank = plan.ranks[static_cast<size_t>(pair.item)].v;
    if (rank == v.size(1)) {
      continue;
    }
    const auto low = pair.entries(weights).masked_fill(pair.entries(heavy), 0);
    const auto values = pair.key_rows(v);
    const auto left = columns(plan.values.left, pair.item, rank, v),
               right = columns(plan.values.right, pair.item, rank, v);
    pair.query_rows(out).add_(at::matmul(low, at::matmul(at::matmul(values, left), right.t())) -
                              at::matmul(low, values));
  }
  return out;
}

// q, k, v [L, d] of one head.
at::Tensor attention_of_head(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan, int64_t first_item) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(1)));
  const auto pairs = far_pairs(plan.tree, first_item);
  const auto exact = at::matmul(q, k.t()) * scale;
  const auto scores = scores_of_head(exact, pairs, q, k, plan, scale);
  const Decided decided = decide(scores, exact, pairs, plan, q.size(1));
  const auto later = at::ones_like(decided.exact).triu(1);
  const auto weights = at::softmax(at::where(decided.exact, exact, scores)
                                       .masked_fill(decided.dropped.logical_or(later), -kInfinity),
                                   1);
  return output_of_head(weights, v, decided.exact, pairs, plan);
}

}  // namespace

at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan) {
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1);
  std::vector<at::Tensor> outputs;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t group = h / (heads / groups);
      const int64_t first_item = (b * groups + group) * plan.tree.num_pairs();
      outputs.push_back(attention_of_head(q[b][h], k[b][group], v[b][group], plan, first_item));
    }
  }
  return at::stack(outputs).view(q.sizes());
}

at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t repeat = q.size(1) / k.size(1), length = q.size(2);
  const auto scores = at::matmul(q, k.repeat_interleave(repeat, 1).transpose(2, 3)) /
                      std::sqrt(static_cast<double>(q.size(3)));
  const auto later = at::ones({length, length}, q.options().dtype(at::kBool)).triu(1);
  return at::matmul(at::softmax(scores.masked_fill(later, -kInfinity), -1),
                    v.repeat_interleave(repeat, 1));
}

}  // namespace drrl::reference

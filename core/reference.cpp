#include "core/reference.h"

#include <cmath>
#include <limits>
#include <map>

namespace drrl::reference {
namespace {

at::Tensor causal_mask(int64_t length, const at::Tensor& like) {
  return at::ones({length, length}, like.options().dtype(at::kBool)).tril();
}

}  // namespace

at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const LowRankPlan& plan) {
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), length = q.size(2), d = q.size(3);
  const int64_t pairs = plan.tree.num_pairs();
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const auto causal = causal_mask(length, q);
  std::vector<at::Tensor> outputs;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t group = h / (heads / groups);
      const auto q_h = q[b][h], k_h = k[b][group], v_h = v[b][group];  // [L, d]
      auto scores = at::matmul(q_h, k_h.t());
      for (const PairRun& run : plan.tree.runs()) {
        for (int64_t i = 0; i < run.count; ++i) {
          const int64_t item = (b * groups + group) * pairs + run.first_pair + i;
          const int64_t r = plan.ranks[item].qk;
          if (r == d) {
            continue;
          }
          const auto rows = at::arange(run.query_begin + i * run.stride, run.query_begin + i * run.stride + run.query_rows);
          const auto columns = at::arange(run.key_begin + i * run.stride, run.key_begin + i * run.stride + run.key_rows);
          const auto p_q = plan.scores.left[item].narrow(1, 0, r).to(q.scalar_type());
          const auto p_k = plan.scores.right[item].narrow(1, 0, r).to(q.scalar_type());
          const auto q_rows = q_h.index_select(0, rows);
          auto far = at::matmul(at::matmul(q_rows, p_q), at::matmul(k_h.index_select(0, columns), p_k).t());
          if (plan.residual.defined()) {
            const auto fixed = q_rows.detach();
            far = far + at::matmul(fixed, plan.residual[item].to(q.scalar_type())).pow(2).sum(1, /*keepdim=*/true) / scale;
          }
          scores = scores.index_put({rows.unsqueeze(1), columns.unsqueeze(0)}, far);
        }
      }
      const auto softmax = [&] { return at::softmax((scores * scale).masked_fill(causal.logical_not(), -std::numeric_limits<double>::infinity()), 1); };
      std::map<int64_t, at::Tensor> open;  // by item, [query rows, 1]
      if (plan.gated(d)) {
        at::NoGradGuard no_grad;
        const auto low = softmax();
        for (const PairRun& run : plan.tree.runs()) {
          for (int64_t i = 0; i < run.count; ++i) {
            const int64_t item = (b * groups + group) * pairs + run.first_pair + i;
            const int64_t query = run.query_begin + i * run.stride;
            const auto share = low.narrow(0, query, run.query_rows).narrow(1, run.key_begin + i * run.stride, run.key_rows).sum(1, /*keepdim=*/true);
            at::Tensor spread = at::zeros_like(share);
            if (plan.residual.defined() && plan.ranks[item].qk < d) {
              const auto missing = at::matmul(q_h.narrow(0, query, run.query_rows), plan.residual[item].to(q.scalar_type()));
              spread = (2 * missing.pow(2).sum(1, /*keepdim=*/true)).sqrt().clamp_max(kLargestSpread);
            }
            open[item] = plan.ranks[item].gated(d) ? share * (spread + kGateBase) >= plan.ranks[item].gate : at::zeros_like(share, at::kBool);
          }
        }
      }
      const auto exact = at::matmul(q_h, k_h.t());
      for (const PairRun& run : plan.tree.runs()) {
        for (int64_t i = 0; i < run.count && !open.empty(); ++i) {
          const int64_t item = (b * groups + group) * pairs + run.first_pair + i;
          const int64_t query = run.query_begin + i * run.stride, key = run.key_begin + i * run.stride;
          const auto block = [&](const at::Tensor& x) { return x.narrow(0, query, run.query_rows).narrow(1, key, run.key_rows); };
          scores = scores.index_put({at::arange(query, query + run.query_rows).unsqueeze(1), at::arange(key, key + run.key_rows).unsqueeze(0)},
                                    at::where(open.at(item), block(exact), block(scores)));
        }
      }
      const auto weights = softmax();
      auto out = at::matmul(weights, v_h);
      for (const PairRun& run : plan.tree.runs()) {
        for (int64_t i = 0; i < run.count; ++i) {
          const int64_t item = (b * groups + group) * pairs + run.first_pair + i;
          const int64_t r = plan.ranks[item].v;
          if (r == d) {
            continue;
          }
          const int64_t query = run.query_begin + i * run.stride;
          const int64_t key = run.key_begin + i * run.stride;
          const auto share = weights.narrow(0, query, run.query_rows).narrow(1, key, run.key_rows);
          const auto values = v_h.narrow(0, key, run.key_rows);
          const auto p_v = plan.values.left[item].narrow(1, 0, r).to(q.scalar_type());
          const auto p_o = plan.values.right[item].narrow(1, 0, r).to(q.scalar_type());
          auto correction = at::matmul(at::matmul(share, at::matmul(values, p_v)), p_o.t()) - at::matmul(share, values);
          if (!open.empty()) {
            correction = at::where(open.at(item), at::zeros_like(correction), correction);
          }
          out = out + at::constant_pad_nd(correction, {0, 0, query, length - query - run.query_rows});
        }
      }
      outputs.push_back(out);
    }
  }
  return at::stack(outputs).view({batch, heads, length, d});
}

at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t repeat = q.size(1) / k.size(1);
  const auto scores = at::matmul(q, k.repeat_interleave(repeat, 1).transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  const auto masked = scores.masked_fill(causal_mask(q.size(2), q).logical_not(), -std::numeric_limits<double>::infinity());
  return at::matmul(at::softmax(masked, -1), v.repeat_interleave(repeat, 1));
}

}  // namespace drrl::reference

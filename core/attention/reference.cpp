#include "core/attention/reference.h"

#include <cmath>
#include <limits>
#include <map>

namespace drrl::reference {
namespace {

at::Tensor causal_mask(int64_t length, const at::Tensor& like) {
  return at::ones({length, length}, like.options().dtype(at::kBool)).tril();
}

}  // namespace

at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const LowRankPlan& plan) {
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), length = q.size(2),
                d = q.size(3);
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
          const auto rows = at::arange(run.query_begin + i * run.stride,
                                       run.query_begin + i * run.stride + run.query_rows);
          const auto columns = at::arange(run.key_begin + i * run.stride,
                                          run.key_begin + i * run.stride + run.key_rows);
          const auto p_q = plan.scores.left[item].narrow(1, 0, r).to(q.scalar_type());
          const auto p_k = plan.scores.right[item].narrow(1, 0, r).to(q.scalar_type());
          const auto q_rows = q_h.index_select(0, rows);
          auto far = at::matmul(at::matmul(q_rows, p_q),
                                at::matmul(k_h.index_select(0, columns), p_k).t());
          if (plan.residual.defined()) {
            const auto fixed = q_rows.detach();
            far = far + at::matmul(fixed, plan.residual[item].to(q.scalar_type()))
                                .pow(2)
                                .sum(1, /*keepdim=*/true) /
                            scale;
          }
          scores = scores.index_put({rows.unsqueeze(1), columns.unsqueeze(0)}, far);
        }
      }
      const auto softmax = [&] {
        return at::softmax(
            (scores * scale)
                .masked_fill(causal.logical_not(), -std::numeric_limits<double>::infinity()),
            1);
      };
      std::map<int64_t, at::Tensor> open;  // by item, [query rows, keys]: what is exact
      if (plan.gated(d)) {
        const auto exact = at::matmul(q_h, k_h.t());
        auto met = at::full({length}, -std::numeric_limits<double>::infinity(),
                            scores.options());  // log-sum-exp of each row so far
        const int64_t sinks = plan.tree.sinks(), block = plan.tree.geometry().near_block;
        for (int64_t row = 0; row < length; ++row) {
          const auto seen = scores[row].narrow(0, 0, row + 1).detach() * scale;
          const int64_t begin = row < sinks ? 0 : sinks + (row - sinks) / block * block;
          met[row] = at::cat({seen.narrow(0, 0, std::min(sinks, row + 1)),
                              seen.narrow(0, begin, row + 1 - begin)
                                  .narrow(0, 0, row < sinks ? 0 : row + 1 - begin)})
                         .logsumexp(0);
        }
        for (const PairRun& run : plan.tree.runs()) {
          for (int64_t i = 0; i < run.count; ++i) {
            const int64_t item = (b * groups + group) * pairs + run.first_pair + i;
            const int64_t query = run.query_begin + i * run.stride,
                          key = run.key_begin + i * run.stride;
            const auto is_gated = plan.ranks[item].gated(d);
            open[item] = at::zeros({run.query_rows, run.key_rows}, at::kBool);
            auto before = met.narrow(0, query, run.query_rows);
            for (int64_t chunk = 0; chunk < run.key_rows; chunk += kGateChunk) {
              const int64_t count = std::min(kGateChunk, run.key_rows - chunk);
              const auto block_of = [&](const at::Tensor& x) {
                return x.narrow(0, query, run.query_rows).narrow(1, key + chunk, count);
              };
              const auto low = block_of(scores);
              const auto with = [&](const at::Tensor& x) {
                return at::logaddexp(before, (x.detach() * scale).logsumexp(1));
              };
              auto heavy = open[item].narrow(1, chunk, count);
              if (is_gated) {
                heavy.copy_(low.detach() * scale >=
                            with(low).unsqueeze(1) +
                                std::log(static_cast<double>(plan.ranks[item].gate)));
              }
              const auto mixed = at::where(heavy.clone(), block_of(exact), low);
              scores = scores.index_put({at::arange(query, query + run.query_rows).unsqueeze(1),
                                         at::arange(key + chunk, key + chunk + count).unsqueeze(0)},
                                        mixed);
              before.copy_(with(mixed));
            }
          }
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
          const auto low = open.empty() ? share : share.masked_fill(open.at(item), 0);
          const auto correction = at::matmul(at::matmul(low, at::matmul(values, p_v)), p_o.t()) -
                                  at::matmul(low, values);
          out = out +
                at::constant_pad_nd(correction, {0, 0, query, length - query - run.query_rows});
        }
      }
      outputs.push_back(out);
    }
  }
  return at::stack(outputs).view({batch, heads, length, d});
}

at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t repeat = q.size(1) / k.size(1);
  const auto scores = at::matmul(q, k.repeat_interleave(repeat, 1).transpose(2, 3)) /
                      std::sqrt(static_cast<double>(q.size(3)));
  const auto masked = scores.masked_fill(causal_mask(q.size(2), q).logical_not(),
                                         -std::numeric_limits<double>::infinity());
  return at::matmul(at::softmax(masked, -1), v.repeat_interleave(repeat, 1));
}

}  // namespace drrl::reference

// What one low-rank forward spends its time on, from the public pieces of core/.

#include <algorithm>
#include <cmath>

#include <ATen/core/grad_mode.h>

#include "core/attention/exact_attention.h"
#include "core/attention/rows.h"
#include "core/linalg/gram.h"
#include "launch/bench/bench.h"

namespace drrl::bench {

std::map<std::string, double> parts_ms(const Inputs& in, Ranks ranks, Geometry geometry,
                                       int64_t repeats) {
  at::NoGradGuard no_grad;
  const BlockTree tree(in.length(), geometry);
  if (tree.num_pairs() == 0) {
    return {};
  }
  const int64_t d = in.head_dim();
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  // q [N1, N2, g, Lq, .], k and v [N1, N2, Lk, .], as attention_part wants them
  const auto part = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        bool causal) {
    auto shape = q.sizes().vec();
    shape.back() = v.size(-1);
    const auto out = at::empty(shape, q.options());
    shape.pop_back();
    attention_part(q, k, v, causal, scale, out, at::empty(shape, q.options().dtype(at::kFloat)));
  };
  const auto near = [&] {
    const auto blocks = [&](int64_t begin, int64_t count, int64_t rows) {
      const auto of = [&](const at::Tensor& x) {
        return token_runs(x, in.groups(), begin, count, rows, rows).flatten(0, 1);
      };
      part(of(in.q), of(in.k).squeeze(2), of(in.v).squeeze(2), /*causal=*/true);
    };
    blocks(tree.sinks(), tree.num_blocks() - 1, geometry.near_block);
    blocks(tree.sinks() + (tree.num_blocks() - 1) * geometry.near_block, 1, tree.last_block_rows());
  };
  const auto sinks = [&] {
    const auto of = [&](const at::Tensor& x, int64_t begin, int64_t count) {
      return token_runs(x, in.groups(), begin, 1, count, count).flatten(0, 1);
    };
    if (tree.sinks() > 0) {
      part(of(in.q, tree.sinks(), in.length() - tree.sinks()), of(in.k, 0, tree.sinks()).squeeze(2),
           of(in.v, 0, tree.sinks()).squeeze(2), false);
    }
  };
  struct Run {
    at::Tensor q, k, v, out;         // rows of one run of far pairs at full width; out at rank r_v
    at::Tensor low_q, low_k, low_v;  // the same in their bases
    at::Tensor p_qk, p_v;            // [n, d, r], [n, d, r_v]
  };
  std::vector<Run> runs;
  for (const PairRun& run : tree.runs()) {
    Run r{query_rows(in.q, in.groups(), run),
          key_rows(in.k, run),
          key_rows(in.v, run),
          {},
          {},
          {},
          {},
          {},
          {}};
    r.p_qk = at::randn({r.q.size(0), d, ranks.qk}, in.q.options()) /
             std::sqrt(static_cast<double>(d));
    r.p_v = at::randn({r.q.size(0), d, ranks.v}, in.q.options()) /
            std::sqrt(static_cast<double>(d));
    r.low_q = at::bmm(r.q, r.p_qk);
    r.low_k = at::bmm(r.k, r.p_qk);
    r.low_v = at::bmm(r.v, r.p_v);
    r.out = at::bmm(r.q, r.p_v);
    runs.push_back(std::move(r));
  }
  const auto far = [&] {
    for (const Run& r : runs) {
      part(r.low_q.unsqueeze(1).unsqueeze(1), r.low_k.unsqueeze(1), r.low_v.unsqueeze(1),
           /*causal=*/false);
    }
  };
  const auto projections = [&] {
    for (const Run& r : runs) {
      if (ranks.qk < d) {
        at::bmm(r.q, r.p_qk);
        at::bmm(r.k, r.p_qk);
      }
      if (ranks.v < d) {
        at::bmm(r.v, r.p_v);
        at::bmm(r.out, r.p_v.transpose(1, 2));
      }
    }
  };
  const auto grams = [&] { pair_grams(in.q, in.k, in.v, tree); };
  std::vector<double> basis_ms;  // Grams and bases together, as the controller itself reports them
  const auto whole = [&] { lowrank(in, ranks, geometry, nullptr, &basis_ms.emplace_back()); };
  const auto ms = interleaved_ms({near, sinks, far, projections, grams, whole}, repeats,
                                 in.q.device());
  basis_ms.erase(basis_ms.begin());  // the run that is not counted
  std::map<std::string, double> parts;
  for (size_t i = 0; i < 5; ++i) {
    parts[kParts[i]] = median(ms[i]);
  }
  parts["bases"] = std::max(0.0, median(basis_ms) - parts["grams"]);
  return parts;
}

}  // namespace drrl::bench

#include "core/lowrank_attention.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <map>

#include "core/attention_part.h"
#include "core/cpu/lowrank_kernel.h"
#include "core/rows.h"

namespace drrl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Shape {
  int64_t batch, heads, groups, length, d;
  double scale;

  Shape(const at::Tensor& q, const at::Tensor& k)
      : batch(q.size(0)), heads(q.size(1)), groups(k.size(1)), length(q.size(2)), d(q.size(3)),
        scale(1.0 / std::sqrt(static_cast<double>(q.size(3)))) {}
  int64_t heads_per_group() const { return heads / groups; }
};

// The items (batch, group, pair) of one run that go through one call, of the largest of their ranks; columns that an item has less are zero.
struct Bucket {
  Ranks ranks{1, 1};                 // of the call; the gate is a yes or no
  std::vector<Ranks> own;            // of each item
  std::vector<int64_t> within_run;   // index into the run's [B G count] batch
  std::vector<int64_t> within_plan;  // index into the plan's [B G pairs] bases
};

// Items of equal keys share a bucket. Those with a gate all do, since their scores take many small steps. So do on CUDA ranks up to 64: its kernels take as long for
// less, and longer for many small calls.
Ranks bucket_key(const Ranks& own, int64_t d, bool cuda) {
  const bool gated = own.gated(d);
  const auto width = [&](int64_t rank) { return rank < d && (gated || (cuda && rank <= 64)) ? 0 : rank; };
  return {width(own.qk), width(own.v), gated ? 0 : std::numeric_limits<float>::infinity()};
}

std::vector<Bucket> buckets_of(const PairRun& run, const LowRankPlan& plan, int64_t d, bool cuda) {
  const int64_t pairs = plan.tree.num_pairs();
  const int64_t sequences = static_cast<int64_t>(plan.ranks.size()) / pairs;
  std::map<Ranks, Bucket> buckets;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t item = s * pairs + run.first_pair + i;
      const Ranks& own = plan.ranks[item];
      const Ranks key = bucket_key(own, d, cuda);
      Bucket& bucket = buckets[key];
      bucket.ranks = {std::max(bucket.ranks.qk, own.qk), std::max(bucket.ranks.v, own.v), key.gate};
      bucket.own.push_back(own);
      bucket.within_run.push_back(s * run.count + i);
      bucket.within_plan.push_back(item);
    }
  }
  std::vector<Bucket> result;
  for (auto& [key, bucket] : buckets) {
    result.push_back(std::move(bucket));
  }
  return result;
}

// The projections of one bucket; undefined where the rank is d and nothing is projected.
struct Projections {
  at::Tensor p_q, p_k;  // [n, d, r]
  at::Tensor p_v, p_o;  // [n, d, r_v]
  at::Tensor residual;  // [n, d, m]

  Projections(const Bucket& bucket, const LowRankPlan& plan, const Shape& shape, const at::TensorOptions& options) {
    const auto index = on_device(bucket.within_plan, options.device());
    const auto of_items = [&](const at::Tensor& x) { return x.index_select(0, index).to(options.dtype()); };
    const auto bases = [&](const Basis& basis, int64_t Ranks::*kind) {
      const int64_t width = bucket.ranks.*kind;
      auto left = of_items(basis.left.narrow(2, 0, width)), right = of_items(basis.right.narrow(2, 0, width));
      if (std::any_of(bucket.own.begin(), bucket.own.end(), [&](const Ranks& own) { return own.*kind < width; })) {
        std::vector<int64_t> own;
        std::transform(bucket.own.begin(), bucket.own.end(), std::back_inserter(own), [&](const Ranks& ranks) { return ranks.*kind; });
        const auto beyond = at::arange(width, index.options()) >= on_device(own, options.device()).view({-1, 1, 1});
        left.masked_fill_(beyond, 0);
        right.masked_fill_(beyond, 0);
      }
      return std::pair(left, right);
    };
    if (bucket.ranks.qk < shape.d) {
      std::tie(p_q, p_k) = bases(plan.scores, &Ranks::qk);
      if (plan.residual.defined()) {
        residual = of_items(plan.residual);
      }
    }
    if (bucket.ranks.v < shape.d) {
      std::tie(p_v, p_o) = bases(plan.values, &Ranks::v);
    }
  }

  // The correction || q F ||^2 of each row's log-sum-exp: rows [n, m, d] -> [n, m]; undefined if there is none.
  at::Tensor correction(const at::Tensor& rows, const at::TensorOptions& options) const {
    return residual.defined() ? residual_correction(rows, residual).to(options.dtype()) : at::Tensor();
  }
};

// Rows of one bucket out of a run's rows, and back. A bucket that is the whole run costs nothing.
at::Tensor take(const at::Tensor& run_rows, const Bucket& bucket) {
  if (static_cast<int64_t>(bucket.within_run.size()) == run_rows.size(0)) {
    return run_rows;
  }
  return run_rows.index_select(0, on_device(bucket.within_run, run_rows.device()));
}

void put(at::Tensor& run_rows, const Bucket& bucket, const at::Tensor& rows) {
  if (static_cast<int64_t>(bucket.within_run.size()) == run_rows.size(0)) {
    run_rows = rows;
  } else {
    run_rows.index_copy_(0, on_device(bucket.within_run, run_rows.device()), rows);
  }
}

// [B, H or G, L, e] -> [B G, g, L, e], g = H / G or 1
at::Tensor by_group(const at::Tensor& x, const Shape& s) {
  return x.view({s.batch * s.groups, x.size(1) / s.groups, x.size(2), x.size(3)});
}

// The exact causal parts: the sinks among themselves, then the complete blocks, then the short last block. Each is `count` runs of
// `rows` tokens that attend within themselves.
struct CausalRun {
  int64_t begin, count, rows;
};
std::vector<CausalRun> causal_runs(const BlockTree& tree) {
  std::vector<CausalRun> runs;
  const int64_t block = tree.geometry().near_block;
  if (tree.sinks() > 0) {
    runs.push_back({0, 1, tree.sinks()});
  }
  const int64_t complete = tree.last_block_rows() == block ? tree.num_blocks() : tree.num_blocks() - 1;
  if (complete > 0) {
    runs.push_back({tree.sinks(), complete, block});
  }
  if (complete < tree.num_blocks()) {
    runs.push_back({tree.sinks() + complete * block, 1, tree.last_block_rows()});
  }
  return runs;
}

// The blocks of a run as problems of attention_part, no copy: x [B, H or G, L, e] -> [B G, count, g, rows, e]; for keys, without the g.
at::Tensor query_blocks(const at::Tensor& x, const CausalRun& run, const Shape& s) {
  return by_group(x, s).narrow(2, run.begin, run.count * run.rows).unflatten(2, {run.count, run.rows}).transpose(1, 2);
}
at::Tensor key_blocks(const at::Tensor& x, const CausalRun& run, const Shape& s) { return query_blocks(x, run, s).squeeze(2); }

// Everything after the sinks, and the sinks, likewise: [B G, 1, g, L - s, e] and [B G, 1, s, e].
at::Tensor queries_after_sinks(const at::Tensor& x, const BlockTree& tree, const Shape& s) {
  return by_group(x, s).narrow(2, tree.sinks(), s.length - tree.sinks()).unsqueeze(1);
}
at::Tensor sink_keys(const at::Tensor& x, const BlockTree& tree, const Shape& s) {
  return by_group(x, s).narrow(2, 0, tree.sinks());
}

bool has_sink_part(const BlockTree& tree, const Shape& s) { return tree.sinks() > 0 && tree.sinks() < s.length; }

// One far bucket's forward, kept until the merged log-sum-exp is known.
struct FarPart {
  Projections projections;
  at::Tensor out;  // [n, g rows, r_v], in the value basis
};

// x [B, H, L, e] -> the rows of a run's queries, [B, G, count, g, rows, e], a view.
at::Tensor run_view(const at::Tensor& x, const PairRun& run, const Shape& s) {
  return token_runs(x, s.groups, run.query_begin, run.count, run.query_rows, run.stride);
}

// Buckets with a gate make their scores a matrix, which the CPU kernel does without: right, but not faster than exact attention. Some rows at a time: work(first row,
// rows) for matrices [n, rows, keys] of a limited number of entries, or of one row.
template <typename Work>
void for_row_slices(const at::Tensor& rows, int64_t keys, const Work& work) {
  const int64_t entries = rows.is_cuda() ? 1 << 25 : 1 << 20, count = rows.size(1);
  const int64_t most = std::max<int64_t>(1, entries / (rows.size(0) * keys));
  for (int64_t first = 0; first < count; first += most) {
    work(first, std::min(most, count - first));
  }
}

struct GatedScores {
  at::Tensor scores;  // [n, g rows, keys], scaled; exact ones where `exact`
  at::Tensor exact;   // of the same shape, bool
};

// before [n, g rows]: the log-sum-exp of what each row met before this pair; log_gate [n, 1]. rows, keys: at full width; low_..: projected.
GatedScores gated_scores(const at::Tensor& rows, const at::Tensor& keys, const at::Tensor& low_rows, const at::Tensor& low_keys, const at::Tensor& correction,
                         const at::Tensor& before, const at::Tensor& log_gate, double scale) {
  const auto of = [&](const at::Tensor& a, const at::Tensor& b) { return at::bmm(a, b.transpose(1, 2)).to(before.scalar_type()).mul_(scale); };
  GatedScores result{of(low_rows, low_keys), {}};
  if (correction.defined()) {
    result.scores += correction.unsqueeze(2);
  }
  const auto full = of(rows, keys);
  result.exact = at::zeros(full.sizes(), full.options().dtype(at::kBool));
  auto met = before;
  for (int64_t begin = 0; begin < full.size(2); begin += kGateChunk) {
    const int64_t count = std::min(kGateChunk, full.size(2) - begin);
    auto scores = result.scores.narrow(2, begin, count);
    const auto heavy = scores >= (at::logaddexp(met, scores.logsumexp(2)) + log_gate).unsqueeze(2);
    scores.copy_(at::where(heavy, full.narrow(2, begin, count), scores));
    result.exact.narrow(2, begin, count).copy_(heavy);
    met = at::logaddexp(met, scores.logsumexp(2));
  }
  return result;
}

// The logarithms of a bucket's gates, [n, 1].
at::Tensor log_gates(const Bucket& bucket, const at::TensorOptions& options) {
  std::vector<double> gates;
  std::transform(bucket.own.begin(), bucket.own.end(), std::back_inserter(gates), [](const Ranks& own) { return std::log(static_cast<double>(own.gate)); });
  return at::tensor(gates, at::kDouble).unsqueeze(1).to(options);
}

// A slice's exact entries, `found` in its matrix [n, rows, keys] of the g rows from `first` on, by what sorts them: row of [B, H, L] x L + position of the key.
at::Tensor places_of(const at::Tensor& found, int64_t first, int64_t rows, const Bucket& bucket, const PairRun& run, const Shape& s) {
  const auto at_row = found.div(run.key_rows, "floor");
  const auto item = on_device(bucket.within_run, found.device()).index_select(0, at_row.div(rows, "floor")), row = at_row.remainder(rows) + first;
  const auto sequence = item.div(run.count, "floor"), pair = item.remainder(run.count) * run.stride, head = row.div(run.query_rows, "floor");
  const auto query = (sequence * (s.heads / s.groups) + head) * s.length + run.query_begin + pair + row.remainder(run.query_rows);
  return query * s.length + run.key_begin + pair + found.remainder(run.key_rows);
}

ExactEntries sorted_entries(const std::vector<at::Tensor>& places, const Shape& s) {
  const auto sorted = std::get<0>(at::cat(places).sort());
  const auto rows = at::arange(s.batch * s.heads * s.length + 1, sorted.options()) * s.length;
  return {at::searchsorted(sorted, rows).to(at::kCPU), sorted.remainder(s.length).to(at::kInt).to(at::kCPU)};
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const LowRankPlan& plan) {
  const Shape s(q, k);
  const BlockTree& tree = plan.tree;
  auto out = at::empty(q.sizes(), q.options());
  auto logsumexp = at::empty({s.batch, s.heads, s.length}, q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  const auto logsumexp4 = logsumexp.unsqueeze(3);

  near_attention(q, k, v, tree, out, logsumexp);

  at::Tensor sink_out, sink_logsumexp;  // [B G, 1, g, L - s, d], [B G, 1, g, L - s]
  if (has_sink_part(tree, s)) {
    const auto rows = queries_after_sinks(q, tree, s);
    sink_out = at::empty(rows.sizes(), q.options());
    sink_logsumexp = at::empty(rows.sizes().slice(0, 4), logsumexp.options());
    attention_part(rows, sink_keys(k, tree, s), sink_keys(v, tree, s), /*causal=*/false, s.scale, sink_out, sink_logsumexp);
  }

  const auto near_logsumexp = logsumexp.clone();  // while `logsumexp` is of all that was met so far, in the end of everything
  if (sink_out.defined()) {
    auto rows = queries_after_sinks(logsumexp4, tree, s).squeeze(4);
    rows.copy_(at::logaddexp(rows, sink_logsumexp));
  }
  const auto& runs = tree.runs();
  std::vector<std::vector<Bucket>> buckets;
  std::vector<std::vector<FarPart>> far;
  std::vector<at::Tensor> far_logsumexp;  // per run, [B G count, g rows]
  std::vector<at::Tensor> exact;  // places of each slice
  plan.exact_slices.clear();
  for (const PairRun& run : runs) {
    buckets.push_back(buckets_of(run, plan, s.d, q.is_cuda()));
    far.emplace_back();
    const auto rows_q = query_rows(q, s.groups, run);
    const auto rows_k = key_rows(k, run);
    const auto rows_v = key_rows(v, run);
    auto met = run_view(logsumexp4, run, s);
    far_logsumexp.push_back(at::empty({rows_q.size(0), rows_q.size(1)}, logsumexp.options()));
    for (const Bucket& bucket : buckets.back()) {
      Projections p(bucket, plan, s, q.options());
      const auto bucket_q = take(rows_q, bucket), bucket_k = take(rows_k, bucket), bucket_v = take(rows_v, bucket);
      const auto low_q = into_basis(bucket_q, p.p_q);
      const auto low_k = into_basis(bucket_k, p.p_k);
      const auto low_v = into_basis(bucket_v, p.p_v);
      const auto correction = p.correction(bucket_q, logsumexp.options());
      at::Tensor part_out, part_logsumexp;
      if (bucket.ranks.gated(s.d)) {
        const auto before = take(met.reshape(far_logsumexp.back().sizes()), bucket);
        const auto log_gate = log_gates(bucket, logsumexp.options());
        std::vector<at::Tensor> outs, sums;
        for_row_slices(bucket_q, run.key_rows, [&](int64_t first, int64_t rows) {
          const auto of = [&](const at::Tensor& x) { return x.defined() ? x.narrow(1, first, rows) : x; };
          const auto gated = gated_scores(of(bucket_q), bucket_k, of(low_q), low_k, of(correction), of(before), log_gate, s.scale);
          sums.push_back(gated.scores.logsumexp(2));
          const auto weights = (gated.scores - sums.back().unsqueeze(2)).exp_().to(q.scalar_type());
          outs.push_back(out_of_basis(at::bmm(weights.masked_fill(gated.exact, 0), low_v), p.p_o) + at::bmm(weights * gated.exact, bucket_v));
          const auto found = gated.exact.flatten().nonzero().squeeze(1);
          exact.push_back(places_of(found, first, rows, bucket, run, s));
          plan.exact_slices.push_back(found.to(at::kInt));
        });
        part_out = at::cat(outs, 1);
        part_logsumexp = at::cat(sums, 1);
      } else {
        std::tie(part_out, part_logsumexp) = attention_rows(low_q, low_k, low_v, s.scale);
        if (correction.defined()) {
          part_logsumexp += correction;
        }
      }
      put(far_logsumexp.back(), bucket, part_logsumexp);
      far.back().push_back({std::move(p), part_out});
    }
    met.copy_(at::logaddexp(met, far_logsumexp.back().view(met.sizes())));
  }
  plan.exact = exact.empty() ? ExactEntries() : sorted_entries(exact, s);

  // Each part weighted by its share exp(lse_part - lse).
  out.mul_((near_logsumexp - logsumexp).exp_().unsqueeze(3).to(out.scalar_type()));
  if (sink_out.defined()) {
    const auto share = (sink_logsumexp - queries_after_sinks(logsumexp4, tree, s).squeeze(4)).exp_().unsqueeze(4).to(out.scalar_type());
    queries_after_sinks(out, tree, s).addcmul_(sink_out, share);
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto share = (far_logsumexp[i] - run_view(logsumexp4, runs[i], s).reshape(far_logsumexp[i].sizes())).exp_();
    auto expanded = buckets[i].size() > 1 ? at::empty({share.size(0), share.size(1), s.d}, out.options()) : at::Tensor();
    for (size_t b = 0; b < buckets[i].size(); ++b) {
      FarPart& part = far[i][b];
      const auto rows = part.out.size(2) == s.d ? part.out : out_of_basis(part.out, part.projections.p_o);
      if (expanded.defined()) {
        put(expanded, buckets[i][b], rows);
      } else {
        expanded = rows;
      }
      part.out.reset();
    }
    add_rows(out, s.groups, runs[i], runs[i].query_begin, runs[i].query_rows, expanded, share);
  }
  return {out, logsumexp};
}

struct Operands {
  at::Tensor q, k, v, grad, logsumexp;  // [n, rows or keys, width], [n, rows]
};
struct Gradients {
  at::Tensor q, k, v;
};

// Gradients of a bucket with a gate: of its entries at low rank, and of those that are exact. `slice`: those of its first slice, moved on to behind its last.
std::pair<Gradients, Gradients> gated_backward(const Operands& low, const Operands& full, const at::Tensor& delta, const Shape& s,
                                               std::vector<at::Tensor>::const_iterator& slice) {
  struct Sums {
    std::vector<at::Tensor> q;
    at::Tensor k, v;
  };
  Sums of_low, of_exact;
  for_row_slices(low.q, low.k.size(1), [&](int64_t first, int64_t rows) {
    const auto of = [&](const at::Tensor& x) { return x.narrow(1, first, rows); };
    const auto add = [&](const Operands& x, const at::Tensor& left_out, Sums& to) {
      const auto scores = at::bmm(of(x.q), x.k.transpose(1, 2)).to(delta.scalar_type()) * s.scale;
      const auto weights = (scores - of(x.logsumexp).unsqueeze(2)).exp_().masked_fill_(left_out, 0);
      const auto grads = weights * (at::bmm(of(x.grad), x.v.transpose(1, 2)) - of(delta).unsqueeze(2)) * s.scale;
      const auto w = weights.to(x.q.scalar_type()), g = grads.to(x.q.scalar_type());
      const auto sum = [&](at::Tensor& total, const at::Tensor& part) { total = total.defined() ? total + part : part; };
      to.q.push_back(at::bmm(g, x.k));
      sum(to.k, at::bmm(g.transpose(1, 2), of(x.q)).to(delta.scalar_type()));
      sum(to.v, at::bmm(w.transpose(1, 2), of(x.grad)).to(delta.scalar_type()));
    };
    auto mask = at::zeros({low.q.size(0) * rows * low.k.size(1)}, low.q.options().dtype(at::kBool));
    mask = mask.index_fill_(0, (slice++)->to(at::kLong), 1).view({low.q.size(0), rows, low.k.size(1)});
    add(low, mask, of_low);
    add(full, mask.logical_not(), of_exact);
  });
  const auto done = [&](const Sums& x) { return Gradients{at::cat(x.q, 1), x.k.to(low.q.scalar_type()), x.v.to(low.q.scalar_type())}; };
  return {done(of_low), done(of_exact)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& out, const at::Tensor& logsumexp,
                                                        const LowRankPlan& plan) {
  const Shape s(q, k);
  const BlockTree& tree = plan.tree;
  auto grad_q = at::empty(q.sizes(), q.options());
  auto grad_k = at::empty(k.sizes(), k.options());
  auto grad_v = at::empty(v.sizes(), v.options());
  const auto logsumexp4 = logsumexp.unsqueeze(3);
  const auto delta4 = (grad_out * out).sum(3, /*keepdim=*/true, logsumexp.scalar_type());

  near_attention_backward(grad_out, q, k, v, tree, logsumexp, delta4.squeeze(3), grad_q, grad_k, grad_v);

  if (has_sink_part(tree, s)) {
    const auto rows = queries_after_sinks(q, tree, s);
    const auto keys = sink_keys(k, tree, s);
    auto dq = at::empty(rows.sizes(), q.options());
    auto dk = at::empty(keys.sizes(), k.options());
    auto dv = at::empty(keys.sizes(), v.options());
    attention_part_backward(queries_after_sinks(grad_out, tree, s), rows, keys, sink_keys(v, tree, s),
                            queries_after_sinks(logsumexp4, tree, s).squeeze(4), queries_after_sinks(delta4, tree, s).squeeze(4),
                            /*causal=*/false, s.scale, dq, dk, dv);
    queries_after_sinks(grad_q, tree, s).add_(dq);
    sink_keys(grad_k, tree, s).add_(dk);
    sink_keys(grad_v, tree, s).add_(dv);
  }

  auto slice = plan.exact_slices.cbegin();
  for (const PairRun& run : tree.runs()) {
    const auto rows_q = query_rows(q, s.groups, run);
    const auto rows_k = key_rows(k, run);
    const auto rows_v = key_rows(v, run);
    const auto rows_grad = query_rows(grad_out, s.groups, run);
    const auto rows_delta = query_rows(delta4, s.groups, run).squeeze(2);
    const auto rows_logsumexp = query_rows(logsumexp4, s.groups, run).squeeze(2);
    auto run_grad_q = at::empty_like(rows_q);
    auto run_grad_k = at::empty_like(rows_k);
    auto run_grad_v = at::empty_like(rows_v);
    for (const Bucket& bucket : buckets_of(run, plan, s.d, q.is_cuda())) {
      const Projections p(bucket, plan, s, q.options());
      const auto bucket_q = take(rows_q, bucket);
      const auto low_q = into_basis(bucket_q, p.p_q);
      const auto low_k = into_basis(take(rows_k, bucket), p.p_k);
      const auto low_v = into_basis(take(rows_v, bucket), p.p_v);
      auto bucket_logsumexp = take(rows_logsumexp, bucket);  // as the uncorrected scores see it
      if (const auto correction = p.correction(bucket_q, bucket_logsumexp.options()); correction.defined()) {
        bucket_logsumexp = bucket_logsumexp - correction;
      }
      const auto low_grad = into_basis(take(rows_grad, bucket), p.p_o);
      const at::Tensor bucket_delta = take(rows_delta, bucket);
      at::Tensor dq, dk, dv;
      if (bucket.ranks.gated(s.d)) {
        const Operands low{low_q, low_k, low_v, low_grad, bucket_logsumexp};
        const Operands full{bucket_q, take(rows_k, bucket), take(rows_v, bucket), take(rows_grad, bucket), take(rows_logsumexp, bucket)};
        const auto [of_low, of_exact] = gated_backward(low, full, bucket_delta, s, slice);
        dq = out_of_basis(of_low.q, p.p_q) + of_exact.q;
        dk = out_of_basis(of_low.k, p.p_k) + of_exact.k;
        dv = out_of_basis(of_low.v, p.p_v) + of_exact.v;
      } else {
        std::tie(dq, dk, dv) = attention_rows_backward(low_grad, low_q, low_k, low_v, bucket_logsumexp, bucket_delta, s.scale);
        dq = out_of_basis(dq, p.p_q);
        dk = out_of_basis(dk, p.p_k);
        dv = out_of_basis(dv, p.p_v);
      }
      put(run_grad_q, bucket, dq);
      put(run_grad_k, bucket, dk);
      put(run_grad_v, bucket, dv);
    }
    add_rows(grad_q, s.groups, run, run.query_begin, run.query_rows, run_grad_q);
    add_rows(grad_k, s.groups, run, run.key_begin, run.key_rows, run_grad_k);
    add_rows(grad_v, s.groups, run, run.key_begin, run.key_rows, run_grad_v);
  }
  return {grad_q, grad_k, grad_v};
}

class LowRankAttention : public torch::autograd::Function<LowRankAttention> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const c10::intrusive_ptr<LowRankPlan>& plan) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, logsumexp] = cpu::lowrank_available(q, *plan) ? cpu::lowrank_forward(q, k, v, *plan) : drrl::forward(q, k, v, *plan);
    context->save_for_backward({q, k, v, out, logsumexp});
    context->saved_data["plan"] = c10::IValue::make_capsule(plan);
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto plan = c10::static_intrusive_pointer_cast<LowRankPlan>(context->saved_data["plan"].toCapsule());
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& q = saved[0];
    const auto run = cpu::lowrank_available(q, *plan) ? &cpu::lowrank_backward : &drrl::backward;
    auto [dq, dk, dv] = run(grads[0].contiguous(), q, saved[1], saved[2], saved[3], saved[4], *plan);
    return {dq, dk, dv, at::Tensor()};
  }
};

}  // namespace

int64_t ExactEntries::count(int64_t row, int64_t rows, int64_t key, int64_t key_count) const {
  const int64_t* at = begin.const_data_ptr<int64_t>();
  const auto* all = keys.const_data_ptr<int32_t>();
  int64_t sum = 0;
  for (int64_t i = row; i < row + rows; ++i) {
    const auto first = std::lower_bound(all + at[i], all + at[i + 1], static_cast<int32_t>(key));
    sum += std::lower_bound(first, all + at[i + 1], static_cast<int32_t>(key + key_count)) - first;
  }
  return sum;
}

void near_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockTree& tree, const at::Tensor& out,
                    const at::Tensor& logsumexp) {
  const Shape s(q, k);
  for (const CausalRun& run : causal_runs(tree)) {  // they cover every token once
    attention_part(query_blocks(q, run, s), key_blocks(k, run, s), key_blocks(v, run, s), /*causal=*/true, s.scale,
                   query_blocks(out, run, s), query_blocks(logsumexp.unsqueeze(3), run, s).squeeze(4));
  }
}

void near_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockTree& tree,
                             const at::Tensor& logsumexp, const at::Tensor& delta, const at::Tensor& grad_q, const at::Tensor& grad_k,
                             const at::Tensor& grad_v) {
  const Shape s(q, k);
  const auto of_rows = [&](const at::Tensor& x, const CausalRun& run) { return query_blocks(x.unsqueeze(3), run, s).squeeze(4); };
  for (const CausalRun& run : causal_runs(tree)) {
    attention_part_backward(query_blocks(grad_out, run, s), query_blocks(q, run, s), key_blocks(k, run, s), key_blocks(v, run, s),
                            of_rows(logsumexp, run), of_rows(delta, run), /*causal=*/true, s.scale, query_blocks(grad_q, run, s),
                            key_blocks(grad_k, run, s), key_blocks(grad_v, run, s));
  }
}

at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<LowRankPlan>& plan) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "lowrank_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G");
  TORCH_CHECK(plan != nullptr, "lowrank_attention: no plan");
  const BlockTree& tree = plan->tree;
  const int64_t d = q.size(3);
  TORCH_CHECK(q.size(2) == tree.sequence_length(), "lowrank_attention: q ", q.sizes(), " for a plan of ", tree.sequence_length(),
              " tokens");
  const int64_t items = k.size(0) * k.size(1) * tree.num_pairs();
  TORCH_CHECK(static_cast<int64_t>(plan->ranks.size()) == items, "lowrank_attention: the plan has ", plan->ranks.size(),
              " ranks, expected B G pairs = ", k.size(0), " x ", k.size(1), " x ", tree.num_pairs());
  int64_t score_columns = 0;  // the largest rank that needs a basis
  int64_t value_columns = 0;
  for (const Ranks& ranks : plan->ranks) {
    TORCH_CHECK(ranks.qk >= 1 && ranks.qk <= d && ranks.v >= 1 && ranks.v <= d, "lowrank_attention: ranks (", ranks.qk, ", ", ranks.v,
                "), expected 1..", d);
    score_columns = ranks.qk < d ? std::max(score_columns, ranks.qk) : score_columns;
    value_columns = ranks.v < d ? std::max(value_columns, ranks.v) : value_columns;
  }
  const auto check_basis = [&](const Basis& basis, const char* which, int64_t columns) {
    TORCH_CHECK(basis.defined() && basis.left.sizes() == at::IntArrayRef({items, d, basis.left.size(2)}) &&
                    basis.right.sizes() == basis.left.sizes() && basis.left.size(2) >= columns,
                "lowrank_attention: the plan's ", which, " bases are ", basis.defined() ? c10::str(basis.left.sizes()) : "missing",
                ", expected [", items, ", ", d, ", at least ", columns, "]");
  };
  if (score_columns > 0) {
    check_basis(plan->scores, "score", score_columns);
  }
  TORCH_CHECK(!plan->residual.defined() || plan->residual.sizes() == at::IntArrayRef({items, d, std::min(kResidualColumns, d)}), "lowrank_attention: the plan's residual factors are ",
              plan->residual.sizes(), ", expected [", items, ", ", d, ", ", std::min(kResidualColumns, d), "]");
  if (value_columns > 0) {
    check_basis(plan->values, "value", value_columns);
  }
  if (items == 0 || (score_columns == 0 && value_columns == 0)) {
    return exact_attention(q, k, v);
  }
  return LowRankAttention::apply(q.contiguous(), k.contiguous(), v.contiguous(), plan);
}

}  // namespace drrl

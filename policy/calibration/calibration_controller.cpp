#include "policy/calibration/calibration_controller.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/Parallel.h>

#include "core/attention/exact_attention.h"
#include "core/attention/far_bases.h"
#include "core/attention/flops.h"
#include "core/attention/lowrank_attention.h"
#include "core/attention/rows.h"
#include "core/linalg/basis.h"
#include "core/linalg/gram.h"
#include "policy/attention/layer_plan.h"
#include "policy/calibration/loss_sensitivity.h"
#include "policy/calibration/pair_features.h"

namespace drrl {
namespace {

constexpr int64_t kScoresAtOnce = 1 << 19;  // a matrix of so many stays in a cache

// n pairs of R query rows, those of all heads of a group, and K keys, in float32 and, with grad's
// product, float64.
struct Pairs {
  at::Tensor q, k, v, grad;   // [n, R or K, d]; grad: of the rows' outputs
  at::Tensor logsumexp, met;  // [n, R]: of all of a row's scores; of those nearer than the pair
  at::Tensor output;          // [n, R] float64
};

// One kind of theirs at one rank, which leaves `output` before it is divided by the sum of
// `weights`, [n, R] float64.
struct LowPairs {
  at::Tensor rows, keys;  // scores: q and k in their bases; values: grad and v, [n, R or K, r]
  at::Tensor correction;  // [n, R]; undefined for values
  at::Tensor output, weights;
  bool scores() const { return correction.defined(); }
};

// What gates make of it: how far each row's error moves the likelihood, [gates, n, R] float64, and
// how many of its entries are exact, likewise.
struct Gated {
  at::Tensor moved, exact;
};

float sum_of(const float* x, int64_t count) {
  std::array<float, 16> lanes{};  // which the compiler adds side by side
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (size_t lane = 0; lane < 16; ++lane) {
      lanes[lane] += x[i + static_cast<int64_t>(lane)];
    }
  }
  return std::accumulate(x + i, x + count, std::accumulate(lanes.begin(), lanes.end(), 0.0F));
}

// One row: adds to output, weights and exact [gates][stride], at the highest gate that each entry
// passes, what changes if it is exact. low: weights that gates see; whole: exact ones, along: grad
// v^T, low_along: the same in the basis (null for scores), all [keys].
void add_entries(const float* low, const float* whole, const float* along, const float* low_along,
                 int64_t keys, float met, const std::vector<float>& gates, double* output,
                 double* weights, double* exact, int64_t stride) {
  for (int64_t begin = 0; begin < keys; begin += kGateChunk) {
    const int64_t end = std::min(begin + kGateChunk, keys);
    met += sum_of(low + begin, end - begin);
    const float least = gates.front() * met, so_far = met;
    for (int64_t j = begin; j < end; ++j) {
      if (low[j] >= least) {
        const auto passed = std::upper_bound(gates.begin() + 1, gates.end(), low[j] / so_far) -
                            gates.begin() - 1;
        const int64_t at = passed * stride;
        const float change = whole[j] - low[j];
        output[at] += low_along != nullptr ? whole[j] * (along[j] - low_along[j])
                                           : change * along[j];
        weights[at] += change;
        exact[at] += 1;
        met += change;
      }
    }
  }
}

std::vector<Gated> behind_gates(const Pairs& x, const std::vector<LowPairs>& all,
                                const at::Tensor& gates, double scale) {
  const int64_t n = x.q.size(0), rows = x.q.size(1), keys = x.k.size(1), count = gates.size(0);
  const std::vector<float> thresholds = [&] {
    const at::Tensor f = gates.to(at::kFloat).contiguous();
    return std::vector<float>(f.const_data_ptr<float>(), f.const_data_ptr<float>() + count);
  }();
  const auto zeros = [&] { return at::zeros({count, n, rows}, at::kDouble); };
  std::vector<std::array<at::Tensor, 3>>
      changes;  // of output, weights and exact, by the highest gate passed
  for (size_t i = 0; i < all.size(); ++i) {
    changes.push_back({zeros(), zeros(), zeros()});
  }
  const int64_t pairs_at_once = std::max<int64_t>(1, kScoresAtOnce / (rows * keys)),
                rows_at_once = std::min(rows, std::max<int64_t>(1, kScoresAtOnce / keys));
  const auto on_cpu = [](const at::Tensor& t) { return t.to(at::kCPU, at::kFloat).contiguous(); };
  for (int64_t pair = 0; pair < n; pair += pairs_at_once) {
    const int64_t pairs = std::min(pairs_at_once, n - pair);
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t some = std::min(rows_at_once, rows - row);
      const auto of_rows = [&](const at::Tensor& t) {
        return t.narrow(0, pair, pairs).narrow(1, row, some);
      };
      const auto product = [&](const at::Tensor& a, const at::Tensor& b) {
        return on_cpu(wide_product(of_rows(a), b.narrow(0, pair, pairs).transpose(1, 2)));
      };
      const auto logsumexp = on_cpu(of_rows(x.logsumexp)),
                 met = (on_cpu(of_rows(x.met)) - logsumexp).exp();
      const auto to_weights = [&](const at::Tensor& scores, const at::Tensor& shift) {
        return at::add(shift.unsqueeze(2), scores, scale).clamp_max_(80).exp_();
      };
      const auto whole = to_weights(product(x.q, x.k), -logsumexp), along = product(x.grad, x.v);
      for (size_t i = 0; i < all.size(); ++i) {
        const auto projected = product(all[i].rows, all[i].keys);
        const auto low = all[i].scores()
                             ? to_weights(projected, on_cpu(of_rows(all[i].correction)) - logsumexp)
                             : whole;
        const auto pointer = [&](const at::Tensor& t) { return t.const_data_ptr<float>(); };
        at::parallel_for(
            0, pairs * some, 1,
            [&, low_at = pointer(low), whole_at = pointer(whole), along_at = pointer(along),
             projected_at = pointer(projected), met_at = pointer(met)](int64_t begin, int64_t end) {
              for (int64_t at = begin; at < end; ++at) {
                const int64_t to = (pair + at / some) * rows + row + at % some;
                const auto into = [&](size_t which) {
                  return changes[i][which].data_ptr<double>() + to;
                };
                add_entries(low_at + at * keys, whole_at + at * keys, along_at + at * keys,
                            all[i].scores() ? nullptr : projected_at + at * keys, keys, met_at[at],
                            thresholds, into(0), into(1), into(2), n * rows);
              }
            });
      }
    }
  }
  std::vector<Gated> result;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto of_gates = [&](size_t which) { return changes[i][which].flip(0).cumsum(0).flip(0); };
    const auto at_low_rank = all[i].weights.to(at::kCPU), left = at_low_rank + of_gates(1);
    const auto moved = (all[i].output.to(at::kCPU) + of_gates(0)) / left - x.output.to(at::kCPU);
    // Where nearly all weight at low rank is of entries that become exact and are far lighter then,
    // what is left has no digits: the row counts as exact.
    result.push_back(
        {at::where(left > 1e-5 * at_low_rank, moved, at::zeros({}, moved.options())), of_gates(2)});
  }
  return result;
}

// What one backward pass of one layer tells about every rank and gate.
class LayerMeasurement {
 public:
  // q, grad [B, H, L, d], k, v [B, G, L, d], w_o [hidden, H d], mass: attention_mass of q and k.
  LayerMeasurement(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& w_o, const at::Tensor& grad, const at::Tensor& mass,
                   const BlockTree& tree, const std::vector<int64_t>& ranks,
                   const at::Tensor& gates);

  // Nearer runs first: each adds to what the rows of later ones have met.
  void measure(const PairRun& run);

  int64_t heads_per_group() const { return q_.size(1) / groups_; }
  const PairGrams& grams() const { return grams_; }

  // Of pairs [B, G, 2, pairs, ranks], with gates [B, G, 2, pairs, ranks, gates]; shares of entries
  // [B, G, pairs, ranks + 1, gates]: float64.
  at::Tensor damage, gated_damage, exact_entries;

 private:
  // A run's rows of all heads, [B G count, g rows, ..], and what exact attention gives there.
  struct RunRows {
    Pairs pairs;
    at::Tensor exact;  // the rows' whole output
    at::Tensor exact_part,
        exact_share;             // what the run's pairs add to it, their share of the softmax
    at::Tensor key_grams, keys;  // of the pairs' keys, and how many there are
  };

  RunRows rows_of(const PairRun& run) const;
  // Output and share of the softmax, [n, g rows, ..], of the run's part with these operands.
  std::pair<at::Tensor, at::Tensor> part(const Pairs& pairs, const at::Tensor& queries,
                                         const at::Tensor& keys, const at::Tensor& values,
                                         const at::Tensor& correction, const at::Tensor& up) const;
  // Scores or values of the run at a rank. served <- [B, G, count]: pairs that no low rank serves,
  // which will be exact and suffer nothing.
  LowPairs at_rank(const PairRun& run, const RunRows& rows, FarKind kind, int64_t rank,
                   at::Tensor& served) const;
  at::Tensor served_exactly(const PairRun& run, Ranks ranks, const at::Tensor& residual) const;
  // [B G pairs, ..] -> those of the run, [B G count, ..].
  at::Tensor of_run(const at::Tensor& x, const PairRun& run) const {
    return x.unflatten(0, {batch_ * groups_, tree_.num_pairs()})
        .narrow(1, run.first_pair, run.count)
        .flatten(0, 1);
  }
  at::Tensor along_grad(const Pairs& pairs, const at::Tensor& rows) const {
    return (rows * pairs.grad).sum(2, /*keepdim=*/false, at::kDouble);
  }

  const at::Tensor &q_, &k_, &v_, &grad_;
  const BlockTree& tree_;
  const std::vector<int64_t>& ranks_;
  const at::Tensor& gates_;
  int64_t batch_, groups_;
  double scale_;
  PairGrams grams_;
  UsablePairs usable_;
  FarBases bases_;
  at::Tensor whole_, logsumexp_;  // exact attention and its log-sum-exp [B, G, g, L]
  at::Tensor met_;                // [B, H, L, 1]: log-sum-exp of what a row met before the run
};

LayerMeasurement::LayerMeasurement(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& w_o, const at::Tensor& grad,
                                   const at::Tensor& mass, const BlockTree& tree,
                                   const std::vector<int64_t>& ranks, const at::Tensor& gates)
    : q_(q),
      k_(k),
      v_(v),
      grad_(grad),
      tree_(tree),
      ranks_(ranks),
      gates_(gates),
      batch_(q.size(0)),
      groups_(k.size(1)),
      scale_(1.0 / std::sqrt(static_cast<double>(q.size(3)))),
      grams_(pair_grams(q, k, v, tree, mass)),
      usable_(usable_pairs(grams_, w_o)),
      bases_(solve_far_bases(grams_, w_o, /*scores=*/true, /*values=*/true)) {
  const auto choices = static_cast<int64_t>(ranks.size());
  const auto zeros = [](at::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); };
  damage = zeros({batch_, groups_, 2, tree.num_pairs(), choices});
  gated_damage = zeros({batch_, groups_, 2, tree.num_pairs(), choices, gates.size(0)});
  exact_entries = zeros({batch_, groups_, tree.num_pairs(), choices + 1, gates.size(0)});

  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // Exact attention again, for its log-sum-exp, by which parts are weighed.
  whole_ = at::empty(q.sizes(), q.options());
  logsumexp_ = at::empty({batch_, groups_, heads_per_group(), q.size(2)}, q.options().dtype(wide));
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {groups_, -1}); };
  attention_part(by_group(q), k, v, /*causal=*/true, scale_, by_group(whole_), logsumexp_);
  // Of what each row meets before its far pairs: its own block and the sinks.
  auto near_out = at::empty_like(q),
       met = at::empty({batch_, q.size(1), q.size(2)}, logsumexp_.options());
  near_attention(q, k, v, tree, near_out, met);
  if (const int64_t sinks = tree.sinks(); sinks > 0) {
    auto behind = met.slice(2, sinks);
    const auto scores = at::matmul(by_group(q.slice(2, sinks)).to(wide),
                                   k.slice(2, 0, sinks).unsqueeze(2).transpose(3, 4).to(wide)) *
                        scale_;  // [B, G, g, L - s, s]
    behind.copy_(at::logaddexp(behind, scores.logsumexp(4).flatten(1, 2)));
  }
  met_ = met.unsqueeze(3);
}

LayerMeasurement::RunRows LayerMeasurement::rows_of(const PairRun& run) const {
  const auto take = [&](const at::Tensor& x) { return query_rows(x, groups_, run); };
  RunRows rows;
  rows.exact = take(whole_);
  rows.pairs = {take(q_),
                key_rows(k_, run),
                key_rows(v_, run),
                take(grad_.contiguous()),
                take(logsumexp_.flatten(1, 2).unsqueeze(3)).squeeze(2),
                take(met_).squeeze(2),
                {}};
  rows.pairs.output = along_grad(rows.pairs, rows.exact);
  std::tie(rows.exact_part, rows.exact_share) = part(rows.pairs, rows.pairs.q, rows.pairs.k,
                                                     rows.pairs.v, {}, {});
  rows.keys = at::full({rows.pairs.q.size(0)}, static_cast<double>(run.key_rows),
                       bases_.scores.singular_values.options());
  rows.key_grams = of_run(grams_.keys.flatten(0, 2), run);
  return rows;
}

std::pair<at::Tensor, at::Tensor> LayerMeasurement::part(
    const Pairs& pairs, const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
    const at::Tensor& correction, const at::Tensor& up) const {
  const auto [out, sum] = attention_rows(queries, keys, values, scale_);
  const auto share = ((correction.defined() ? sum + correction : sum) - pairs.logsumexp)
                         .clamp_max(60)
                         .exp()
                         .unsqueeze(2);
  return {out_of_basis(out, up) * share, share};
}

at::Tensor LayerMeasurement::served_exactly(const PairRun& run, Ranks ranks,
                                            const at::Tensor& residual) const {
  const int64_t items = batch_ * groups_ * run.count;
  std::vector<Ranks> served(static_cast<size_t>(items), ranks);
  UsablePairs usable;
  for (int64_t item = 0; item < items; ++item) {
    const auto in_all = static_cast<size_t>(item / run.count * tree_.num_pairs() + run.first_pair +
                                            item % run.count);
    usable.scores.push_back(usable_.scores[in_all]);
    usable.values.push_back(usable_.values[in_all]);
  }
  const auto take = [&](const at::Tensor& gram) {
    return gram.narrow(2, run.first_pair, run.count);
  };
  leave_exact({take(grams_.queries), take(grams_.keys), take(grams_.values)}, usable,
              heads_per_group(), {run.key_rows}, residual, served);
  auto mask = at::zeros({batch_, groups_, run.count}, at::kBool);
  std::transform(served.begin(), served.end(), mask.data_ptr<bool>(),
                 [&](const Ranks& r) { return r != ranks; });
  return mask;
}

LowPairs LayerMeasurement::at_rank(const PairRun& run, const RunRows& rows, FarKind kind,
                                   int64_t rank, at::Tensor& served) const {
  const int64_t d = q_.size(3);
  const Basis& all = kind == FarKind::kScores ? bases_.scores : bases_.values;
  const auto columns = [&](const at::Tensor& x) { return of_run(x, run).narrow(2, 0, rank); };
  const Basis basis{columns(all.left), columns(all.right), {}};
  const auto left = basis.left.to(q_.scalar_type()), right = basis.right.to(q_.scalar_type());
  const Pairs& pairs = rows.pairs;
  LowPairs low;
  std::pair<at::Tensor, at::Tensor> far;
  if (kind == FarKind::kScores) {
    const auto residual = residual_factor(basis, rows.key_grams, rows.keys);
    served = served_exactly(run, {rank, d}, residual);
    low.correction = residual_correction(pairs.q, residual);
    low.rows = at::bmm(pairs.q, left);
    low.keys = at::bmm(pairs.k, right);
    far = part(pairs, low.rows, low.keys, pairs.v, low.correction, {});
  } else {
    served = served_exactly(run, {d, rank}, {});
    low.rows = at::bmm(pairs.grad, right);
    low.keys = at::bmm(pairs.v, left);
    far = part(pairs, pairs.q, pairs.k, low.keys, {}, right);
  }
  low.output = along_grad(pairs, rows.exact - rows.exact_part + far.first);
  low.weights = (1 - rows.exact_share + far.second)
                    .squeeze(2)
                    .to(at::kDouble)
                    .clamp_min(1e-6);  // below there are no digits
  return low;
}

void LayerMeasurement::measure(const PairRun& run) {
  const auto choices = static_cast<int64_t>(ranks_.size());
  const RunRows rows = rows_of(run);
  const auto nats = [&](const at::Tensor& moved) {
    return loss_increase(moved, heads_per_group()).sum(-1);
  };
  const auto by_pair = [&](const at::Tensor& x) {  // [gates, n] -> [B, G, count, gates]
    return x.unflatten(1, {batch_, groups_, run.count}).movedim(0, 3);
  };
  std::vector<LowPairs> all;
  std::vector<at::Tensor> served(static_cast<size_t>(2 * choices));
  for (int64_t i = 0; i < 2 * choices; ++i) {
    const int64_t kind = i / choices, rank = i % choices;
    at::Tensor& exact = served[static_cast<size_t>(i)];
    const LowPairs& low = all.emplace_back(
        at_rank(run, rows, static_cast<FarKind>(kind), ranks_[static_cast<size_t>(rank)], exact));
    damage.select(2, kind)
        .narrow(2, run.first_pair, run.count)
        .select(3, rank) += nats(low.output / low.weights - rows.pairs.output)
                                .view({batch_, groups_, run.count})
                                .to(at::kCPU)
                                .masked_fill(exact, 0);
  }
  const std::vector<Gated> gated = behind_gates(rows.pairs, all, gates_, scale_);
  const int64_t entries = run.query_rows * run.key_rows;  // of a pair and head
  for (int64_t i = 0; i < 2 * choices; ++i) {
    const int64_t kind = i / choices, rank = i % choices;
    const Gated& behind = gated[static_cast<size_t>(i)];
    gated_damage.select(2, kind)
        .narrow(2, run.first_pair, run.count)
        .select(3, rank)
        .copy_(by_pair(nats(behind.moved))
                   .to(at::kCPU)
                   .masked_fill(served[static_cast<size_t>(i)].unsqueeze(3), 0));
    if (i <= choices) {  // by score rank; exact scores, as under values of any rank, are the last
      exact_entries.narrow(2, run.first_pair, run.count)
          .select(3, i)
          .copy_(by_pair(behind.exact.sum(-1)) / static_cast<double>(heads_per_group() * entries));
    }
  }
  const auto met = token_runs(met_, groups_, run.query_begin, run.count, run.query_rows,
                              run.stride);
  met.copy_(at::logaddexp(
      met, (rows.exact_share.squeeze(2).log() + rows.pairs.logsumexp).view(met.sizes())));
}

}  // namespace

CalibrationController::CalibrationController(int64_t layers, Geometry geometry,
                                             std::vector<int64_t> ranks)
    : layers_(layers), geometry_(geometry), ranks_(std::move(ranks)) {}

at::Tensor CalibrationController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                         const at::Tensor& v, const at::Tensor& w_o,
                                         std::shared_ptr<LayerPlan>& plan) {
  plan = std::make_shared<LayerPlan>();
  const auto out = exact_attention(q, k, v);
  if (out.requires_grad()) {
    out.register_hook([this, layer, q = q.detach(), k = k.detach(), v = v.detach(),
                       w_o](const at::Tensor& grad) { measure(layer, q, k, v, w_o, grad); });
  }
  return out;
}

void CalibrationController::measure(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& w_o,
                                    const at::Tensor& grad) {
  at::NoGradGuard no_grad;
  const BlockTree tree(q.size(2), geometry_);
  if (tree.num_pairs() == 0) {
    return;
  }
  const int64_t batch = q.size(0), groups = k.size(1), d = q.size(3);
  const at::Tensor gates = default_gates();
  if (!damage_.defined()) {
    const auto choices = static_cast<int64_t>(ranks_.size());
    const auto zeros = [](at::IntArrayRef sizes) { return at::zeros(sizes, at::kDouble); };
    damage_ = zeros({layers_, groups, 2, tree.num_levels(), choices});
    gated_damage_ = zeros({layers_, groups, 2, tree.num_levels(), choices, gates.size(0)});
    exact_entries_ = zeros({layers_, groups, tree.num_levels(), choices + 1, gates.size(0)});
    entries_ = zeros({layers_, tree.num_levels()});
    grams_ = zeros({layers_, groups, 4, d, d});
  }
  TORCH_CHECK(damage_.size(3) == tree.num_levels(), "calibration on a sequence of ", q.size(2),
              " tokens with ", tree.num_levels(), " levels after others with ", damage_.size(3));
  const auto mass = attention_mass(q, k, tree);
  const auto gram = [&](const at::Tensor& x, const at::Tensor& weights) {
    const int64_t rows = tree.geometry().near_block;  // all complete blocks
    return token_gram(x.narrow(2, tree.sinks(), tree.num_pairs() * rows), groups, rows, weights)
        .sum(0)
        .to(at::kCPU);
  };
  const std::array grams = {gram(q, {}), gram(k, mass), gram(v, mass),
                            output_gram(w_o, groups, d).to(at::kCPU)};
  for (int64_t i = 0; i < 4; ++i) {
    grams_[layer].select(1, i) += grams[static_cast<size_t>(i)];
  }

  LayerMeasurement measured(q, k, v, w_o, grad, mass, tree, ranks_, gates);
  for (const PairRun& run : tree.runs()) {
    measured.measure(run);
    const auto entries = static_cast<double>(run.query_rows * run.key_rows);  // of a pair and head
    const auto sum = [&](const at::Tensor& x, int64_t dim) {  // over the run's pairs and the batch
      return x.narrow(dim, run.first_pair, run.count).sum(at::IntArrayRef{0, dim});
    };
    entries_[layer][run.level] += batch * run.count * run.query_rows * run.key_rows;
    damage_[layer].select(2, run.level) += sum(measured.damage, 3);
    gated_damage_[layer].select(2, run.level) += sum(measured.gated_damage, 3);
    exact_entries_[layer].select(1, run.level) += sum(measured.exact_entries, 2) * entries;
  }
  if (start_.defined()) {
    const auto keep = [&](at::Tensor& all, const at::Tensor& x) {
      if (!all.defined() || all[layer].sizes() != x.sizes()) {
        all = at::zeros_like(x).unsqueeze(0).repeat_interleave(layers_, 0);
      }
      all[layer].copy_(x);
    };
    keep(pairs_.state, pair_state(measured.grams(), w_o, measured.heads_per_group(),
                                  for_batch(start_[layer], batch), tree, 0, ranks_));
    keep(pairs_.damage, measured.damage);
    keep(pairs_.gated_damage, measured.gated_damage);
    keep(pairs_.exact_entries, measured.exact_entries);
  }
}

at::Tensor starting_bases(const at::Tensor& grams) {
  const auto of = [&](int64_t kind) { return grams.select(2, kind).flatten(0, 1).contiguous(); };
  const auto scores = solve_basis(of(0), of(1)).right;
  const auto values = solve_basis(of(2), of(3)).right;
  return at::stack({scores, values}, 1).unflatten(0, {grams.size(0), grams.size(1)});
}

}  // namespace drrl

#include "core/attention/far_bases.h"

#include <algorithm>

#include "core/attention/flops.h"
#include "core/attention/rows.h"

namespace drrl {
namespace {

// The matrices X^T X [B G pairs, d, d] and Y^T Y of each pair's product X Y^T; Y^T Y for every
// pair, or one for all pairs of a sequence and KV group, [B G, d, d].
struct Problem {
  at::Tensor gram_x, gram_y;
};

Problem problem_of(FarKind kind, const PairGrams& grams, const at::Tensor& w_o) {
  if (kind == FarKind::kScores) {
    return {grams.queries.flatten(0, 2), grams.keys.flatten(0, 2)};
  }
  return {grams.values.flatten(0, 2), for_batch(output_of(grams, w_o), grams.values.size(0))};
}

}  // namespace

at::Tensor output_of(const PairGrams& grams, const at::Tensor& w_o) {
  return grams.output.defined() ? grams.output
                                : output_gram(w_o, grams.values.size(1), grams.values.size(4));
}

PairGrams far_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const BlockTree& tree, bool weighted) {
  at::NoGradGuard no_grad;
  return pair_grams(q, k, v, tree, weighted ? attention_mass(q, k, tree) : at::Tensor());
}

FarBases solve_far_bases(const PairGrams& grams, const at::Tensor& w_o, bool scores, bool values) {
  at::NoGradGuard no_grad;
  const int64_t d = grams.keys.size(4);
  FarBases bases;
  const auto solve = [&](FarKind kind, Basis& into) {
    const Problem p = problem_of(kind, grams, w_o);
    into = solve_basis(p.gram_x,
                       p.gram_y.repeat_interleave(p.gram_x.size(0) / p.gram_y.size(0), 0));
    bases.decompositions += p.gram_x.size(0);
  };
  if (scores) {
    solve(FarKind::kScores, bases.scores);
  }
  if (values) {
    solve(FarKind::kValues, bases.values);
    bases.flops += output_gram_flops(w_o.size(0), w_o.size(1) / d, d);
  }
  bases.flops += static_cast<double>(bases.decompositions) * basis_solve_flops(d);
  return bases;
}

FarBases update_far_bases(const PairGrams& grams, const at::Tensor& w_o,
                          const std::vector<Ranks>& ranks, const at::Tensor& start, int64_t steps) {
  at::NoGradGuard no_grad;
  const int64_t d = grams.keys.size(4);
  FarBases bases;
  for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
    std::vector<int64_t> of_kind;
    double flops = kind == FarKind::kValues ? output_gram_flops(w_o.size(0), w_o.size(1) / d, d)
                                            : 0;
    int64_t low = 0;
    for (const Ranks& r : ranks) {
      const int64_t rank = of_kind.emplace_back(kind == FarKind::kScores ? r.qk : r.v);
      low += rank < d ? 1 : 0;
      flops += rank < d ? basis_update_flops(d, rank, steps) : 0;
    }
    if (low == 0) {
      continue;
    }
    const Problem p = problem_of(kind, grams, w_o);
    (kind == FarKind::kScores ? bases.scores : bases.values) = update_bases(
        start.select(1, static_cast<int64_t>(kind)), p.gram_x, p.gram_y, of_kind, steps);
    bases.updates += low * steps;
    bases.flops += flops;
  }
  return bases;
}

at::Tensor first_pair_bases(const PairGrams& grams, const at::Tensor& w_o) {
  const auto problems = first_pair_problems(grams, w_o);
  return solve_basis(problems[0], problems[1]).right.unflatten(0, {-1, 2});
}

at::Tensor first_pair_problems(const PairGrams& grams, const at::Tensor& w_o) {
  at::NoGradGuard no_grad;
  const auto first = [](const at::Tensor& gram) { return gram.select(2, 0).flatten(0, 1); };
  const auto of_kinds = [](const at::Tensor& scores, const at::Tensor& values) {
    return at::stack({scores, values}, 1).flatten(0, 1);
  };
  return at::stack(
      {of_kinds(first(grams.queries), first(grams.values)),
       of_kinds(first(grams.keys), for_batch(output_of(grams, w_o), grams.values.size(0)))});
}

at::Tensor for_batch(const at::Tensor& of_layer, int64_t batch) {
  std::vector<int64_t> times(static_cast<size_t>(of_layer.dim()), 1);
  times.front() = batch;
  return of_layer.repeat(times);
}

at::Tensor residual_factors(const PairGrams& grams, const Basis& scores,
                            const std::vector<Ranks>& ranks, const std::vector<int64_t>& keys) {
  at::NoGradGuard no_grad;
  std::vector<int64_t> of_scores, counts;
  for (const Ranks& r : ranks) {
    counts.push_back(keys[of_scores.size() % keys.size()]);
    of_scores.push_back(r.qk);
  }
  const auto key_grams = grams.keys.flatten(0, 2);
  const int64_t most = grams.keys.size(4) - 1;
  if (std::all_of(of_scores.begin(), of_scores.end(), [&](int64_t rank) { return rank > most; })) {
    return {};
  }
  const auto below_d = [&](const at::Tensor& basis) {
    return basis.narrow(2, 0, std::min(basis.size(2), most));
  };
  return residual_factor({below_d(scores.left), below_d(scores.right), {}}, key_grams,
                         on_device(counts, key_grams.device()), of_scores);
}

std::vector<int64_t> key_counts(const BlockTree& tree) {
  std::vector<int64_t> keys;
  for (const PairRun& run : tree.runs()) {
    keys.insert(keys.end(), static_cast<size_t>(run.count), run.key_rows);
  }
  return keys;
}

UsablePairs usable_pairs(PairGrams& grams, const at::Tensor& w_o) {
  at::NoGradGuard no_grad;
  constexpr double kSmallest = 1e-30, kLargest = 1e30;  // traces of a Gram
  const auto in_pairs = grams.keys.sizes().slice(0, 3);
  const int64_t items = c10::multiply_integers(in_pairs);
  UsablePairs result{std::vector<bool>(static_cast<size_t>(items), true), {}};
  result.values = result.scores;
  if (!grams.keys.is_cpu()) {
    return result;
  }
  grams.output = output_of(grams, w_o);
  const auto mended = [&](at::Tensor& gram) {  // and which were sound
    const auto trace = gram.diagonal(0, -2, -1).sum(-1);
    const auto sound = (trace >= kSmallest).logical_and(trace <= kLargest);
    if (!sound.all().item<bool>()) {
      gram = at::where(sound.unsqueeze(-1).unsqueeze(-1), gram,
                       at::eye(gram.size(-1), gram.options()));
    }
    return sound;
  };
  const auto scores = mended(grams.queries).logical_and(mended(grams.keys)).contiguous();
  const auto
      values = mended(grams.values).logical_and(mended(grams.output).view({1, -1, 1})).contiguous();
  std::copy_n(scores.const_data_ptr<bool>(), items, result.scores.begin());
  std::copy_n(values.const_data_ptr<bool>(), items, result.values.begin());
  return result;
}

int64_t leave_exact(const PairGrams& grams, const UsablePairs& usable, int64_t heads_per_group,
                    const std::vector<int64_t>& keys, const at::Tensor& residual,
                    std::vector<Ranks>& ranks) {
  at::NoGradGuard no_grad;
  const int64_t d = grams.keys.size(4);
  if (!grams.keys.is_cpu()) {
    return 0;
  }
  at::Tensor expected;  // the sum over older queries of their corrections
  const auto energy = (grams.queries * grams.keys)
                          .sum({3, 4})
                          .flatten()
                          .contiguous();  // of all their scores, unscaled
  if (residual.defined()) {
    const auto factor = residual.to(at::kDouble);
    expected = (at::bmm(grams.queries.flatten(0, 2), factor) * factor).sum({1, 2});
  }
  int64_t changed = 0;
  for (size_t item = 0; item < ranks.size(); ++item) {
    Ranks& r = ranks[item];
    const Ranks before = r;
    const auto hopeless = [&] {
      const auto rows = static_cast<double>(keys[item % keys.size()]),
                 queries = static_cast<double>(heads_per_group) * rows;
      return !(expected.const_data_ptr<double>()[item] <= kHopelessCorrection * queries &&
               energy.const_data_ptr<double>()[item] <=
                   kHopelessScore * kHopelessScore * static_cast<double>(d) * queries * rows);
    };
    r.qk = r.qk < d && (!usable.scores[item] || hopeless()) ? d : r.qk;
    r.v = usable.values[item] ? r.v : d;
    changed += r == before ? 0 : 1;
  }
  return changed;
}

void complete_bases(FarBases& bases, const PairGrams& grams, const UsablePairs& usable,
                    int64_t heads_per_group, const std::vector<int64_t>& keys,
                    std::vector<Ranks>& ranks) {
  const int64_t d = grams.keys.size(4);
  for (const Ranks& r : ranks) {
    bases.flops += r.qk < d ? residual_factor_flops(d, r.qk) : 0;
  }
  bases.residual = residual_factors(grams, bases.scores, ranks, keys);
  bases.exact_pairs = leave_exact(grams, usable, heads_per_group, keys, bases.residual, ranks);
}

c10::intrusive_ptr<LowRankPlan> make_plan(const BlockTree& tree, std::vector<Ranks> ranks,
                                          const PairGrams& grams, const FarBases& bases) {
  auto residual = residual_factors(grams, bases.scores, ranks, key_counts(tree));
  return c10::make_intrusive<LowRankPlan>(tree, std::move(ranks), bases.scores, bases.values,
                                          std::move(residual));
}

}  // namespace drrl

#include "policy/far_bases.h"

#include <algorithm>
#include <map>

#include "core/cost.h"
#include "core/gram.h"

namespace drrl {
namespace {

// The Gram pair [B G pairs, d, d] of each kind.
struct Problem {
  at::Tensor gram_x, gram_y;
};

Problem problem_of(FarKind kind, const PairGrams& grams, const at::Tensor& output) {
  if (kind == FarKind::kScores) {
    return {grams.queries.flatten(0, 2), grams.keys.flatten(0, 2)};
  }
  return {grams.values.flatten(0, 2), output.unsqueeze(1).expand_as(grams.values).flatten(0, 2)};
}

// The items whose rank of this kind is below d, by rank.
std::map<int64_t, std::vector<int64_t>> items_by_rank(const std::vector<Ranks>& ranks, FarKind kind, int64_t d) {
  std::map<int64_t, std::vector<int64_t>> items;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t rank = kind == FarKind::kScores ? ranks[i].qk : ranks[i].v;
    if (rank < d) {
      items[rank].push_back(static_cast<int64_t>(i));
    }
  }
  return items;
}

}  // namespace

FarBases solve_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                         bool scores, bool values) {
  at::NoGradGuard no_grad;
  const PairGrams grams = pair_grams(q.detach(), k.detach(), v.detach(), tree);
  const int64_t d = k.size(3);
  FarBases bases;
  const auto solve = [&](FarKind kind, Basis& into) {
    const Problem p = problem_of(kind, grams, kind == FarKind::kValues ? output_gram(w_o, k.size(1), d) : at::Tensor());
    into = solve_basis(p.gram_x, p.gram_y);
    bases.solves += p.gram_x.size(0);
  };
  if (scores) {
    solve(FarKind::kScores, bases.scores);
  }
  if (values) {
    solve(FarKind::kValues, bases.values);
    bases.flops += 2.0 * static_cast<double>(w_o.numel() * d);
  }
  bases.flops += static_cast<double>(bases.solves) * basis_solve_flops(d);
  bases.key_grams = grams.keys.flatten(0, 2);
  return bases;
}

FarBases update_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                          const std::vector<Ranks>& ranks, const at::Tensor& start, int64_t steps) {
  at::NoGradGuard no_grad;
  const int64_t d = k.size(3), groups = k.size(1), pairs = tree.num_pairs();
  const PairGrams grams = pair_grams(q.detach(), k.detach(), v.detach(), tree);
  FarBases bases;
  bases.key_grams = grams.keys.flatten(0, 2);
  for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
    const auto items_of = items_by_rank(ranks, kind, d);
    if (items_of.empty()) {
      continue;
    }
    at::Tensor output;
    if (kind == FarKind::kValues) {
      output = output_gram(w_o, groups, d);
      bases.flops += 2.0 * static_cast<double>(w_o.numel() * d);
    }
    const Problem p = problem_of(kind, grams, output);
    const int64_t sequences = p.gram_x.size(0) / pairs;  // B G
    at::Tensor from;  // [B G, d, d]
    if (start.defined()) {
      from = start.select(1, static_cast<int64_t>(kind)).unsqueeze(0).expand({sequences / groups, -1, -1, -1}).flatten(0, 1);
    } else {
      const auto first = [&](const at::Tensor& gram) { return gram.unflatten(0, {sequences, pairs}).select(1, 0).contiguous(); };
      from = solve_basis(first(p.gram_x), first(p.gram_y)).right;
      bases.solves += sequences;
      bases.flops += static_cast<double>(sequences) * basis_solve_flops(d);
    }
    Basis& result = kind == FarKind::kScores ? bases.scores : bases.values;
    const int64_t columns = items_of.rbegin()->first;
    const auto options = p.gram_x.options().dtype(at::kFloat);
    result.left = at::empty({p.gram_x.size(0), d, columns}, options);
    result.right = at::empty({p.gram_x.size(0), d, columns}, options);
    for (const auto& [rank, items] : items_of) {
      const auto index = at::tensor(items, at::kLong).to(options.device());
      const Basis updated = update_basis(from.narrow(2, 0, rank).index_select(0, index.div(pairs, "floor")), p.gram_x.index_select(0, index),
                                         p.gram_y.index_select(0, index), steps);
      result.left.narrow(2, 0, rank).index_copy_(0, index, updated.left);
      result.right.narrow(2, 0, rank).index_copy_(0, index, updated.right);
      bases.updates += static_cast<int64_t>(items.size()) * steps;
      bases.flops += static_cast<double>(items.size()) * basis_update_flops(d, rank, steps);
    }
  }
  return bases;
}

c10::intrusive_ptr<LowRankPlan> make_plan(const BlockTree& tree, std::vector<Ranks> ranks, FarBases& bases) {
  at::NoGradGuard no_grad;
  const int64_t d = bases.key_grams.size(1);
  at::Tensor residual;
  for (const auto& [rank, items] : items_by_rank(ranks, FarKind::kScores, d)) {
    std::vector<double> keys;
    for (const int64_t item : items) {
      const int64_t pair = item % tree.num_pairs();
      const auto run = std::find_if(tree.runs().begin(), tree.runs().end(), [&](const PairRun& r) { return pair < r.first_pair + r.count; });
      keys.push_back(static_cast<double>(run->key_rows));
    }
    const auto index = at::tensor(items, at::kLong).to(bases.key_grams.device());
    const auto columns = [&, columns_of = rank](const at::Tensor& basis) { return basis.narrow(2, 0, columns_of).index_select(0, index); };
    const auto forms = residual_form({columns(bases.scores.left), columns(bases.scores.right), {}}, bases.key_grams.index_select(0, index),
                                     at::tensor(keys, at::kDouble).to(index.device()));
    if (!residual.defined()) {
      residual = at::empty(bases.key_grams.sizes(), forms.options());
    }
    residual.index_copy_(0, index, forms);
    bases.flops += static_cast<double>(items.size()) * residual_form_flops(d, rank);
  }
  return c10::make_intrusive<LowRankPlan>(tree, std::move(ranks), bases.scores, bases.values, residual);
}

}  // namespace drrl

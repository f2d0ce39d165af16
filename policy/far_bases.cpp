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
  return bases;
}

FarBases update_far_bases(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o, const BlockTree& tree,
                          const std::vector<Ranks>& ranks, const at::Tensor& start, int64_t steps) {
  at::NoGradGuard no_grad;
  const int64_t d = k.size(3), groups = k.size(1), pairs = tree.num_pairs();
  const PairGrams grams = pair_grams(q.detach(), k.detach(), v.detach(), tree);
  FarBases bases;
  for (const FarKind kind : {FarKind::kScores, FarKind::kValues}) {
    std::map<int64_t, std::vector<int64_t>> items_of;  // by rank
    for (size_t i = 0; i < ranks.size(); ++i) {
      const int64_t rank = kind == FarKind::kScores ? ranks[i].qk : ranks[i].v;
      if (rank < d) {
        items_of[rank].push_back(static_cast<int64_t>(i));
      }
    }
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

}  // namespace drrl

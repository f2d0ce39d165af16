#include "distributed/attention/replicated_kv_bases.h"

#include <algorithm>

#include "core/attention/flops.h"
#include "core/linalg/basis.h"
#include "distributed/topology/mesh.h"

namespace drrl {
namespace {

// Columns that bases of these ranks have.
int64_t columns_of(const std::vector<Ranks>& ranks, int64_t Ranks::* kind, int64_t head_dim) {
  int64_t most = 0;
  for (const Ranks& r : ranks) {
    most = r.*kind < head_dim ? std::max(most, r.*kind) : most;
  }
  return most;
}

}  // namespace

int64_t ReplicatedKvBases::total_heads(int64_t own, const at::Device& device) {
  if (total_heads_ == 0) {
    at::Tensor sum = at::full({1}, own, at::TensorOptions(device).dtype(at::kLong));
    group_.all_reduce(sum);
    total_heads_ = sum.item<int64_t>();
  }
  return total_heads_;
}

PairGrams ReplicatedKvBases::of_all_heads(const PairGrams& own, const at::Tensor& w_o) {
  at::NoGradGuard no_grad;
  const int64_t d = own.keys.size(4), heads = w_o.size(1) / d;
  const double share = static_cast<double>(heads) /
                       static_cast<double>(total_heads(heads, own.keys.device()));
  std::vector<at::Tensor> parts, flat;
  for (const at::Tensor& gram :
       {own.queries, own.keys * share, own.values * share, output_gram(w_o, 1, d)}) {
    parts.push_back(lower_triangle(gram));
    flat.push_back(parts.back().flatten());
  }
  at::Tensor message = at::cat(flat).to(travelling_type(w_o.scalar_type()));
  group_.all_reduce(message);
  int64_t offset = 0;
  for (at::Tensor& part : parts) {
    const int64_t count = part.numel();
    part = from_lower_triangle(message.narrow(0, offset, count).view(part.sizes()).to(at::kDouble),
                               d);
    offset += count;
  }
  return {parts[0], parts[1], parts[2], parts[3]};
}

FarBases ReplicatedKvBases::make(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                                 const std::vector<Ranks>& ranks, at::Tensor& start) {
  at::NoGradGuard no_grad;
  const int64_t batch = grams.keys.size(0), pairs = grams.keys.size(2), d = grams.keys.size(4);
  int64_t decompositions = 0;
  if (!start.defined() && starts_from_first_pair(d)) {
    start = shared_first_pair_bases(grams, w_o, decompositions);
  } else if (!start.defined() && !decomposes(d)) {
    start = calibrated_start(layer, batch);
  }
  const IndexRange share = partition(pairs, group_.size(), group_.rank());
  FarBases bases;
  if (share.count > 0) {
    const auto own = [&](const at::Tensor& x) {
      return x.narrow(2, share.begin, share.count).contiguous();
    };
    std::vector<Ranks> own_ranks;
    for (int64_t b = 0; b < batch; ++b) {
      const auto first = ranks.begin() + b * pairs + share.begin;
      own_ranks.insert(own_ranks.end(), first, first + share.count);
    }
    bases = local_.make(layer,
                        {own(grams.queries), own(grams.keys), own(grams.values), grams.output}, w_o,
                        own_ranks, start);
  }
  gather(bases, ranks, batch, pairs, grams.keys.options(), d);
  bases.decompositions += decompositions;
  bases.flops += static_cast<double>(decompositions) * basis_solve_flops(d);
  return bases;
}

at::Tensor ReplicatedKvBases::shared_first_pair_bases(const PairGrams& grams, const at::Tensor& w_o,
                                                      int64_t& decompositions) const {
  const auto problems = first_pair_problems(grams, w_o);
  const int64_t count = problems.size(1), d = problems.size(2);
  const IndexRange own = partition(count, group_.size(), group_.rank());
  const auto of_own = problems.narrow(1, own.begin, own.count);
  decompositions += own.count;
  const auto solved = own.count > 0 ? solve_basis(of_own[0], of_own[1]).right
                                    : at::empty({0, d, d}, problems.options().dtype(at::kFloat));
  return all_rows(solved, count).unflatten(0, {-1, 2});
}

void ReplicatedKvBases::gather(FarBases& made, const std::vector<Ranks>& ranks, int64_t batch,
                               int64_t pairs, const at::TensorOptions& options,
                               int64_t head_dim) const {
  const int64_t scores = columns_of(ranks, &Ranks::qk, head_dim),
                values = columns_of(ranks, &Ranks::v, head_dim);
  if (scores + values == 0) {
    return;
  }
  // A row for each pair: left and right factors of scores, then of values.
  const int64_t own = partition(pairs, group_.size(), group_.rank()).count;
  const auto row = at::zeros({own, batch, head_dim, 2 * (scores + values)},
                             options.dtype(at::kFloat));
  int64_t column = 0;
  for (const auto& [factor, columns] : {std::pair(made.scores.left, scores),
                                        {made.scores.right, scores},
                                        {made.values.left, values},
                                        {made.values.right, values}}) {
    if (factor.defined()) {
      const int64_t count = std::min(columns, factor.size(2));
      row.narrow(3, column, count)
          .copy_(factor.narrow(2, 0, count).unflatten(0, {batch, own}).transpose(0, 1));
    }
    column += columns;
  }
  const auto of_pairs = all_rows(row, pairs).transpose(0, 1).flatten(0, 1);  // [B pairs, d, ..]
  const auto factor = [&](int64_t first, int64_t columns) {
    return columns > 0 ? of_pairs.narrow(2, first, columns).contiguous() : at::Tensor();
  };
  made.scores = {factor(0, scores), factor(scores, scores), {}};
  made.values = {factor(2 * scores, values), factor(2 * scores + values, values), {}};
}

at::Tensor ReplicatedKvBases::all_rows(const at::Tensor& own, int64_t count) const {
  std::vector<int64_t> rows;
  for (int64_t member = 0; member < group_.size(); ++member) {
    rows.push_back(partition(count, group_.size(), member).count);
  }
  return group_.all_gather_uneven(own.contiguous(), rows);
}

}  // namespace drrl

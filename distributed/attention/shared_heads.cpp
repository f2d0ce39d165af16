#include "distributed/attention/shared_heads.h"

#include <algorithm>

#include "core/linalg/basis.h"
#include "distributed/collectives/traffic.h"
#include "distributed/topology/mesh.h"

namespace drrl {
namespace {

int64_t sent(const char* operation, const Group& group, int64_t message_bytes) {
  return static_cast<int64_t>(static_cast<double>(message_bytes) *
                              bus_factor(operation, group.size()));
}

// Columns that bases of these ranks have.
int64_t columns_of(const std::vector<Ranks>& ranks, int64_t Ranks::* kind, int64_t head_dim) {
  int64_t most = 0;
  for (const Ranks& r : ranks) {
    most = r.*kind < head_dim ? std::max(most, r.*kind) : most;
  }
  return most;
}

}  // namespace

int64_t SharedHeads::total(int64_t own, const at::Device& device) {
  if (!shared()) {
    return own;
  }
  if (total_ == 0) {
    at::Tensor sum = at::full({1}, own, at::TensorOptions(device).dtype(at::kLong));
    group_.all_reduce(sum);
    total_ = sum.item<int64_t>();
  }
  return total_;
}

PairGrams SharedHeads::sum(const PairGrams& own, const at::Tensor& w_o, int64_t& bytes) {
  if (!shared()) {
    return own;
  }
  at::NoGradGuard no_grad;
  const int64_t d = own.keys.size(4), heads = w_o.size(1) / d;
  const double share = static_cast<double>(heads) /
                       static_cast<double>(total(heads, own.keys.device()));
  std::vector<at::Tensor> parts;
  for (const at::Tensor& gram :
       {own.queries, own.keys * share, own.values * share, output_gram(w_o, 1, d)}) {
    parts.push_back(lower_triangle(gram));
  }
  std::vector<at::Tensor> flat;
  std::transform(parts.begin(), parts.end(), std::back_inserter(flat),
                 [](const at::Tensor& x) { return x.flatten(); });
  at::Tensor message = at::cat(flat).to(travelling_type(w_o.scalar_type()));
  group_.all_reduce(message);
  bytes += sent("all_reduce", group_, static_cast<int64_t>(message.nbytes()));
  int64_t offset = 0;
  for (at::Tensor& part : parts) {
    const int64_t count = part.numel();
    part = from_lower_triangle(message.narrow(0, offset, count).view(part.sizes()).to(at::kDouble),
                               d);
    offset += count;
  }
  return {parts[0], parts[1], parts[2], parts[3]};
}

at::Tensor SharedHeads::gathered(const at::Tensor& own, int64_t count, int64_t& bytes) const {
  std::vector<int64_t> rows;
  for (int64_t member = 0; member < group_.size(); ++member) {
    rows.push_back(partition(count, group_.size(), member).count);
  }
  const at::Tensor all = group_.all_gather_uneven(own.contiguous(), rows);
  bytes += sent("all_gather", group_,
                group_.size() * rows[0] * static_cast<int64_t>(all.nbytes()) /
                    count);  // padded to the largest share
  return all;
}

at::Tensor SharedHeads::first_pair_bases(const PairGrams& grams, const at::Tensor& w_o,
                                         int64_t& solves, int64_t& bytes) const {
  if (!shared()) {
    solves += 2 * grams.keys.size(0) * grams.keys.size(1);
    return drrl::first_pair_bases(grams, w_o);
  }
  at::NoGradGuard no_grad;
  const auto problems = first_pair_problems(grams, w_o);
  const int64_t count = problems.size(1), d = problems.size(2);
  const Share own = partition(count, group_.size(), group_.rank());
  const auto of_own = problems.narrow(1, own.begin, own.count);
  solves += own.count;
  const auto solved = own.count > 0 ? solve_basis(of_own[0], of_own[1]).right
                                    : at::empty({0, d, d}, problems.options().dtype(at::kFloat));
  return gathered(solved, count, bytes).unflatten(0, {-1, 2});
}

FarBases SharedHeads::deal_out(
    const PairGrams& grams, const std::vector<Ranks>& ranks,
    const std::function<FarBases(const PairGrams&, const std::vector<Ranks>&)>& make,
    int64_t& bytes) const {
  if (!shared()) {
    return make(grams, ranks);
  }
  at::NoGradGuard no_grad;
  const int64_t batch = grams.keys.size(0), pairs = grams.keys.size(2), d = grams.keys.size(4);
  const Share share = partition(pairs, group_.size(), group_.rank());
  FarBases made;
  if (share.count > 0) {
    const auto own = [&](const at::Tensor& x) {
      return x.narrow(2, share.begin, share.count).contiguous();
    };
    std::vector<Ranks> of_own;
    for (int64_t b = 0; b < batch; ++b) {
      const auto first = ranks.begin() + b * pairs + share.begin;
      of_own.insert(of_own.end(), first, first + share.count);
    }
    made = make({own(grams.queries), own(grams.keys), own(grams.values), grams.output}, of_own);
  }

  // A row for each pair: left and right factors of scores, then of values.
  const int64_t scores = columns_of(ranks, &Ranks::qk, d), values = columns_of(ranks, &Ranks::v, d);
  if (scores + values == 0) {
    return made;
  }
  const auto row = at::zeros({share.count, batch, d, 2 * (scores + values)},
                             grams.keys.options().dtype(at::kFloat));
  int64_t column = 0;
  for (const auto& [factor, columns] : {std::pair(made.scores.left, scores),
                                        {made.scores.right, scores},
                                        {made.values.left, values},
                                        {made.values.right, values}}) {
    if (factor.defined()) {
      const int64_t count = std::min(columns, factor.size(2));
      row.narrow(3, column, count)
          .copy_(factor.narrow(2, 0, count).unflatten(0, {batch, share.count}).transpose(0, 1));
    }
    column += columns;
  }
  const auto of_pairs = gathered(row, pairs, bytes)
                            .transpose(0, 1)
                            .flatten(0, 1);  // [B pairs, d, columns]
  const auto factor = [&](int64_t first, int64_t columns) {
    return columns > 0 ? of_pairs.narrow(2, first, columns).contiguous() : at::Tensor();
  };
  made.scores = {factor(0, scores), factor(scores, scores), {}};
  made.values = {factor(2 * scores, values), factor(2 * scores + values, values), {}};
  return made;
}

}  // namespace drrl

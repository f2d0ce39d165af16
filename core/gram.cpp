#include "core/gram.h"

#include <cmath>

#include "core/rows.h"

namespace drrl {
namespace {

constexpr double kEvenShare = 0.1;  // of attention_mass

at::Tensor at_least_float(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x;
}

// x [B, H, L, d] -> [B, G, blocks, d, d]: X^T X of each of `blocks` blocks of `rows` tokens from token `begin` on, summed over a group's heads.
// weights [B, G, blocks, rows] (one head a group), if any, weigh the rows. One head of each group at a time, so that no more of x is copied; of half
// precision on CUDA all at once, in products that add in float.
at::Tensor block_grams(const at::Tensor& x, int64_t groups, int64_t begin, int64_t blocks, int64_t rows, const at::Tensor& weights = {}) {
  const int64_t d = x.size(3);
  const auto runs = token_runs(x, groups, begin, blocks, rows, rows);  // [B, G, blocks, g, rows, d]
  at::Tensor sum;
  if (x.is_cuda() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf)) {
    auto stacked = runs.reshape({-1, runs.size(3) * rows, d});
    if (weights.defined()) {
      stacked = stacked * weights.reshape({stacked.size(0), -1, 1}).sqrt().to(x.scalar_type());
    }
    return at::bmm(stacked.transpose(1, 2), stacked, at::kFloat).view({x.size(0), groups, blocks, d, d}).to(at::kDouble);
  }
  for (int64_t head = 0; head < runs.size(3); ++head) {
    auto stacked = at_least_float(runs.select(3, head).reshape({-1, rows, d}));
    if (weights.defined()) {
      stacked = stacked * weights.reshape({-1, rows, 1}).sqrt();
    }
    const auto transposed = stacked.transpose(1, 2);
    sum = sum.defined() ? sum.baddbmm_(transposed, stacked) : at::bmm(transposed, stacked);
  }
  return sum.view({x.size(0), groups, blocks, d, d}).to(at::kDouble);
}

// attention_mass of `blocks` blocks of `rows` tokens from token `begin` on: [B, G, blocks, rows].
at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, int64_t begin, int64_t blocks, int64_t rows) {
  at::NoGradGuard no_grad;
  const auto blocks_of = [&](const at::Tensor& x) { return token_runs(x, k.size(1), begin, blocks, rows, rows); };  // [B, G, blocks, g, rows, d]
  return drrl::attention_mass(at_least_float(blocks_of(q)).mean(4), blocks_of(k).squeeze(3));
}

// Sums block Grams into the Gram of each pair's left node, in the order of the tree's pairs.
at::Tensor sum_up_tree(at::Tensor nodes, const BlockTree& tree) {
  std::vector<at::Tensor> pairs;
  int64_t level = 0;
  for (const PairRun& run : tree.runs()) {
    while (level < run.level) {  // [.., n, d, d] -> [.., n / 2, d, d]; an odd last node is never a left node higher up
      const int64_t n = nodes.size(2) / 2;
      nodes = nodes.narrow(2, 0, 2 * n).unflatten(2, {n, 2}).sum(3);
      ++level;
    }
    const int64_t first = 2 * (run.key_begin - tree.sinks()) / run.stride;  // left nodes are the even ones
    pairs.push_back(nodes.slice(2, first, first + 2 * run.count - 1, 2));
  }
  return at::cat(pairs, 2);
}

}  // namespace

at::Tensor attention_mass(const at::Tensor& mean_queries, const at::Tensor& keys) {
  at::NoGradGuard no_grad;
  const int64_t rows = keys.size(-2), d = keys.size(-1);
  const auto scores = at::matmul(at_least_float(mean_queries), at_least_float(keys).transpose(-2, -1)) / std::sqrt(static_cast<double>(d));
  return at::softmax(scores, -1).mean(-2) * ((1 - kEvenShare) * static_cast<double>(rows)) + kEvenShare;
}

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const BlockTree& tree) {
  return attention_mass(q, k, tree.sinks(), tree.num_blocks() - 1, tree.geometry().near_block);
}

PairGrams pair_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockTree& tree, const at::Tensor& key_weights) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes(), "pair_grams: q ", q.sizes(), ", k ", k.sizes(), ", v ",
              v.sizes(), ", expected q [B, H, L, d] and k, v [B, G, L, d]");
  TORCH_CHECK(q.size(2) == tree.sequence_length() && k.size(2) == tree.sequence_length(), "pair_grams: q ", q.sizes(), ", k ",
              k.sizes(), " for a tree of ", tree.sequence_length(), " tokens");
  TORCH_CHECK(tree.num_pairs() > 0, "pair_grams: a sequence of ", tree.sequence_length(), " tokens has no far pairs");
  at::NoGradGuard no_grad;
  const int64_t groups = k.size(1);
  // The last block is never on the left of a pair, so every block used here is complete.
  const int64_t blocks = tree.num_blocks() - 1;
  const int64_t rows = tree.geometry().near_block;
  TORCH_CHECK(!key_weights.defined() || key_weights.sizes() == at::IntArrayRef({k.size(0), groups, blocks, rows}), "pair_grams: weights ",
              key_weights.sizes(), ", expected [", k.size(0), ", ", groups, ", ", blocks, ", ", rows, "]");
  const auto of_pairs = [&](const at::Tensor& x, const at::Tensor& weights) {
    return sum_up_tree(block_grams(x, groups, tree.sinks(), blocks, rows, weights), tree);
  };
  return {of_pairs(q, {}), of_pairs(k, key_weights), of_pairs(v, key_weights)};
}

PairGrams block_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t begin, int64_t blocks, int64_t rows) {
  at::NoGradGuard no_grad;
  const auto weights = attention_mass(q, k, begin, blocks, rows);
  const auto of = [&](const at::Tensor& x, const at::Tensor& w) { return block_grams(x, k.size(1), begin, blocks, rows, w); };
  return {of(q, {}), of(k, weights), of(v, weights)};
}

at::Tensor token_gram(const at::Tensor& x, int64_t groups, int64_t rows, const at::Tensor& weights) {
  TORCH_CHECK(x.dim() == 4 && groups > 0 && x.size(1) % groups == 0 && rows > 0 && x.size(2) % rows == 0, "token_gram: x ", x.sizes(), " for ",
              groups, " groups and runs of ", rows, " tokens");
  at::NoGradGuard no_grad;
  return block_grams(x, groups, 0, x.size(2) / rows, rows, weights).sum(2);
}

at::Tensor output_gram(const at::Tensor& w_o, int64_t groups, int64_t head_dim) {
  TORCH_CHECK(w_o.dim() == 2 && groups > 0 && head_dim > 0 && w_o.size(1) % (groups * head_dim) == 0, "output_gram: w_o ",
              w_o.sizes(), " for ", groups, " groups of head dim ", head_dim);
  at::NoGradGuard no_grad;
  // [hidden, G, g, d] -> [G, g hidden, d]
  const auto w = w_o.detach().to(at::kFloat).unflatten(1, {groups, -1, head_dim}).permute({1, 2, 0, 3}).flatten(1, 2);
  return at::bmm(w.transpose(1, 2), w).to(at::kDouble);
}

}  // namespace drrl

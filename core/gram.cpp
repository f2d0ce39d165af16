#include "core/gram.h"

#include "core/rows.h"

namespace drrl {
namespace {

// x [B, H, L, d] -> [B, G, blocks, d, d]: X^T X of each of `blocks` blocks of `rows` tokens from token `begin` on, summed over a group's heads.
at::Tensor block_grams(const at::Tensor& x, int64_t groups, int64_t begin, int64_t blocks, int64_t rows) {
  const int64_t d = x.size(3);
  const int64_t heads = x.size(1) / groups;
  auto stacked = token_runs(x, groups, begin, blocks, rows, rows).reshape({-1, heads * rows, d});
  if (stacked.scalar_type() == at::kBFloat16 || stacked.scalar_type() == at::kHalf) {
    stacked = stacked.to(at::kFloat);
  }
  return at::bmm(stacked.transpose(1, 2), stacked).view({x.size(0), groups, blocks, d, d}).to(at::kDouble);
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

PairGrams pair_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const BlockTree& tree) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes(), "pair_grams: q ", q.sizes(), ", k ", k.sizes(), ", v ",
              v.sizes(), ", expected q [B, H, L, d] and k, v [B, G, L, d]");
  TORCH_CHECK(q.size(2) == tree.sequence_length() && k.size(2) == tree.sequence_length(), "pair_grams: q ", q.sizes(), ", k ",
              k.sizes(), " for a tree of ", tree.sequence_length(), " tokens");
  TORCH_CHECK(tree.num_pairs() > 0, "pair_grams: a sequence of ", tree.sequence_length(), " tokens has no far pairs");
  at::NoGradGuard no_grad;
  const int64_t groups = k.size(1);
  // The last block is never on the left of a pair, so every block used here is complete.
  const int64_t blocks = tree.num_blocks() - 1;
  const auto of_pairs = [&](const at::Tensor& x) {
    return sum_up_tree(block_grams(x, groups, tree.sinks(), blocks, tree.geometry().near_block), tree);
  };
  return {of_pairs(q), of_pairs(k), of_pairs(v)};
}

at::Tensor token_gram(const at::Tensor& x, int64_t groups, int64_t rows) {
  TORCH_CHECK(x.dim() == 4 && groups > 0 && x.size(1) % groups == 0 && rows > 0 && x.size(2) % rows == 0, "token_gram: x ", x.sizes(), " for ",
              groups, " groups and runs of ", rows, " tokens");
  at::NoGradGuard no_grad;
  return block_grams(x, groups, 0, x.size(2) / rows, rows).sum(2);
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

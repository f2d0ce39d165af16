#include "core/linalg/gram.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include <ATen/core/grad_mode.h>

#include "core/attention/rows.h"
#include "core/cpu/tasks.h"

namespace drrl {
namespace {

constexpr double kEvenShare = 0.1;  // of attention_mass

at::Tensor at_least_float(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x;
}

// Rows [B, H, L, d] and, if defined, their weights [B, G, blocks, rows].
struct Rows {
  at::Tensor x, weights;
};

bool kernel_fits(const at::Tensor& x) {
  return x.is_cpu() && x.scalar_type() == at::kFloat && x.stride(3) == 1 &&
         x.size(3) % cpu::kWidth == 0 && cpu::kernel_available();
}

// block_grams of each input in float, where the kernel fits: of symmetric matrices, half is
// computed.
std::vector<at::Tensor> symmetric_block_grams(const std::vector<Rows>& inputs, int64_t groups,
                                              int64_t begin, int64_t blocks, int64_t rows) {
  const int64_t batch = inputs[0].x.size(0), d = inputs[0].x.size(3),
                tasks = batch * groups * blocks;
  std::vector<at::Tensor> results, weights;
  for (const Rows& input : inputs) {
    results.push_back(at::empty({batch, groups, blocks, d, d}, input.x.options()));
    weights.push_back(input.weights.defined() ? input.weights.contiguous() : input.weights);
  }
  cpu::for_each_task(
      static_cast<int64_t>(inputs.size()) * tasks, d * cpu::key_chunk_rows(),
      [&](int64_t task, float* scratch) {
        const auto which = static_cast<size_t>(task / tasks);
        const int64_t item = task % tasks, block = item % blocks, group = item / blocks % groups,
                      sequence = item / blocks / groups;
        const at::Tensor& x = inputs[which].x;
        const int64_t heads_per_group = x.size(1) / groups;
        float* gram = results[which].data_ptr<float>() + item * d * d;
        std::fill_n(gram, d * d, 0.0f);
        for (int64_t head = group * heads_per_group; head < (group + 1) * heads_per_group; ++head) {
          cpu::add_gram(rows, d,
                        x.const_data_ptr<float>() + sequence * x.stride(0) + head * x.stride(1) +
                            (begin + block * rows) * x.stride(2),
                        x.stride(2),
                        weights[which].defined()
                            ? weights[which].const_data_ptr<float>() + item * rows
                            : nullptr,
                        gram, scratch);
        }
        for (int64_t i = 1; i < d; ++i) {
          for (int64_t j = 0; j < i; ++j) {
            gram[i * d + j] = gram[j * d + i];
          }
        }
      });
  return results;
}

// x [B, H, L, d] -> [B, G, blocks, d, d]: X^T X of each of `blocks` blocks of `rows` tokens from
// token `begin` on, summed over a group's heads. weights [B, G, blocks, rows] (one head a group),
// if any, weigh the rows. One head of each group at a time, so that no more of x is copied; of half
// precision on CUDA all at once, in products that add in float.
at::Tensor block_grams(const at::Tensor& x, int64_t groups, int64_t begin, int64_t blocks,
                       int64_t rows, const at::Tensor& weights = {}) {
  const int64_t d = x.size(3);
  if (kernel_fits(x)) {
    return symmetric_block_grams({{x, weights}}, groups, begin, blocks, rows)[0].to(at::kDouble);
  }
  const auto runs = token_runs(x, groups, begin, blocks, rows, rows);  // [B, G, blocks, g, rows, d]
  at::Tensor sum;
  if (x.is_cuda() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf)) {
    auto stacked = runs.reshape({-1, runs.size(3) * rows, d});
    if (weights.defined()) {
      stacked = stacked * weights.reshape({stacked.size(0), -1, 1}).sqrt().to(x.scalar_type());
    }
    return at::bmm(stacked.transpose(1, 2), stacked, at::kFloat)
        .view({x.size(0), groups, blocks, d, d})
        .to(at::kDouble);
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
at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, int64_t begin, int64_t blocks,
                          int64_t rows) {
  at::NoGradGuard no_grad;
  const auto blocks_of = [&](const at::Tensor& x) {
    return token_runs(x, k.size(1), begin, blocks, rows, rows);
  };  // [B, G, blocks, g, rows, d]
  return drrl::attention_mass(at_least_float(blocks_of(q)).mean(4), blocks_of(k).squeeze(3));
}

// Where the lower triangle of a d x d matrix lies in it, row by row: [d (d + 1) / 2].
at::Tensor places_of_triangle(int64_t d, const at::Device& device) {
  const auto indices = at::tril_indices(d, d, 0, at::TensorOptions(at::kLong).device(device));
  return indices[0] * d + indices[1];
}

// The left node of a run's first pair, by number in its level; every second one from there on is
// the next pair's: left nodes are the even ones.
int64_t first_node(const PairRun& run, const BlockTree& tree) {
  return 2 * (run.key_begin - tree.sinks()) / run.stride;
}

// Sums block Grams into the Gram of each pair's left node, in the order of the tree's pairs.
at::Tensor sum_up_tree(at::Tensor nodes, const BlockTree& tree) {
  std::vector<at::Tensor> pairs;
  int64_t level = 0;
  for (const PairRun& run : tree.runs()) {
    while (level < run.level) {  // [.., n, d, d] -> [.., n / 2, d, d]; an odd last node is never a
                                 // left node higher up
      const int64_t n = nodes.size(2) / 2;
      nodes = nodes.narrow(2, 0, 2 * n).unflatten(2, {n, 2}).sum(3);
      ++level;
    }
    const int64_t first = first_node(run, tree);
    pairs.push_back(nodes.slice(2, first, first + 2 * run.count - 1, 2));
  }
  return at::cat(pairs, 2);
}

// The same of several inputs at once on a CPU, from Grams of blocks in float.
std::vector<at::Tensor> sum_up_tree(const std::vector<at::Tensor>& blocks, const BlockTree& tree) {
  const int64_t sequences = blocks[0].size(0) * blocks[0].size(1), nodes = blocks[0].size(2),
                size = blocks[0].size(3) * blocks[0].size(4);
  std::vector<at::Tensor> pairs;
  for (const at::Tensor& of : blocks) {
    pairs.push_back(at::empty({of.size(0), of.size(1), tree.num_pairs(), of.size(3), of.size(4)},
                              of.options().dtype(at::kDouble)));
  }
  const int64_t piece = std::gcd<int64_t>(size, 512);  // entries of all nodes that one task adds up
  const int64_t pieces = size / piece, tasks = sequences * pieces;
  cpu::for_each_task(
      static_cast<int64_t>(blocks.size()) * tasks, 2 * nodes * piece,
      [&](int64_t task, float* scratch) {
        const auto which = static_cast<size_t>(task / tasks);
        const int64_t sequence = task % tasks / pieces, first = task % pieces * piece;
        auto* sums = reinterpret_cast<double*>(scratch);  // [nodes, piece]
        const float* from = blocks[which].const_data_ptr<float>() + sequence * nodes * size + first;
        for (int64_t node = 0; node < nodes; ++node) {
          std::copy_n(from + node * size, piece, sums + node * piece);
        }
        double* to = pairs[which].data_ptr<double>() + sequence * tree.num_pairs() * size + first;
        int64_t level = 0, count = nodes;
        for (const PairRun& run : tree.runs()) {
          for (; level < run.level; ++level) {
            count /= 2;
            for (int64_t node = 0; node < count; ++node) {
              const double* left = sums + 2 * node * piece;
              std::transform(left, left + piece, left + piece, sums + node * piece, std::plus<>());
            }
          }
          for (int64_t i = 0; i < run.count; ++i) {
            std::copy_n(sums + (first_node(run, tree) + 2 * i) * piece, piece,
                        to + (run.first_pair + i) * size);
          }
        }
      });
  return pairs;
}

}  // namespace

at::Tensor lower_triangle(const at::Tensor& symmetric) {
  const int64_t d = symmetric.size(-1);
  if (!symmetric.is_cpu()) {
    return symmetric.flatten(-2).index_select(-1, places_of_triangle(d, symmetric.device()));
  }
  const auto full = symmetric.contiguous();
  std::vector<int64_t> shape = full.sizes().vec();
  shape.pop_back();
  shape.back() = d * (d + 1) / 2;
  const at::Tensor lower = at::empty(shape, full.options());
  const size_t bytes = full.element_size();
  const auto* from = static_cast<const std::byte*>(full.const_data_ptr());
  auto* to = static_cast<std::byte*>(lower.mutable_data_ptr());
  for (int64_t row = 0; row < full.numel() / std::max<int64_t>(1, d);
       ++row, from += static_cast<size_t>(d) * bytes) {
    to = std::copy_n(from, static_cast<size_t>(row % d + 1) * bytes, to);
  }
  return lower;
}

at::Tensor from_lower_triangle(const at::Tensor& lower, int64_t d) {
  std::vector<int64_t> shape = lower.sizes().vec();
  if (!lower.is_cpu()) {
    shape.back() = d * d;
    auto full = at::zeros(shape, lower.options())
                    .index_copy_(-1, places_of_triangle(d, lower.device()), lower)
                    .unflatten(-1, {d, d});
    return full + full.tril(-1).transpose(-2, -1);
  }
  shape.back() = d;
  shape.push_back(d);
  const auto triangles = lower.contiguous();
  const at::Tensor full = at::empty(shape, lower.options());
  AT_DISPATCH_FLOATING_TYPES(lower.scalar_type(), "from_lower_triangle", [&] {
    const auto* from = triangles.const_data_ptr<scalar_t>();
    for (auto *matrix = full.mutable_data_ptr<scalar_t>(), *end = matrix + full.numel();
         matrix < end; matrix += d * d) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          matrix[i * d + j] = matrix[j * d + i] = *from++;
        }
      }
    }
  });
  return full;
}

at::ScalarType travelling_type(at::ScalarType of_inputs) {
  return of_inputs == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor attention_mass(const at::Tensor& mean_queries, const at::Tensor& keys) {
  at::NoGradGuard no_grad;
  const int64_t rows = keys.size(-2), d = keys.size(-1);
  const auto scores = at::matmul(at_least_float(mean_queries),
                                 at_least_float(keys).transpose(-2, -1)) /
                      std::sqrt(static_cast<double>(d));
  return at::softmax(scores, -1).mean(-2) * ((1 - kEvenShare) * static_cast<double>(rows)) +
         kEvenShare;
}

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const BlockTree& tree) {
  return attention_mass(q, k, tree.sinks(), tree.num_blocks() - 1, tree.geometry().near_block);
}

PairGrams pair_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const BlockTree& tree, const at::Tensor& key_weights) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes(), "pair_grams: q ", q.sizes(),
              ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d] and k, v [B, G, L, d]");
  TORCH_CHECK(q.size(2) == tree.sequence_length() && k.size(2) == tree.sequence_length(),
              "pair_grams: q ", q.sizes(), ", k ", k.sizes(), " for a tree of ",
              tree.sequence_length(), " tokens");
  TORCH_CHECK(tree.num_pairs() > 0, "pair_grams: a sequence of ", tree.sequence_length(),
              " tokens has no far pairs");
  at::NoGradGuard no_grad;
  const int64_t groups = k.size(1);
  // The last block is never on the left of a pair, so every block used here is complete.
  const int64_t blocks = tree.num_blocks() - 1;
  const int64_t rows = tree.geometry().near_block;
  TORCH_CHECK(!key_weights.defined() ||
                  key_weights.sizes() == at::IntArrayRef({k.size(0), groups, blocks, rows}),
              "pair_grams: weights ", key_weights.sizes(), ", expected [", k.size(0), ", ", groups,
              ", ", blocks, ", ", rows, "]");
  if (kernel_fits(q) && kernel_fits(k) && kernel_fits(v)) {
    auto of_pairs = sum_up_tree(symmetric_block_grams({{q, {}}, {k, key_weights}, {v, key_weights}},
                                                      groups, tree.sinks(), blocks, rows),
                                tree);
    return {std::move(of_pairs[0]), std::move(of_pairs[1]), std::move(of_pairs[2])};
  }
  const auto of_pairs = [&](const at::Tensor& x, const at::Tensor& weights) {
    return sum_up_tree(block_grams(x, groups, tree.sinks(), blocks, rows, weights), tree);
  };
  return {of_pairs(q, {}), of_pairs(k, key_weights), of_pairs(v, key_weights)};
}

PairGrams block_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t begin,
                      int64_t blocks, int64_t rows) {
  at::NoGradGuard no_grad;
  const auto weights = attention_mass(q, k, begin, blocks, rows);
  const auto of = [&](const at::Tensor& x, const at::Tensor& w) {
    return block_grams(x, k.size(1), begin, blocks, rows, w);
  };
  return {of(q, {}), of(k, weights), of(v, weights)};
}

at::Tensor block_gram_triangles(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                int64_t begin, int64_t blocks, int64_t rows) {
  at::NoGradGuard no_grad;
  if (kernel_fits(q) && kernel_fits(k) && kernel_fits(v)) {
    const auto weights = attention_mass(q, k, begin, blocks, rows);
    const auto grams = symmetric_block_grams({{q, {}}, {k, weights}, {v, weights}}, k.size(1),
                                             begin, blocks, rows);
    return at::stack(
        {lower_triangle(grams[0]), lower_triangle(grams[1]), lower_triangle(grams[2])});
  }
  const PairGrams grams = block_grams(q, k, v, begin, blocks, rows);
  return lower_triangle(
      at::stack({grams.queries, grams.keys, grams.values}).to(travelling_type(q.scalar_type())));
}

at::Tensor token_gram(const at::Tensor& x, int64_t groups, int64_t rows,
                      const at::Tensor& weights) {
  TORCH_CHECK(
      x.dim() == 4 && groups > 0 && x.size(1) % groups == 0 && rows > 0 && x.size(2) % rows == 0,
      "token_gram: x ", x.sizes(), " for ", groups, " groups and runs of ", rows, " tokens");
  at::NoGradGuard no_grad;
  return block_grams(x, groups, 0, x.size(2) / rows, rows, weights).sum(2);
}

at::Tensor output_gram(const at::Tensor& w_o, int64_t groups, int64_t head_dim) {
  TORCH_CHECK(
      w_o.dim() == 2 && groups > 0 && head_dim > 0 && w_o.size(1) % (groups * head_dim) == 0,
      "output_gram: w_o ", w_o.sizes(), " for ", groups, " groups of head dim ", head_dim);
  at::NoGradGuard no_grad;
  if (const auto heads = w_o.detach().unflatten(1, {-1, head_dim}).transpose(0, 1).unsqueeze(0);
      kernel_fits(heads)) {  // [1, H, hidden, d]
    return symmetric_block_grams({{heads, {}}}, groups, 0, 1, w_o.size(0))[0]
        .view({groups, head_dim, head_dim})
        .to(at::kDouble);
  }
  // [hidden, G, g, d] -> [G, g hidden, d]
  const auto w = w_o.detach()
                     .to(at::kFloat)
                     .unflatten(1, {groups, -1, head_dim})
                     .permute({1, 2, 0, 3})
                     .flatten(1, 2);
  return at::bmm(w.transpose(1, 2), w).to(at::kDouble);
}

}  // namespace drrl

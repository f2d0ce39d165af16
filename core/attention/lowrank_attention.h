#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include "core/linalg/basis.h"
#include "core/types/block_tree.h"

namespace drrl {

/// The widths at which a far pair is attended: `qk` columns for scores, `v` for values; each
/// in 1..d, d meaning exact.
struct Ranks {
  int64_t qk;
  int64_t v;
  /// An entry (query row, key) of the pair whose weight at low rank is at least this share of the
  /// row's softmax so far (below) is exact after all, score and value; infinity: none is.
  float gate = std::numeric_limits<float>::infinity();

  bool gated(int64_t d) const {
    return gate < std::numeric_limits<float>::infinity() && (qk < d || v < d);
  }

  bool operator==(const Ranks&) const = default;
  auto operator<=>(const Ranks&) const = default;
};

/// A row's softmax so far, where a gate looks: the weights of its own block, the sinks, and of its
/// far pairs by ascending level in chunks of so many keys from the pair's first on, the entry's own
/// chunk at low rank, earlier chunks with what was exact in them. Of the row itself and older
/// tokens alone, so causal row by row.
inline constexpr int64_t kGateChunk = 256;

/// Entries that gates made exact, of all rows: row i of [B, H, L] has keys[begin[i]], ..,
/// keys[begin[i + 1] - 1], token positions, ascending.
class ExactEntries {
 public:
  ExactEntries() = default;
  ExactEntries(at::Tensor begin, at::Tensor keys)
      : begin_(std::move(begin)), keys_(std::move(keys)) {}
  /// Of places [n] int64, row x length + key, in any order on any device; sorted, and brought to
  /// the CPU, when somebody first asks which they are.
  ExactEntries(at::Tensor places, int64_t rows, int64_t length)
      : places_(std::move(places)), rows_(rows), length_(length) {}

  bool defined() const { return begin_.defined() || places_.defined(); }
  int64_t size() const {
    return places_.defined() ? places_.numel() : keys_.defined() ? keys_.numel() : 0;
  }
  const at::Tensor& begin() const;  ///< [B H L + 1] int64, on the CPU
  const at::Tensor& keys() const;   ///< int32, on the CPU
  /// How many entries of rows [row, row + rows) of [B H L] are of a key in [key, key + key_count).
  int64_t count(int64_t row, int64_t rows, int64_t key, int64_t key_count) const;

 private:
  void sort() const;

  mutable at::Tensor begin_, keys_, places_;
  int64_t rows_ = 0, length_ = 0;
};

struct RunCalls;  // lowrank_attention.cpp

/// All that one layer's low-rank attention needs besides q, k and v. Constant for autograd.
struct LowRankPlan : torch::CustomClassHolder {
  LowRankPlan(BlockTree tree_in, std::vector<Ranks> ranks_in, Basis scores_in, Basis values_in,
              at::Tensor residual_in = {})
      : tree(std::move(tree_in)),
        ranks(std::move(ranks_in)),
        scores(std::move(scores_in)),
        values(std::move(values_in)),
        residual(std::move(residual_in)) {}

  BlockTree tree;
  /// One entry per (batch, KV group, pair), in that order, pair innermost: B G pairs entries.
  std::vector<Ranks> ranks;
  /// Bases in the same order, [B G pairs, d, columns] with at least as many columns as the largest
  /// rank below d. `scores` may be undefined if every rank qk is d, `values` if every rank v is d.
  Basis scores;
  Basis values;
  /// residual_factor of each pair's score basis at its rank, [B G pairs, d, m] float32, not read
  /// where the rank is d; undefined: no correction.
  at::Tensor residual;
  /// Written by a forward pass with gates; and, outside the CPU kernel, the same for its backward
  /// pass, each matrix of scores by flat int32 indices.
  mutable ExactEntries exact;
  mutable std::vector<at::Tensor> exact_slices;
  /// Likewise: how its pairs share calls, and what those need of the bases.
  mutable std::shared_ptr<const std::vector<RunCalls>> calls;

  bool gated(int64_t d) const {
    return std::any_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.gated(d); });
  }
};

/// Near + sinks + far attention of one layer, one softmax over all three.
///
///   near   softmax-terms of q k^T / sqrt(d) over each token's own block (causal) and the sinks,
///   exact far    scores (q P_q)(k P_k)^T / sqrt(d) + || q F ||^2 at rank r, values v P_v at rank
///   r_v, expanded once per row by P_o^T
///
/// F is the pair's residual factor (basis.h): what the projected scores lack in the softmax'
/// denominator, to second order. The parts are merged by their log-sum-exp; the backward hands the
/// merged log-sum-exp and rowsum(grad * out) to each part (attention_part.h). Ranks, bases and the
/// correction by F are constants: no gradient flows through them.
///
/// q [B, H, L, d], k and v [B, G, L, d], L = plan.tree.sequence_length(); float32, float64 (CPU),
/// bfloat16. returns [B, H, L, d] of q's dtype, differentiable in q, k, v. With all ranks d it is
/// exact_attention, at its cost. Errors: c10::Error on shapes that disagree with each other or with
/// the plan, and on ranks outside 1..d.
at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<LowRankPlan>& plan);

/// The near part alone, one softmax over it: out [B, H, L, d] and its log-sum-exp [B, H, L]
/// (float32; float64 for float64) <- each token over its own block, the sinks over themselves. For
/// operators that merge it with parts of their own.
void near_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const BlockTree& tree, const at::Tensor& out, const at::Tensor& logsumexp);

/// grad_q, grad_k, grad_v <- its gradients, written, given the merged log-sum-exp and delta
/// (attention_part.h), [B, H, L] each.
void near_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const BlockTree& tree,
                             const at::Tensor& logsumexp, const at::Tensor& delta,
                             const at::Tensor& grad_q, const at::Tensor& grad_k,
                             const at::Tensor& grad_v);

}  // namespace drrl

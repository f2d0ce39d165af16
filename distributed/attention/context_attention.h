#pragma once

#include <vector>

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include "core/types/lowrank_plan.h"
#include "distributed/collectives/group.h"
#include "distributed/topology/sequence_split.h"

namespace drrl {

/// One far pair (or the sinks, as keys of every later query) at those sequences and KV groups that
/// share their ranks there: one batched attention.
struct ContextPart {
  int64_t pair;                    ///< of the tree; -1: the sinks
  IndexRange keys, queries;        ///< tokens
  Ranks ranks;                     ///< of the sinks: head_dim
  std::vector<int64_t> sequences;  ///< n indices b G + g, ascending

  // Bases of the pair at its ranks, [n, d, r], in the dtype of q. Undefined: the rank is d and
  // nothing is projected, or no row here needs them.
  at::Tensor p_k = {}, p_v = {};  ///< where this process holds some of the keys
  at::Tensor p_q = {}, p_o = {},
             residual = {};  ///< where it holds some of the queries; residual [n, d, m]
};

/// The parts of a sequence that is split over processes, without bases, the same on all of them.
/// ranks: one entry per (batch, KV group, pair), pair innermost, as in LowRankPlan.
std::vector<ContextPart> context_parts(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                       int64_t head_dim);

/// All that one layer's attention needs besides q, k and v when the sequence is split over `group`.
/// Constant for autograd.
struct ContextPlan : torch::CustomClassHolder {
  ContextPlan(SequenceSplit split_in, Group group_in, std::vector<ContextPart> parts_in)
      : split(std::move(split_in)), group(std::move(group_in)), parts(std::move(parts_in)) {}

  SequenceSplit split;  ///< into group.size() parts
  Group group;
  std::vector<ContextPart> parts;

  /// Elements of keys and values that would leave this process in a forward pass at rank d. The
  /// backward pass sends as many back.
  int64_t exact_elements(int64_t head_dim) const;
};

/// lowrank_attention of a sequence that is split over processes: the same near part, sinks and far
/// pairs, merged in the same way.
///
/// Keys and values of a pair are projected by the processes that hold them and travel at their
/// ranks, to the processes that hold queries of the pair and to no other, in one message for the
/// whole layer, while the near part is computed. With all ranks d this is exact attention. Between
/// two chunks of a split into a power of two there is exactly one pair, so the bytes are (r + r_v)
/// / 2 d of what exact ring attention passes around (arXiv 2310.01889); other splits cut nodes of
/// the tree, which brings them to 0.8 to 1.3 times that. The backward pass sends the gradients of
/// the projected keys and values back and projects them up where the keys are.
///
/// q [B, H, rows, d], k and v [B, G, rows, d] of this process's rows,
/// split.positions(group.rank()); returns [B, H, rows, d], differentiable in q, k, v. Collective
/// over plan->group, and so is its backward pass. Errors: c10::Error on shapes that disagree with
/// the plan; those of Group.
at::Tensor context_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<ContextPlan>& plan);

}  // namespace drrl

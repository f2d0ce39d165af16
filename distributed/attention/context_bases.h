#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/far_bases.h"
#include "core/linalg/gram.h"
#include "distributed/attention/context_attention.h"

namespace drrl {

/// Bases of far pairs when the sequence is split over processes. Each pair's are made once, by one
/// process that holds some of its keys, from the sum of all holders' Grams, and handed to those
/// that project by them: what ranks share is equal bit for bit, and each pair is worked on once.

/// By pair, the process that makes its bases, among the holders of its keys the one with the fewest
/// pairs so far; -1 if all ranks of the pair are d. Process 0, which holds its keys, always makes
/// those of pair 0: updates may start from there.
std::vector<int64_t> basis_makers(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                  int64_t head_dim);

/// Pairs made by `process`, ascending.
std::vector<int64_t> pairs_made_by(const std::vector<int64_t>& makers, int64_t process);

/// far_grams of the pairs that this process makes, [B, G, made, d, d]; q, k, v of its rows. What
/// travels of a Gram, which is symmetric, is its lower triangle, as travelling_type says. bytes +=
/// what left this process. Collective.
PairGrams context_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const SequenceSplit& split, const Group& group,
                        const std::vector<int64_t>& makers, int64_t& bytes);

/// Each rank <- the largest that a process has there, on all of them: makers of bases may have left
/// pairs exact. bytes += what left this process. Collective.
void agree_on_ranks(std::vector<Ranks>& ranks, const Group& group, int64_t& bytes);

/// first_pair_bases, [B G, 2, d, d] on all processes: process 0, whose `made` begin with pair 0,
/// deals its Grams out, and each process decomposes its share of the 2 B G problems. `made` need
/// have groups and batch only elsewhere. solves += those of this process, bytes as above.
/// Collective.
at::Tensor dealt_first_pair_bases(const PairGrams& made, const at::Tensor& w_o, const Group& group,
                                  int64_t& solves, int64_t& bytes);

/// Puts bases and residual factors into all processes' parts where they are needed: `made` and
/// `residual` [B G made, d, ..] are of the pairs that this process made. In the dtype and on the
/// device of `options`. bytes as above. Collective.
void hand_out_bases(ContextPlan& plan, const std::vector<int64_t>& makers, const FarBases& made,
                    const at::Tensor& residual, int64_t head_dim, const at::TensorOptions& options,
                    int64_t& bytes);

}  // namespace drrl

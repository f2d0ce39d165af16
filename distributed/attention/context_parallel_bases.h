#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include "core/attention/far_bases.h"
#include "core/types/attention_call.h"
#include "distributed/attention/basis_provider.h"
#include "distributed/attention/context_attention.h"

namespace drrl {

/// Bases of far pairs when the sequence is split over processes. Each pair's are made once, by one
/// process that holds some of its keys, from the sum of all holders' Grams, and handed to those
/// that project by them: what processes share is equal bit for bit, and each pair is worked on
/// once.

/// By pair, the process that makes its bases, among the holders of its keys the one with the fewest
/// pairs so far; -1 if all ranks of the pair are d. Process 0, which holds its keys, always makes
/// those of pair 0: updates may start from there.
std::vector<int64_t> basis_owners(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                  int64_t head_dim);

/// Pairs owned by `process`, ascending.
std::vector<int64_t> pairs_owned_by(const std::vector<int64_t>& owners, int64_t process);

/// What one layer of a split sequence is attended by.
struct PlannedContext {
  c10::intrusive_ptr<ContextPlan> plan;  ///< with the bases that this process needs
  std::vector<Ranks> ranks;              ///< those decided, or d where no low rank serves
  FarBases
      bases;  ///< those of the pairs that this process owns, and their cost; exact_pairs of all
};

/// The plan of a call whose pairs shall have these ranks (B G pairs): q, k and v of the call are
/// this process's rows. Sums the Grams of each pair on its owner, makes the bases there with
/// `provider`, and hands them out. What travels of a Gram, which is symmetric, is its lower
/// triangle, in the type that travelling_type says. With all ranks d nothing travels here.
/// Collective over `group`, the processes that the sequence is split over, and over the provider's.
PlannedContext make_context_plan(const AttentionCall& call, const SequenceSplit& split,
                                 const Group& group, BasisProvider& provider,
                                 std::vector<Ranks> ranks);

}  // namespace drrl

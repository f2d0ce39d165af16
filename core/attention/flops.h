#pragma once

#include <cstdint>
#include <vector>

#include "core/types/lowrank_plan.h"

namespace drrl {

/// Floating-point operations (multiply and add counted as two) of one layer's attention, by what
/// they are spent on. Element-wise work (softmax, merging) is not counted, neither here nor for
/// exact attention.
struct AttentionFlops {
  double near = 0;         ///< exact blocks, causal half only
  double sinks = 0;        ///< everybody against the sinks, and the sinks among themselves
  double far = 0;          ///< scores of far pairs at rank r, values at rank r_v
  double projections = 0;  ///< into and out of the bases
  double grams = 0;        ///< block Grams and their sums
  double bases = 0;        ///< Cholesky, products, symmetric eigenproblem

  double total() const { return near + sinks + far + projections + grams + bases; }
  AttentionFlops& operator+=(const AttentionFlops& other);
};

/// Operations of exact causal attention: 4 d per (query, visible key) and head; times 3.5 with the
/// flash backward (five products to the forward's two, arXiv 2205.14135).
double exact_attention_flops(int64_t batch, int64_t heads, int64_t length, int64_t head_dim,
                             bool with_backward);

/// The two products of a far pair that a rank makes cheaper.
enum class FarKind { kScores = 0, kValues = 1 };

/// Operations of one kind of one pair of a run at `rank`: its product, and if rank < head_dim the
/// projections into and out of its basis and the residual correction. batch 1, one KV group of
/// `heads_per_group` query heads. kept: share of its tiles that are not dropped.
AttentionFlops far_pair_flops(const PairRun& run, FarKind kind, int64_t rank,
                              int64_t heads_per_group, int64_t head_dim, bool with_backward,
                              double kept = 1);

/// Operations of one entry of one query head that a gate makes exact, beside the low rank it had
/// first.
double exact_entry_flops(int64_t head_dim, bool with_backward);

/// Operations that no rank changes: exact blocks, sinks, block Grams.
AttentionFlops exact_part_flops(const BlockTree& tree, int64_t batch, int64_t heads, int64_t groups,
                                int64_t head_dim, bool with_backward);

/// Operations of lowrank_attention as this library executes it, Grams included. basis_flops: those
/// of making the bases. served: by the forward pass.
AttentionFlops lowrank_attention_flops(const LowRankPlan& plan, int64_t batch, int64_t heads,
                                       int64_t groups, int64_t head_dim, double basis_flops,
                                       bool with_backward, const FarServed& served = {});

/// Operations of one basis solution at dimension d: Cholesky d^3/3, five products 2 d^3, symmetric
/// eigenproblem with vectors 9 d^3 (Golub and Van Loan, Matrix Computations, 4th ed., section 8.3).
double basis_solve_flops(int64_t d);

/// Operations of update_basis: 2 steps + 1 half rounds of a product with the Gram 2 d^2 r, one of
/// size r 2 d r^2, Cholesky r^3/3 and its two triangular solves 2 d r^2.
double basis_update_flops(int64_t d, int64_t rank, int64_t steps);

/// Operations of stale_loss: three products 2 d^3, Cholesky d^3/3, a triangular solve d^3.
double stale_loss_flops(int64_t d);

/// Operations of output_gram for a w_o [hidden, heads d]: 2 d for each of its elements.
double output_gram_flops(int64_t hidden, int64_t heads, int64_t d);

/// Operations of residual_factor: C applied twice to m columns (8 d r m + 2 d^2 m each), a product,
/// a Cholesky factorization and a triangular solve.
double residual_factor_flops(int64_t d, int64_t rank);

}  // namespace drrl

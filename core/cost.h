#pragma once

#include <cstdint>
#include <vector>

#include "core/lowrank_attention.h"

namespace drrl {

/// Floating-point operations (multiply and add counted as two) of one layer's attention, by what they are spent on. Element-wise work
/// (softmax, merging) is not counted, neither here nor for exact attention.
struct AttentionFlops {
  double near = 0;         ///< exact blocks, causal half only
  double sinks = 0;        ///< everybody against the sinks, and the sinks among themselves
  double far = 0;          ///< scores of far pairs at rank r, values at rank r_v
  double projections = 0;  ///< into and out of the bases
  double grams = 0;        ///< block Grams and their sums
  double tests = 0;        ///< tail_loss
  double solves = 0;       ///< bases: Cholesky, products, symmetric eigenproblem

  double total() const { return near + sinks + far + projections + grams + tests + solves; }
  AttentionFlops& operator+=(const AttentionFlops& other);
};

/// Operations of exact causal attention: 4 d per (query, visible key) and head; times 3.5 with the flash backward (five products to the
/// forward's two, arXiv 2205.14135).
double exact_attention_flops(int64_t batch, int64_t heads, int64_t length, int64_t head_dim, bool with_backward);

/// Operations of lowrank_attention as this library executes it, Grams and `solves` basis solutions ([d, d] problems) included.
AttentionFlops lowrank_attention_flops(const LowRankPlan& plan, int64_t batch, int64_t heads, int64_t groups, int64_t head_dim,
                                       int64_t solves, bool with_backward);

/// Operations of one basis solution at dimension d: Cholesky d^3/3, five products 2 d^3, symmetric eigenproblem with vectors 9 d^3
/// (Golub and Van Loan, Matrix Computations, 4th ed., section 8.3).
double basis_solve_flops(int64_t d);

}  // namespace drrl

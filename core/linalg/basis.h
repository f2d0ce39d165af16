#pragma once

#include <vector>

#include <ATen/ATen.h>

#include "core/types/basis.h"
#include "core/types/basis_settings.h"

namespace drrl {

/// Solves for the best bases in Frobenius norm, in closed form (KQ-SVD, arXiv 2512.05916;
/// Eckart-Young on X Y^T).
///
/// With G_y = C C^T (Cholesky) the matrix C^T G_x C = V Sigma^2 V^T holds the squared singular
/// values of X Y^T, and
///   left = C V Sigma^-1/2,   right = G_x C V Sigma^-3/2.
/// One Cholesky factorization and one symmetric eigenproblem a matrix, in float64; no Gram is
/// inverted. Directions with sigma_i < 1e-7 sigma_0 are beyond the accuracy of the Grams. If X has
/// too few rows to choose them, they are chosen for Y alone (G_x is lifted by 1e-6 of its mean
/// diagonal); what Y has not either are columns of zeros, never amplified.
///
/// gram_x, gram_y [N, d, d] symmetric positive semidefinite, float64. Large batches are dealt out
/// over the CPU's threads with one thread a matrix; on CUDA cuSOLVER's batched solver is used
/// (core/cuda). Errors: Error(kNumerics) naming the matrix if a Gram is not finite or a
/// factorization does not converge.
Basis solve_basis(const at::Tensor& gram_x, const at::Tensor& gram_y);

/// The best bases of `right`'s rank that `steps` rounds of alternating least squares reach from
/// `right`, without decomposing anything: subspace iteration, one round of which is
///   left  = G_y right (right^T G_y right)^-1,   the best left factor for that right one,
///                                               whatever X is,
///   right = G_x left (left^T G_x left)^-1,      and the other way round,
/// followed by one more left half. The error falls by (sigma_{r+1} / sigma_r)^2 a round, so from a
/// basis of older tokens, or of other text, one or two come close to `solve_basis` (the
/// "incremental updates" of arXiv 2512.15973, section on online updates). Products and a Cholesky
/// factorization of size r only. The columns span the right spaces but are not nested: the rank of
/// the result is fixed.
///
/// right [N, d, r]; gram_x, gram_y as for solve_basis, of any rank, zero included. Returns bases
/// [N, d, r] without singular values. Empty columns of `right` are filled with random signs, so
/// that a start of low rank finds the others in the Grams. A Gram that rounding has made indefinite
/// is lifted by as much of its mean diagonal as it needs (basis_settings.h). steps >= 0; 0 gives
/// only the left factor. Errors: Error(kNumerics) naming the matrix if a Gram is not finite or far
/// from positive semidefinite. On CUDA, where d is a multiple of 4 and r of 8, the call does not
/// wait for the device: bases of bad Grams are NaN, and a later call throws.
Basis update_basis(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                   int64_t steps);

/// update_basis of items whose ranks differ, in one call. Item i of N starts from the first
/// ranks[i] columns of right[i S / N] and takes gram_x[i] and gram_y[i M / N]: neighbours share
/// what is theirs in common. A rank of d makes no basis.
///
/// right [S, d, d] float32, gram_x [N, d, d], gram_y [M, d, d], S and M divisors of N; N ranks from
/// 1 to d, some below d. Returns bases [N, d, largest rank below d]; columns beyond an item's rank
/// are not defined. Errors: as update_basis.
Basis update_bases(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y,
                   const std::vector<int64_t>& ranks, int64_t steps);

/// The exact loss of a basis on *any* data with the given Grams, without decomposition and for
/// every rank at once:
///   tail(r) = || X Y^T - X P_x P_y^T Y^T ||_F^2 = tr(G_x M_r G_y M_r^T),
///   M_r = I - left[:, :r] right[:, :r]^T.
/// Also the loss of a stale basis on tokens that came after it (the perturbation of the paper's
/// section on online updates, arXiv 2512.15973, measured instead of bounded).
///
/// returns [N, d + 1] float64; column r is the loss at rank r, column 0 is `total` = tr(G_x G_y) =
/// ||X Y^T||_F^2.
at::Tensor tail_loss(const Basis& basis, const at::Tensor& gram_x, const at::Tensor& gram_y);

/// What `right` would lose at every rank on data with these Grams if only its partner were made
/// anew: min over left of
/// || X Y^T - X left right[:, :r]^T Y^T ||_F^2 for every r at once (Gram-Schmidt: one Cholesky
/// factorization, no decomposition). `update_basis` from there never loses more, so this is the
/// certificate of a basis before any work is put into it.
///
/// right [N, d, d]; Grams as for solve_basis. Returns [N, d + 1] float64, column 0 is ||X
/// Y^T||_F^2.
at::Tensor stale_loss(const at::Tensor& right, const at::Tensor& gram_x, const at::Tensor& gram_y);

/// Columns of residual_factor: enough for most of what a projection drops, few enough to cost
/// little.
inline constexpr int64_t kResidualColumns = 16;

/// What a projection drops from the scores of a set of keys, as a quadratic form in the query: with
/// e_j = (q . k_j - (q P_q) . (k_j P_k)) / sqrt(d),
///   q^T C q = 1/2 mean_j e_j^2,   C = M (G_k / n) M^T / (2 d),   M = I - left right^T.
/// To second order in e (its second cumulant; its mean is small, and it hardly depends on the
/// projected scores) log sum_j exp(s_j) exceeds the log-sum-exp of the projected scores by that
/// much, for each query by its own. Without it low rank takes weight from far keys.
///
/// Returns F [N, d, m], m = min(kResidualColumns, d), float32, with F F^T the Nystrom approximation
/// of C on the range of C times fixed random columns: below C, close to its leading part, products
/// and a Cholesky factorization of size m only (Halko et al., arXiv 0909.4061, section 5.5). basis
/// [N, d, r]; gram [N, d, d] float64 of `keys` [N] keys each (any type of number). ranks [N]: of
/// each item's basis only the first so many columns; of an item whose rank is beyond r no factor is
/// made, what stands there is not defined. Empty: all r of all.
at::Tensor residual_factor(const Basis& basis, const at::Tensor& gram, const at::Tensor& keys,
                           const std::vector<int64_t>& ranks = {});

/// || q F ||^2 of each row, at most kLargestCorrection: rows [N, .., d], factor [N, d, m] -> [N,
/// ..], at least float32.
at::Tensor residual_correction(const at::Tensor& rows, const at::Tensor& factor);

}  // namespace drrl

#pragma once

#include <ATen/ATen.h>

namespace drrl {

/// Bases of the best low-rank approximations of products X Y^T, known only through their Grams.
///
/// X Y^T is approximated by (X left[:, :r]) (Y right[:, :r])^T for any r: the columns are nested,
/// so changing the rank is slicing.
struct Basis {
  at::Tensor left;             ///< [N, d, d] float32; P_q for scores, P_v for values
  at::Tensor right;            ///< [N, d, d] float32; P_k for scores, P_o for values
  at::Tensor singular_values;  ///< [N, d] float64, descending: those of X Y^T

  bool defined() const { return left.defined(); }
};

}  // namespace drrl

#pragma once

#include <cstdint>

#include "core/types/basis_settings.h"

namespace drrl::cpu {

/// Whether basis_kernel.cpp can work on matrices of these sizes: `kernel_available()` and multiples
/// of 8.
bool basis_kernel_fits(int64_t d, int64_t rank);

/// Doubles of scratch for one item.
int64_t update_scratch_size(int64_t d, int64_t rank);

/// update_basis (core/linalg/basis.h) for one item, in double. start [d, rank] in rows of
/// start_columns numbers; gram_x, gram_y [d, d]; writes left and right, [d, rank] in rows of
/// `columns` numbers. False if a factorization failed for every jitter, as it does if a Gram is not
/// finite.
bool update_item(int64_t d, int64_t rank, int64_t steps, const float* start, int64_t start_columns,
                 const double* gram_x, const double* gram_y, const UpdateSettings& settings,
                 float* left, float* right, int64_t columns, double* scratch);

/// residual_factor for one item, in double: left, right [d, rank] in rows of basis_columns numbers;
/// gram [d, d] times scale is G_k / (2 n d); start [d, columns] the fixed random columns; writes F
/// [d, columns], zeros where nothing is dropped.
int64_t residual_scratch_size(int64_t d, int64_t rank, int64_t columns);
void residual_item(int64_t d, int64_t rank, int64_t columns, const float* left, const float* right,
                   int64_t basis_columns, const double* gram, double scale, const double* start,
                   float* to, double* scratch);

}  // namespace drrl::cpu

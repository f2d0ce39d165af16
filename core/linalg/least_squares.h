#pragma once

#include <vector>

namespace drrl {

/// x >= 0 of least ||A x - b||, row by row of A, by coordinate descent on the normal equations: for
/// a few dozen unknowns. 0 for a column of zeros.
std::vector<double> nonnegative_least_squares(const std::vector<std::vector<double>>& rows,
                                              const std::vector<double>& b);

}  // namespace drrl

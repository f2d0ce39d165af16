#include "core/linalg/least_squares.h"

#include <algorithm>
#include <cmath>

namespace drrl {

std::vector<double> nonnegative_least_squares(const std::vector<std::vector<double>>& rows,
                                              const std::vector<double>& b) {
  const size_t n = rows.at(0).size();
  std::vector<double> scale(n, 0.0), x(n, 0.0), rest(n, 0.0), gram(n * n, 0.0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < n; ++i) {
      scale[i] += row[i] * row[i];
    }
  }
  for (double& s : scale) {
    s = s > 0 ? 1 / std::sqrt(s) : 0;
  }
  for (size_t m = 0; m < rows.size(); ++m) {
    for (size_t i = 0; i < n; ++i) {
      rest[i] += rows[m][i] * scale[i] * b[m];
      for (size_t j = 0; j < n; ++j) {
        gram[i * n + j] += rows[m][i] * scale[i] * rows[m][j] * scale[j];
      }
    }
  }
  constexpr int kSweeps = 100000;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double moved = 0;
    for (size_t i = 0; i < n; ++i) {
      const double step = gram[i * n + i] > 0 ? std::max(rest[i] / gram[i * n + i], -x[i]) : 0;
      x[i] += step;
      moved = std::max(moved, std::abs(step));
      for (size_t j = 0; step != 0 && j < n; ++j) {
        rest[j] -= step * gram[j * n + i];
      }
    }
    if (moved < 1e-12) {
      break;
    }
  }
  for (size_t i = 0; i < n; ++i) {
    x[i] *= scale[i];
  }
  return x;
}

}  // namespace drrl

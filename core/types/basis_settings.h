#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DRRL_ALSO_ON_DEVICE __host__ __device__
#else
#define DRRL_ALSO_ON_DEVICE
#endif

/// What the makers of bases have in common: PyTorch operators (basis.cpp), the CPU's kernel and the
/// GPU's.
namespace drrl {

/// Of update_basis. Lifts, relative to a Gram's mean diagonal, stand above the rounding of its
/// float32 sums. Where a Gram is not definite under the first one, a hundred times more is tried,
/// up to the largest. The jitter is that of factorizations, relative to a diagonal of ones.
struct UpdateSettings {
  double first_lift = 1e-6, largest_lift = 1, jitter = 1e-12;
};

/// A partner explains no more than its lifted Gram holds. One that claims more, by this factor, is
/// due to a Gram that is not definite.
inline constexpr double kMostExplained = 1.001;

/// Entry i of a fixed sequence of random signs, the same on every device and process.
DRRL_ALSO_ON_DEVICE inline double random_sign(int64_t i) {
  return (static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15ULL) >> 63 != 0 ? 1 : -1;
}

/// The largest correction by a residual factor: the logarithm of nine million keys. Beyond that of
/// the number of keys, the largest error alone decides their sum, and not the mean square: there
/// the second-order expansion ends.
inline constexpr float kLargestCorrection = 16;

}  // namespace drrl

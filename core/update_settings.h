#pragma once

namespace drrl {

/// Of update_basis, relative to a matrix' mean diagonal: what Grams are lifted by, and the jitters of factorizations, each a hundred times the one before.
struct UpdateSettings {
  double rounding, first_jitter, largest_jitter;
};

}  // namespace drrl

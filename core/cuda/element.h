#pragma once

#include <optional>

#include <ATen/ATen.h>

#include "core/cuda/rows_kernel.h"

namespace drrl {

/// The kernels' name for a dtype; nothing for one that they do not take.
inline std::optional<cuda::Element> element_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return cuda::Element::kFloat;
    case at::kHalf: return cuda::Element::kHalf;
    case at::kBFloat16: return cuda::Element::kBFloat16;
    default: return std::nullopt;
  }
}

}  // namespace drrl

#pragma once

#include <cstdlib>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace drrl {

inline double relative(const at::Tensor& a, const at::Tensor& b) {
  const auto x = a.to(at::kCPU, at::kDouble), y = b.to(at::kCPU, at::kDouble);
  return ((x - y).norm() / (y.norm() + 1e-300)).item<double>();
}

#define DRRL_NEEDS_GPU()                               \
  if (!at::hasCUDA() || at::getNumGPUs() == 0) {       \
    if (std::getenv("DRRL_REQUIRE_GPU") != nullptr) {  \
      FAIL() << "this process sees no usable GPU";     \
    }                                                  \
    GTEST_SKIP() << "this process sees no usable GPU"; \
  }

}  // namespace drrl

#pragma once

#include <ATen/ATen.h>

/// What operators without autograd return, on every device.
namespace drrl::raw {

struct NormResult {
  at::Tensor y, rstd;
};

struct NormGradients {
  at::Tensor x, weight;
};

struct SwigluGradients {
  at::Tensor gate_up;  ///< [N, 2 n]
  at::Tensor y;        ///< the forward's result once more, so that nobody needs to keep it
};

}  // namespace drrl::raw

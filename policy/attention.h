#pragma once

#include <ATen/ATen.h>

#include <memory>

namespace drrl {

/// What one call of `AttentionController::attend` decided: the ranks and, for low-rank plans, the bases it used. Opaque to the
/// model, which only keeps it between a forward and its recomputation under activation checkpointing.
struct LayerPlan;

/// The seam between a model and the rank policy: a model computes queries, keys and values and asks the controller for
/// attention; which ranks are used, and whether any are, is the controller's business.
class AttentionController {
 public:
  virtual ~AttentionController() = default;

  /// Causal self attention of one layer, softmax(q k^T / sqrt(d)) v or its near + sinks + far approximation.
  ///
  /// layer   index of the layer, 0-based
  /// q       [B, H, L, d], position encoding applied; H is the number of query heads on this tensor-parallel rank
  /// k, v    [B, G, L, d]; G KV groups, query head h reads group h / (H / G)
  /// w_o     [hidden, H d], the output projection that will follow (it weights the value error); not differentiated here
  /// plan    null: decide, and keep the decision here. Otherwise replay exactly that decision.
  ///
  /// returns [B, H, L, d], differentiable in q, k and v. The dtype is that of q. Strides are unspecified.
  virtual at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                            std::shared_ptr<LayerPlan>& plan) = 0;
};

/// Exact attention in every layer, nothing decided and nothing counted.
std::shared_ptr<AttentionController> make_full_attention();

}  // namespace drrl

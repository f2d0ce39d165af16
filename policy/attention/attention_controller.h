#pragma once

#include <memory>

#include <ATen/ATen.h>

#include "distributed/collectives/group.h"

namespace drrl {

/// What one call of `AttentionController::attend` decided: the ranks and, for low-rank plans, the
/// bases it used. Opaque to the model, which only keeps it between a forward and its recomputation
/// under activation checkpointing.
struct LayerPlan;

class KvCache;

/// The seam between a model and the rank policy: a model computes queries, keys and values and asks
/// the controller for attention; which ranks are used, and whether any are, is the controller's
/// business.
class AttentionController {
 public:
  virtual ~AttentionController() = default;

  /// Context parallelism: before a pass over sequences of `length` tokens, the positions that this
  /// process computes, ascending [rows] int64; the calls of `attend` that follow have those rows of
  /// q, k and v only. Undefined, the default: all of them. Errors: Error(kUsage) for sequences too
  /// short to split.
  virtual at::Tensor split(int64_t /*length*/) { return {}; }

  /// The processes that a sequence is split over; one by default.
  virtual const Group& context() const;

  /// Causal self attention of one layer, softmax(q k^T / sqrt(d)) v or its near + sinks + far
  /// approximation.
  ///
  /// layer   index of the layer, 0-based
  /// q       [B, H, L, d], position encoding applied; H is the number of query heads on this
  /// tensor-parallel rank k, v    [B, G, L, d]; G KV groups, query head h reads group h / (H / G)
  /// w_o     [hidden, H d], the output projection that will follow (it weights the value error);
  /// not differentiated here plan    null: decide, and keep the decision here. Otherwise replay
  /// exactly that decision.
  ///
  /// returns [B, H, L, d], differentiable in q, k and v. The dtype is that of q. Strides are
  /// unspecified. Errors: c10::Error on shapes that disagree.
  virtual at::Tensor attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& w_o,
                            std::shared_ptr<LayerPlan>& plan) = 0;

  /// An empty cache of `layers` layers for sequences that will not exceed `horizon` tokens. The
  /// default one is plain: exact keys and values.
  virtual std::unique_ptr<KvCache> make_cache(int64_t layers, int64_t horizon) const;

  /// The same attention for sequences that grow: q, k and v are those of the next L tokens (a
  /// prompt or a part of it, or one token), positions included; earlier ones are in `cache`, which
  /// a make_cache of this controller made. Returns [B, H, L, d], equal up to rounding to those rows
  /// of `attend` on the whole sequence. Builds no graph. The default is exact attention.
  virtual at::Tensor extend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const at::Tensor& w_o, KvCache& cache);
};

/// Exact attention in every layer, nothing decided and nothing counted.
std::shared_ptr<AttentionController> make_exact_attention();

}  // namespace drrl

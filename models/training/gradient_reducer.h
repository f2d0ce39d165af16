#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

#include "distributed/collectives/group.h"
#include "models/causal_lm/causal_lm.h"

namespace drrl {

/// Sums gradients over the data-parallel group in flat buckets, overlapped with the backward pass.
///
/// Gradients are views of the buckets from the start, so the model accumulates into them in place
/// and nothing is copied. Buckets run from the last parameter to the first, the order in which a
/// backward pass completes gradients; a bucket is sent when `complete_from` says that all of it is
/// final, and always after the buckets before it: all ranks issue the same collectives in the same
/// order. With one data-parallel rank there are no buckets: gradients start undefined, and a first
/// product becomes the gradient without a pass to clear it.
///
/// One step: `begin`; backward of every microbatch, with `complete_from` called during the last
/// one; `finish`. A rank without any microbatch calls `begin` and `finish` only and adds zeros.
///
/// Last come the rows that tensor-parallel ranks share (sum_shared_rows): so all that hold a row
/// get the same bits.
class GradientReducer {
 public:
  /// `parameters` must outlive the reducer. One bucket holds at most `bucket_bytes`, or a single
  /// larger gradient. kv: Mesh::kv().
  GradientReducer(std::vector<Parameter>& parameters, const Group& data_parallel,
                  const Group& kv = {}, int64_t bucket_bytes = int64_t{32} << 20);

  /// Forgets all gradients.
  void begin();

  /// The gradients of parameters [first, end) have their final values in this step: sends the
  /// buckets that are complete.
  void complete_from(int64_t first);

  /// Afterwards every parameter has a gradient, summed over the data-parallel group and, where rows
  /// are shared, over kv. Returns whether this rank's own gradients were finite before the sum
  /// (always true with one rank in either group, where the norm says the same).
  bool finish();

  int64_t bucket_count() const noexcept { return static_cast<int64_t>(buckets_.size()); }
  int64_t sent() const noexcept { return next_; }  ///< buckets of this step that are on their way

 private:
  struct Bucket {
    at::Tensor flat;    // [elements]
    int64_t first = 0;  // the lowest index of its parameters
    at::Tensor norm;    // [] of this rank's own contribution
    Pending pending;
  };

  std::vector<Parameter>& parameters_;
  Group data_parallel_;
  Group kv_;
  std::vector<Bucket> buckets_;
  std::vector<at::Tensor> views_;  // by parameter: its part of a bucket, in its shape
  int64_t next_ = 0;               // the first bucket that is not sent
};

/// Gradients of the rows that processes of `kv` share <- their sum over it, as one flat message,
/// bit-equal on all of them. Collective over `kv`; for who has no GradientReducer. Errors:
/// Error(kUsage) if rows are shared and `kv` is of one process.
void sum_shared_rows(const std::vector<Parameter>& parameters, const Group& kv);

/// What one sum over the tensor-parallel group turns into the global squared norm of the gradient:
/// gradients of sharded parameters count on every rank, those of replicated parameters on
/// tensor-parallel rank 0 alone, shared rows on rank 0 of kv. fp64 scalar on the parameters'
/// device; not finite when any gradient that it counts is not.
at::Tensor squared_gradient_norm(const std::vector<Parameter>& parameters,
                                 const Group& tensor_parallel, const Group& kv = {});

/// The factor of torch.nn.utils.clip_grad_norm_: min(1, clip / (norm + 1e-6)); 1 when clip is 0
/// (off).
double clip_factor(double norm, double clip);

}  // namespace drrl

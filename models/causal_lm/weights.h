#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "distributed/topology/mesh.h"
#include "models/causal_lm/config.h"

namespace drrl {

/// Where a tensor-parallel rank's parameter lies in a Hugging Face file: rows [row, row + ...) of
/// the parameter are the indices [start, start + length) of dimension `dim` of the tensor `name` of
/// shape `shape`.
struct WeightPart {
  std::string name;
  std::vector<int64_t> shape;
  int64_t dim, start, length;
  int64_t row;
  bool transposed = false;  ///< the file holds [in, out] (Conv1D of GPT-2), the parameter [out, in]
};

/// Names of a family's parameters, without ".weight" and ".bias": those of a layer after
/// "<layers>N.".
struct ParameterNames {
  const char* base;  ///< prefix of all but the head; the files of a bare base model leave it out
  const char *embedding, *positions, *layers, *input_norm, *qkv, *o, *post_norm, *into_mlp, *down,
      *final_norm;
};
const ParameterNames& parameter_names(const ModelConfig& config);

/// One parameter of the model as rank `tp_rank` of `tp_size` holds it: its name (causal_lm.h), its
/// local shape, and its parts in the file, more than one where matrices are stacked.
struct ParameterLayout {
  std::string name;
  std::vector<int64_t> shape;
  bool sharded;
  std::vector<WeightPart> parts;
  int64_t shared_rows = 0;  ///< the last so many are those of a KV head that other ranks hold, too
};

/// The attention heads of tensor-parallel rank `rank` of `tp`, among the model's. Errors:
/// Error(kUsage) when there are more ranks than query heads.
struct HeadShare {
  IndexRange kv_heads;
  IndexRange query_heads;
  IndexRange sharers;  ///< ranks that hold the same KV heads (kv_sharers_of)
};
HeadShare head_share(const ModelConfig& config, int64_t tp, int64_t rank);

/// All parameters of the model, in the order of its layers.
/// Errors: Error(kUsage) when there are more ranks than query heads, MLP columns or vocabulary
/// rows; it names both numbers.
std::vector<ParameterLayout> parameter_layouts(const ModelConfig& config, int64_t tp_size,
                                               int64_t tp_rank);

/// The region of a parameter's local tensor that a part fills, a view laid out as the part is in
/// the file.
at::Tensor region(const at::Tensor& parameter, const WeightPart& part);

}  // namespace drrl

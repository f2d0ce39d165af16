#include "policy/attention/layer_plan.h"

#include "core/attention/exact_attention.h"
#include "core/attention/lowrank_attention.h"

namespace drrl {

at::Tensor LayerPlan::run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          FarServed* far) const {
  return context != nullptr   ? context_attention(q, k, v, context)
         : lowrank != nullptr ? lowrank_attention(q, k, v, lowrank, far)
                              : exact_attention(q, k, v);
}

}  // namespace drrl

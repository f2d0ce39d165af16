#include "core/device.h"

#include <ATen/detail/CUDAHooksInterface.h>

namespace drrl {

void synchronize(at::Device device) {
  if (device.is_cuda()) {
    const auto& cuda = at::detail::getCUDAHooks();
    cuda.deviceSynchronize(device.has_index() ? device.index() : cuda.getCurrentDevice());
  }
}

}  // namespace drrl

#pragma once

#include <c10/core/Device.h>

namespace drrl {

/// Waits until all that was given to the device is done; without an index: to the current one. The
/// current device of a thread is cuda:0 unless somebody sets it, whatever tensors live on.
void synchronize(at::Device device);

}  // namespace drrl

#include "core/device.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <gtest/gtest.h>

namespace drrl {
namespace {

std::vector<c10::DeviceIndex> waited_for;

// In the place of CUDA for this program, which computes on the CPU alone.
struct FakeCuda : at::CUDAHooksInterface {
  explicit FakeCuda(at::CUDAHooksArgs /*unused*/) {}
  c10::DeviceIndex getCurrentDevice() const override { return 5; }
  void deviceSynchronize(c10::DeviceIndex index) const override { waited_for.push_back(index); }
};
const at::RegistererCUDAHooksRegistry registered(
    "CUDAHooks", c10::REGISTRY_PREFERRED, at::CUDAHooksRegistry(),
    at::RegistererCUDAHooksRegistry::DefaultCreator<FakeCuda>);

TEST(Synchronize, WaitsForTheDeviceThatItIsGiven) {
  synchronize(at::Device(at::kCUDA, 3));
  synchronize(at::kCPU);
  synchronize(at::kCUDA);
  EXPECT_EQ(waited_for, (std::vector<c10::DeviceIndex>{3, 5}));
}

}  // namespace
}  // namespace drrl

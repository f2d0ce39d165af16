#include "models/causal_lm/replicas.h"

#include <map>

#include "core/io/file_io.h"
#include "distributed/collectives/agreement.h"

namespace drrl {

void check_replicas(const CausalLM& model, const Mesh& mesh) {
  if (mesh.world().size() == 1) {
    return;
  }
  const at::NoGradGuard no_grad;
  const int64_t rank = mesh.tp().rank();
  const std::string shard = c10::str("the checksum of tensor-parallel shard ", rank),
                    whole = "the checksum of what is not sharded";
  const std::string shared = c10::str(
      "the checksum of KV head ",
      kv_heads_of(model.config().num_key_value_heads, mesh.tp().size(), rank).begin);
  std::map<std::string, std::string> checksums;  // of each tensor in turn
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    const at::Tensor bytes = tensor.cpu().contiguous();
    checksums[name] += to_hex(hash_bytes(bytes.const_data_ptr(), bytes.nbytes()));
  };
  for (const Parameter& parameter : model.parameters()) {
    add(parameter.sharded ? shard : whole, parameter.value);
    if (mesh.kv().size() > 1 && parameter.shared_rows > 0) {
      add(shared, parameter.value.narrow(0, parameter.value.size(0) - parameter.shared_rows,
                                         parameter.shared_rows));
    }
    if (const auto& watchdog = mesh.world().watchdog()) {
      watchdog->alive();
    }
  }
  Facts facts;
  for (const auto& [name, of_tensors] : checksums) {
    facts.push_back({name, to_hex(hash_bytes(of_tensors))});
  }
  check_agreement(exchange_over(mesh.world(), mesh.world().message_device()), facts,
                  ErrorKind::kCommunication, "weights");
}

}  // namespace drrl

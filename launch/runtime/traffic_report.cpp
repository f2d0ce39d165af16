#include "launch/runtime/traffic_report.h"

#include <string>

#include "launch/options/options.h"

namespace drrl {

using Json = nlohmann::ordered_json;

Json traffic_report(const Traffic::Entries& entries, double steps, bool times) {
  const auto timed = [&](double ms) { return times ? Json(ms / steps) : Json(); };
  double sent_bytes = 0, exposed_ms = 0;
  Json sent = Json::array();
  for (const auto& [key, entry] : entries) {
    sent_bytes += entry.sent_bytes;
    exposed_ms += entry.waited_ms;
    sent.push_back({{"group", key.first},
                    {"operation", key.second},
                    {"calls", static_cast<double>(entry.calls) / steps},
                    {"sent_bytes", entry.sent_bytes / steps},
                    {"exposed_ms", timed(entry.waited_ms)}});
  }
  return {{"sent_bytes", sent_bytes / steps}, {"exposed_ms", timed(exposed_ms)}, {"sent", sent}};
}

Json gathered(const Json& own, const Group& world) {
  const std::string line = own.dump() + "\n";
  at::Tensor bytes = at::from_blob(const_cast<char*>(line.data()),
                                   {static_cast<int64_t>(line.size())}, at::kByte);
  bytes = world.all_gather_uneven(bytes.to(world.message_device())).cpu();
  Json all = Json::array();
  for (const std::string& one :
       split(std::string(static_cast<const char*>(bytes.data_ptr()), bytes.nbytes()), '\n')) {
    all.push_back(Json::parse(one));
  }
  return all;
}

}  // namespace drrl

#include "distributed/agreement.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <map>
#include <sstream>
#include <vector>

#include "core/error.h"

namespace drrl {

uint64_t hash_bytes(const void* data, std::size_t size) {
  return XXH3_64bits(data, size);
}

void roll_call(const Group& group, std::string_view what) {
  constexpr int kTag = 7321;
  at::Tensor word = at::zeros({1}, at::kByte);
  if (group.size() == 1 || !group.message_device().is_cpu()) {
    return;
  }
  const auto hear = [&](int64_t member) {
    try {
      group.receive(word, member, kTag);
    } catch (const Error& error) {
      raise(ErrorKind::kCommunication, group.describe(member), " has not come to ", what, ": ", error.what());
    }
  };
  if (group.rank() != 0) {
    group.send(word, 0, kTag);
    hear(0);
    return;
  }
  for (int64_t member = 1; member < group.size(); ++member) {
    hear(member);
  }
  for (int64_t member = 1; member < group.size(); ++member) {
    group.send(word, member, kTag);
  }
}

void check_agreement(const Group& group, uint64_t value, std::string_view what) {
  if (group.size() == 1) {
    return;
  }
  const at::Tensor own = at::full({1}, static_cast<int64_t>(value), at::kLong).to(group.message_device());
  at::Tensor all = at::empty({group.size()}, own.options());
  group.all_gather(all, own);
  all = all.cpu();
  const int64_t* values = all.const_data_ptr<int64_t>();

  std::map<int64_t, int64_t> votes;
  int64_t reference = values[0];
  for (int64_t member = 0; member < group.size(); ++member) {
    ++votes[values[member]];
  }
  if (votes.size() == 1) {
    return;
  }
  for (const auto& [candidate, count] : votes) {
    if (2 * count > group.size()) {
      reference = candidate;
    }
  }
  std::ostringstream message;
  message << "the members of group '" << group.name() << "' do not agree on " << what << ": expected " << std::hex
          << static_cast<uint64_t>(reference);
  for (int64_t member = 0; member < group.size(); ++member) {
    if (values[member] != reference) {
      message << "; " << group.describe(member) << " has " << static_cast<uint64_t>(values[member]);
    }
  }
  raise(ErrorKind::kCommunication, message.str());
}

}  // namespace drrl

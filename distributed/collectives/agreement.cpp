#include "distributed/collectives/agreement.h"

#define XXH_INLINE_ALL
#include <algorithm>
#include <map>
#include <sstream>

#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "core/io/file_io.h"

namespace drrl {
namespace {

using Json = nlohmann::json;

/// Texts of options and paths, as they stand in a line.
std::string shown(const std::string& text) {
  constexpr size_t kLongest = 300;
  const bool plain = std::all_of(text.begin(), text.end(),
                                 [](unsigned char c) { return c >= 0x20 && c < 0x7f; });
  return text.empty() ? "empty" : plain && text.size() <= kLongest ? text : quoted(text);
}

/// "rank 1", "ranks 0 2 3 4 and 12 more".
std::string shown(const std::vector<size_t>& ranks) {
  constexpr size_t kShown = 4;
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < std::min(ranks.size(), kShown); ++i) {
    text += c10::str(" ", ranks[i]);
  }
  return ranks.size() > kShown ? c10::str(text, " and ", ranks.size() - kShown, " more") : text;
}

}  // namespace

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
      raise(ErrorKind::kCommunication, group.describe(member), " has not come to ", what, ": ",
            error.what());
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
  const at::Tensor own = at::full({1}, static_cast<int64_t>(value), at::kLong)
                             .to(group.message_device());
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
  message << "the members of group '" << group.name() << "' do not agree on " << what
          << ": expected " << std::hex << static_cast<uint64_t>(reference);
  for (int64_t member = 0; member < group.size(); ++member) {
    if (values[member] != reference) {
      message << "; " << group.describe(member) << " has " << static_cast<uint64_t>(values[member]);
    }
  }
  raise(ErrorKind::kCommunication, message.str());
}

TextExchange exchange_over(const Group& group, at::Device device) {
  return [group, device](const std::string& mine) {
    // lengths first, then all bytes in one uneven gather
    const auto length = static_cast<int64_t>(mine.size());
    const at::Tensor own_length = at::full({1}, length, at::kLong).to(device);
    at::Tensor lengths = at::empty({group.size()}, at::TensorOptions(at::kLong).device(device));
    group.all_gather(lengths, own_length);
    at::Tensor bytes = at::empty({length}, at::kByte);
    std::copy(mine.begin(), mine.end(), bytes.data_ptr<uint8_t>());
    const at::Tensor all = group.all_gather_uneven(bytes.to(device)).to(at::kCPU).contiguous();
    lengths = lengths.to(at::kCPU);

    std::vector<std::string> texts;
    const auto* position = reinterpret_cast<const char*>(all.data_ptr<uint8_t>());
    for (int64_t i = 0; i < group.size(); ++i) {
      const auto bytes_of_rank = static_cast<size_t>(lengths[i].item<int64_t>());
      texts.emplace_back(position, bytes_of_rank);
      position += bytes_of_rank;
    }
    return texts;
  };
}

std::string disagreement(const std::vector<Facts>& all) {
  constexpr size_t kShown = 3;  // facts, and values of each
  struct Held {
    std::string value, origin;
    std::vector<size_t> ranks;
  };
  std::vector<std::string> names;  // in the order of the first process that holds them
  std::map<std::string, std::vector<Held>> by_name;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    for (const Fact& fact : all[rank]) {
      const auto [found, fresh] = by_name.try_emplace(fact.name);
      if (fresh) {
        names.push_back(fact.name);
      }
      std::vector<Held>& held = found->second;
      auto same = std::find_if(held.begin(), held.end(),
                               [&](const Held& other) { return other.value == fact.value; });
      if (same == held.end()) {
        same = held.insert(held.end(), {fact.value, fact.origin, {}});
      }
      same->ranks.push_back(rank);
    }
  }
  std::string text;
  size_t differing = 0;
  for (const std::string& name : names) {
    const std::vector<Held>& held = by_name[name];
    if (held.size() == 1 || ++differing > kShown) {
      continue;
    }
    text += (text.empty() ? "" : "; ") + name + " is ";
    for (size_t i = 0; i < std::min(held.size(), kShown); ++i) {
      text += c10::str(i == 0 ? "" : ", ", shown(held[i].value),
                       held[i].origin.empty() ? "" : " (" + shown(held[i].origin) + ")", " on ",
                       shown(held[i].ranks));
    }
    text += held.size() > kShown ? c10::str(", ", held.size() - kShown, " other values elsewhere")
                                 : "";
  }
  return differing > kShown ? c10::str(text, "; ", differing - kShown, " more differ") : text;
}

void check_agreement(const TextExchange& exchange, const Facts& facts, ErrorKind kind,
                     std::string_view what) {
  Json mine = Json::array();
  std::string values;
  for (const Fact& fact : facts) {
    mine.push_back({fact.name, fact.value, fact.origin});
    values += c10::str(fact.name.size(), " ", fact.name, fact.value.size(), " ", fact.value);
  }
  const std::vector<std::string> hashes = exchange(to_hex(hash_bytes(values)));
  if (std::all_of(hashes.begin(), hashes.end(),
                  [&](const std::string& hash) { return hash == hashes.front(); })) {
    return;
  }
  std::vector<Facts> all;
  const std::vector<uint8_t> bytes = Json::to_cbor(
      mine);  // options may hold what JSON's text would not take
  for (const std::string& text : exchange({bytes.begin(), bytes.end()})) {
    Facts& of_rank = all.emplace_back();
    for (const Json& fact : Json::from_cbor(text)) {
      of_rank.push_back({fact.at(0), fact.at(1), fact.at(2)});
    }
  }
  const std::string differences = disagreement(all);
  check(kind, differences.empty(), "all processes of a job need the same ", what, ": ",
        differences);
}

}  // namespace drrl

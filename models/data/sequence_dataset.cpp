#include "models/data/sequence_dataset.h"

#include <algorithm>
#include <array>
#include <bit>

#include "core/error.h"

namespace drrl {
namespace {

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31U);
}

}  // namespace

int64_t permuted_index(int64_t index, int64_t n, uint64_t key) {
  constexpr uint64_t kRounds = 6;
  const auto size = static_cast<uint64_t>(n);
  // Two halves of `half` bits each; the domain is at most 4 n, so the walk takes fewer than 4 steps
  // on average.
  const int half = std::max(1, (static_cast<int>(std::bit_width(size - 1)) + 1) / 2);
  const uint64_t mask = (uint64_t{1} << half) - 1;
  auto x = static_cast<uint64_t>(index);
  do {
    uint64_t left = x >> half;
    uint64_t right = x & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const uint64_t next = left ^ (mix(right ^ mix(key + round)) & mask);
      left = right;
      right = next;
    }
    x = left << half | right;
  } while (x >= size);
  return static_cast<int64_t>(x);
}

SequenceDataset::SequenceDataset(std::shared_ptr<const TokenFile> file, int64_t begin, int64_t end,
                                 int64_t seq_len, uint64_t seed)
    : file_(std::move(file)),
      begin_(begin),
      end_(end),
      seq_len_(seq_len),
      windows_(0),
      seed_(seed) {
  check(ErrorKind::kUsage, seq_len >= 1, "seq_len must be at least 1, got ", seq_len);
  check(ErrorKind::kInternal, begin >= 0 && begin <= end && end <= file_->tokens(), "token range [",
        begin, ", ", end, ") does not lie in a file of ", file_->tokens(), " tokens");
  windows_ = end - begin > seq_len ? (end - begin - 1) / seq_len : 0;
  check(ErrorKind::kData, windows_ > 0, file_->bin_path().string(), ": the range [", begin, ", ",
        end, ") has ", end - begin, " tokens, but one sequence needs seq_len + 1 = ", seq_len + 1);
}

int64_t SequenceDataset::window_of(int64_t sample) const {
  const auto epoch = static_cast<uint64_t>(sample / windows_);
  return permuted_index(sample % windows_, windows_, mix(seed_) ^ mix(epoch ^ 0x5eedULL << 32U));
}

template <typename WindowOf>
Batch SequenceDataset::gather(int64_t count, WindowOf window_of) const {
  at::Tensor rows = at::empty({count, seq_len_ + 1}, at::kLong);
  for (int64_t i = 0; i < count; ++i) {
    rows.select(0, i).copy_(file_->read(begin_ + window_of(i) * seq_len_, seq_len_ + 1));
  }
  return {rows.narrow(1, 0, seq_len_).contiguous(), rows.narrow(1, 1, seq_len_).contiguous()};
}

Batch SequenceDataset::samples(int64_t first, int64_t count) const {
  return gather(count, [&](int64_t i) { return window_of(first + i); });
}

Batch SequenceDataset::ordered(int64_t first, int64_t count) const {
  check(ErrorKind::kInternal, first >= 0 && first + count <= windows_, "windows [", first, ", ",
        first + count, ") of ", windows_);
  return gather(count, [&](int64_t i) { return first + i; });
}

}  // namespace drrl

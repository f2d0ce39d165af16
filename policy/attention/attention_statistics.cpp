#include "policy/attention/attention_statistics.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/error.h"

namespace drrl {
namespace {

using Sums = AttentionStatistics;
constexpr double Sums::* kNumbers[] = {&Sums::flops, &Sums::exact_flops, &Sums::rank_qk,
                                       &Sums::rank_v};
constexpr int64_t Sums::* kCounts[] = {&Sums::calls,
                                       &Sums::decompositions,
                                       &Sums::updates,
                                       &Sums::guard_raises,
                                       &Sums::exact_pairs,
                                       &Sums::context_bytes,
                                       &Sums::context_exact_bytes,
                                       &Sums::basis_bytes,
                                       &Sums::decisions};
constexpr double Sums::* kTimes[] = {&Sums::attention_ms, &Sums::basis_ms, &Sums::basis_cpu_ms};

}  // namespace

AttentionStatistics& AttentionStatistics::operator+=(const AttentionStatistics& other) {
  for (const auto number : kNumbers) {
    this->*number += other.*number;
  }
  for (const auto count : kCounts) {
    this->*count += other.*count;
  }
  for (const auto time : kTimes) {
    this->*time += other.*time;
  }
  layer_ms.resize(std::max(layer_ms.size(), other.layer_ms.size()), 0.0);
  std::transform(other.layer_ms.begin(), other.layer_ms.end(), layer_ms.begin(), layer_ms.begin(),
                 std::plus<>());
  return *this;
}

std::vector<double> AttentionStatistics::counts() const {
  std::vector<double> all;
  for (const auto number : kNumbers) {
    all.push_back(this->*number);
  }
  for (const auto count : kCounts) {
    all.push_back(static_cast<double>(this->*count));
  }
  return all;
}

void AttentionStatistics::set_counts(const std::vector<double>& counts) {
  check(ErrorKind::kInternal, counts.size() == std::size(kNumbers) + std::size(kCounts),
        "AttentionStatistics has ", std::size(kNumbers) + std::size(kCounts), " counts, got ",
        counts.size());
  auto next = counts.begin();
  for (const auto number : kNumbers) {
    this->*number = *next++;
  }
  for (const auto count : kCounts) {
    this->*count = std::llround(*next++);
  }
}

}  // namespace drrl

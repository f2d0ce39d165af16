#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/types/ranks.h"

namespace drrl {

/// Ranks for each layer, KV group of the model and tree level.
class RankTable {
 public:
  RankTable(int64_t layers, int64_t groups, int64_t levels, Ranks all)
      : layers_(layers),
        groups_(groups),
        levels_(levels),
        ranks_(static_cast<size_t>(layers * groups * levels), all) {}
  Ranks& at(int64_t layer, int64_t group, int64_t level) {
    return ranks_[static_cast<size_t>((layer * groups_ + group) * levels_ + level)];
  }
  const Ranks& at(int64_t layer, int64_t group, int64_t level) const {
    return const_cast<RankTable*>(this)->at(layer, group, level);
  }
  int64_t layers() const { return layers_; }
  int64_t groups() const { return groups_; }
  int64_t levels() const { return levels_; }

 private:
  int64_t layers_, groups_, levels_;
  std::vector<Ranks> ranks_;
};

}  // namespace drrl

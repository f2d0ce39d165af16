#pragma once

#include <span>
#include <vector>

#include "policy/calibration/calibration.h"

namespace drrl {

/// What can be chosen for the far pairs of one layer, KV group and tree level together.
struct RankItem {
  struct Option {
    double damage;  ///< calibrated [nats per token]
    double cost;    ///< in the unit of the prices
    Ranks ranks;
  };
  std::vector<Option> options;  ///< the last one, exact, does no damage
  size_t chosen = 0;

  const Option& now() const { return options[chosen]; }
};

/// The items of all layers, KV groups and levels, level innermost. with_gates: with gates along
/// with ranks; the entries that they make exact are as many as the calibration met.
std::vector<RankItem> rank_items(const Calibration& calibration, const BlockTree& tree,
                                 const std::vector<int64_t>& buckets, const Prices& prices,
                                 bool with_gates);

/// Takes the single steps that save most damage for their cost among those that fit into `left`,
/// best first. Returns what is left in the end.
double spend_left(std::span<RankItem> items, double left);

/// What is chosen, as a table. items: as rank_items returns them for so many layers and groups.
RankTable chosen_ranks(const std::vector<RankItem>& items, int64_t layers, int64_t groups);

}  // namespace drrl

#include "distributed/attention/basis_provider.h"

#include <algorithm>

#include "core/attention/flops.h"
#include "distributed/attention/replicated_kv_bases.h"

namespace drrl {

FarBases LocalBases::make(int64_t layer, const PairGrams& grams, const at::Tensor& w_o,
                          const std::vector<Ranks>& ranks, at::Tensor& start) {
  const int64_t batch = grams.keys.size(0), groups = grams.keys.size(1), d = grams.keys.size(4);
  if (decomposes(d)) {
    const auto any_below_d = [&](int64_t Ranks::* kind) {
      return std::any_of(ranks.begin(), ranks.end(), [&](const Ranks& r) { return r.*kind < d; });
    };
    return solve_far_bases(grams, w_o, any_below_d(&Ranks::qk), any_below_d(&Ranks::v));
  }
  int64_t decompositions = 0;
  if (!start.defined()) {
    start = calibrated_start(layer, batch);
  }
  if (!start.defined()) {
    start = first_pair_bases(grams, w_o);
    decompositions = 2 * batch * groups;
  }
  FarBases bases = update_far_bases(grams, w_o, ranks, start, options().update_steps);
  bases.decompositions += decompositions;
  bases.flops += static_cast<double>(decompositions) * basis_solve_flops(d);
  return bases;
}

std::unique_ptr<BasisProvider> make_basis_provider(BasisOptions options, int64_t near_block,
                                                   const Group& kv) {
  if (kv.size() > 1) {
    return std::make_unique<ReplicatedKvBases>(std::move(options), near_block, kv);
  }
  return std::make_unique<LocalBases>(std::move(options), near_block);
}

}  // namespace drrl

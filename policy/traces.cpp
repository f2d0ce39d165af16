#include "policy/traces.h"

#include "core/error.h"
#include "policy/policy_file.h"
#include "policy/state.h"

namespace drrl {
namespace {
constexpr const char* kFormat = "drrl-traces-1";
}  // namespace

Traces::Traces(int64_t sequences, int64_t layers, int64_t groups, int64_t pairs, std::vector<int64_t> ranks_in)
    : ranks(std::move(ranks_in)), state(at::zeros({sequences, layers, groups, pairs, pair_features(ranks)})),
      damage(at::zeros({sequences, kDraws, layers, groups, 2, pairs, static_cast<int64_t>(ranks.size())})) {}

void Traces::put(int64_t sequence, int64_t draw, int64_t first_group, const at::Tensor& states, const at::Tensor& pair_damage) {
  TORCH_CHECK(states.defined() && states.size(1) == 1, "Traces: states ", states.sizes(), ", expected those of one sequence");
  const int64_t groups = states.size(2);
  state[sequence].narrow(1, first_group, groups).copy_(states.squeeze(1));
  damage[sequence][draw].narrow(1, first_group, groups).copy_(pair_damage.squeeze(1));
}

void Traces::save(const std::filesystem::path& file) const {
  write_safetensors(file, {{"state", state}, {"damage", damage}},
                    {{"format", kFormat},
                     {"seq_len", std::to_string(seq_len)},
                     {"near_block", std::to_string(geometry.near_block)},
                     {"sink_tokens", std::to_string(geometry.sink_tokens)},
                     {"heads_per_group", std::to_string(heads_per_group)},
                     {"calibration", calibration},
                     {"ranks", to_list(ranks)}});
}

Traces Traces::load(const std::filesystem::path& path) {
  const PolicyFile file(path, "trace", kFormat);
  Traces t;
  t.seq_len = file.integer("seq_len", 1);
  t.geometry = {file.integer("near_block", 1), file.integer("sink_tokens", 0)};
  t.heads_per_group = file.integer("heads_per_group", 1);
  t.calibration = file.field("calibration");
  t.ranks = file.ranks();
  t.state = file.tensor("state", at::kFloat, 5);
  t.damage = file.tensor("damage", at::kFloat, 7);
  const auto s = t.state.sizes();
  const auto expected = {s[0], kDraws, s[1], s[2], int64_t{2}, s[3], static_cast<int64_t>(t.ranks.size())};
  check(ErrorKind::kModel, t.damage.sizes() == at::IntArrayRef(expected) && s[4] == pair_features(t.ranks) && s[3] == BlockTree(t.seq_len, t.geometry).num_pairs(),
        path, ": state ", s, " and damage ", t.damage.sizes(), " do not fit each other, the ranks ", at::IntArrayRef(t.ranks), " or ", t.seq_len,
        " tokens");
  return t;
}

}  // namespace drrl

#include "policy/agent/traces.h"

#include <algorithm>

#include "core/error.h"
#include "policy/calibration/pair_features.h"
#include "policy/calibration/policy_file.h"

namespace drrl {
namespace {
constexpr const char* kFormat = "drrl-traces-4";
}  // namespace

Traces::Traces(int64_t sequences, int64_t layers, int64_t groups, int64_t seq_len_in,
               Geometry geometry_in, std::vector<int64_t> ranks_in, at::Tensor gates_in)
    : seq_len(seq_len_in),
      geometry(geometry_in),
      ranks(std::move(ranks_in)),
      tokens(at::zeros({sequences, seq_len}, at::kLong)),
      gates(std::move(gates_in)) {
  const int64_t pairs = BlockTree(seq_len, geometry).num_pairs();
  state = at::zeros({sequences, layers, groups, pairs, pair_features(ranks)});
  const auto choices = static_cast<int64_t>(ranks.size());
  damage = at::zeros({sequences, kDraws, layers, groups, 2, pairs, choices});
  gated_damage = at::zeros({sequences, kDraws, layers, groups, 2, pairs, choices, gates.size(0)});
  exact_entries = at::zeros({sequences, layers, groups, pairs, choices + 1, gates.size(0)});
}

Traces Traces::first(int64_t count) const {
  Traces some = *this;
  some.tokens = tokens.narrow(0, 0, count);
  for (const auto part : kMeasured) {
    some.*part = (some.*part).narrow(0, 0, count);
  }
  return some;
}

void Traces::put(int64_t sequence, int64_t draw, int64_t first_group,
                 const CalibrationController::PairRecord& pairs) {
  TORCH_CHECK(pairs.state.defined() && pairs.state.size(1) == 1, "Traces: states ",
              pairs.state.sizes(), ", expected those of one sequence");
  const auto copy = [&](const at::Tensor& to, const at::Tensor& from) {
    to.narrow(1, first_group, from.size(2)).copy_(from.squeeze(1));
  };
  copy(state[sequence], pairs.state);
  copy(damage[sequence][draw], pairs.damage);
  copy(gated_damage[sequence][draw], pairs.gated_damage);
  copy(exact_entries[sequence], pairs.exact_entries);
}

void Traces::save(const std::filesystem::path& file) const {
  write_safetensors(file,
                    {{"tokens", tokens},
                     {"state", state},
                     {"gates", gates},
                     {"damage", damage},
                     {"gated_damage", gated_damage},
                     {"exact_entries", exact_entries}},
                    {{"format", kFormat},
                     {"seq_len", std::to_string(seq_len)},
                     {"near_block", std::to_string(geometry.near_block)},
                     {"sink_tokens", std::to_string(geometry.sink_tokens)},
                     {"heads_per_group", std::to_string(heads_per_group)},
                     {"calibration", calibration},
                     {"source", source},
                     {"ranks", to_list(ranks)}},
                    [](const std::filesystem::path& written) { load(written); });
}

Traces Traces::load(const std::filesystem::path& path) {
  const PolicyFile file(path, "trace", kFormat);
  Traces t;
  t.seq_len = file.integer("seq_len", 1);
  t.geometry = {file.integer("near_block", 1), file.integer("sink_tokens", 0)};
  t.heads_per_group = file.integer("heads_per_group", 1);
  t.calibration = file.field("calibration");
  t.source = file.field("source");
  t.ranks = file.ranks();
  t.tokens = file.tensor("tokens", at::kLong, 2);
  t.state = file.tensor("state", at::kFloat, 5);
  t.gates = file.tensor("gates", at::kDouble, 1);
  t.damage = file.tensor("damage", at::kFloat, 7);
  t.gated_damage = file.tensor("gated_damage", at::kFloat, 8);
  t.exact_entries = file.tensor("exact_entries", at::kFloat, 6);
  const auto s = t.state.sizes();
  check(ErrorKind::kModel, t.tokens.sizes() == at::IntArrayRef({s[0], t.seq_len}), path,
        ": \"tokens\" is ", t.tokens.sizes(), ", expected [", s[0], ", ", t.seq_len, "]");
  check(ErrorKind::kModel, (t.tokens >= 0).all().item<bool>(), path,
        ": \"tokens\" holds a negative one, ", t.tokens.min().item<int64_t>());
  const Traces expected(s[0], s[1], s[2], t.seq_len, t.geometry, t.ranks, t.gates);
  const auto fits = [&](at::Tensor Traces::* x) { return (t.*x).sizes() == (expected.*x).sizes(); };
  check(ErrorKind::kModel, std::all_of(kMeasured.begin(), kMeasured.end(), fits), path, ": state ",
        s, ", damage ", t.damage.sizes(), ", gated_damage ", t.gated_damage.sizes(),
        " and exact_entries ", t.exact_entries.sizes(), " do not fit each other, the ranks ",
        at::IntArrayRef(t.ranks), ", ", t.gates.size(0), " gates or ", t.seq_len, " tokens");
  return t;
}

}  // namespace drrl

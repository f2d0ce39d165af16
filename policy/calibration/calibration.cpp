#include "policy/calibration/calibration.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "distributed/collectives/agreement.h"
#include "policy/calibration/policy_file.h"

namespace drrl {
namespace {

constexpr const char* kFormat = "drrl-calibration-4";

}  // namespace

std::string Calibration::digest() const {
  const auto bytes = [](const at::Tensor& x) { return hash_bytes(x.const_data_ptr(), x.nbytes()); };
  std::vector<uint64_t> hashes;
  for (const NamedTensor& tensor : tensors()) {
    hashes.push_back(bytes(tensor.value.contiguous()));
  }
  return to_hex(hash_bytes(hashes.data(), hashes.size() * sizeof(uint64_t)));
}

void Calibration::save(const std::filesystem::path& file) const {
  write_safetensors(file, tensors(), metadata(),
                    [](const std::filesystem::path& written) { load(written); });
}

std::vector<NamedTensor> Calibration::tensors() const {
  std::vector<NamedTensor> all = {{"damage", damage}, {"bases", bases}};
  if (gates.defined()) {
    all.insert(
        all.end(),
        {{"gates", gates}, {"gated_damage", gated_damage}, {"exact_entries", exact_entries}});
  }
  return all;
}

std::map<std::string, std::string> Calibration::metadata() const {
  return {{"format", kFormat},
          {"model", model},
          {"data", data},
          {"seq_len", std::to_string(seq_len)},
          {"tokens", std::to_string(tokens)},
          {"near_block", std::to_string(geometry.near_block)},
          {"sink_tokens", std::to_string(geometry.sink_tokens)},
          {"ranks", to_list(ranks)}};
}

Calibration Calibration::load(const std::filesystem::path& path) {
  constexpr ErrorKind kind = ErrorKind::kModel;
  check(kind, path_exists(path, kind), "no calibration file ", path,
        " (drrl-policy calibrate makes one)");
  const PolicyFile file(path, "calibration", kFormat);
  Calibration c;
  c.model = file.field("model");
  c.data = file.field("data");
  c.seq_len = file.integer("seq_len", 1);
  c.tokens = file.integer("tokens", 1);
  c.geometry = {file.integer("near_block", 1), file.integer("sink_tokens", 0)};
  c.ranks = file.ranks();
  c.damage = file.tensor("damage", at::kDouble, 5);
  c.bases = file.tensor("bases", at::kFloat, 5);
  const bool fits = c.damage.sizes().slice(0, 3) == c.bases.sizes().slice(0, 3) &&
                    c.damage.size(2) == 2 &&
                    c.damage.size(4) == static_cast<int64_t>(c.ranks.size()) &&
                    c.bases.size(3) == c.bases.size(4) && c.ranks.back() < c.bases.size(4);
  check(kind, fits, path, ": damage ", c.damage.sizes(), " and bases ", c.bases.sizes(),
        " do not fit each other or the ranks ", c.ranks,
        ": expected [layers, groups, 2, levels, ranks] and [layers, groups, 2, d, d] with ranks "
        "below d");
  if (file.contains("gates")) {
    c.gates = file.tensor("gates", at::kDouble, 1);
    c.gated_damage = file.tensor("gated_damage", at::kDouble, 6);
    c.exact_entries = file.tensor("exact_entries", at::kDouble, 5);
    const at::Tensor shares = at::constant_pad_nd(at::constant_pad_nd(c.gates, {1, 0}), {0, 1}, 1);
    check(kind, (shares.diff() > 0).all().item<bool>(), path, ": \"gates\" are ",
          at::ArrayRef(c.gates.const_data_ptr<double>(), static_cast<size_t>(c.gates.numel())),
          ", expected shares between 0 and 1, ascending");
    const int64_t choices = c.damage.size(4) + 1, gates = c.gates.size(0);
    check(kind,
          c.gated_damage.sizes() ==
                  at::IntArrayRef({c.layers(), c.groups(), 2, c.levels(), choices - 1, gates}) &&
              c.exact_entries.sizes() ==
                  at::IntArrayRef({c.layers(), c.groups(), c.levels(), choices, gates}),
          path, ": gated_damage ", c.gated_damage.sizes(), " and exact_entries ",
          c.exact_entries.sizes(), " do not fit damage ", c.damage.sizes(), " and ", gates,
          " gates");
    check(kind,
          (c.gated_damage >= 0).all().item<bool>() && (c.exact_entries >= 0).all().item<bool>() &&
              (c.exact_entries <= 1 + 1e-9).all().item<bool>(),
          path, ": a negative entry in gated_damage, or one of exact_entries outside 0..1");
  }
  check(kind, (c.damage >= 0).all().item<bool>(), path, ": \"damage\" holds a negative entry, ",
        c.damage.min().item<double>());
  return c;
}

Calibration scaled(const Calibration& calibration, const at::Tensor& log_factors) {
  TORCH_CHECK(log_factors.sizes() == calibration.damage.sizes(), "scaled: factors ",
              log_factors.sizes(), ", expected ", calibration.damage.sizes());
  Calibration result = calibration;
  const at::Tensor factors = log_factors.exp();
  result.damage = calibration.damage * factors;
  if (calibration.gates.defined()) {
    result.gated_damage = calibration.gated_damage * factors.unsqueeze(5);
  }
  return result;
}

double expected_damage(const Calibration& c, const RankTable& table) {
  const auto damage = c.damage.accessor<double, 5>();
  const auto choice = [&](int64_t rank) {
    return std::find(c.ranks.begin(), c.ranks.end(), rank) - c.ranks.begin();
  };  // of exact: the last
  double sum = 0;
  for (int64_t layer = 0; layer < table.layers(); ++layer) {
    for (int64_t group = 0; group < table.groups(); ++group) {
      for (int64_t level = 0; level < table.levels(); ++level) {
        const Ranks& r = table.at(layer, group, level);
        const int64_t measured = std::min(level, c.levels() - 1), qk = choice(r.qk),
                      v = choice(r.v);
        const auto exact = static_cast<int64_t>(c.ranks.size());
        const int64_t
            gate = r.gated(c.head_dim())
                       ? (c.gates - static_cast<double>(r.gate)).abs().argmin().item<int64_t>()
                       : -1;
        for (int64_t kind = 0; kind < 2; ++kind) {
          const auto rank = kind == 0 ? qk : v;
          sum += rank == exact ? 0
                 : gate < 0
                     ? damage[layer][group][kind][measured][rank]
                     : c.gated_damage[layer][group][kind][measured][rank][gate].item<double>();
        }
      }
    }
  }
  return sum;
}

}  // namespace drrl

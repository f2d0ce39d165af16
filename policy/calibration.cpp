#include "policy/calibration.h"

#include <array>
#include <charconv>
#include <sstream>

#include "core/attention_part.h"
#include "core/error.h"
#include "core/gram.h"
#include "core/safetensors.h"
#include "distributed/agreement.h"
#include "policy/controller.h"

namespace drrl {
namespace {

constexpr const char* kFormat = "drrl-calibration-2";

// An integer of the file's metadata. Error(kModel) unless it is one, and at least `least`.
int64_t integer(const std::string& text, const std::string& what, int64_t least) {
  int64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  check(ErrorKind::kModel, problem == std::errc() && end == text.data() + text.size() && value >= least, what, " is ", quoted(text),
        ", expected an integer from ", least);
  return value;
}

at::Tensor checked_tensor(const SafetensorsFile& file, const std::string& name, at::ScalarType dtype, int64_t dims) {
  const auto& entry = file.entry(name);
  check(ErrorKind::kModel, entry.dtype == dtype && static_cast<int64_t>(entry.shape.size()) == dims, file.path(), ": \"", name, "\" is ",
        c10::toString(entry.dtype), " ", at::IntArrayRef(entry.shape), ", expected ", c10::toString(dtype), " of ", dims, " dimensions");
  auto tensor = file.tensor(name);
  check(ErrorKind::kModel, tensor.numel() > 0 && at::isfinite(tensor).all().item<bool>(), file.path(), ": \"", name,
        "\" is empty or not finite");
  return tensor;
}

}  // namespace

std::string Calibration::digest() const {
  const auto bytes = [](const at::Tensor& x) { return hash_bytes(x.const_data_ptr(), x.nbytes()); };
  const std::array hashes = {bytes(damage.contiguous()), bytes(bases.contiguous())};
  return to_hex(hash_bytes(hashes.data(), sizeof(hashes)));
}

void Calibration::save(const std::filesystem::path& file) const {
  std::ostringstream rank_list;
  for (size_t i = 0; i < ranks.size(); ++i) {
    rank_list << (i > 0 ? "," : "") << ranks[i];
  }
  write_safetensors(file, {{"damage", damage}, {"bases", bases}},
                    {{"format", kFormat},
                     {"model", model},
                     {"data", data},
                     {"seq_len", std::to_string(seq_len)},
                     {"tokens", std::to_string(tokens)},
                     {"near_block", std::to_string(geometry.near_block)},
                     {"sink_tokens", std::to_string(geometry.sink_tokens)},
                     {"ranks", rank_list.str()}});
}

Calibration Calibration::load(const std::filesystem::path& path) {
  constexpr ErrorKind kind = ErrorKind::kModel;
  check(kind, path_exists(path, kind), "no calibration file ", path, " (drrl-policy calibrate makes one)");
  const SafetensorsFile file(path, kind);
  const auto field = [&](const std::string& name) {
    const auto found = file.metadata().find(name);
    check(kind, found != file.metadata().end(), path, " is not a calibration file: its metadata has no \"", name, "\"");
    return found->second;
  };
  const auto number = [&](const std::string& name, int64_t least) { return integer(field(name), c10::str(path, ": \"", name, "\""), least); };
  check(kind, field("format") == kFormat, path, ": \"format\" is ", quoted(field("format")), ", expected \"", kFormat,
        "\"; calibrate again");
  Calibration c;
  c.model = field("model");
  c.data = field("data");
  c.seq_len = number("seq_len", 1);
  c.tokens = number("tokens", 1);
  c.geometry = {number("near_block", 1), number("sink_tokens", 0)};
  std::istringstream list(field("ranks"));
  for (std::string item; std::getline(list, item, ',');) {
    c.ranks.push_back(integer(item, c10::str(path, ": an entry of \"ranks\""), c.ranks.empty() ? 1 : c.ranks.back() + 1));
  }
  c.damage = checked_tensor(file, "damage", at::kDouble, 5);
  c.bases = checked_tensor(file, "bases", at::kFloat, 5);
  const bool fits = c.damage.sizes().slice(0, 3) == c.bases.sizes().slice(0, 3) && c.damage.size(2) == 2 &&
                    c.damage.size(4) == static_cast<int64_t>(c.ranks.size()) && c.bases.size(3) == c.bases.size(4) &&
                    c.ranks.back() < c.bases.size(4);
  check(kind, fits, path, ": damage ", c.damage.sizes(), " and bases ", c.bases.sizes(), " do not fit each other or the ranks ", c.ranks,
        ": expected [layers, groups, 2, levels, ranks] and [layers, groups, 2, d, d] with ranks below d");
  check(kind, (c.damage >= 0).all().item<bool>(), path, ": \"damage\" holds a negative entry, ", c.damage.min().item<double>());
  return c;
}

CalibrationController::CalibrationController(int64_t layers, Geometry geometry, std::vector<int64_t> ranks)
    : layers_(layers), geometry_(geometry), ranks_(std::move(ranks)) {}

at::Tensor CalibrationController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) {
  plan = std::make_shared<LayerPlan>();
  const auto out = exact_attention(q, k, v);
  if (out.requires_grad()) {
    out.register_hook([this, layer, q = q.detach(), k = k.detach(), v = v.detach(), w_o, exact = out.detach()](const at::Tensor& grad) {
      measure(layer, q, k, v, w_o, exact, grad);
    });
  }
  return out;
}

void CalibrationController::measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                                    const at::Tensor& exact, const at::Tensor& grad) {
  at::NoGradGuard no_grad;
  const BlockTree tree(q.size(2), geometry_);
  if (tree.num_pairs() == 0) {
    return;
  }
  const int64_t batch = q.size(0), groups = k.size(1), d = q.size(3);
  if (!damage_.defined()) {
    damage_ = at::zeros({layers_, groups, 2, tree.num_levels(), static_cast<int64_t>(ranks_.size())}, at::kDouble);
    grams_ = at::zeros({layers_, groups, 4, d, d}, at::kDouble);
  }
  TORCH_CHECK(damage_.size(3) == tree.num_levels(), "calibration on a sequence of ", q.size(2), " tokens with ", tree.num_levels(),
              " levels after others with ", damage_.size(3));
  const auto after_sinks = [&](const at::Tensor& x) {  // Gram of all rows of a group: [B, H or G, L, d] -> [G, d, d]
    return token_gram(x.slice(2, tree.sinks()), groups, x.size(2) - tree.sinks()).sum(0).to(at::kCPU);
  };
  const std::array grams = {after_sinks(q), after_sinks(k), after_sinks(v), output_gram(w_o, groups, d).to(at::kCPU)};
  for (int64_t i = 0; i < 4; ++i) {
    grams_[layer].select(1, i) += grams[static_cast<size_t>(i)];
  }

  const PairGrams far_grams = pair_grams(q, k, v, tree);
  FarBases bases = solve_far_bases(far_grams, w_o, /*scores=*/true, /*values=*/true);
  const int64_t pairs = tree.num_pairs();
  for (int64_t level = 0; level < tree.num_levels(); ++level) {
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (size_t i = 0; i < ranks_.size(); ++i) {
        std::vector<Ranks> ranks(static_cast<size_t>(batch * groups * pairs), Ranks{d, d});
        for (const PairRun& run : tree.runs()) {
          for (int64_t item = 0; run.level == level && item < batch * groups * run.count; ++item) {
            Ranks& r = ranks[static_cast<size_t>(item / run.count * pairs + run.first_pair + item % run.count)];
            (kind == 0 ? r.qk : r.v) = ranks_[i];
          }
        }
        const auto plan = make_plan(tree, std::move(ranks), far_grams, bases);
        const auto error = lowrank_attention(q, k, v, plan) - exact;
        // [B, H, L, d] -> one number a group and token: how far this error moves the log-likelihood there
        const auto moved = (error * grad).sum(3, /*keepdim=*/false, at::kDouble).unflatten(1, {groups, -1}).sum(2);
        damage_[layer].select(1, kind).select(1, level).select(1, static_cast<int64_t>(i)) += 0.5 * moved.pow(2).sum(at::IntArrayRef{0, 2}).to(at::kCPU);
      }
    }
  }
}

at::Tensor starting_bases(const at::Tensor& grams) {
  const auto of = [&](int64_t kind) { return grams.select(2, kind).flatten(0, 1).contiguous(); };
  const auto scores = solve_basis(of(0), of(1)).right;
  const auto values = solve_basis(of(2), of(3)).right;
  return at::stack({scores, values}, 1).unflatten(0, {grams.size(0), grams.size(1)});
}

}  // namespace drrl

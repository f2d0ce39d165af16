#include "policy/calibration.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/attention_part.h"
#include "core/error.h"
#include "core/gram.h"
#include "core/rows.h"
#include "distributed/agreement.h"
#include "policy/controller.h"
#include "policy/policy_file.h"
#include "policy/state.h"

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

void Calibration::save(const std::filesystem::path& file) const { write_safetensors(file, tensors(), metadata()); }

std::vector<NamedTensor> Calibration::tensors() const {
  std::vector<NamedTensor> all = {{"damage", damage}, {"bases", bases}};
  if (gates.defined()) {
    all.insert(all.end(), {{"gates", gates}, {"gated_damage", gated_damage}, {"exact_entries", exact_entries}});
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
  check(kind, path_exists(path, kind), "no calibration file ", path, " (drrl-policy calibrate makes one)");
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
  const bool fits = c.damage.sizes().slice(0, 3) == c.bases.sizes().slice(0, 3) && c.damage.size(2) == 2 &&
                    c.damage.size(4) == static_cast<int64_t>(c.ranks.size()) && c.bases.size(3) == c.bases.size(4) &&
                    c.ranks.back() < c.bases.size(4);
  check(kind, fits, path, ": damage ", c.damage.sizes(), " and bases ", c.bases.sizes(), " do not fit each other or the ranks ", c.ranks,
        ": expected [layers, groups, 2, levels, ranks] and [layers, groups, 2, d, d] with ranks below d");
  if (file.contains("gates")) {
    c.gates = file.tensor("gates", at::kDouble, 1);
    c.gated_damage = file.tensor("gated_damage", at::kDouble, 6);
    c.exact_entries = file.tensor("exact_entries", at::kDouble, 5);
    const int64_t choices = c.damage.size(4) + 1, gates = c.gates.size(0);
    check(kind, c.gated_damage.sizes() == at::IntArrayRef({c.layers(), c.groups(), 2, c.levels(), choices - 1, gates}) &&
                    c.exact_entries.sizes() == at::IntArrayRef({c.layers(), c.groups(), c.levels(), choices, gates}),
          path, ": gated_damage ", c.gated_damage.sizes(), " and exact_entries ", c.exact_entries.sizes(), " do not fit damage ", c.damage.sizes(), " and ", gates, " gates");
    check(kind, (c.gated_damage >= 0).all().item<bool>() && (c.exact_entries >= 0).all().item<bool>() && (c.exact_entries <= 1 + 1e-9).all().item<bool>(), path,
          ": a negative entry in gated_damage, or one of exact_entries outside 0..1");
  }
  check(kind, (c.damage >= 0).all().item<bool>(), path, ": \"damage\" holds a negative entry, ", c.damage.min().item<double>());
  return c;
}

Calibration scaled(const Calibration& calibration, const at::Tensor& log_factors) {
  TORCH_CHECK(log_factors.sizes() == calibration.damage.sizes(), "scaled: factors ", log_factors.sizes(), ", expected ", calibration.damage.sizes());
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
  const auto choice = [&](int64_t rank) { return std::find(c.ranks.begin(), c.ranks.end(), rank) - c.ranks.begin(); };  // of exact: the last
  double sum = 0;
  for (int64_t layer = 0; layer < table.layers(); ++layer) {
    for (int64_t group = 0; group < table.groups(); ++group) {
      for (int64_t level = 0; level < table.levels(); ++level) {
        const Ranks& r = table.at(layer, group, level);
        const int64_t measured = std::min(level, c.levels() - 1), qk = choice(r.qk), v = choice(r.v);
        const auto exact = static_cast<int64_t>(c.ranks.size());
        const int64_t gate = r.gated(c.head_dim()) ? (c.gates - static_cast<double>(r.gate)).abs().argmin().item<int64_t>() : -1;
        for (int64_t kind = 0; kind < 2; ++kind) {
          const auto rank = kind == 0 ? qk : v;
          sum += rank == exact ? 0 : gate < 0 ? damage[layer][group][kind][measured][rank] : c.gated_damage[layer][group][kind][measured][rank][gate].item<double>();
        }
      }
    }
  }
  return sum;
}

CalibrationController::CalibrationController(int64_t layers, Geometry geometry, std::vector<int64_t> ranks)
    : layers_(layers), geometry_(geometry), ranks_(std::move(ranks)) {}

at::Tensor CalibrationController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const at::Tensor& w_o, std::shared_ptr<LayerPlan>& plan) {
  plan = std::make_shared<LayerPlan>();
  const auto out = exact_attention(q, k, v);
  if (out.requires_grad()) {
    out.register_hook([this, layer, q = q.detach(), k = k.detach(), v = v.detach(), w_o](const at::Tensor& grad) {
      measure(layer, q, k, v, w_o, grad);
    });
  }
  return out;
}

void CalibrationController::measure(int64_t layer, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                                    const at::Tensor& grad) {
  at::NoGradGuard no_grad;
  const BlockTree tree(q.size(2), geometry_);
  if (tree.num_pairs() == 0) {
    return;
  }
  const int64_t batch = q.size(0), groups = k.size(1), d = q.size(3);
  if (!damage_.defined()) {
    damage_ = at::zeros({layers_, groups, 2, tree.num_levels(), static_cast<int64_t>(ranks_.size())}, at::kDouble);
    const auto choices = static_cast<int64_t>(ranks_.size()), gates = default_gates().size(0);
    gated_damage_ = at::zeros({layers_, groups, 2, tree.num_levels(), choices, gates}, at::kDouble);
    exact_entries_ = at::zeros({layers_, groups, tree.num_levels(), choices + 1, gates}, at::kDouble);
    entries_ = at::zeros({layers_, tree.num_levels()}, at::kDouble);
    grams_ = at::zeros({layers_, groups, 4, d, d}, at::kDouble);
  }
  TORCH_CHECK(damage_.size(3) == tree.num_levels(), "calibration on a sequence of ", q.size(2), " tokens with ", tree.num_levels(),
              " levels after others with ", damage_.size(3));
  const auto mass = attention_mass(q, k, tree);
  const auto of_blocks = [&](const at::Tensor& x, const at::Tensor& weights) {  // of all complete blocks: [B, H or G, L, d] -> [G, d, d]
    const int64_t rows = tree.geometry().near_block;
    return token_gram(x.narrow(2, tree.sinks(), tree.num_pairs() * rows), groups, rows, weights).sum(0).to(at::kCPU);
  };
  const std::array grams = {of_blocks(q, {}), of_blocks(k, mass), of_blocks(v, mass), output_gram(w_o, groups, d).to(at::kCPU)};
  for (int64_t i = 0; i < 4; ++i) {
    grams_[layer].select(1, i) += grams[static_cast<size_t>(i)];
  }

  const PairGrams grams_of_pairs = pair_grams(q, k, v, tree, mass);
  const FarBases bases = solve_far_bases(grams_of_pairs, w_o, /*scores=*/true, /*values=*/true);
  const at::Tensor thresholds = default_gates();
  const auto choices = static_cast<int64_t>(ranks_.size()), gates = thresholds.size(0);
  const auto of_pairs = at::zeros({batch, groups, 2, tree.num_pairs(), choices}, at::kDouble);
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  // Exact attention again, for its log-sum-exp, by which parts are weighed.
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto whole = at::empty(q.sizes(), q.options()), logsumexp = at::empty({batch, groups, q.size(1) / groups, q.size(2)}, q.options().dtype(wide));
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {groups, -1}); };
  attention_part(by_group(q), k, v, /*causal=*/true, scale, by_group(whole), logsumexp);

  for (const PairRun& run : tree.runs()) {
    const auto rows_of = [&](const at::Tensor& x) { return query_rows(x, groups, run); };  // [B G count, g rows, e]
    const auto run_q = rows_of(q), run_k = key_rows(k, run), run_v = key_rows(v, run);
    const auto run_exact = rows_of(whole), run_grad = rows_of(grad.contiguous());
    const auto run_logsumexp = rows_of(logsumexp.flatten(1, 2).unsqueeze(3)).squeeze(2);
    // The run's part of attention with these queries, keys and values, unnormalized over the whole row: its output and its share of the softmax.
    const auto part = [&](const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& correction, const at::Tensor& up) {
      const auto [out, sum] = attention_rows(queries, keys, values, scale);
      const auto share = ((correction.defined() ? sum + correction : sum) - run_logsumexp).exp().unsqueeze(2);
      return std::pair(out_of_basis(out, up) * share, share);
    };
    const auto pairs_of = [&](const at::Tensor& x) {  // [B G pairs, d, e] -> those of this run, [B G count, d, e]
      return x.unflatten(0, {batch * groups, tree.num_pairs()}).narrow(1, run.first_pair, run.count).flatten(0, 1);
    };
    const auto [exact_out, exact_share] = part(run_q, run_k, run_v, {}, {});
    const auto keys = at::full({run_q.size(0)}, static_cast<double>(run.key_rows), bases.scores.singular_values.options());
    const auto key_grams = pairs_of(grams_of_pairs.keys.flatten(0, 2));
    entries_[layer][run.level] += batch * run.count * run.query_rows * run.key_rows;
    const auto of_groups = [&](const at::Tensor& x) { return x.view({batch, groups, run.count}).sum(at::IntArrayRef{0, 2}).to(at::kCPU); };
    const auto met_before = rows_of(met.flatten(1, 2).unsqueeze(3)).squeeze(2);
    const auto damage_of = [&](const at::Tensor& moved) {  // [.., g rows] -> [..]
      return 0.5 * moved.unflatten(-1, {-1, run.query_rows}).sum(-2).pow(2).sum(-1);
    };
    // With gates: one pair at a time, as scores are matrices here.
    const auto with_gates = [&](int64_t kind, int64_t rank, const at::Tensor& left, const at::Tensor& right, const at::Tensor& correction) {
      auto left_over = at::zeros({gates, run_q.size(0)}, at::kDouble), exact = at::zeros({gates, run_q.size(0)}, at::kDouble);
      for (int64_t n = 0; n < run_q.size(0); ++n) {
        const auto of = [&](const at::Tensor& x) { return x.narrow(0, n, 1); };
        const auto low_q = kind == 0 ? at::bmm(of(run_q), of(left)) : of(run_q), low_k = kind == 0 ? at::bmm(of(run_k), of(right)) : of(run_k);
        const auto low_v = kind == 0 ? of(run_v) : at::bmm(at::bmm(of(run_v), of(left)), of(right).transpose(1, 2));
        for (int64_t gate = 0; gate < gates; ++gate) {
          const auto gated = gated_scores(of(run_q), of(run_k), low_q, low_k, correction.defined() ? of(correction) : correction, of(met_before),
                                          thresholds[gate].item<double>(), scale);
          const auto weights = (gated.scores - of(run_logsumexp).unsqueeze(2)).exp();
          const auto part_out = kind == 0 ? at::bmm(weights.to(run_v.scalar_type()), of(run_v))
                                          : of(exact_out) + at::bmm(weights.masked_fill(gated.exact, 0).to(run_v.scalar_type()), low_v - of(run_v));
          const auto error = (of(run_exact) - of(exact_out) + part_out) / (1 - of(exact_share) + weights.sum(2, /*keepdim=*/true)) - of(run_exact);
          left_over[gate][n] = damage_of((error * of(run_grad)).sum(2, /*keepdim=*/false, at::kDouble)).item();
          exact[gate][n] = gated.exact.sum().item();
        }
      }
      for (int64_t gate = 0; gate < gates; ++gate) {
        gated_damage_[layer].select(1, kind).select(1, run.level).select(1, rank).select(1, gate) += of_groups(left_over[gate]);
        if (kind == 0 || rank == 0) {
          const double heads = static_cast<double>(q.size(1) / groups);
          exact_entries_[layer].select(1, run.level).select(1, kind == 0 ? rank : choices).select(1, gate) += of_groups(exact[gate]) / heads;
        }
      }
    };
    for (int64_t kind = 0; kind < 2; ++kind) {
      const Basis& all = kind == 0 ? bases.scores : bases.values;
      for (size_t i = 0; i < ranks_.size(); ++i) {
        const auto left = pairs_of(all.left).narrow(2, 0, ranks_[i]), right = pairs_of(all.right).narrow(2, 0, ranks_[i]);
        const auto in_dtype = [&](const at::Tensor& x) { return x.to(q.scalar_type()); };
        const at::Tensor correction = kind == 0 ? residual_correction(run_q, residual_factor({left, right, {}}, key_grams, keys)) : at::Tensor();
        const auto [out, share] =
            kind == 0 ? part(at::bmm(run_q, in_dtype(left)), at::bmm(run_k, in_dtype(right)), run_v, correction, {})
                      : part(run_q, run_k, at::bmm(run_v, in_dtype(left)), {}, in_dtype(right));
        const auto error = (run_exact - exact_out + out) / (1 - exact_share + share) - run_exact;
        // [B G count, g rows, d] -> one number a pair and token: how far this error moves the log-likelihood there
        const auto moved = (error * run_grad).sum(2, /*keepdim=*/false, at::kDouble);
        const auto damage = damage_of(moved).view({batch, groups, run.count});
        with_gates(kind, static_cast<int64_t>(i), in_dtype(left), in_dtype(right), correction);
        of_pairs.select(2, kind).narrow(2, run.first_pair, run.count).select(3, static_cast<int64_t>(i)) += damage.to(at::kCPU);
      }
    }
    auto met_of_run = token_runs(met.flatten(1, 2).unsqueeze(3), groups, run.query_begin, run.count, run.query_rows, run.stride);
    met_of_run.copy_(at::logaddexp(met_of_run, exact_logsumexp.view(met_of_run.sizes())));
    damage_[layer].select(2, run.level) += of_pairs.narrow(3, run.first_pair, run.count).sum(at::IntArrayRef{0, 3});
  }
  if (start_.defined()) {
    const auto state = pair_state(grams_of_pairs, w_o, for_batch(start_[layer], batch), tree, 0, ranks_);
    if (!states_.defined() || states_[layer].sizes() != state.sizes()) {
      const auto all_layers = [&](const at::Tensor& x) { return at::zeros_like(x).unsqueeze(0).repeat_interleave(layers_, 0); };
      states_ = all_layers(state);
      pair_damage_ = all_layers(of_pairs);
    }
    states_[layer].copy_(state);
    pair_damage_[layer].copy_(of_pairs);
  }
}

at::Tensor starting_bases(const at::Tensor& grams) {
  const auto of = [&](int64_t kind) { return grams.select(2, kind).flatten(0, 1).contiguous(); };
  const auto scores = solve_basis(of(0), of(1)).right;
  const auto values = solve_basis(of(2), of(3)).right;
  return at::stack({scores, values}, 1).unflatten(0, {grams.size(0), grams.size(1)});
}

}  // namespace drrl

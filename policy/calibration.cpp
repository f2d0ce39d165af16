#include "policy/calibration.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/attention_part.h"
#include "core/error.h"
#include "core/gram.h"
#include "core/lowrank_attention.h"
#include "core/rows.h"
#include "distributed/agreement.h"
#include "policy/controller.h"
#include "policy/policy_file.h"
#include "policy/state.h"

namespace drrl {
namespace {

constexpr const char* kFormat = "drrl-calibration-4";
constexpr int64_t kScoresAtOnce = 1 << 24;  // of pairs that are measured together

// n pairs of R query rows, those of all heads of a group, and K keys, with scores or values at a low rank.
struct LowPairs {
  at::Tensor q, k, v, grad;             // at full width, [n, R or K, d]; grad: of the rows' outputs
  at::Tensor low_q, low_k, correction;  // low scores are low_q low_k^T times scale and correction [n, R]; q, k and undefined where scores are exact
  at::Tensor low_v;                     // [n, K, d], in and out of the basis; undefined where values are exact
  at::Tensor logsumexp, met;            // of all of a row's exact scores; of those nearer than the pair: [n, R]
  // With grad's product, as low rank leaves them: the row's output before it is divided by the sum of its weights; that sum; the exact output. [n, R] float64
  at::Tensor output, weights, exact_output;

  LowPairs narrow(int64_t begin, int64_t count) const {
    LowPairs part = *this;
    for (at::Tensor* x : {&part.q, &part.k, &part.v, &part.grad, &part.low_q, &part.low_k, &part.correction, &part.low_v, &part.logsumexp, &part.met, &part.output,
                          &part.weights, &part.exact_output}) {
      *x = x->defined() ? x->narrow(0, begin, count) : *x;
    }
    return part;
  }
  // How far each row's error moves the likelihood.
  at::Tensor moved() const { return output / weights - exact_output; }
};

// The same under each gate, [gates, n, R], and how many entries it makes exact, [gates, n].
std::pair<at::Tensor, at::Tensor> moved_behind_gates(const LowPairs& x, const at::Tensor& gates, double scale) {
  const int64_t n = x.q.size(0), rows = x.q.size(1), keys = x.k.size(1), d = x.q.size(2), count = gates.size(0);
  const auto wide = x.logsumexp.scalar_type();
  const auto flat = [&](const at::Tensor& rows_of) { return rows_of.reshape({-1, d}); };
  auto low = at::bmm(x.low_q, x.low_k.transpose(1, 2)).to(wide).mul_(scale);
  if (x.correction.defined()) {
    low += x.correction.unsqueeze(2);
  }
  low.sub_(x.logsumexp.unsqueeze(2)).clamp_max_(80).exp_();
  auto met = (x.met - x.logsumexp).exp();
  // What entries change, by the highest gate that makes them exact: [gates, n R].
  auto output = at::zeros({count, n * rows}, x.output.options()), weights = at::zeros_like(output), exact = at::zeros_like(output);
  const auto thresholds = gates.to(met.options());
  for (int64_t begin = 0; begin < keys; begin += kGateChunk) {
    const auto chunk = low.narrow(2, begin, std::min(kGateChunk, keys - begin));
    met += chunk.sum(2);
    const auto heavy = chunk >= (met * gates[0].item<double>()).unsqueeze(2);
    const auto at = heavy.nonzero();
    const auto row = at.select(1, 0) * rows + at.select(1, 1), key = at.select(1, 0) * keys + begin + at.select(1, 2);
    const auto dot = [&](const at::Tensor& of_rows, const at::Tensor& of_keys) {
      return (flat(of_rows).index_select(0, row) * flat(of_keys).index_select(0, key)).sum(1, /*keepdim=*/false, wide);
    };
    const auto weight = chunk.masked_select(heavy);
    const auto gate = at::searchsorted(thresholds, weight / met.flatten().index_select(0, row), /*out_int32=*/false, /*right=*/true).sub_(1).clamp_min_(0);
    const auto add = [&](at::Tensor& to, const at::Tensor& change) { to.view({-1}).index_add_(0, gate * (n * rows) + row, change.to(to.scalar_type())); };
    if (x.low_v.defined()) {
      add(output, weight * dot(x.grad, x.v - x.low_v));
    } else {
      const auto change = (dot(x.q, x.k) * scale - x.logsumexp.flatten().index_select(0, row)).exp() - weight;
      add(output, change * dot(x.grad, x.v));
      add(weights, change);
      met.view({-1}).index_add_(0, row, change);
    }
    add(exact, at::ones_like(weight));
  }
  const auto of_gates = [&](const at::Tensor& changes) { return changes.flip(0).cumsum(0).flip(0).view({count, n, rows}); };
  return {(x.output + of_gates(output)) / (x.weights + of_gates(weights)) - x.exact_output, of_gates(exact).sum(2)};
}

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
  const at::Tensor gates = default_gates();
  const auto choices = static_cast<int64_t>(ranks_.size());
  const auto of_pairs = at::zeros({batch, groups, 2, tree.num_pairs(), choices}, at::kDouble);
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // Exact attention again, for its log-sum-exp, by which parts are weighed.
  auto whole = at::empty(q.sizes(), q.options()), logsumexp = at::empty({batch, groups, q.size(1) / groups, q.size(2)}, q.options().dtype(wide));
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {groups, -1}); };
  attention_part(by_group(q), k, v, /*causal=*/true, scale, by_group(whole), logsumexp);
  // Of what each row meets before its far pairs of a level, [B, H, L, 1]: its own block, the sinks, nearer pairs.
  auto near_out = at::empty_like(q), met = at::empty({batch, q.size(1), q.size(2)}, logsumexp.options());
  near_attention(q, k, v, tree, near_out, met);
  if (const int64_t sinks = tree.sinks(); sinks > 0) {
    auto behind = met.slice(2, sinks);
    const auto scores = at::matmul(by_group(q.slice(2, sinks)), k.slice(2, 0, sinks).unsqueeze(2).transpose(3, 4)).to(wide) * scale;  // [B, G, g, L - s, s]
    behind.copy_(at::logaddexp(behind, scores.logsumexp(4).flatten(1, 2)));
  }
  met = met.unsqueeze(3);

  for (const PairRun& run : tree.runs()) {
    const auto rows_of = [&](const at::Tensor& x) { return query_rows(x, groups, run); };  // [B G count, g rows, e]
    const auto run_q = rows_of(q), run_k = key_rows(k, run), run_v = key_rows(v, run);
    const auto run_exact = rows_of(whole), run_grad = rows_of(grad.contiguous());
    const auto run_logsumexp = rows_of(logsumexp.flatten(1, 2).unsqueeze(3)).squeeze(2);
    const auto along_grad = [&](const at::Tensor& rows) { return (rows * run_grad).sum(2, /*keepdim=*/false, at::kDouble); };
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
    const int64_t heads_per_group = q.size(1) / groups;
    entries_[layer][run.level] += batch * run.count * run.query_rows * run.key_rows;
    const auto met_of_run = token_runs(met, groups, run.query_begin, run.count, run.query_rows, run.stride);
    LowPairs pairs{run_q, run_k, run_v, run_grad, run_q, run_k, {}, {}, run_logsumexp, rows_of(met).squeeze(2), {}, {}, along_grad(run_exact)};
    const auto damage_of = [&](const at::Tensor& moved) {  // [.., g rows] -> [..]: all heads of a token together
      return 0.5 * moved.unflatten(-1, {heads_per_group, run.query_rows}).sum(-2).square().sum(-1);
    };
    const auto behind_gates = [&](int64_t kind, int64_t rank) {
      const int64_t step = std::max<int64_t>(1, kScoresAtOnce / (pairs.q.size(1) * run.key_rows));
      for (int64_t begin = 0; begin < run_q.size(0); begin += step) {
        const int64_t count = std::min(step, run_q.size(0) - begin);
        const auto [moved, exact] = moved_behind_gates(pairs.narrow(begin, count), gates, scale);
        const auto group = at::arange(begin, begin + count).div(run.count, "floor").remainder(groups);
        const auto add = [&](at::Tensor to, const at::Tensor& of_gates) { to.index_add_(0, group, of_gates.t().to(at::kCPU)); };  // [groups, gates]
        add(gated_damage_[layer].select(1, kind).select(1, run.level).select(1, rank), damage_of(moved));
        if (kind == 0 || rank == 0) {  // exact scores, with values of any rank
          add(exact_entries_[layer].select(1, run.level).select(1, kind == 0 ? rank : choices), exact / heads_per_group);
        }
      }
    };
    for (int64_t kind = 0; kind < 2; ++kind) {
      const Basis& all = kind == 0 ? bases.scores : bases.values;
      for (int64_t i = 0; i < choices; ++i) {
        const auto in_dtype = [&](const at::Tensor& x) { return pairs_of(x).narrow(2, 0, ranks_[static_cast<size_t>(i)]).to(q.scalar_type()); };
        const auto left = in_dtype(all.left), right = in_dtype(all.right);
        std::pair<at::Tensor, at::Tensor> low;
        if (kind == 0) {
          const auto columns = [&](const at::Tensor& x) { return pairs_of(x).narrow(2, 0, ranks_[static_cast<size_t>(i)]); };
          pairs.correction = residual_correction(run_q, residual_factor({columns(all.left), columns(all.right), {}}, key_grams, keys));
          pairs.low_q = at::bmm(run_q, left);
          pairs.low_k = at::bmm(run_k, right);
          low = part(pairs.low_q, pairs.low_k, run_v, pairs.correction, {});
        } else {
          const auto low_v = at::bmm(run_v, left);
          pairs.low_q = run_q;
          pairs.low_k = run_k;
          pairs.correction.reset();
          pairs.low_v = at::bmm(low_v, right.transpose(1, 2));
          low = part(run_q, run_k, low_v, {}, right);
        }
        pairs.output = along_grad(run_exact - exact_out + low.first);
        pairs.weights = (1 - exact_share + low.second).squeeze(2).to(at::kDouble);
        const auto damage = damage_of(pairs.moved()).view({batch, groups, run.count});
        of_pairs.select(2, kind).narrow(2, run.first_pair, run.count).select(3, i) += damage.to(at::kCPU);
        behind_gates(kind, i);
      }
    }
    met_of_run.copy_(at::logaddexp(met_of_run, (exact_share.squeeze(2).log() + run_logsumexp).view(met_of_run.sizes())));
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

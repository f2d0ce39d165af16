#include "policy/calibration/calibration.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include <ATen/Parallel.h>

#include "core/attention/exact_attention.h"
#include "core/attention/far_bases.h"
#include "core/attention/lowrank_attention.h"
#include "core/attention/rows.h"
#include "core/error.h"
#include "core/linalg/basis.h"
#include "core/linalg/gram.h"
#include "distributed/collectives/agreement.h"
#include "policy/attention/layer_plan.h"
#include "policy/calibration/pair_features.h"
#include "policy/calibration/policy_file.h"

namespace drrl {
namespace {

constexpr const char* kFormat = "drrl-calibration-4";
constexpr int64_t kScoresAtOnce = 1 << 19;  // a matrix of so many stays in a cache

// n pairs of R query rows, those of all heads of a group, and K keys, in float32 and, with grad's
// product, float64.
struct Pairs {
  at::Tensor q, k, v, grad;   // [n, R or K, d]; grad: of the rows' outputs
  at::Tensor logsumexp, met;  // [n, R]: of all of a row's scores; of those nearer than the pair
  at::Tensor output;          // [n, R] float64
};

// One kind of theirs at one rank, which leaves `output` before it is divided by the sum of
// `weights`, [n, R] float64.
struct LowPairs {
  at::Tensor rows, keys;  // scores: q and k in their bases; values: grad and v, [n, R or K, r]
  at::Tensor correction;  // [n, R]; undefined for values
  at::Tensor output, weights;
  bool scores() const { return correction.defined(); }
};

// What gates make of it: how far each row's error moves the likelihood, [gates, n, R] float64, and
// how many of its entries are exact, likewise.
struct Gated {
  at::Tensor moved, exact;
};

float sum_of(const float* x, int64_t count) {
  std::array<float, 16> lanes{};  // which the compiler adds side by side
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (size_t lane = 0; lane < 16; ++lane) {
      lanes[lane] += x[i + static_cast<int64_t>(lane)];
    }
  }
  return std::accumulate(x + i, x + count, std::accumulate(lanes.begin(), lanes.end(), 0.0F));
}

// One row: adds to output, weights and exact [gates][stride], at the highest gate that each entry
// passes, what changes if it is exact. low: weights that gates see; whole: exact ones, along: grad
// v^T, low_along: the same in the basis (null for scores), all [keys].
void add_entries(const float* low, const float* whole, const float* along, const float* low_along,
                 int64_t keys, float met, const std::vector<float>& gates, double* output,
                 double* weights, double* exact, int64_t stride) {
  for (int64_t begin = 0; begin < keys; begin += kGateChunk) {
    const int64_t end = std::min(begin + kGateChunk, keys);
    met += sum_of(low + begin, end - begin);
    const float least = gates.front() * met, so_far = met;
    for (int64_t j = begin; j < end; ++j) {
      if (low[j] >= least) {
        const auto passed = std::upper_bound(gates.begin() + 1, gates.end(), low[j] / so_far) -
                            gates.begin() - 1;
        const int64_t at = passed * stride;
        const float change = whole[j] - low[j];
        output[at] += low_along != nullptr ? whole[j] * (along[j] - low_along[j])
                                           : change * along[j];
        weights[at] += change;
        exact[at] += 1;
        met += change;
      }
    }
  }
}

std::vector<Gated> behind_gates(const Pairs& x, const std::vector<LowPairs>& all,
                                const at::Tensor& gates, double scale) {
  const int64_t n = x.q.size(0), rows = x.q.size(1), keys = x.k.size(1), count = gates.size(0);
  const std::vector<float> thresholds = [&] {
    const at::Tensor f = gates.to(at::kFloat).contiguous();
    return std::vector<float>(f.const_data_ptr<float>(), f.const_data_ptr<float>() + count);
  }();
  const auto zeros = [&] { return at::zeros({count, n, rows}, at::kDouble); };
  std::vector<std::array<at::Tensor, 3>>
      changes;  // of output, weights and exact, by the highest gate passed
  for (size_t i = 0; i < all.size(); ++i) {
    changes.push_back({zeros(), zeros(), zeros()});
  }
  const int64_t pairs_at_once = std::max<int64_t>(1, kScoresAtOnce / (rows * keys)),
                rows_at_once = std::min(rows, std::max<int64_t>(1, kScoresAtOnce / keys));
  const auto on_cpu = [](const at::Tensor& t) { return t.to(at::kCPU, at::kFloat).contiguous(); };
  for (int64_t pair = 0; pair < n; pair += pairs_at_once) {
    const int64_t pairs = std::min(pairs_at_once, n - pair);
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t some = std::min(rows_at_once, rows - row);
      const auto of_rows = [&](const at::Tensor& t) {
        return t.narrow(0, pair, pairs).narrow(1, row, some);
      };
      const auto product = [&](const at::Tensor& a, const at::Tensor& b) {
        return on_cpu(wide_product(of_rows(a), b.narrow(0, pair, pairs).transpose(1, 2)));
      };
      const auto logsumexp = on_cpu(of_rows(x.logsumexp)),
                 met = (on_cpu(of_rows(x.met)) - logsumexp).exp();
      const auto to_weights = [&](const at::Tensor& scores, const at::Tensor& shift) {
        return at::add(shift.unsqueeze(2), scores, scale).clamp_max_(80).exp_();
      };
      const auto whole = to_weights(product(x.q, x.k), -logsumexp), along = product(x.grad, x.v);
      for (size_t i = 0; i < all.size(); ++i) {
        const auto projected = product(all[i].rows, all[i].keys);
        const auto low = all[i].scores()
                             ? to_weights(projected, on_cpu(of_rows(all[i].correction)) - logsumexp)
                             : whole;
        const auto pointer = [&](const at::Tensor& t) { return t.const_data_ptr<float>(); };
        at::parallel_for(
            0, pairs * some, 1,
            [&, low_at = pointer(low), whole_at = pointer(whole), along_at = pointer(along),
             projected_at = pointer(projected), met_at = pointer(met)](int64_t begin, int64_t end) {
              for (int64_t at = begin; at < end; ++at) {
                const int64_t to = (pair + at / some) * rows + row + at % some;
                const auto into = [&](size_t which) {
                  return changes[i][which].data_ptr<double>() + to;
                };
                add_entries(low_at + at * keys, whole_at + at * keys, along_at + at * keys,
                            all[i].scores() ? nullptr : projected_at + at * keys, keys, met_at[at],
                            thresholds, into(0), into(1), into(2), n * rows);
              }
            });
      }
    }
  }
  std::vector<Gated> result;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto of_gates = [&](size_t which) { return changes[i][which].flip(0).cumsum(0).flip(0); };
    const auto at_low_rank = all[i].weights.to(at::kCPU), left = at_low_rank + of_gates(1);
    const auto moved = (all[i].output.to(at::kCPU) + of_gates(0)) / left - x.output.to(at::kCPU);
    // Where nearly all weight at low rank is of entries that become exact and are far lighter then,
    // what is left has no digits: the row counts as exact.
    result.push_back(
        {at::where(left > 1e-5 * at_low_rank, moved, at::zeros({}, moved.options())), of_gates(2)});
  }
  return result;
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

CalibrationController::CalibrationController(int64_t layers, Geometry geometry,
                                             std::vector<int64_t> ranks)
    : layers_(layers), geometry_(geometry), ranks_(std::move(ranks)) {}

at::Tensor CalibrationController::attend(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                         const at::Tensor& v, const at::Tensor& w_o,
                                         std::shared_ptr<LayerPlan>& plan) {
  plan = std::make_shared<LayerPlan>();
  const auto out = exact_attention(q, k, v);
  if (out.requires_grad()) {
    out.register_hook([this, layer, q = q.detach(), k = k.detach(), v = v.detach(),
                       w_o](const at::Tensor& grad) { measure(layer, q, k, v, w_o, grad); });
  }
  return out;
}

void CalibrationController::measure(int64_t layer, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& w_o,
                                    const at::Tensor& grad) {
  at::NoGradGuard no_grad;
  const BlockTree tree(q.size(2), geometry_);
  if (tree.num_pairs() == 0) {
    return;
  }
  const int64_t batch = q.size(0), groups = k.size(1), d = q.size(3);
  if (!damage_.defined()) {
    damage_ = at::zeros(
        {layers_, groups, 2, tree.num_levels(), static_cast<int64_t>(ranks_.size())}, at::kDouble);
    const auto choices = static_cast<int64_t>(ranks_.size()), gates = default_gates().size(0);
    gated_damage_ = at::zeros({layers_, groups, 2, tree.num_levels(), choices, gates}, at::kDouble);
    exact_entries_ = at::zeros({layers_, groups, tree.num_levels(), choices + 1, gates},
                               at::kDouble);
    entries_ = at::zeros({layers_, tree.num_levels()}, at::kDouble);
    grams_ = at::zeros({layers_, groups, 4, d, d}, at::kDouble);
  }
  TORCH_CHECK(damage_.size(3) == tree.num_levels(), "calibration on a sequence of ", q.size(2),
              " tokens with ", tree.num_levels(), " levels after others with ", damage_.size(3));
  const auto mass = attention_mass(q, k, tree);
  const auto of_blocks =
      [&](const at::Tensor& x,
          const at::Tensor& weights) {  // of all complete blocks: [B, H or G, L, d] -> [G, d, d]
        const int64_t rows = tree.geometry().near_block;
        return token_gram(x.narrow(2, tree.sinks(), tree.num_pairs() * rows), groups, rows, weights)
            .sum(0)
            .to(at::kCPU);
      };
  const std::array grams = {of_blocks(q, {}), of_blocks(k, mass), of_blocks(v, mass),
                            output_gram(w_o, groups, d).to(at::kCPU)};
  for (int64_t i = 0; i < 4; ++i) {
    grams_[layer].select(1, i) += grams[static_cast<size_t>(i)];
  }

  PairGrams grams_of_pairs = pair_grams(q, k, v, tree, mass);
  const UsablePairs usable = usable_pairs(grams_of_pairs, w_o);
  const FarBases bases = solve_far_bases(grams_of_pairs, w_o, /*scores=*/true, /*values=*/true);
  const at::Tensor gates = default_gates();
  const auto choices = static_cast<int64_t>(ranks_.size());
  const auto of_pairs = at::zeros({batch, groups, 2, tree.num_pairs(), choices}, at::kDouble);
  const auto gated_of_pairs = at::zeros(
      {batch, groups, 2, tree.num_pairs(), choices, gates.size(0)}, at::kDouble);
  const auto exact_of_pairs = at::zeros(
      {batch, groups, tree.num_pairs(), choices + 1, gates.size(0)}, at::kDouble);  // shares
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // Exact attention again, for its log-sum-exp, by which parts are weighed.
  auto whole = at::empty(q.sizes(), q.options()),
       logsumexp = at::empty({batch, groups, q.size(1) / groups, q.size(2)},
                             q.options().dtype(wide));
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {groups, -1}); };
  attention_part(by_group(q), k, v, /*causal=*/true, scale, by_group(whole), logsumexp);
  // Of what each row meets before its far pairs of a level, [B, H, L, 1]: its own block, the sinks,
  // nearer pairs.
  auto near_out = at::empty_like(q),
       met = at::empty({batch, q.size(1), q.size(2)}, logsumexp.options());
  near_attention(q, k, v, tree, near_out, met);
  if (const int64_t sinks = tree.sinks(); sinks > 0) {
    auto behind = met.slice(2, sinks);
    const auto scores = at::matmul(by_group(q.slice(2, sinks)).to(wide),
                                   k.slice(2, 0, sinks).unsqueeze(2).transpose(3, 4).to(wide)) *
                        scale;  // [B, G, g, L - s, s]
    behind.copy_(at::logaddexp(behind, scores.logsumexp(4).flatten(1, 2)));
  }
  met = met.unsqueeze(3);

  for (const PairRun& run : tree.runs()) {
    const auto rows_of = [&](const at::Tensor& x) {
      return query_rows(x, groups, run);
    };  // [B G count, g rows, e]
    const auto run_q = rows_of(q), run_k = key_rows(k, run), run_v = key_rows(v, run);
    const auto run_exact = rows_of(whole), run_grad = rows_of(grad.contiguous());
    const auto run_logsumexp = rows_of(logsumexp.flatten(1, 2).unsqueeze(3)).squeeze(2);
    const auto along_grad = [&](const at::Tensor& rows) {
      return (rows * run_grad).sum(2, /*keepdim=*/false, at::kDouble);
    };
    // The run's part of attention with these queries, keys and values, unnormalized over the whole
    // row: its output and its share of the softmax.
    const auto part = [&](const at::Tensor& queries, const at::Tensor& keys,
                          const at::Tensor& values, const at::Tensor& correction,
                          const at::Tensor& up) {
      const auto [out, sum] = attention_rows(queries, keys, values, scale);
      const auto share = ((correction.defined() ? sum + correction : sum) - run_logsumexp)
                             .clamp_max(60)
                             .exp()
                             .unsqueeze(2);
      return std::pair(out_of_basis(out, up) * share, share);
    };
    const auto pairs_of =
        [&](const at::Tensor& x) {  // [B G pairs, d, e] -> those of this run, [B G count, d, e]
          return x.unflatten(0, {batch * groups, tree.num_pairs()})
              .narrow(1, run.first_pair, run.count)
              .flatten(0, 1);
        };
    const auto [exact_out, exact_share] = part(run_q, run_k, run_v, {}, {});
    const auto keys = at::full({run_q.size(0)}, static_cast<double>(run.key_rows),
                               bases.scores.singular_values.options());
    const auto key_grams = pairs_of(grams_of_pairs.keys.flatten(0, 2));
    const int64_t heads_per_group = q.size(1) / groups;
    const int64_t entries = run.query_rows * run.key_rows;  // of a pair and head
    entries_[layer][run.level] += batch * run.count * entries;
    const auto met_of_run = token_runs(met, groups, run.query_begin, run.count, run.query_rows,
                                       run.stride);
    const Pairs pairs{run_q,
                      run_k,
                      run_v,
                      run_grad,
                      run_logsumexp,
                      rows_of(met).squeeze(2),
                      along_grad(run_exact)};
    const auto damage_of =
        [&](const at::Tensor& moved) {  // [.., n, g rows] -> [..]: all heads of a token together
          return 0.5 *
                 moved.unflatten(-1, {heads_per_group, run.query_rows}).sum(-2).square().sum(-1);
        };
    const auto by_pair = [&](const at::Tensor& x) {
      return x.unflatten(1, {batch, groups, run.count}).movedim(0, 3);
    };  // [gates, n] -> [B, G, count, gates]
    // Pairs of the run that no low rank serves, [B, G, count] bool: they will be exact, and suffer
    // nothing.
    const auto served_exactly = [&](Ranks at, const at::Tensor& residual) {
      std::vector<Ranks> ranks(static_cast<size_t>(batch * groups * run.count), at);
      UsablePairs of_run;
      for (int64_t item = 0; item < batch * groups * run.count; ++item) {
        const auto in_all = static_cast<size_t>(item / run.count * tree.num_pairs() +
                                                run.first_pair + item % run.count);
        of_run.scores.push_back(usable.scores[in_all]);
        of_run.values.push_back(usable.values[in_all]);
      }
      const auto of_pairs_in = [&](const at::Tensor& gram) {
        return gram.narrow(2, run.first_pair, run.count);
      };
      leave_exact({of_pairs_in(grams_of_pairs.queries), of_pairs_in(grams_of_pairs.keys),
                   of_pairs_in(grams_of_pairs.values)},
                  of_run, heads_per_group, {run.key_rows}, residual, ranks);
      auto mask = at::zeros({batch, groups, run.count}, at::kBool);
      std::transform(ranks.begin(), ranks.end(), mask.data_ptr<bool>(),
                     [&](const Ranks& r) { return r != at; });
      return mask;
    };
    std::vector<LowPairs> all;
    std::vector<at::Tensor> exact_anyway;
    for (int64_t kind = 0; kind < 2; ++kind) {
      for (int64_t i = 0; i < choices; ++i) {
        const auto columns = [&](const at::Tensor& x) {
          return pairs_of(x).narrow(2, 0, ranks_[static_cast<size_t>(i)]);
        };
        const Basis basis{columns((kind == 0 ? bases.scores : bases.values).left),
                          columns((kind == 0 ? bases.scores : bases.values).right),
                          {}};
        const auto left = basis.left.to(q.scalar_type()), right = basis.right.to(q.scalar_type());
        LowPairs& low = all.emplace_back();
        std::pair<at::Tensor, at::Tensor> far;
        if (kind == 0) {
          const auto residual = residual_factor(basis, key_grams, keys);
          exact_anyway.push_back(served_exactly({ranks_[static_cast<size_t>(i)], d}, residual));
          low.correction = residual_correction(run_q, residual);
          low.rows = at::bmm(run_q, left);
          low.keys = at::bmm(run_k, right);
          far = part(low.rows, low.keys, run_v, low.correction, {});
        } else {
          exact_anyway.push_back(served_exactly({d, ranks_[static_cast<size_t>(i)]}, {}));
          low.rows = at::bmm(run_grad, right);
          low.keys = at::bmm(run_v, left);
          far = part(run_q, run_k, low.keys, {}, right);
        }
        low.output = along_grad(run_exact - exact_out + far.first);
        low.weights = (1 - exact_share + far.second)
                          .squeeze(2)
                          .to(at::kDouble)
                          .clamp_min(1e-6);  // below there are no digits
        const auto damage = damage_of(low.output / low.weights - pairs.output)
                                .view({batch, groups, run.count});
        of_pairs.select(2, kind)
            .narrow(2, run.first_pair, run.count)
            .select(3, i) += damage.to(at::kCPU).masked_fill(exact_anyway.back(), 0);
      }
    }
    const std::vector<Gated> gated = behind_gates(pairs, all, gates, scale);
    for (int64_t i = 0; i < 2 * choices; ++i) {
      const int64_t kind = i / choices, rank = i % choices;
      gated_of_pairs.select(2, kind)
          .narrow(2, run.first_pair, run.count)
          .select(3, rank)
          .copy_(by_pair(damage_of(gated[static_cast<size_t>(i)].moved))
                     .to(at::kCPU)
                     .masked_fill(exact_anyway[static_cast<size_t>(i)].unsqueeze(3), 0));
      if (i <= choices) {  // by score rank; exact scores, as under values of any rank, are the last
        exact_of_pairs.narrow(2, run.first_pair, run.count)
            .select(3, i)
            .copy_(by_pair(gated[static_cast<size_t>(i)].exact.sum(-1)) /
                   static_cast<double>(heads_per_group * entries));
      }
    }
    met_of_run.copy_(at::logaddexp(
        met_of_run, (exact_share.squeeze(2).log() + run_logsumexp).view(met_of_run.sizes())));
    damage_[layer].select(
        2, run.level) += of_pairs.narrow(3, run.first_pair, run.count).sum(at::IntArrayRef{0, 3});
    gated_damage_[layer].select(2, run.level) += gated_of_pairs.narrow(3, run.first_pair, run.count)
                                                     .sum(at::IntArrayRef{0, 3});
    exact_entries_[layer].select(1, run.level) += exact_of_pairs
                                                      .narrow(2, run.first_pair, run.count)
                                                      .sum(at::IntArrayRef{0, 2}) *
                                                  entries;
  }
  if (start_.defined()) {
    const auto state = pair_state(grams_of_pairs, w_o, q.size(1) / groups,
                                  for_batch(start_[layer], batch), tree, 0, ranks_);
    const auto keep = [&](at::Tensor& all, const at::Tensor& x) {
      if (!all.defined() || all[layer].sizes() != x.sizes()) {
        all = at::zeros_like(x).unsqueeze(0).repeat_interleave(layers_, 0);
      }
      all[layer].copy_(x);
    };
    keep(pairs_.state, state);
    keep(pairs_.damage, of_pairs);
    keep(pairs_.gated_damage, gated_of_pairs);
    keep(pairs_.exact_entries, exact_of_pairs);
  }
}

at::Tensor starting_bases(const at::Tensor& grams) {
  const auto of = [&](int64_t kind) { return grams.select(2, kind).flatten(0, 1).contiguous(); };
  const auto scores = solve_basis(of(0), of(1)).right;
  const auto values = solve_basis(of(2), of(3)).right;
  return at::stack({scores, values}, 1).unflatten(0, {grams.size(0), grams.size(1)});
}

}  // namespace drrl

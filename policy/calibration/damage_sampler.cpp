#include "policy/calibration/damage_sampler.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <utility>

#include "core/attention/certificate.h"
#include "core/attention/far_bases.h"
#include "core/attention/rows.h"
#include "core/linalg/basis.h"
#include "distributed/collectives/agreement.h"
#include "policy/calibration/loss_sensitivity.h"

namespace drrl {

DamageSampler::DamageSampler(const Calibration& calibration, int64_t first_group, int64_t groups,
                             at::Device device, Options options)
    : options_(std::move(options)), calls_(static_cast<size_t>(calibration.layers()), 0) {
  TORCH_CHECK(options_.rows >= 1 && options_.gradient_scale > 0, "DamageSampler: ", options_.rows,
              " rows and a gradient scale of ", options_.gradient_scale);
  for (size_t i = 0; i < calibration.ranks.size(); ++i) {
    if (std::find(options_.buckets.begin(), options_.buckets.end(), calibration.ranks[i]) !=
        options_.buckets.end()) {
      ranks_.push_back(calibration.ranks[i]);
      columns_.push_back(static_cast<int64_t>(i));
    }
  }
  start_ = calibration.bases.narrow(1, first_group, groups).to(device);
  auto sizes = calibration.damage.sizes().vec();
  sizes[1] = groups;
  sizes.insert(sizes.begin(), kSums);
  sums_ = at::zeros(sizes, at::TensorOptions(device).dtype(at::kDouble));
}

void DamageSampler::begin(int64_t step) {
  step_ = step;
  active_ = true;
  std::fill(calls_.begin(), calls_.end(), 0);
}

void DamageSampler::reset(const at::Tensor& sums) {
  if (sums.defined()) {
    sums_.copy_(sums);
  } else {
    sums_.zero_();
  }
}

double DamageSampler::take_ms() {
  return std::exchange(ms_, 0);
}

bool DamageSampler::draws(int64_t layer) {
  return active_ && (step_ + layer + calls_[static_cast<size_t>(layer)]++) % kTurns == 0;
}

std::shared_ptr<const DamageSample> DamageSampler::choose(int64_t layer, const BlockTree& tree,
                                                          const PairGrams& grams) const {
  const std::array<int64_t, 4> key = {static_cast<int64_t>(options_.seed), step_, layer,
                                      calls_[static_cast<size_t>(layer)]};
  const uint64_t random = hash_bytes(key.data(), sizeof(key));
  const int64_t block_rows = tree.geometry().near_block;
  // A last block that is short would weigh its rows more than others'.
  const int64_t complete = tree.last_block_rows() == block_rows || tree.num_blocks() == 2
                               ? tree.num_blocks()
                               : tree.num_blocks() - 1;
  const int64_t block = 1 +
                        static_cast<int64_t>((random >> 32) % static_cast<uint64_t>(complete - 1));
  const int64_t available = block + 1 == tree.num_blocks() ? tree.last_block_rows() : block_rows;
  const int64_t rows = std::min(options_.rows, available);
  const int64_t offset = static_cast<int64_t>((random & 0xffffffffU) %
                                              static_cast<uint64_t>(available));
  auto sample = std::make_shared<DamageSample>();
  for (int64_t i = 0; i < rows; ++i) {
    sample->positions.push_back(tree.sinks() + block * block_rows +
                                (offset + i * available / rows) % available);
  }
  std::sort(sample->positions.begin(), sample->positions.end());
  for (const SeenPair& seen : seen_pairs(tree, block)) {
    sample->pairs.push_back(seen.pair);
  }
  const auto index = on_device(sample->pairs, grams.keys.device());
  sample->grams = {grams.queries.index_select(2, index), grams.keys.index_select(2, index),
                   grams.values.index_select(2, index)};
  return sample;
}

void DamageSampler::watch(int64_t layer, const BlockTree& tree, const at::Tensor& out,
                          const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& w_o, std::shared_ptr<const DamageSample> sample) {
  if (sample == nullptr || !out.requires_grad()) {
    return;
  }
  out.register_hook([this, layer, tree, q = q.detach(), k = k.detach(), v = v.detach(),
                     w_o = w_o.detach(), sample = std::move(sample)](const at::Tensor& grad) {
    measure(layer, tree, q, k, v, w_o, *sample, grad);
  });
}

void DamageSampler::measure(int64_t layer, const BlockTree& tree, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, const at::Tensor& w_o,
                            const DamageSample& sample, const at::Tensor& grad) {
  const auto begun = std::chrono::steady_clock::now();
  at::NoGradGuard no_grad;
  const int64_t batch = q.size(0), groups = k.size(1), heads = q.size(1) / groups, d = q.size(3);
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = static_cast<int64_t>(sample.positions.size()),
             end = sample.positions.back() + 1, pairs = static_cast<int64_t>(sample.pairs.size());
  const auto positions = on_device(sample.positions, q.device());
  const auto of_rows = [&](const at::Tensor& x) {  // [B, H, L, d] -> [B G, g rows, d]
    return x.index_select(2, positions).to(wide).reshape({batch * groups, heads * rows, d});
  };
  const auto before_end = [&](const at::Tensor& x) {
    return x.narrow(2, 0, end).to(wide).flatten(0, 1);
  };
  const auto queries = of_rows(q), gradient = of_rows(grad), keys = before_end(k),
             values = before_end(v);
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));

  // Exact attention of these rows: weights [B G, g rows, end] and output.
  auto scores = at::bmm(queries, keys.transpose(1, 2)).mul_(scale);
  const auto later = at::arange(end, positions.options()) > positions.unsqueeze(1);
  scores.view({batch * groups, heads, rows, end})
      .masked_fill_(later, -std::numeric_limits<double>::infinity());
  const auto logsumexp = scores.logsumexp(2, /*keepdim=*/true);
  const auto weights = scores.sub_(logsumexp).exp_();
  const auto exact = at::bmm(weights, values);

  const auto sequences = static_cast<size_t>(batch * groups);
  std::vector<int64_t> key_rows;
  for (const int64_t pair : sample.pairs) {
    key_rows.push_back(tree.run_of(pair).key_rows);
  }
  std::vector<double> share_of_level(static_cast<size_t>(tree.num_levels()),
                                     0.0);  // of all tokens, those that see a pair of it
  for (const PairRun& run : tree.runs()) {
    share_of_level[static_cast<size_t>(run.level)] += static_cast<double>(run.count *
                                                                          run.query_rows) /
                                                      static_cast<double>(tree.sequence_length());
  }
  PairGrams grams = sample.grams;
  const UsablePairs usable = usable_pairs(grams, w_o);
  FarBases solved;
  if (options_.update_steps < 0) {
    solved = solve_far_bases(grams, w_o, /*scores=*/true, /*values=*/true);
  }
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const int64_t rank = ranks_[i];
    const std::vector<Ranks> ranks(sequences * static_cast<size_t>(pairs), Ranks{rank, rank});
    const FarBases bases = options_.update_steps < 0
                               ? solved
                               : update_far_bases(grams, w_o, ranks,
                                                  for_batch(start_[layer], batch),
                                                  options_.update_steps);
    const at::Tensor residual = residual_factors(grams, bases.scores, ranks, key_rows);
    std::vector<Ranks> served = ranks;
    leave_exact(grams, usable, heads, key_rows, residual, served);
    for (int64_t p = 0; p < pairs; ++p) {
      const PairRun& run = tree.run_of(sample.pairs[static_cast<size_t>(p)]);
      const int64_t first = run.key_begin +
                            (sample.pairs[static_cast<size_t>(p)] - run.first_pair) * run.stride;
      const auto of_pair = [&](const at::Tensor& x) {
        return x.unflatten(0, {batch * groups, pairs}).select(1, p).to(wide);
      };
      const auto through = [&](const at::Tensor& x, const Basis& basis) {  // x left right^T
        return at::bmm(at::bmm(x, of_pair(basis.left).narrow(2, 0, rank)),
                       of_pair(basis.right).narrow(2, 0, rank).transpose(1, 2));
      };
      const auto pair_keys = keys.narrow(1, first, run.key_rows),
                 pair_values = values.narrow(1, first, run.key_rows);
      const auto pair_weights = weights.narrow(2, first, run.key_rows);
      const auto part = at::bmm(pair_weights, pair_values);
      // Scores at this rank, with the rest of the row as it is; then values.
      auto low = at::bmm(through(queries, bases.scores), pair_keys.transpose(1, 2)).mul_(scale);
      low.add_(residual_correction(queries, of_pair(residual)).unsqueeze(2))
          .sub_(logsumexp)
          .clamp_max_(60)
          .exp_();
      const auto total = (1 - pair_weights.sum(2, /*keepdim=*/true) + low.sum(2, /*keepdim=*/true))
                             .clamp_min(1e-6);  // below there are no digits
      const std::array errors = {(exact - part + at::bmm(low, pair_values)) / total - exact,
                                 through(part, bases.values) - part};
      for (int64_t kind = 0; kind < 2; ++kind) {
        const auto moved = (errors[static_cast<size_t>(kind)] * gradient)
                               .sum(2, /*keepdim=*/false, at::kDouble)
                               .view({batch, groups, heads * rows});
        auto damage = loss_increase(moved, heads, options_.gradient_scale)
                          .mean(2)
                          .mul_(share_of_level[static_cast<size_t>(run.level)]);  // [B, G]
        for (size_t s = 0; s < sequences; ++s) {
          const Ranks& r = served[s * static_cast<size_t>(pairs) + static_cast<size_t>(p)];
          if ((kind == 0 ? r.qk : r.v) == d) {  // exact after all
            damage.view({-1})[static_cast<int64_t>(s)].zero_();
          }
        }
        auto cells = sums_.select(1, layer)
                         .select(2, kind)
                         .select(2, std::min(run.level, sums_.size(4) - 1))
                         .select(2, columns_[i]);  // [kSums, G]
        cells[kDamage] += damage.sum(0);
        cells[kCount] += static_cast<double>(batch);
      }
    }
  }
  ms_ += std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begun)
             .count();
}

}  // namespace drrl

#include "core/attention/lowrank_attention.h"

#include <cmath>
#include <span>

#include <torch/csrc/autograd/custom_function.h>

#include "core/attention/exact_attention.h"
#include "core/attention/rows.h"
#include "core/attention/tiles.h"
#include "core/cpu/lowrank_kernel.h"
#include "core/linalg/basis.h"
#ifdef DRRL_WITH_CUDA
#include "core/cuda/gate.h"
#endif

namespace drrl {

// The data of one run's items, stored in call order. Each call takes a view of every tensor, so
// different ranks cost more calls but no copies.
struct RunCalls {
  // Items (batch, group, pair) that go through one call, of the largest of their ranks; columns
  // that an item has less are zero.
  struct Call {
    Ranks ranks{1, 1};             // the gate is a yes or no
    int64_t first = 0, count = 0;  // places of the items

    // Whether entries are looked at one by one: for a gate, or for tiles to drop.
    bool decides() const { return ranks.gate == 0; }
  };
  std::vector<Call> calls;
  at::Tensor order, inverse;  // [B G count]: the run's item at each place, and back; undefined
                              // where there is one call
  at::Tensor p_q, p_k;        // [B G count, d, largest r]; undefined where all ranks are d
  at::Tensor p_v, p_o;        // [B G count, d, largest r_v], likewise
  at::Tensor residual;        // [B G count, d, m], likewise, of the run
  at::Tensor log_gates;       // [B G count, 1]; undefined where no entry is decided on
  at::Tensor log_drops;       // likewise

  at::Tensor ordered(const at::Tensor& run_rows) const {
    return order.defined() ? run_rows.index_select(0, order) : run_rows;
  }
  at::Tensor as_run(const at::Tensor& rows) const {
    return inverse.defined() ? rows.index_select(0, inverse) : rows;
  }
};

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Shape {
  int64_t batch, heads, groups, length, d;
  double scale;

  Shape(const at::Tensor& q, const at::Tensor& k)
      : batch(q.size(0)),
        heads(q.size(1)),
        groups(k.size(1)),
        length(q.size(2)),
        d(q.size(3)),
        scale(1.0 / std::sqrt(static_cast<double>(q.size(3)))) {}
  int64_t heads_per_group() const { return heads / groups; }
};

using Call = RunCalls::Call;

at::Tensor of(const Call& call, const at::Tensor& x) {
  return x.defined() ? x.narrow(0, call.first, call.count) : x;
}

// One call's projections; undefined where the rank is d and nothing is projected.
struct Projections {
  at::Tensor p_q, p_k;  // [n, d, r]
  at::Tensor p_v, p_o;  // [n, d, r_v]

  Projections(const RunCalls& run, const Call& call, int64_t d) {
    if (call.ranks.qk < d) {
      p_q = of(call, run.p_q).narrow(2, 0, call.ranks.qk);
      p_k = of(call, run.p_k).narrow(2, 0, call.ranks.qk);
    }
    if (call.ranks.v < d) {
      p_v = of(call, run.p_v).narrow(2, 0, call.ranks.v);
      p_o = of(call, run.p_o).narrow(2, 0, call.ranks.v);
    }
  }
};

// Items of equal keys share a call. All gated items share a key, since their scores take many small
// steps. On CUDA all ranks up to 64 share one: smaller ranks are not faster there, and many small
// calls are slower.
Ranks call_key(const Ranks& own, int64_t d, bool cuda) {
  const bool gated = own.gated(d) || own.drops();
  const auto width = [&](int64_t rank) {
    return rank < d && (gated || (cuda && rank <= 64)) ? 0 : rank;
  };
  return {width(own.qk), width(own.v), gated ? 0 : std::numeric_limits<float>::infinity()};
}

// Of all runs. Whatever is made of bases is made for all of them at once; options: of q.
std::vector<RunCalls> far_calls(const LowRankPlan& plan, int64_t d,
                                const at::TensorOptions& options) {
  const int64_t pairs = plan.tree.num_pairs(), items = static_cast<int64_t>(plan.ranks.size()),
                sequences = items / pairs;
  std::vector<RunCalls> result;
  std::vector<int64_t> numbers(5 *
                               items);  // of each item in its place: number in the plan, place's
                                        // item in the run, item's place in the run, ranks
  std::vector<double> log_gates(items), log_drops(items);
  const std::span<int64_t> all(numbers);
  const auto index = all.subspan(0, items), order = all.subspan(items, items),
             inverse = all.subspan(2 * items, items), qk = all.subspan(3 * items, items),
             v = all.subspan(4 * items, items);
  bool gated = false, narrower = false;
  int64_t first = 0, columns_qk = 0, columns_v = 0;  // of a run; the largest ranks below d
  for (const PairRun& run : plan.tree.runs()) {
    const auto in_plan = [&](int64_t i) {
      return i / run.count * pairs + run.first_pair + i % run.count;
    };
    const auto shared = group_by_ranks(sequences * run.count, [&](int64_t i) {
      return call_key(plan.ranks[in_plan(i)], d, options.device().is_cuda());
    });
    RunCalls& calls = result.emplace_back();
    int64_t place = 0;
    for (const auto& [key, members] : shared) {
      Call call{{1, 1, key.gate}, place, static_cast<int64_t>(members.size())};
      for (const int64_t i : members) {
        const int64_t at = first + place;
        index[at] = in_plan(i);
        order[at] = i;
        inverse[first + i] = place++;
        const Ranks& own = plan.ranks[index[at]];
        std::tie(qk[at], v[at]) = std::tie(own.qk, own.v);
        log_gates[at] = std::log(static_cast<double>(own.gated(d) ? own.gate : Ranks{}.gate));
        log_drops[at] = std::log(static_cast<double>(own.drop));
        call.ranks = {std::max(call.ranks.qk, own.qk), std::max(call.ranks.v, own.v), key.gate};
      }
      gated = gated || call.decides();
      columns_qk = std::max(columns_qk, call.ranks.qk < d ? call.ranks.qk : 0);
      columns_v = std::max(columns_v, call.ranks.v < d ? call.ranks.v : 0);
      const auto less = [&](std::span<int64_t> own, int64_t rank) {
        return rank < d && std::any_of(
                               own.begin() + first + call.first, own.begin() + first + place,
                               [&](int64_t r) { return r < rank; });
      };
      narrower = narrower || less(qk, call.ranks.qk) || less(v, call.ranks.v);
      calls.calls.push_back(call);
    }
    first += place;
  }

  const auto device = options.device();
  const auto uploaded = on_device(numbers, device).view({5, items});
  const auto of_items = [&](const at::Tensor& x) { return x.index_select(0, uploaded[0]); };
  const auto bases = [&](const Basis& basis, int64_t columns, const at::Tensor& own) {
    if (columns == 0) {
      return std::pair<at::Tensor, at::Tensor>();
    }
    auto left = of_items(basis.left.narrow(2, 0, columns)),
         right = of_items(basis.right.narrow(2, 0, columns));
    if (narrower) {
      const auto beyond = at::arange(columns, own.options()) >= own.view({-1, 1, 1});
      left.masked_fill_(beyond, 0);
      right.masked_fill_(beyond, 0);
    }
    return std::pair(left.to(options.dtype()), right.to(options.dtype()));
  };
  const auto [p_q, p_k] = bases(plan.scores, columns_qk, uploaded[3]);
  const auto [p_v, p_o] = bases(plan.values, columns_v, uploaded[4]);
  at::Tensor residual, gates, drops;
  if (columns_qk > 0 && plan.residual.defined()) {
    residual = of_items(plan.residual)
                   .masked_fill_((uploaded[3] == d).view({-1, 1, 1}), 0)
                   .to(options.dtype());
  }
  if (gated) {
    gates = on_device(log_gates, device).unsqueeze(1);
    drops = on_device(log_drops, device).unsqueeze(1);
  }
  first = 0;
  for (RunCalls& calls : result) {
    const int64_t count = calls.calls.back().first + calls.calls.back().count;
    const auto of_run = [&](const at::Tensor& x) {
      return x.defined() ? x.narrow(0, first, count) : x;
    };
    calls.log_drops = of_run(drops);
    std::tie(calls.p_q, calls.p_k, calls.p_v, calls.p_o, calls.log_gates) = std::tuple(
        of_run(p_q), of_run(p_k), of_run(p_v), of_run(p_o), of_run(gates));
    if (std::any_of(calls.calls.begin(), calls.calls.end(),
                    [&](const Call& call) { return call.ranks.qk < d; })) {
      calls.residual = of_run(residual);
    }
    if (calls.calls.size() > 1) {
      std::tie(calls.order, calls.inverse) = std::pair(of_run(uploaded[1]), of_run(uploaded[2]));
    }
    first += count;
  }
  return result;
}

// The correction || q F ||^2 of each row's log-sum-exp: rows [n, m, d] -> [n, m], zero where the
// rank is d; undefined if there is none.
at::Tensor correction_of(const RunCalls& calls, const at::Tensor& rows,
                         const at::TensorOptions& options) {
  return calls.residual.defined() ? residual_correction(rows, calls.residual).to(options.dtype())
                                  : at::Tensor();
}

// [B, H or G, L, e] -> [B G, g, L, e], g = H / G or 1
at::Tensor by_group(const at::Tensor& x, const Shape& s) {
  return x.view({s.batch * s.groups, x.size(1) / s.groups, x.size(2), x.size(3)});
}

// The exact causal parts: the sinks among themselves, then the complete blocks, then the short last
// block. Each is `count` runs of `rows` tokens that attend within themselves.
struct CausalRun {
  int64_t begin, count, rows;
};
std::vector<CausalRun> causal_runs(const BlockTree& tree) {
  std::vector<CausalRun> runs;
  const int64_t block = tree.geometry().near_block;
  if (tree.sinks() > 0) {
    runs.push_back({0, 1, tree.sinks()});
  }
  const int64_t complete = tree.last_block_rows() == block ? tree.num_blocks()
                                                           : tree.num_blocks() - 1;
  if (complete > 0) {
    runs.push_back({tree.sinks(), complete, block});
  }
  if (complete < tree.num_blocks()) {
    runs.push_back({tree.sinks() + complete * block, 1, tree.last_block_rows()});
  }
  return runs;
}

// The blocks of a run as problems of attention_part, no copy: x [B, H or G, L, e] -> [B G, count,
// g, rows, e]; for keys, without the g.
at::Tensor query_blocks(const at::Tensor& x, const CausalRun& run, const Shape& s) {
  return by_group(x, s)
      .narrow(2, run.begin, run.count * run.rows)
      .unflatten(2, {run.count, run.rows})
      .transpose(1, 2);
}
at::Tensor key_blocks(const at::Tensor& x, const CausalRun& run, const Shape& s) {
  return query_blocks(x, run, s).squeeze(2);
}

// Everything after the sinks, and the sinks, likewise: [B G, 1, g, L - s, e] and [B G, 1, s, e].
at::Tensor queries_after_sinks(const at::Tensor& x, const BlockTree& tree, const Shape& s) {
  return by_group(x, s).narrow(2, tree.sinks(), s.length - tree.sinks()).unsqueeze(1);
}
at::Tensor sink_keys(const at::Tensor& x, const BlockTree& tree, const Shape& s) {
  return by_group(x, s).narrow(2, 0, tree.sinks());
}

bool has_sink_part(const BlockTree& tree, const Shape& s) {
  return tree.sinks() > 0 && tree.sinks() < s.length;
}

// x [B, H, L, e] -> the rows of a run's queries, [B, G, count, g, rows, e], a view.
at::Tensor run_view(const at::Tensor& x, const PairRun& run, const Shape& s) {
  return token_runs(x, s.groups, run.query_begin, run.count, run.query_rows, run.stride);
}

// Calls with a gate make their scores a matrix, which the CPU kernel does without: right, but not
// faster than exact attention. Some rows at a time: work(first row, rows) for matrices [n, rows,
// keys] of a limited number of entries, or of one row.
// block > 0: each slice is whole blocks of so many rows of one head.
template <typename Work>
void for_row_slices(const at::Tensor& rows, const PairRun& run, int64_t block, const Work& work) {
  const int64_t entries = rows.is_cuda() ? 1 << 25 : 1 << 20, count = rows.size(1);
  int64_t most = std::max<int64_t>(1, entries / (rows.size(0) * run.key_rows));
  if (block == 0) {
    for (int64_t first = 0; first < count; first += most) {
      work(first, std::min(most, count - first));
    }
    return;
  }
  most = std::max<int64_t>(1, most / block) * block;
  for (int64_t head = 0; head < count; head += run.query_rows) {
    for (int64_t first = 0; first < run.query_rows; first += most) {
      work(head + first, std::min(most, run.query_rows - first));
    }
  }
}

// to [n, rows, d] <- rows [n, rows, r] expanded by a basis [n, d, r], or as they are if it is
// undefined.
void expand(const at::Tensor& rows, const at::Tensor& basis, at::Tensor to) {
  if (basis.defined()) {
    at::bmm_out(to, rows, basis.transpose(1, 2));
  } else {
    to.copy_(rows);
  }
}

struct GatedWeights {
  at::Tensor sums;        // [n, g rows]: each row's log-sum-exp over the keys
  at::Tensor low, heavy;  // [n, g rows, keys], of q's dtype: weights exp(score - sum), those that
                          // stay at low rank and those that do not, zero where it is the other
  at::Tensor exact;       // of the same shape, bool: which they are
  at::Tensor kept;        // [n, g rows, tiles of keys] bool; undefined: all are
};

// before [n, g rows]: the log-sum-exp of what each row met before this pair; log_gate [n, 1]. rows,
// keys: at full width; low_..: projected.
GatedWeights gated_weights(const at::Tensor& rows, const at::Tensor& keys,
                           const at::Tensor& low_rows, const at::Tensor& low_keys,
                           const at::Tensor& correction, const at::Tensor& before,
                           const at::Tensor& log_gate, const at::Tensor& log_drop,
                           int64_t block_rows, double scale) {
  const auto of = [&](const at::Tensor& a, const at::Tensor& b) {
    return wide_product(a, b.transpose(1, 2)).mul_(scale);
  };
  auto scores = of(low_rows, low_keys);
  if (correction.defined()) {
    scores += correction.unsqueeze(2);
  }
  const auto full = of(rows, keys);
  GatedWeights result;
#ifdef DRRL_WITH_CUDA
  if (!log_drop.defined() &&
      gate_cuda(scores, full, before, log_gate, kGateChunk, rows.scalar_type(), result.sums,
                result.low, result.heavy, result.exact)) {
    return result;
  }
#endif
  result.exact = at::zeros(full.sizes(), full.options().dtype(at::kBool));
  auto met = before;
  std::vector<at::Tensor> kept;
  for (int64_t begin = 0; begin < full.size(2); begin += kGateChunk) {
    const int64_t count = std::min(kGateChunk, full.size(2) - begin);
    auto chunk = scores.narrow(2, begin, count);
    if (log_drop.defined()) {
      const auto largest = chunk.unflatten(2, {count / kTileKeys, kTileKeys}).amax(3);
      kept.push_back(kept_tiles(largest >= (met + log_drop).unsqueeze(2), block_rows));
      chunk.masked_fill_(kept.back().logical_not().repeat_interleave(kTileKeys, 2),
                         -std::numeric_limits<double>::infinity());
    }
    const auto heavy = chunk >= (at::logaddexp(met, chunk.logsumexp(2)) + log_gate).unsqueeze(2);
    chunk.copy_(at::where(heavy, full.narrow(2, begin, count), chunk));
    result.exact.narrow(2, begin, count).copy_(heavy);
    met = at::logaddexp(met, chunk.logsumexp(2));
  }
  result.sums = scores.logsumexp(2);
  auto soft = scores.softmax(2);
  if (log_drop.defined()) {
    result.kept = at::cat(kept, 2);
    soft.masked_fill_((result.sums == -std::numeric_limits<double>::infinity()).unsqueeze(2), 0);
  }
  const auto weights = soft.to(rows.scalar_type());
  result.low = weights.masked_fill(result.exact, 0);
  result.heavy = weights * result.exact;
  return result;
}

// A slice's exact entries, `found` in its matrix [n, rows, keys] of the g rows from `first` on and
// of items in this order, by what sorts them: row of [B, H, L] x L + position of the key.
at::Tensor places_of(const at::Tensor& found, int64_t first, int64_t rows, const at::Tensor& order,
                     const PairRun& run, const Shape& s) {
  const auto at_row = found.div(run.key_rows, "floor"), place = at_row.div(rows, "floor"),
             row = at_row.remainder(rows) + first;
  const auto item = order.defined() ? order.index_select(0, place) : place;
  const auto sequence = item.div(run.count, "floor"), pair = item.remainder(run.count) * run.stride,
             head = row.div(run.query_rows, "floor");
  const auto query = (sequence * (s.heads / s.groups) + head) * s.length + run.query_begin + pair +
                     row.remainder(run.query_rows);
  return query * s.length + run.key_begin + pair + found.remainder(run.key_rows);
}

// The composed forward pass: near and sinks, then all far pairs of one run after the other.
class ForwardPass {
 public:
  ForwardPass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              const LowRankPlan& plan, LowRankContext& context)
      : q_(q),
        k_(k),
        v_(v),
        tree_(plan.tree),
        s_(q, k),
        context_(context),
        out_(at::empty(q.sizes(), q.options())),
        near_logsumexp_(at::empty(
            {s_.batch, s_.heads, s_.length},
            q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat))) {
    context_.calls = std::make_shared<const std::vector<RunCalls>>(
        far_calls(plan, s_.d, q.options()));
    if (plan.drops()) {
      const int64_t tokens = s_.length - tree_.sinks();
      context_.served.kept_from = at::full(
          {s_.batch, s_.heads, (tokens + kTileRows - 1) / kTileRows,
           (tokens + kTileKeys - 1) / kTileKeys},
          FarServed::kNoTile, q.options().dtype(at::kByte));
    }
  }

  std::tuple<at::Tensor, at::Tensor> run() {
    near_attention(q_, k_, v_, tree_, out_, near_logsumexp_);
    // Of all that was met so far, in the end of everything. In double: the parts' shares add up to
    // one however large scores are.
    logsumexp_ = near_logsumexp_.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true)
                     .unsqueeze(3);
    attend_sinks();
    for (size_t i = 0; i < tree_.runs().size(); ++i) {
      attend_far(tree_.runs()[i], (*context_.calls)[i]);
    }
    context_.served.exact = exact_.empty()
                                ? ExactEntries()
                                : ExactEntries(at::cat(exact_), s_.batch * s_.heads * s_.length,
                                               s_.length);
    merge();
    return {out_, logsumexp_.squeeze(3).to(near_logsumexp_.scalar_type())};
  }

 private:
  // What one run adds.
  struct FarOut {
    std::vector<at::Tensor> out;  // of each call, [n, g rows, r_v], in the value basis, or [.., d]
                                  // under a gate
    at::Tensor logsumexp;         // [B G count, g rows]
  };

  at::Tensor after_sinks(const at::Tensor& x) const { return queries_after_sinks(x, tree_, s_); }

  void attend_sinks() {
    if (!has_sink_part(tree_, s_)) {
      return;
    }
    const auto rows = after_sinks(q_);
    sink_out_ = at::empty(rows.sizes(), q_.options());
    sink_logsumexp_ = at::empty(rows.sizes().slice(0, 4), near_logsumexp_.options());
    attention_part(rows, sink_keys(k_, tree_, s_), sink_keys(v_, tree_, s_), /*causal=*/false,
                   s_.scale, sink_out_, sink_logsumexp_);
    auto met = after_sinks(logsumexp_).squeeze(4);
    met.copy_(at::logaddexp(met, sink_logsumexp_));
  }

  void attend_far(const PairRun& run, const RunCalls& calls) {
    const auto rows_q = calls.ordered(query_rows(q_, s_.groups, run)),
               rows_k = calls.ordered(key_rows(k_, run)), rows_v = calls.ordered(key_rows(v_, run));
    const auto correction = correction_of(calls, rows_q, near_logsumexp_.options());
    auto met = run_view(logsumexp_, run, s_);
    const auto before = calls.log_gates.defined()
                            ? calls.ordered(met.reshape(rows_q.sizes().slice(0, 2))
                                                .to(near_logsumexp_.scalar_type()))
                            : at::Tensor();
    auto sums = at::empty(rows_q.sizes().slice(0, 2), near_logsumexp_.options());
    FarOut& far = far_.emplace_back();
    for (const Call& call : calls.calls) {
      const Projections p(calls, call, s_.d);
      const FarRows rows{of(call, rows_q),
                         of(call, rows_k),
                         of(call, rows_v),
                         into_basis(of(call, rows_q), p.p_q),
                         into_basis(of(call, rows_k), p.p_k),
                         into_basis(of(call, rows_v), p.p_v),
                         of(call, correction)};
      if (call.decides()) {
        far.out.push_back(
            attend_gated(run, calls, call, rows, of(call, before), p.p_o, of(call, sums)));
      } else {
        auto [part_out, part_logsumexp] = attention_rows(rows.low_q, rows.low_k, rows.low_v,
                                                         s_.scale);
        of(call, sums)
            .copy_(rows.correction.defined() ? part_logsumexp + rows.correction : part_logsumexp);
        far.out.push_back(part_out);
      }
    }
    far.logsumexp = calls.as_run(sums);
    met.copy_(at::logaddexp(met, far.logsumexp.view(met.sizes())));
  }

  // A call's rows [n, g rows, d], keys and values, and the same in its bases.
  struct FarRows {
    at::Tensor q, k, v, low_q, low_k, low_v, correction;
  };

  // sums <- log-sum-exps of the rows.
  at::Tensor attend_gated(const PairRun& run, const RunCalls& calls, const Call& call,
                          const FarRows& x, const at::Tensor& before, const at::Tensor& p_o,
                          const at::Tensor& sums) {
    const auto log_gate = of(call, calls.log_gates).to(near_logsumexp_.scalar_type());
    const bool drops = context_.served.kept_from.defined();
    const auto log_drop = drops ? of(call, calls.log_drops).to(near_logsumexp_.scalar_type())
                                : at::Tensor();
    std::vector<at::Tensor> outs;
    const auto by_slice = [&](int64_t first, int64_t rows) {
      const auto slice = [&](const at::Tensor& t) {
        return t.defined() ? t.narrow(1, first, rows) : t;
      };
      const auto gated = gated_weights(slice(x.q), x.k, slice(x.low_q), x.low_k,
                                       slice(x.correction), slice(before), log_gate, log_drop,
                                       tree_.geometry().near_block, s_.scale);
      slice(sums).copy_(gated.sums);
      outs.push_back(
          out_of_basis(at::bmm(gated.low, x.low_v), p_o).add_(at::bmm(gated.heavy, x.v)));
      const auto found = gated.exact.flatten().nonzero().squeeze(1);
      exact_.push_back(places_of(found, first, rows, of(call, calls.order), run, s_));
      context_.exact_slices.push_back(found.to(at::kInt));
      if (drops) {
        context_.kept_slices.push_back(gated.kept);
        note_kept(run, of(call, calls.order), gated.kept, first);
      }
    };
    for_row_slices(x.low_q, run, drops ? tree_.geometry().near_block : 0, by_slice);
    return at::cat(outs, 1);
  }

  // Writes down which rows of one head, from row `first` of the g rows on, keep which tiles: kept
  // [n, rows, tiles], items in this order.
  void note_kept(const PairRun& run, const at::Tensor& order, const at::Tensor& kept,
                 int64_t first) {
    const auto from = first_kept(kept);
    const auto items = order.defined() ? order.to(at::kCPU) : at::arange(kept.size(0));
    const int64_t head = first / run.query_rows, row = first % run.query_rows,
                  heads_per_group = s_.heads_per_group();
    auto all = context_.served.kept_from.flatten(0, 1);
    for (int64_t i = 0; i < kept.size(0); ++i) {
      const int64_t item = items[i].item<int64_t>(), sequence = item / run.count,
                    shift = item % run.count * run.stride - tree_.sinks();
      all[sequence * heads_per_group + head]
          .narrow(0, (run.query_begin + shift + row) / kTileRows, from.size(1))
          .narrow(1, (run.key_begin + shift) / kTileKeys, from.size(2))
          .copy_(from[i]);
    }
  }

  // Each part weighted by its share exp(lse_part - lse).
  void merge() {
    out_.mul_((near_logsumexp_.unsqueeze(3) - logsumexp_).exp_().to(out_.scalar_type()));
    if (sink_out_.defined()) {
      const auto share = (sink_logsumexp_ - after_sinks(logsumexp_).squeeze(4))
                             .exp_()
                             .unsqueeze(4)
                             .to(out_.scalar_type());
      after_sinks(out_).addcmul_(sink_out_, share);
    }
    for (size_t i = 0; i < far_.size(); ++i) {
      const PairRun& run = tree_.runs()[i];
      const RunCalls& calls = (*context_.calls)[i];
      FarOut& far = far_[i];
      const auto share = (far.logsumexp -
                          run_view(logsumexp_, run, s_).reshape(far.logsumexp.sizes()))
                             .exp_()
                             .to(near_logsumexp_.scalar_type());
      auto expanded = at::empty({share.size(0), share.size(1), s_.d}, out_.options());
      for (size_t c = 0; c < calls.calls.size(); ++c) {
        const Call& call = calls.calls[c];
        expand(far.out[c],
               far.out[c].size(2) < s_.d ? Projections(calls, call, s_.d).p_o : at::Tensor(),
               of(call, expanded));
        far.out[c].reset();
      }
      add_rows(out_, s_.groups, run, run.query_begin, run.query_rows, calls.as_run(expanded),
               share);
    }
  }

  const at::Tensor &q_, &k_, &v_;
  const BlockTree& tree_;
  Shape s_;
  LowRankContext& context_;
  at::Tensor out_;                        // [B, H, L, d]: of near, in the end of all
  at::Tensor near_logsumexp_;             // [B, H, L]
  at::Tensor logsumexp_;                  // [B, H, L, 1] float64
  at::Tensor sink_out_, sink_logsumexp_;  // [B G, 1, g, L - s, d], [B G, 1, g, L - s]
  std::vector<FarOut> far_;               // of each run
  std::vector<at::Tensor> exact_;         // places of each slice
};

struct Operands {
  at::Tensor q, k, v, grad, logsumexp;  // [n, rows or keys, width], [n, rows]
};
struct Gradients {
  at::Tensor q, k, v;
};

// What slices of a forward pass left, in their order.
struct Slices {
  std::vector<at::Tensor>::const_iterator exact, kept;
};

// Gradients of a call that decides on entries: of those at low rank, and of those that are exact.
// block: as for_row_slices. slices: those of its first slice, moved on to behind its last.
std::pair<Gradients, Gradients> gated_backward(const Operands& low, const Operands& full,
                                               const at::Tensor& delta, const PairRun& run,
                                               int64_t block, const Shape& s, Slices& slices) {
  struct Sums {
    std::vector<at::Tensor> q;
    at::Tensor k, v;
  };
  Sums of_low, of_exact;
  for_row_slices(low.q, run, block, [&](int64_t first, int64_t rows) {
    const auto of = [&](const at::Tensor& x) { return x.narrow(1, first, rows); };
    const auto add = [&](const Operands& x, const at::Tensor& left_out, Sums& to) {
      const auto scores = wide_product(of(x.q), x.k.transpose(1, 2)) * s.scale;
      const auto weights = (scores - of(x.logsumexp).unsqueeze(2)).exp_().masked_fill_(left_out, 0);
      const auto grads = weights *
                         (wide_product(of(x.grad), x.v.transpose(1, 2)) - of(delta).unsqueeze(2)) *
                         s.scale;
      const auto w = weights.to(x.q.scalar_type()), g = grads.to(x.q.scalar_type());
      const auto sum = [&](at::Tensor& total, const at::Tensor& part) {
        total = total.defined() ? total + part : part;
      };
      to.q.push_back(at::bmm(g, x.k));
      sum(to.k, wide_product(g.transpose(1, 2), of(x.q)));
      sum(to.v, wide_product(w.transpose(1, 2), of(x.grad)));
    };
    auto mask = at::zeros({low.q.size(0) * rows * low.k.size(1)}, low.q.options().dtype(at::kBool));
    mask = mask.index_fill_(0, (slices.exact++)->to(at::kLong), 1)
               .view({low.q.size(0), rows, low.k.size(1)});
    add(full, mask.logical_not(), of_exact);
    if (block > 0) {
      mask.logical_or_((slices.kept++)->logical_not().repeat_interleave(kTileKeys, 2));
    }
    add(low, mask, of_low);
  });
  const auto done = [&](const Sums& x) {
    return Gradients{at::cat(x.q, 1), x.k.to(low.q.scalar_type()), x.v.to(low.q.scalar_type())};
  };
  return {done(of_low), done(of_exact)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out,
                                                        const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& out,
                                                        const at::Tensor& logsumexp,
                                                        const LowRankPlan& plan,
                                                        const LowRankContext& context) {
  const Shape s(q, k);
  const BlockTree& tree = plan.tree;
  auto grad_q = at::empty(q.sizes(), q.options());
  auto grad_k = at::empty(k.sizes(), k.options());
  auto grad_v = at::empty(v.sizes(), v.options());
  const auto logsumexp4 = logsumexp.unsqueeze(3);
  const auto delta4 = (grad_out * out).sum(3, /*keepdim=*/true, logsumexp.scalar_type());

  near_attention_backward(grad_out, q, k, v, tree, logsumexp, delta4.squeeze(3), grad_q, grad_k,
                          grad_v);

  if (has_sink_part(tree, s)) {
    const auto rows = queries_after_sinks(q, tree, s);
    const auto keys = sink_keys(k, tree, s);
    auto dq = at::empty(rows.sizes(), q.options());
    auto dk = at::empty(keys.sizes(), k.options());
    auto dv = at::empty(keys.sizes(), v.options());
    attention_part_backward(queries_after_sinks(grad_out, tree, s), rows, keys,
                            sink_keys(v, tree, s),
                            queries_after_sinks(logsumexp4, tree, s).squeeze(4),
                            queries_after_sinks(delta4, tree, s).squeeze(4),
                            /*causal=*/false, s.scale, dq, dk, dv);
    queries_after_sinks(grad_q, tree, s).add_(dq);
    sink_keys(grad_k, tree, s).add_(dk);
    sink_keys(grad_v, tree, s).add_(dv);
  }

  Slices slices{context.exact_slices.cbegin(), context.kept_slices.cbegin()};
  const int64_t block = plan.drops() ? tree.geometry().near_block : 0;
  for (size_t i = 0; i < tree.runs().size(); ++i) {
    const PairRun& run = tree.runs()[i];
    const RunCalls& calls = (*context.calls)[i];
    const auto rows_q = calls.ordered(query_rows(q, s.groups, run)),
               rows_k = calls.ordered(key_rows(k, run)), rows_v = calls.ordered(key_rows(v, run));
    const auto rows_grad = calls.ordered(query_rows(grad_out, s.groups, run));
    const auto rows_delta = calls.ordered(query_rows(delta4, s.groups, run).squeeze(2));
    const auto rows_logsumexp = calls.ordered(query_rows(logsumexp4, s.groups, run).squeeze(2));
    const auto correction = correction_of(calls, rows_q, rows_logsumexp.options());
    const auto low_logsumexp = correction.defined()
                                   ? rows_logsumexp - correction
                                   : rows_logsumexp;  // as the uncorrected scores see it
    auto run_grad_q = at::empty_like(rows_q), run_grad_k = at::empty_like(rows_k),
         run_grad_v = at::empty_like(rows_v);
    for (const Call& call : calls.calls) {
      const Projections p(calls, call, s.d);
      const auto of_call = [&](const at::Tensor& x) { return of(call, x); };
      const auto low_q = into_basis(of_call(rows_q), p.p_q),
                 low_k = into_basis(of_call(rows_k), p.p_k),
                 low_v = into_basis(of_call(rows_v), p.p_v);
      const auto low_grad = into_basis(of_call(rows_grad), p.p_o);
      const auto expanded = [&](const Gradients& low) {
        expand(low.q, p.p_q, of_call(run_grad_q));
        expand(low.k, p.p_k, of_call(run_grad_k));
        expand(low.v, p.p_v, of_call(run_grad_v));
      };
      if (call.decides()) {
        const Operands low{low_q, low_k, low_v, low_grad, of_call(low_logsumexp)};
        const Operands full{of_call(rows_q), of_call(rows_k), of_call(rows_v), of_call(rows_grad),
                            of_call(rows_logsumexp)};
        const auto [of_low, of_exact] = gated_backward(low, full, of_call(rows_delta), run, block,
                                                       s, slices);
        expanded(of_low);
        of_call(run_grad_q).add_(of_exact.q);
        of_call(run_grad_k).add_(of_exact.k);
        of_call(run_grad_v).add_(of_exact.v);
      } else {
        const auto [dq, dk, dv] = attention_rows_backward(
            low_grad, low_q, low_k, low_v, of_call(low_logsumexp), of_call(rows_delta), s.scale);
        expanded({dq, dk, dv});
      }
    }
    add_rows(grad_q, s.groups, run, run.query_begin, run.query_rows, calls.as_run(run_grad_q));
    add_rows(grad_k, s.groups, run, run.key_begin, run.key_rows, calls.as_run(run_grad_k));
    add_rows(grad_v, s.groups, run, run.key_begin, run.key_rows, calls.as_run(run_grad_v));
  }
  return {grad_q, grad_k, grad_v};
}

class LowRankAttention : public torch::autograd::Function<LowRankAttention> {
 public:
  static at::Tensor forward(AutogradContext* autograd, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const c10::intrusive_ptr<LowRankPlan>& plan,
                            const c10::intrusive_ptr<LowRankContext>& context) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, logsumexp] = cpu::lowrank_available(q, *plan)
                                ? cpu::lowrank_forward(q, k, v, *plan, *context)
                                : ForwardPass(q, k, v, *plan, *context).run();
    autograd->save_for_backward({q, k, v, out, logsumexp});
    autograd->saved_data["plan"] = c10::IValue::make_capsule(plan);
    autograd->saved_data["context"] = c10::IValue::make_capsule(context);
    return out;
  }

  static variable_list backward(AutogradContext* autograd, const variable_list& grads) {
    const auto saved = autograd->get_saved_variables();
    const auto plan = c10::static_intrusive_pointer_cast<LowRankPlan>(
        autograd->saved_data["plan"].toCapsule());
    const auto context = c10::static_intrusive_pointer_cast<LowRankContext>(
        autograd->saved_data["context"].toCapsule());
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& q = saved[0];
    const auto run = cpu::lowrank_available(q, *plan) ? &cpu::lowrank_backward : &drrl::backward;
    auto [dq, dk, dv] = run(grads[0].contiguous(), q, saved[1], saved[2], saved[3], saved[4], *plan,
                            *context);
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

void near_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const BlockTree& tree, const at::Tensor& out, const at::Tensor& logsumexp) {
  const Shape s(q, k);
  for (const CausalRun& run : causal_runs(tree)) {  // they cover every token once
    attention_part(query_blocks(q, run, s), key_blocks(k, run, s), key_blocks(v, run, s),
                   /*causal=*/true, s.scale, query_blocks(out, run, s),
                   query_blocks(logsumexp.unsqueeze(3), run, s).squeeze(4));
  }
}

void near_attention_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const BlockTree& tree,
                             const at::Tensor& logsumexp, const at::Tensor& delta,
                             const at::Tensor& grad_q, const at::Tensor& grad_k,
                             const at::Tensor& grad_v) {
  const Shape s(q, k);
  const auto of_rows = [&](const at::Tensor& x, const CausalRun& run) {
    return query_blocks(x.unsqueeze(3), run, s).squeeze(4);
  };
  for (const CausalRun& run : causal_runs(tree)) {
    attention_part_backward(query_blocks(grad_out, run, s), query_blocks(q, run, s),
                            key_blocks(k, run, s), key_blocks(v, run, s), of_rows(logsumexp, run),
                            of_rows(delta, run), /*causal=*/true, s.scale,
                            query_blocks(grad_q, run, s), key_blocks(grad_k, run, s),
                            key_blocks(grad_v, run, s));
  }
}

namespace {

// Whether anything is of low rank. Errors: c10::Error on ranks or bases that do not fit.
bool check_plan(const LowRankPlan& plan, const at::Tensor& q, const at::Tensor& k) {
  const BlockTree& tree = plan.tree;
  const int64_t d = q.size(3);
  TORCH_CHECK(q.size(2) == tree.sequence_length(), "lowrank_attention: q ", q.sizes(),
              " for a plan of ", tree.sequence_length(), " tokens");
  const int64_t items = k.size(0) * k.size(1) * tree.num_pairs();
  TORCH_CHECK(static_cast<int64_t>(plan.ranks.size()) == items, "lowrank_attention: the plan has ",
              plan.ranks.size(), " ranks, expected B G pairs = ", k.size(0), " x ", k.size(1),
              " x ", tree.num_pairs());
  int64_t score_columns = 0;  // the largest rank that needs a basis
  int64_t value_columns = 0;
  for (const Ranks& ranks : plan.ranks) {
    TORCH_CHECK(ranks.qk >= 1 && ranks.qk <= d && ranks.v >= 1 && ranks.v <= d,
                "lowrank_attention: ranks (", ranks.qk, ", ", ranks.v, "), expected 1..", d);
    score_columns = ranks.qk < d ? std::max(score_columns, ranks.qk) : score_columns;
    value_columns = ranks.v < d ? std::max(value_columns, ranks.v) : value_columns;
  }
  const auto check_basis = [&](const Basis& basis, const char* which, int64_t columns) {
    TORCH_CHECK(basis.defined() &&
                    basis.left.sizes() == at::IntArrayRef({items, d, basis.left.size(2)}) &&
                    basis.right.sizes() == basis.left.sizes() && basis.left.size(2) >= columns,
                "lowrank_attention: the plan's ", which, " bases are ",
                basis.defined() ? c10::str(basis.left.sizes()) : "missing", ", expected [", items,
                ", ", d, ", at least ", columns, "]");
  };
  if (score_columns > 0) {
    check_basis(plan.scores, "score", score_columns);
  }
  TORCH_CHECK(
      !plan.residual.defined() ||
          plan.residual.sizes() == at::IntArrayRef({items, d, std::min(kResidualColumns, d)}),
      "lowrank_attention: the plan's residual factors are ", plan.residual.sizes(), ", expected [",
      items, ", ", d, ", ", std::min(kResidualColumns, d), "]");
  if (value_columns > 0) {
    check_basis(plan.values, "value", value_columns);
  }
  TORCH_CHECK(!plan.drops() || tree.geometry().near_block % kTileKeys == 0,
              "lowrank_attention: blocks of ", tree.geometry().near_block,
              " tokens, of which tiles are dropped: expected a multiple of ", kTileKeys);
  return items > 0 && (score_columns > 0 || value_columns > 0 || plan.drops());
}

}  // namespace

at::Tensor lowrank_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<LowRankPlan>& plan, FarServed* served) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) &&
                  q.size(2) == k.size(2) && q.size(3) == k.size(3) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "lowrank_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G");
  TORCH_CHECK(plan != nullptr, "lowrank_attention: no plan");
  if (!check_plan(*plan, q, k)) {
    if (served != nullptr) {
      *served = {};
    }
    return exact_attention(q, k, v);
  }
  const auto context = c10::make_intrusive<LowRankContext>();
  auto out = LowRankAttention::apply(q.contiguous(), k.contiguous(), v.contiguous(), plan, context);
  if (served != nullptr) {
    *served = context->served;
  }
  return out;
}

}  // namespace drrl

#include "distributed/attention/context_attention.h"

#include <cmath>

#include <torch/csrc/autograd/custom_function.h>

#include "core/attention/exact_attention.h"
#include "core/attention/lowrank_attention.h"
#include "core/attention/rows.h"
#include "core/linalg/basis.h"
#include "distributed/collectives/exchange.h"

namespace drrl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct KeysValues {
  at::Tensor k;  // [n, rows, r]
  at::Tensor v;  // [n, rows, r_v]
};

at::Tensor joined(const std::vector<at::Tensor>& rows) {
  return rows.size() == 1 ? rows[0] : at::cat(rows, 1);
}

// This process's rows of one part.
class Rows {
 public:
  Rows(const ContextPart& part, const ContextPlan& plan, const at::Tensor& k)
      : keys(plan.split.rows_of(plan.group.rank(), part.keys)),
        queries(plan.split.rows_of(plan.group.rank(), part.queries)),
        sequences_(k.size(0) * k.size(1)),
        n_(static_cast<int64_t>(part.sequences.size())) {
    if (n_ < sequences_) {
      index_ = at::tensor(part.sequences, at::kLong).to(k.device());
    }
  }

  // x [B, H or G, L, e] -> [n, g rows, e], the heads of a group stacked as rows
  at::Tensor take(const at::Tensor& x, const IndexRange& rows) const {
    const auto all = view(x, rows);
    return (index_.defined() ? all.index_select(0, index_) : all).reshape({n_, -1, x.size(3)});
  }
  void add(const at::Tensor& x, const IndexRange& rows, const at::Tensor& values) const {
    auto all = view(x, rows);
    const auto shaped = values.view({n_, all.size(1), rows.count, x.size(3)});
    index_.defined() ? all.index_add_(0, index_, shaped) : all.add_(shaped);
  }
  void put(const at::Tensor& x, const IndexRange& rows, const at::Tensor& values) const {
    auto all = view(x, rows);
    const auto shaped = values.view({n_, all.size(1), rows.count, x.size(3)});
    index_.defined() ? all.index_copy_(0, index_, shaped) : all.copy_(shaped);
  }

  IndexRange keys, queries;

 private:
  at::Tensor view(const at::Tensor& x, const IndexRange& rows) const {
    return x.view({sequences_, x.size(0) * x.size(1) / sequences_, x.size(2), x.size(3)})
        .narrow(2, rows.begin, rows.count);
  }
  int64_t sequences_, n_;
  at::Tensor index_;  // undefined: all sequences
};

// The way of a part's keys and values from one process that holds some to one that has queries for
// them.
struct Leg {
  size_t part;
  int64_t from, to, rows;
};

std::vector<Leg> legs_of(const ContextPlan& plan) {
  std::vector<Leg> legs;
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    for (int64_t from = 0; from < plan.split.parts(); ++from) {
      const int64_t rows = plan.split.rows_of(from, plan.parts[i].keys).count;
      for (int64_t to = 0; rows > 0 && to < plan.split.parts(); ++to) {
        if (plan.split.rows_of(to, plan.parts[i].queries).count > 0) {
          legs.push_back({i, from, to, rows});
        }
      }
    }
  }
  return legs;
}

// Two messages a leg, keys and values; or their gradients, the other way.
std::vector<Message> messages_of(const std::vector<Leg>& legs, const ContextPlan& plan,
                                 bool backward) {
  std::vector<Message> messages;
  for (const Leg& leg : legs) {
    const ContextPart& part = plan.parts[leg.part];
    for (const int64_t rank : {part.ranks.qk, part.ranks.v}) {
      messages.push_back({backward ? leg.to : leg.from,
                          backward ? leg.from : leg.to,
                          {static_cast<int64_t>(part.sequences.size()), leg.rows, rank}});
    }
  }
  return messages;
}

// One part's forward, kept until the merged log-sum-exp is known.
struct FarPart {
  size_t part;
  at::Tensor out;        // [n, g rows, r_v], in the value basis
  at::Tensor logsumexp;  // [n, g rows, 1]
};

struct Forward {
  at::Tensor out, logsumexp;         // [B, H, L, d], [B, H, L, 1]
  std::vector<KeysValues> arrivals;  // by part, of all its keys, where this process has queries
};

Forward forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const ContextPlan& plan) {
  const int64_t me = plan.group.rank(), d = q.size(3);
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  const auto legs = legs_of(plan);

  std::vector<KeysValues> projected(plan.parts.size());
  std::vector<at::Tensor> contents;
  for (const Leg& leg : legs) {
    const ContextPart& part = plan.parts[leg.part];
    KeysValues& low = projected[leg.part];
    if (leg.from == me && !low.k.defined()) {
      const Rows rows(part, plan, k);
      low = {into_basis(rows.take(k, rows.keys), part.p_k),
             into_basis(rows.take(v, rows.keys), part.p_v)};
    }
    contents.insert(contents.end(), {low.k, low.v});
  }
  Exchange exchange(plan.group, messages_of(legs, plan, /*backward=*/false), contents, q.options());

  Forward result{at::empty(q.sizes(), q.options()), {}, std::vector<KeysValues>(plan.parts.size())};
  auto near = at::empty(
      {q.size(0), q.size(1), q.size(2)},
      q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  near_attention(q, k, v, plan.split.own_tree(me), result.out, near);
  near = near.unsqueeze(3);

  const auto received = exchange.wait();
  std::vector<std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>> pieces(
      plan.parts.size());
  for (size_t i = 0; i < legs.size(); ++i) {
    if (legs[i].to == me) {
      pieces[legs[i].part].first.push_back(received[2 * i]);
      pieces[legs[i].part].second.push_back(received[2 * i + 1]);
    }
  }
  result.logsumexp = near.to(
      at::kDouble, /*non_blocking=*/false,
      /*copy=*/true);  // the parts' shares add up to one however large scores are
  std::vector<FarPart> far;
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    if (pieces[i].first.empty()) {
      continue;
    }
    const ContextPart& part = plan.parts[i];
    const Rows rows(part, plan, k);
    KeysValues& low = result.arrivals[i];
    low = {joined(pieces[i].first), joined(pieces[i].second)};
    const auto rows_q = rows.take(q, rows.queries);
    const auto low_q = into_basis(rows_q, part.p_q);
    auto [part_out, part_logsumexp] = attention_rows(low_q, low.k, low.v, scale);
    if (part.residual.defined()) {
      part_logsumexp += residual_correction(rows_q, part.residual).to(near.scalar_type());
    }
    part_logsumexp = part_logsumexp.unsqueeze(2);
    rows.put(result.logsumexp, rows.queries,
             at::logaddexp(rows.take(result.logsumexp, rows.queries), part_logsumexp));
    far.push_back({i, part_out, part_logsumexp});
  }

  // Each part weighted by its share exp(lse_part - lse).
  result.out.mul_((near - result.logsumexp).exp_().to(q.scalar_type()));
  for (FarPart& f : far) {
    const ContextPart& part = plan.parts[f.part];
    const Rows rows(part, plan, k);
    const auto share = (f.logsumexp - rows.take(result.logsumexp, rows.queries))
                           .exp_()
                           .to(q.scalar_type());
    rows.add(result.out, rows.queries, out_of_basis(f.out.mul_(share), part.p_o));
    f.out.reset();
  }
  result.logsumexp = result.logsumexp.to(near.scalar_type());
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out,
                                                        const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const Forward& saved,
                                                        const ContextPlan& plan) {
  const int64_t me = plan.group.rank();
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  auto grad_q = at::empty(q.sizes(), q.options());
  auto grad_k = at::empty(k.sizes(), k.options());
  auto grad_v = at::empty(v.sizes(), v.options());
  const auto delta = (grad_out * saved.out).sum(3, /*keepdim=*/true, saved.logsumexp.scalar_type());
  near_attention_backward(grad_out, q, k, v, plan.split.own_tree(me), saved.logsumexp.squeeze(3),
                          delta.squeeze(3), grad_q, grad_k, grad_v);

  std::vector<KeysValues> grads(plan.parts.size());  // of all keys and values of a part, projected
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const ContextPart& part = plan.parts[i];
    const KeysValues& low = saved.arrivals[i];
    if (!low.k.defined()) {
      continue;
    }
    const Rows rows(part, plan, k);
    const auto rows_q = rows.take(q, rows.queries);
    const auto low_q = into_basis(rows_q, part.p_q);
    auto logsumexp = rows.take(saved.logsumexp, rows.queries)
                         .squeeze(2);  // as the uncorrected scores see it
    if (part.residual.defined()) {
      logsumexp = logsumexp -
                  residual_correction(rows_q, part.residual).to(logsumexp.scalar_type());
    }
    const auto [dq, dk, dv] = attention_rows_backward(
        into_basis(rows.take(grad_out, rows.queries), part.p_o), low_q, low.k, low.v, logsumexp,
        rows.take(delta, rows.queries).squeeze(2), scale);
    grads[i] = {dk, dv};
    rows.add(grad_q, rows.queries, out_of_basis(dq, part.p_q));
  }

  const auto legs = legs_of(plan);
  std::vector<at::Tensor> contents;
  std::vector<int64_t> sent(
      plan.parts.size());  // rows of a part's keys; they came in the order of the legs
  for (const Leg& leg : legs) {
    if (leg.to == me) {
      int64_t& begin = sent[leg.part];
      contents.push_back(grads[leg.part].k.narrow(1, begin, leg.rows));
      contents.push_back(grads[leg.part].v.narrow(1, begin, leg.rows));
      begin += leg.rows;
    } else {
      contents.resize(contents.size() + 2);
    }
  }
  const auto received = Exchange(plan.group, messages_of(legs, plan, /*backward=*/true), contents,
                                 q.options())
                            .wait();
  std::vector<KeysValues> sums(plan.parts.size());
  for (size_t i = 0; i < legs.size(); ++i) {
    if (legs[i].from == me) {
      KeysValues& sum = sums[legs[i].part];
      sum = sum.k.defined() ? KeysValues{sum.k + received[2 * i], sum.v + received[2 * i + 1]}
                            : KeysValues{received[2 * i], received[2 * i + 1]};
    }
  }
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    if (sums[i].k.defined()) {
      const Rows rows(plan.parts[i], plan, k);
      rows.add(grad_k, rows.keys, out_of_basis(sums[i].k, plan.parts[i].p_k).contiguous());
      rows.add(grad_v, rows.keys, out_of_basis(sums[i].v, plan.parts[i].p_v).contiguous());
    }
  }
  return {grad_q, grad_k, grad_v};
}

class ContextAttention : public torch::autograd::Function<ContextAttention> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const c10::intrusive_ptr<ContextPlan>& plan) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Forward result = drrl::forward(q, k, v, *plan);
    variable_list saved = {q, k, v, result.out, result.logsumexp};
    for (const KeysValues& low : result.arrivals) {
      saved.insert(saved.end(), {low.k, low.v});
    }
    context->save_for_backward(saved);
    context->saved_data["plan"] = c10::IValue::make_capsule(plan);
    return result.out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto plan = c10::static_intrusive_pointer_cast<ContextPlan>(
        context->saved_data["plan"].toCapsule());
    at::AutoDispatchBelowADInplaceOrView guard;
    Forward result{saved[3], saved[4], {}};
    for (size_t i = 5; i < saved.size(); i += 2) {
      result.arrivals.push_back({saved[i], saved[i + 1]});
    }
    auto [dq, dk, dv] = drrl::backward(grads[0].contiguous(), saved[0], saved[1], saved[2], result,
                                       *plan);
    return {dq, dk, dv, at::Tensor()};
  }
};

}  // namespace

std::vector<ContextPart> context_parts(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                       int64_t head_dim) {
  const BlockTree& tree = split.tree();
  const int64_t pairs = tree.num_pairs(), sequences = static_cast<int64_t>(ranks.size()) / pairs;
  TORCH_CHECK(sequences * pairs == static_cast<int64_t>(ranks.size()),
              "context_parts: ", ranks.size(), " ranks for ", pairs, " pairs");
  std::vector<ContextPart> parts;
  if (tree.sinks() > 0) {
    parts.push_back({-1,
                     {0, tree.sinks()},
                     {tree.sinks(), tree.sequence_length() - tree.sinks()},
                     {head_dim, head_dim},
                     {}});
    for (int64_t s = 0; s < sequences; ++s) {
      parts.back().sequences.push_back(s);
    }
  }
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      const auto by_ranks = group_by_ranks(sequences, [&](int64_t s) {
        return ranks[static_cast<size_t>(s * pairs + run.first_pair + i)];
      });
      for (const auto& [of, which] : by_ranks) {
        parts.push_back({run.first_pair + i,
                         {run.key_begin + i * run.stride, run.key_rows},
                         {run.query_begin + i * run.stride, run.query_rows},
                         of,
                         which});
      }
    }
  }
  return parts;
}

int64_t ContextPlan::exact_elements(int64_t head_dim) const {
  int64_t elements = 0;
  for (const Leg& leg : legs_of(*this)) {
    if (leg.from == group.rank() && leg.to != leg.from) {
      elements += static_cast<int64_t>(parts[leg.part].sequences.size()) * leg.rows * 2 * head_dim;
    }
  }
  return elements;
}

at::Tensor context_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const c10::intrusive_ptr<ContextPlan>& plan) {
  TORCH_CHECK(plan != nullptr, "context_attention: no plan");
  const int64_t rows = plan->split.rows(plan->group.rank());
  TORCH_CHECK(plan->split.parts() == plan->group.size(), "context_attention: a sequence in ",
              plan->split.parts(), " parts for a group of ", plan->group.size());
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) &&
                  q.size(2) == k.size(2) && q.size(3) == k.size(3) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0 && q.size(2) == rows,
              "context_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G and the L = ",
              rows, " rows of part ", plan->group.rank());
  return ContextAttention::apply(q.contiguous(), k.contiguous(), v.contiguous(), plan);
}

}  // namespace drrl

#include "distributed/attention/context_bases.h"

#include <algorithm>

#include "core/linalg/basis.h"
#include "distributed/collectives/exchange.h"
#include "distributed/collectives/traffic.h"
#include "distributed/topology/mesh.h"

namespace drrl {
namespace {

std::vector<Range> keys_of_pairs(const BlockTree& tree) {
  std::vector<Range> keys;
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      keys.push_back({run.key_begin + i * run.stride, run.key_rows});
    }
  }
  return keys;
}

// A basis on its way to one process that projects by it.
struct Delivery {
  size_t part;
  int64_t to;
  at::Tensor ContextPart::* field;
  int64_t columns;
};

std::vector<Delivery> deliveries_of(const ContextPlan& plan, int64_t head_dim) {
  std::vector<Delivery> deliveries;
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const ContextPart& part = plan.parts[i];
    const int64_t qk = part.ranks.qk, v = part.ranks.v;
    for (int64_t to = 0; to < plan.split.parts(); ++to) {
      const bool keys = plan.split.rows_of(to, part.keys).count > 0,
                 queries = plan.split.rows_of(to, part.queries).count > 0;
      const auto deliver = [&](bool needed, at::Tensor ContextPart::* field, int64_t columns) {
        if (needed) {
          deliveries.push_back({i, to, field, columns});
        }
      };
      deliver(keys && qk < head_dim, &ContextPart::p_k, qk);
      deliver(keys && v < head_dim, &ContextPart::p_v, v);
      deliver(queries && qk < head_dim, &ContextPart::p_q, qk);
      deliver(queries && v < head_dim, &ContextPart::p_o, v);
      deliver(queries && qk < head_dim, &ContextPart::residual,
              std::min(kResidualColumns, head_dim));
    }
  }
  return deliveries;
}

}  // namespace

std::vector<int64_t> basis_makers(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                  int64_t head_dim) {
  const auto keys = keys_of_pairs(split.tree());
  std::vector<int64_t> makers(keys.size(), -1), load(static_cast<size_t>(split.parts()));
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    bool low = pair == 0;
    for (size_t item = pair; item < ranks.size(); item += keys.size()) {
      low = low || ranks[item].qk < head_dim || ranks[item].v < head_dim;
    }
    for (int64_t process = 0; low && process < split.parts(); ++process) {
      if (split.rows_of(process, keys[pair]).count > 0 &&
          (makers[pair] < 0 ||
           load[static_cast<size_t>(process)] < load[static_cast<size_t>(makers[pair])])) {
        makers[pair] = process;
      }
    }
    if (low) {
      ++load[static_cast<size_t>(makers[pair])];
    }
  }
  return makers;
}

std::vector<int64_t> pairs_made_by(const std::vector<int64_t>& makers, int64_t process) {
  std::vector<int64_t> pairs;
  for (size_t pair = 0; pair < makers.size(); ++pair) {
    if (makers[pair] == process) {
      pairs.push_back(static_cast<int64_t>(pair));
    }
  }
  return pairs;
}

PairGrams context_grams(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const SequenceSplit& split, const Group& group,
                        const std::vector<int64_t>& makers, int64_t& bytes) {
  at::NoGradGuard no_grad;
  const int64_t batch = k.size(0), groups = k.size(1), d = k.size(3),
                block = split.tree().geometry().near_block;
  const int64_t begin = group.rank() == 0 ? split.tree().sinks() : 0,
                blocks = (k.size(2) - begin) / block;  // complete ones: no pair has keys of another
  const at::Tensor all = block_gram_triangles(q, k, v, begin, blocks, block);

  const auto keys = keys_of_pairs(split.tree());
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    for (int64_t from = 0; makers[pair] >= 0 && from < split.parts(); ++from) {
      const Range rows = split.rows_of(from, keys[pair]);
      if (rows.count > 0) {
        messages.push_back({from, makers[pair], {3, batch, groups, all.size(4)}});
        contents.push_back(
            from == group.rank()
                ? all.narrow(3, (rows.begin - begin) / block, rows.count / block).sum(3)
                : at::Tensor());
      }
    }
  }
  Exchange exchange(group, messages, contents, all.options());
  bytes += exchange.bytes_sent();
  const auto received = exchange.wait();
  std::vector<at::Tensor> made;
  size_t message = 0;
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    at::Tensor sum;
    for (int64_t from = 0; makers[pair] >= 0 && from < split.parts(); ++from) {
      if (split.rows_of(from, keys[pair]).count > 0) {
        const auto part = received[message].defined() ? received[message].to(at::kDouble)
                                                      : at::Tensor();
        ++message;
        sum = sum.defined() && part.defined() ? sum + part : part;
      }
    }
    if (sum.defined()) {
      made.push_back(sum);
    }
  }
  const auto sums = made.empty() ? at::empty({3, batch, groups, 0, all.size(4)},
                                             all.options().dtype(at::kDouble))
                                 : at::stack(made, 3);
  const auto grams = from_lower_triangle(sums, d);
  return {grams[0], grams[1], grams[2]};
}

void agree_on_ranks(std::vector<Ranks>& ranks, const Group& group, int64_t& bytes) {
  at::Tensor all = at::empty({static_cast<int64_t>(ranks.size()), 2}, at::kFloat);
  auto row = all.accessor<float, 2>();
  for (size_t i = 0; i < ranks.size(); ++i) {
    row[static_cast<int64_t>(i)][0] = static_cast<float>(ranks[i].qk);
    row[static_cast<int64_t>(i)][1] = static_cast<float>(ranks[i].v);
  }
  group.all_reduce(all, ReduceOp::kMax);
  bytes += static_cast<int64_t>(static_cast<double>(all.nbytes()) *
                                bus_factor("all_reduce", group.size()));
  for (size_t i = 0; i < ranks.size(); ++i) {
    ranks[i].qk = static_cast<int64_t>(row[static_cast<int64_t>(i)][0]);
    ranks[i].v = static_cast<int64_t>(row[static_cast<int64_t>(i)][1]);
  }
}

at::Tensor dealt_first_pair_bases(const PairGrams& made, const at::Tensor& w_o, const Group& group,
                                  int64_t& solves, int64_t& bytes) {
  at::NoGradGuard no_grad;
  const int64_t sequences = made.keys.size(0) * made.keys.size(1), d = made.keys.size(4);
  const auto share = [&](int64_t process) {
    return partition(2 * sequences, group.size(), process);
  };  // of (sequence, kind), kind innermost
  const auto options = made.keys.options().dtype(travelling_type(w_o.scalar_type()));
  const at::Tensor problems = group.rank() == 0 ? lower_triangle(first_pair_problems(made, w_o))
                                                      .to(options.dtype())
                                                : at::Tensor();  // [2, 2 B G, d (d + 1) / 2]
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (int64_t to = 0; to < group.size(); ++to) {
    messages.push_back({0, to, {2, share(to).count, d * (d + 1) / 2}});
    contents.push_back(problems.defined() ? problems.narrow(1, share(to).begin, share(to).count)
                                          : at::Tensor());
  }
  Exchange dealt(group, messages, contents, options);
  bytes += dealt.bytes_sent();
  const auto own = from_lower_triangle(
      dealt.wait()[static_cast<size_t>(group.rank())].to(at::kDouble), d);
  const auto solved = own.size(1) > 0 ? solve_basis(own[0], own[1]).right
                                      : at::empty({0, d, d}, own.options().dtype(at::kFloat));
  solves += own.size(1);

  messages.clear();
  contents.clear();
  for (int64_t from = 0; from < group.size(); ++from) {
    for (int64_t to = 0; to < group.size(); ++to) {
      messages.push_back({from, to, {share(from).count, d, d}});
      contents.push_back(from == group.rank() ? solved : at::Tensor());
    }
  }
  Exchange gathered(group, messages, contents, solved.options());
  bytes += gathered.bytes_sent();
  std::vector<at::Tensor> all;
  for (const at::Tensor& part : gathered.wait()) {
    if (part.defined()) {
      all.push_back(part);
    }
  }
  return at::cat(all).view({sequences, 2, d, d});
}

void hand_out_bases(ContextPlan& plan, const std::vector<int64_t>& makers, const FarBases& made,
                    const at::Tensor& residual, int64_t head_dim, const at::TensorOptions& options,
                    int64_t& bytes) {
  at::NoGradGuard no_grad;
  const auto own = pairs_made_by(makers, plan.group.rank());
  const auto source = [&](const Delivery& delivery) {
    if (delivery.field == &ContextPart::residual) {
      return residual;
    }
    const bool scores = delivery.field == &ContextPart::p_k || delivery.field == &ContextPart::p_q;
    const bool left = delivery.field == &ContextPart::p_q || delivery.field == &ContextPart::p_v;
    const Basis& basis = scores ? made.scores : made.values;
    return left ? basis.left : basis.right;
  };
  const auto of_part = [&](const Delivery& delivery) {  // what this process made: [sequences of the
                                                        // part, d, columns]
    const ContextPart& part = plan.parts[delivery.part];
    const auto at_pair = std::lower_bound(own.begin(), own.end(), part.pair) - own.begin();
    const at::Tensor& all = source(delivery);
    const auto pair = all.unflatten(0, {-1, static_cast<int64_t>(own.size())})
                          .select(1, at_pair)
                          .narrow(2, 0, delivery.columns);
    const bool every = static_cast<int64_t>(part.sequences.size()) == pair.size(0);
    return (every
                ? pair
                : pair.index_select(0, at::tensor(part.sequences, at::kLong).to(options.device())))
        .to(options.dtype())
        .contiguous();
  };
  const auto deliveries = deliveries_of(plan, head_dim);
  std::vector<std::pair<at::Tensor ContextPart::*, at::Tensor>>
      ready;  // of one part: several processes want the same
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (size_t i = 0; i < deliveries.size(); ++i) {
    const Delivery& delivery = deliveries[i];
    const ContextPart& part = plan.parts[delivery.part];
    const int64_t from = makers[static_cast<size_t>(part.pair)];
    messages.push_back({from,
                        delivery.to,
                        {static_cast<int64_t>(part.sequences.size()), head_dim, delivery.columns}});
    contents.emplace_back();
    if (i > 0 && deliveries[i - 1].part != delivery.part) {
      ready.clear();
    }
    if (from == plan.group.rank()) {
      auto found = std::find_if(ready.begin(), ready.end(),
                                [&](const auto& entry) { return entry.first == delivery.field; });
      if (found == ready.end()) {
        found = ready.insert(ready.end(), {delivery.field, of_part(delivery)});
      }
      contents.back() = found->second;
    }
  }
  Exchange exchange(plan.group, messages, contents, options);
  bytes += exchange.bytes_sent();
  const auto received = exchange.wait();
  for (size_t i = 0; i < deliveries.size(); ++i) {
    if (deliveries[i].to == plan.group.rank()) {
      plan.parts[deliveries[i].part].*deliveries[i].field = received[i];
    }
  }
}

}  // namespace drrl

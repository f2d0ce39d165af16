#include "distributed/attention/context_parallel_bases.h"

#include <algorithm>

#include "core/attention/flops.h"
#include "core/linalg/basis.h"
#include "distributed/collectives/exchange.h"
#include "distributed/topology/mesh.h"

namespace drrl {
namespace {

std::vector<IndexRange> keys_of_pairs(const BlockTree& tree) {
  std::vector<IndexRange> keys;
  for (const PairRun& run : tree.runs()) {
    for (int64_t i = 0; i < run.count; ++i) {
      keys.push_back({run.key_begin + i * run.stride, run.key_rows});
    }
  }
  return keys;
}

// A basis on its way to one process that projects by it.
struct Transfer {
  size_t part;
  int64_t to;
  at::Tensor ContextPart::* field;
  int64_t columns;
};

std::vector<Transfer> transfers_of(const ContextPlan& plan, int64_t head_dim) {
  std::vector<Transfer> transfers;
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const ContextPart& part = plan.parts[i];
    const int64_t qk = part.ranks.qk, v = part.ranks.v;
    for (int64_t to = 0; to < plan.split.parts(); ++to) {
      const bool keys = plan.split.rows_of(to, part.keys).count > 0,
                 queries = plan.split.rows_of(to, part.queries).count > 0;
      const auto deliver = [&](bool needed, at::Tensor ContextPart::* field, int64_t columns) {
        if (needed) {
          transfers.push_back({i, to, field, columns});
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
  return transfers;
}

// The pairs whose bases this process makes.
struct OwnedPairs {
  OwnedPairs(const SequenceSplit& split, const std::vector<int64_t>& owners, int64_t process,
             int64_t sequences_in)
      : pairs(pairs_owned_by(owners, process)),
        all_pairs(owners.size()),
        sequences(static_cast<size_t>(sequences_in)) {
    for (const int64_t pair : pairs) {
      keys.push_back(split.tree().run_of(pair).key_rows);
    }
  }

  // Of entries for all (sequence, pair) those of the own pairs, and back.
  std::vector<Ranks> of(const std::vector<Ranks>& all) const {
    std::vector<Ranks> own;
    for (size_t s = 0; s < sequences; ++s) {
      for (const int64_t pair : pairs) {
        own.push_back(all[s * all_pairs + static_cast<size_t>(pair)]);
      }
    }
    return own;
  }
  void put(const std::vector<Ranks>& own, std::vector<Ranks>& all) const {
    for (size_t i = 0; i < own.size(); ++i) {
      all[i / pairs.size() * all_pairs + static_cast<size_t>(pairs[i % pairs.size()])] = own[i];
    }
  }

  std::vector<int64_t> pairs, keys;  // keys: how many each pair has
  size_t all_pairs, sequences;
};

// far_grams of the pairs that this process owns, [B, G, owned, d, d].
PairGrams context_grams(const AttentionCall& call, const SequenceSplit& split, const Group& group,
                        const std::vector<int64_t>& owners) {
  const int64_t batch = call.batch(), groups = call.groups(), d = call.head_dim(),
                block = split.tree().geometry().near_block;
  const int64_t begin = group.rank() == 0 ? split.tree().sinks() : 0,
                blocks = (call.length() - begin) /
                         block;  // complete ones: no pair has keys of another
  const at::Tensor all = block_gram_triangles(call.q, call.k, call.v, begin, blocks, block);

  const auto keys = keys_of_pairs(split.tree());
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    for (int64_t from = 0; owners[pair] >= 0 && from < split.parts(); ++from) {
      const IndexRange rows = split.rows_of(from, keys[pair]);
      if (rows.count > 0) {
        messages.push_back({from, owners[pair], {3, batch, groups, all.size(4)}});
        contents.push_back(
            from == group.rank()
                ? all.narrow(3, (rows.begin - begin) / block, rows.count / block).sum(3)
                : at::Tensor());
      }
    }
  }
  Exchange exchange(group, messages, contents, all.options());
  const auto received = exchange.wait();
  std::vector<at::Tensor> made;
  size_t message = 0;
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    at::Tensor sum;
    for (int64_t from = 0; owners[pair] >= 0 && from < split.parts(); ++from) {
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

// Each rank <- the largest that a process has there: owners of bases may have left pairs exact.
void agree_on_ranks(std::vector<Ranks>& ranks, const Group& group) {
  at::Tensor all = at::empty({static_cast<int64_t>(ranks.size()), 2}, at::kFloat);
  auto row = all.accessor<float, 2>();
  for (size_t i = 0; i < ranks.size(); ++i) {
    row[static_cast<int64_t>(i)][0] = static_cast<float>(ranks[i].qk);
    row[static_cast<int64_t>(i)][1] = static_cast<float>(ranks[i].v);
  }
  group.all_reduce(all, ReduceOp::kMax);
  for (size_t i = 0; i < ranks.size(); ++i) {
    ranks[i].qk = static_cast<int64_t>(row[static_cast<int64_t>(i)][0]);
    ranks[i].v = static_cast<int64_t>(row[static_cast<int64_t>(i)][1]);
  }
}

// first_pair_bases, [B G, 2, d, d] on all processes: process 0, whose Grams begin with pair 0,
// scatters the 2 B G problems, each process solves its share, and the results are gathered by all.
// Elsewhere only batch and groups of `grams` are looked at. decompositions += those of this
// process.
at::Tensor scattered_first_pair_bases(const PairGrams& grams, const at::Tensor& w_o,
                                      const Group& group, int64_t& decompositions) {
  const int64_t sequences = grams.keys.size(0) * grams.keys.size(1), d = grams.keys.size(4);
  const auto share = [&](int64_t process) {
    return partition(2 * sequences, group.size(), process);
  };  // of (sequence, kind), kind innermost
  const auto options = grams.keys.options().dtype(travelling_type(w_o.scalar_type()));
  const at::Tensor problems = group.rank() == 0 ? lower_triangle(first_pair_problems(grams, w_o))
                                                      .to(options.dtype())
                                                : at::Tensor();  // [2, 2 B G, d (d + 1) / 2]
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (int64_t to = 0; to < group.size(); ++to) {
    messages.push_back({0, to, {2, share(to).count, d * (d + 1) / 2}});
    contents.push_back(problems.defined() ? problems.narrow(1, share(to).begin, share(to).count)
                                          : at::Tensor());
  }
  Exchange scattered(group, messages, contents, options);
  const auto own = from_lower_triangle(
      scattered.wait()[static_cast<size_t>(group.rank())].to(at::kDouble), d);
  const auto solved = own.size(1) > 0 ? solve_basis(own[0], own[1]).right
                                      : at::empty({0, d, d}, own.options().dtype(at::kFloat));
  decompositions += own.size(1);

  messages.clear();
  contents.clear();
  for (int64_t from = 0; from < group.size(); ++from) {
    for (int64_t to = 0; to < group.size(); ++to) {
      messages.push_back({from, to, {share(from).count, d, d}});
      contents.push_back(from == group.rank() ? solved : at::Tensor());
    }
  }
  Exchange gathered(group, messages, contents, solved.options());
  std::vector<at::Tensor> all;
  for (const at::Tensor& part : gathered.wait()) {
    if (part.defined()) {
      all.push_back(part);
    }
  }
  return at::cat(all).view({sequences, 2, d, d});
}

// Puts bases and residual factors into all processes' parts where they are needed: `made` [B G
// owned, d, ..] are of the pairs that this process owns. In the dtype and on the device of options.
void distribute_bases(ContextPlan& plan, const std::vector<int64_t>& owners, const FarBases& made,
                      int64_t head_dim, const at::TensorOptions& options) {
  const auto own = pairs_owned_by(owners, plan.group.rank());
  const auto source = [&](const Transfer& transfer) {
    if (transfer.field == &ContextPart::residual) {
      return made.residual;
    }
    const bool scores = transfer.field == &ContextPart::p_k || transfer.field == &ContextPart::p_q;
    const bool left = transfer.field == &ContextPart::p_q || transfer.field == &ContextPart::p_v;
    const Basis& basis = scores ? made.scores : made.values;
    return left ? basis.left : basis.right;
  };
  const auto of_part = [&](const Transfer& transfer) {  // what this process made: [sequences of the
                                                        // part, d, columns]
    const ContextPart& part = plan.parts[transfer.part];
    const auto at_pair = std::lower_bound(own.begin(), own.end(), part.pair) - own.begin();
    const at::Tensor& all = source(transfer);
    const auto pair = all.unflatten(0, {-1, static_cast<int64_t>(own.size())})
                          .select(1, at_pair)
                          .narrow(2, 0, transfer.columns);
    const bool every = static_cast<int64_t>(part.sequences.size()) == pair.size(0);
    return (every
                ? pair
                : pair.index_select(0, at::tensor(part.sequences, at::kLong).to(options.device())))
        .to(options.dtype())
        .contiguous();
  };
  const auto transfers = transfers_of(plan, head_dim);
  std::vector<std::pair<at::Tensor ContextPart::*, at::Tensor>>
      ready;  // of one part: several processes want the same
  std::vector<Message> messages;
  std::vector<at::Tensor> contents;
  for (size_t i = 0; i < transfers.size(); ++i) {
    const Transfer& transfer = transfers[i];
    const ContextPart& part = plan.parts[transfer.part];
    const int64_t from = owners[static_cast<size_t>(part.pair)];
    messages.push_back({from,
                        transfer.to,
                        {static_cast<int64_t>(part.sequences.size()), head_dim, transfer.columns}});
    contents.emplace_back();
    if (i > 0 && transfers[i - 1].part != transfer.part) {
      ready.clear();
    }
    if (from == plan.group.rank()) {
      auto found = std::find_if(ready.begin(), ready.end(),
                                [&](const auto& entry) { return entry.first == transfer.field; });
      if (found == ready.end()) {
        found = ready.insert(ready.end(), {transfer.field, of_part(transfer)});
      }
      contents.back() = found->second;
    }
  }
  Exchange exchange(plan.group, messages, contents, options);
  const auto received = exchange.wait();
  for (size_t i = 0; i < transfers.size(); ++i) {
    if (transfers[i].to == plan.group.rank()) {
      plan.parts[transfers[i].part].*transfers[i].field = received[i];
    }
  }
}

}  // namespace

std::vector<int64_t> basis_owners(const SequenceSplit& split, const std::vector<Ranks>& ranks,
                                  int64_t head_dim) {
  const auto keys = keys_of_pairs(split.tree());
  std::vector<int64_t> owners(keys.size(), -1), load(static_cast<size_t>(split.parts()));
  for (size_t pair = 0; pair < keys.size(); ++pair) {
    bool low = pair == 0;
    for (size_t item = pair; item < ranks.size(); item += keys.size()) {
      low = low || ranks[item].qk < head_dim || ranks[item].v < head_dim;
    }
    for (int64_t process = 0; low && process < split.parts(); ++process) {
      if (split.rows_of(process, keys[pair]).count > 0 &&
          (owners[pair] < 0 ||
           load[static_cast<size_t>(process)] < load[static_cast<size_t>(owners[pair])])) {
        owners[pair] = process;
      }
    }
    if (low) {
      ++load[static_cast<size_t>(owners[pair])];
    }
  }
  return owners;
}

std::vector<int64_t> pairs_owned_by(const std::vector<int64_t>& owners, int64_t process) {
  std::vector<int64_t> pairs;
  for (size_t pair = 0; pair < owners.size(); ++pair) {
    if (owners[pair] == process) {
      pairs.push_back(static_cast<int64_t>(pair));
    }
  }
  return pairs;
}

PlannedContext make_context_plan(const AttentionCall& call, const SequenceSplit& split,
                                 const Group& group, BasisProvider& provider,
                                 std::vector<Ranks> ranks) {
  at::NoGradGuard no_grad;
  const int64_t d = call.head_dim();
  const auto new_plan = [&] {
    return c10::make_intrusive<ContextPlan>(split, group, context_parts(split, ranks, d));
  };
  PlannedContext planned;
  if (std::all_of(ranks.begin(), ranks.end(),
                  [&](const Ranks& r) { return r.qk == d && r.v == d; })) {
    planned.plan = new_plan();
    planned.ranks = std::move(ranks);
    return planned;
  }
  const auto owners = basis_owners(split, ranks, d);
  const OwnedPairs owned(split, owners, group.rank(), call.batch() * call.groups());
  PairGrams grams = provider.of_all_heads(context_grams(call, split, group, owners), call.w_o);
  const UsablePairs usable = usable_pairs(grams, call.w_o);
  const int64_t heads_per_group = provider.total_heads(call.heads(), call.q.device()) /
                                  call.groups();

  FarBases& bases = planned.bases;
  at::Tensor start;
  int64_t decompositions = 0;
  if (provider.starts_from_first_pair(d)) {
    start = scattered_first_pair_bases(grams, call.w_o, group, decompositions);
  }
  const std::vector<Ranks> decided = ranks;
  if (!owned.pairs.empty()) {
    std::vector<Ranks> own_ranks = owned.of(ranks);
    bases = provider.make(call.layer, grams, call.w_o, own_ranks, start);
    complete_bases(bases, grams, usable, heads_per_group, owned.keys, own_ranks);
    owned.put(own_ranks, ranks);
  }
  bases.decompositions += decompositions;
  bases.flops += static_cast<double>(decompositions) * basis_solve_flops(d);
  bases.exact_pairs = 0;
  if (call.q.is_cpu()) {  // where complete_bases may have made some exact
    agree_on_ranks(ranks, group);
    for (size_t i = 0; i < ranks.size(); ++i) {
      bases.exact_pairs += ranks[i] == decided[i] ? 0 : 1;
    }
  }
  planned.plan = new_plan();
  distribute_bases(*planned.plan, owners, bases, d, call.q.options());
  planned.ranks = std::move(ranks);
  return planned;
}

}  // namespace drrl

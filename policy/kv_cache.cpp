#include "policy/kv_cache.h"

#include <bit>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "core/attention_part.h"
#include "core/error.h"

namespace drrl {
namespace {

// A few rows are two plain products; attention_part would first lay all keys out anew.
constexpr int64_t kFewRows = 16;

// Attention of a group's rows to some keys, normalized over these, and its log-sum-exp.
// q [N, g, rows, e], k [N, n, e], v [N, n, f] -> [N, g, rows, f], [N, g, rows]. causal: n == rows.
struct Part {
  at::Tensor out, logsumexp;
};

Part part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, double scale) {
  const int64_t n = q.size(0), heads = q.size(1), rows = q.size(2);
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (rows >= kFewRows) {
    Part result{at::empty({n, heads, rows, v.size(2)}, q.options()), at::empty({n, heads, rows}, q.options().dtype(wide))};
    attention_part(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal, scale, result.out.unsqueeze(1), result.logsumexp.unsqueeze(1));
    return result;
  }
  auto scores = at::bmm(q.reshape({n, heads * rows, q.size(3)}), k.transpose(1, 2)).to(wide).mul_(scale).view({n, heads, rows, k.size(1)});
  if (causal && rows > 1) {
    scores.masked_fill_(at::ones({rows, rows}, scores.options().dtype(at::kBool)).triu_(1), -std::numeric_limits<double>::infinity());
  }
  auto logsumexp = at::logsumexp(scores, 3);
  const auto weights = scores.sub_(logsumexp.unsqueeze(3)).exp_().to(v.scalar_type()).view({n, heads * rows, k.size(1)});
  return {at::bmm(weights, v).view({n, heads, rows, v.size(2)}), std::move(logsumexp)};
}

// One softmax over the keys of both.
Part merged(const Part& a, const Part& b) {
  auto logsumexp = at::logaddexp(a.logsumexp, b.logsumexp);
  const auto share = [&](const Part& p) { return p.out * (p.logsumexp - logsumexp).exp_().unsqueeze(3).to(p.out.scalar_type()); };
  return {share(a) + share(b), std::move(logsumexp)};
}

// x [N, .., d] times p [N, d, r]
at::Tensor project(const at::Tensor& x, const at::Tensor& p) {
  return p.defined() ? at::matmul(x, x.dim() == 4 ? p.unsqueeze(1) : p) : x;
}

}  // namespace

at::Tensor LayerCache::extend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const DecideNode& decide) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.size(3) == k.size(3) && q.size(2) > 0 && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "LayerCache: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G and L at least 1");
  const int64_t length = q.size(2);
  check(ErrorKind::kUsage, length_ + length <= tree_.sequence_length(), "a cache for ", tree_.sequence_length(), " tokens holds ", length_,
        " and cannot take ", length, " more");
  at::NoGradGuard no_grad;
  const int64_t block = tree_.geometry().near_block;
  if (!near_keys_.defined()) {
    const auto room = [&](int64_t rows) { return at::empty({k.size(0), k.size(1), rows, k.size(3)}, k.options()); };
    const int64_t near = std::min(block, tree_.sequence_length() - tree_.sinks());
    sink_keys_ = room(tree_.sinks());
    sink_values_ = room(tree_.sinks());
    near_keys_ = room(near);
    near_values_ = room(near);
    if (tree_.num_pairs() > 0) {
      near_query_gram_ = at::zeros({k.size(0), k.size(1), k.size(3), k.size(3)}, k.options().dtype(at::kDouble));
    }
  }
  TORCH_CHECK(k.size(0) == near_keys_.size(0) && k.size(1) == near_keys_.size(1) && k.size(3) == near_keys_.size(3) &&
                  k.scalar_type() == near_keys_.scalar_type(),
              "LayerCache: k ", k.sizes(), " of ", k.scalar_type(), " after ", near_keys_.sizes(), " of ", near_keys_.scalar_type());

  auto out = at::empty(q.sizes(), q.options());
  for (int64_t done = 0; done < length;) {  // piece by piece, none across the border of the sinks or of a block
    int64_t room = tree_.sinks() - length_;
    if (room <= 0) {
      if (near_length_ == block) {
        finish_block(decide);
      }
      room = block - near_length_;
    }
    const int64_t rows = std::min(room, length - done);
    attend(q.narrow(2, done, rows), k.narrow(2, done, rows), v.narrow(2, done, rows), out.narrow(2, done, rows));
    done += rows;
  }
  return out;
}

void LayerCache::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out) {
  const int64_t groups = k.size(1), rows = q.size(2);
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {groups, -1}).flatten(0, 1); };  // [B, H, ..] -> [B G, g, ..]
  const auto queries = by_group(q);

  const bool among_sinks = length_ < tree_.sinks();
  const int64_t before = among_sinks ? length_ : near_length_;
  at::Tensor& keys = among_sinks ? sink_keys_ : near_keys_;
  at::Tensor& values = among_sinks ? sink_values_ : near_values_;
  keys.narrow(2, before, rows).copy_(k);
  values.narrow(2, before, rows).copy_(v);
  const auto stored = [&](const at::Tensor& x, int64_t begin, int64_t count) { return x.narrow(2, begin, count).flatten(0, 1); };
  Part all;
  if (rows == 1) {
    all = part(queries, stored(keys, 0, before + 1), stored(values, 0, before + 1), /*causal=*/false, scale);
  } else {
    all = part(queries, stored(keys, before, rows), stored(values, before, rows), /*causal=*/true, scale);
    if (before > 0) {
      all = merged(all, part(queries, stored(keys, 0, before), stored(values, 0, before), /*causal=*/false, scale));
    }
  }
  if (!among_sinks) {
    if (tree_.sinks() > 0) {
      all = merged(all, part(queries, sink_keys_.flatten(0, 1), sink_values_.flatten(0, 1), /*causal=*/false, scale));
    }
    for (const Node& node : nodes_) {
      Part far;
      for (const FarPart& f : node.parts) {
        const auto mine = f.items.defined() ? queries.index_select(0, f.items) : queries;
        Part p = part(project(mine, f.p_q), f.keys, f.values, /*causal=*/false, scale);
        if (f.residual.defined()) {
          p.logsumexp += residual_correction(mine, f.residual);
        }
        p.out = project(p.out, f.p_o.defined() ? f.p_o.transpose(1, 2) : at::Tensor());
        if (!f.items.defined()) {
          far = std::move(p);
          break;
        }
        if (!far.out.defined()) {
          far = {at::empty_like(all.out), at::empty_like(all.logsumexp)};
        }
        far.out.index_copy_(0, f.items, p.out);
        far.logsumexp.index_copy_(0, f.items, p.logsumexp);
      }
      all = merged(all, far);
    }
    if (near_query_gram_.defined()) {
      near_query_gram_.add_(token_gram(q, groups, rows));
    }
    near_length_ += rows;
  }
  length_ += rows;
  by_group(out).copy_(all.out);
}

// Whether a left node is part of a larger one before the horizon: of the first of its ancestors that is a left node itself.
bool LayerCache::merges_again(int64_t level, int64_t node) const {
  do {
    ++level;
    node /= 2;
  } while (node % 2 == 1);
  return ((node + 1) << level) < tree_.num_blocks();
}

void LayerCache::finish_block(const DecideNode& decide) {
  const int64_t block = tree_.geometry().near_block;
  const int64_t begun = (length_ - tree_.sinks()) / block;  // number of the block that begins now
  const int64_t level = std::countr_zero(static_cast<uint64_t>(begun));
  const int64_t node = (begun >> level) - 1;

  std::vector<at::Tensor> keys, values;
  at::Tensor query_gram = near_query_gram_.clone();
  for (size_t i = nodes_.size() - static_cast<size_t>(level); i < nodes_.size(); ++i) {
    check(ErrorKind::kInternal, nodes_[i].exact_keys.defined(), "block ", begun, ": a node that is merged has no exact keys");
    keys.push_back(nodes_[i].exact_keys);
    values.push_back(nodes_[i].exact_values);
    query_gram.add_(nodes_[i].query_gram);
  }
  keys.push_back(near_keys_);
  values.push_back(near_values_);
  const auto k = at::cat(keys, 2);  // a copy even of one
  const auto v = at::cat(values, 2);
  const int64_t groups = k.size(1), d = k.size(3);
  const NodeFactors factors = decide(level, node / 2, {query_gram.unsqueeze(2), token_gram(k, groups, block).unsqueeze(2), token_gram(v, groups, block).unsqueeze(2)});
  const int64_t items = k.size(0) * groups;
  TORCH_CHECK(static_cast<int64_t>(factors.ranks.size()) == items, "LayerCache: ", factors.ranks.size(), " decisions for ", items,
              " (sequence, KV group)");

  std::map<Ranks, std::vector<int64_t>> items_of;
  for (int64_t i = 0; i < items; ++i) {
    items_of[factors.ranks[static_cast<size_t>(i)]].push_back(i);
  }
  Node made;
  for (const auto& [ranks, which] : items_of) {
    FarPart f;
    if (items_of.size() > 1) {
      f.items = at::tensor(which, at::kLong).to(k.device());
    }
    const auto take = [&](const at::Tensor& x) { return f.items.defined() ? x.index_select(0, f.items) : x; };
    const auto columns = [&](const at::Tensor& basis, int64_t rank) { return take(basis.narrow(2, 0, rank)).to(k.scalar_type()).contiguous(); };
    f.keys = take(k.flatten(0, 1));
    f.values = take(v.flatten(0, 1));
    if (ranks.qk < d) {
      f.p_q = columns(factors.scores.left, ranks.qk);
      f.residual = factors.residual.defined() ? columns(factors.residual, d) : at::Tensor();
      f.keys = at::bmm(f.keys, columns(factors.scores.right, ranks.qk));
    }
    if (ranks.v < d) {
      f.p_o = columns(factors.values.right, ranks.v);
      f.values = at::bmm(f.values, columns(factors.values.left, ranks.v));
    }
    made.parts.push_back(std::move(f));
  }
  if (merges_again(level, node)) {
    made.exact_keys = k;
    made.exact_values = v;
    made.query_gram = query_gram;
  }
  nodes_.resize(nodes_.size() - static_cast<size_t>(level));
  nodes_.push_back(std::move(made));
  near_length_ = 0;
  near_query_gram_.zero_();
}

int64_t LayerCache::bytes() const {
  std::set<const void*> counted;  // a node at full rank shares its exact keys
  int64_t sum = 0;
  const auto add = [&](const at::Tensor& x) {
    if (x.defined() && counted.insert(x.storage().unsafeGetStorageImpl()).second) {
      sum += static_cast<int64_t>(x.storage().nbytes());
    }
  };
  for (const auto& x : {sink_keys_, sink_values_, near_keys_, near_values_, near_query_gram_, start_}) {
    add(x);
  }
  for (const Node& node : nodes_) {
    for (const auto& x : {node.exact_keys, node.exact_values, node.query_gram}) {
      add(x);
    }
    for (const FarPart& f : node.parts) {
      for (const auto& x : {f.items, f.p_q, f.p_o, f.residual, f.keys, f.values}) {
        add(x);
      }
    }
  }
  return sum;
}

KvCache::KvCache(int64_t layers, int64_t horizon, Geometry geometry) {
  TORCH_CHECK(layers >= 1, "KvCache: ", layers, " layers, expected at least 1");
  const BlockTree tree(horizon, geometry);
  layers_.assign(static_cast<size_t>(layers), LayerCache(tree));
}

int64_t KvCache::bytes() const {
  int64_t sum = 0;
  for (const LayerCache& layer : layers_) {
    sum += layer.bytes();
  }
  return sum;
}

}  // namespace drrl

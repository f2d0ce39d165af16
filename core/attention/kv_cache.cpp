#include "core/attention/kv_cache.h"

#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "core/attention/exact_attention.h"
#include "core/attention/rows.h"
#include "core/error.h"
#include "core/linalg/basis.h"

namespace drrl {
namespace {

// A few rows are two plain products; attention_part would first lay all keys out anew.
constexpr int64_t kFewRows = 16;

// Attention of a group's rows to some keys, normalized over these, and its log-sum-exp.
// q [N, g, rows, e], k [N, n, e], v [N, n, f] -> [N, g, rows, f], [N, g, rows]. causal: n == rows.
struct Part {
  at::Tensor out, logsumexp;
};

Part part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
          double scale) {
  const int64_t n = q.size(0), heads = q.size(1), rows = q.size(2);
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (rows >= kFewRows) {
    Part result{at::empty({n, heads, rows, v.size(2)}, q.options()),
                at::empty({n, heads, rows}, q.options().dtype(wide))};
    attention_part(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal, scale,
                   result.out.unsqueeze(1), result.logsumexp.unsqueeze(1));
    return result;
  }
  auto scores = wide_product(q.reshape({n, heads * rows, q.size(3)}), k.transpose(1, 2))
                    .mul_(scale)
                    .view({n, heads, rows, k.size(1)});
  if (causal && rows > 1) {
    scores.masked_fill_(at::ones({rows, rows}, scores.options().dtype(at::kBool)).triu_(1),
                        -std::numeric_limits<double>::infinity());
  }
  auto logsumexp = at::logsumexp(scores, 3);
  const auto weights = scores.softmax(3).to(v.scalar_type()).view({n, heads * rows, k.size(1)});
  return {at::bmm(weights, v).view({n, heads, rows, v.size(2)}), std::move(logsumexp)};
}

// One softmax over the keys of all parts.
at::Tensor merged(const std::vector<Part>& parts) {
  if (parts.size() == 1) {
    return parts.front().out;
  }
  std::vector<at::Tensor> logsumexps;
  for (const Part& p : parts) {
    logsumexps.push_back(
        p.logsumexp.to(at::kDouble));  // the shares add up to one however large scores are
  }
  const auto stacked = at::stack(logsumexps);
  const auto shares = (stacked - at::logsumexp(stacked, 0))
                          .exp_()
                          .unsqueeze(4)
                          .to(parts.front().out.scalar_type());
  auto out = parts.front().out * shares[0];
  for (size_t i = 1; i < parts.size(); ++i) {
    out.addcmul_(parts[i].out, shares[static_cast<int64_t>(i)]);
  }
  return out;
}

// x [N, .., d] times p [N, d, r]
at::Tensor project(const at::Tensor& x, const at::Tensor& p) {
  return p.defined() ? at::matmul(x, x.dim() == 4 ? p.unsqueeze(1) : p) : x;
}

}  // namespace

at::Tensor LayerCache::extend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const DecideNode& decide) {
  TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && q.size(0) == k.size(0) &&
          q.size(2) == k.size(2) && q.size(3) == k.size(3) && q.size(2) > 0 && k.size(1) > 0 &&
          q.size(1) % k.size(1) == 0,
      "LayerCache: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
      ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G and L at least 1");
  const int64_t length = q.size(2);
  check(ErrorKind::kUsage, length_ + length <= tree_.sequence_length(), "a cache for ",
        tree_.sequence_length(), " tokens holds ", length_, " and cannot take ", length, " more");
  at::NoGradGuard no_grad;
  const int64_t block = tree_.geometry().near_block;
  if (!near_keys_.defined()) {
    const auto room = [&](int64_t rows) {
      return at::empty({k.size(0), k.size(1), rows, k.size(3)}, k.options());
    };
    const int64_t near = std::min(tree_.sinks() + block, tree_.sequence_length());
    near_keys_ = room(near);
    near_values_ = room(near);
    if (tree_.num_pairs() > 0) {
      near_query_gram_ = at::zeros({k.size(0), k.size(1), k.size(3), k.size(3)},
                                   k.options().dtype(at::kDouble));
      near_query_sum_ = at::zeros({k.size(0), k.size(1), q.size(1) / k.size(1), k.size(3)},
                                  k.options().dtype(at::kDouble));
    }
  }
  TORCH_CHECK(k.size(0) == near_keys_.size(0) && k.size(1) == near_keys_.size(1) &&
                  k.size(3) == near_keys_.size(3) && k.scalar_type() == near_keys_.scalar_type(),
              "LayerCache: k ", k.sizes(), " of ", k.scalar_type(), " after ", near_keys_.sizes(),
              " of ", near_keys_.scalar_type());

  auto out = at::empty(q.sizes(), q.options());
  for (int64_t done = 0;
       done < length;) {  // piece by piece, none across the border of the sinks or of a block
    int64_t room = tree_.sinks() - length_;
    if (room <= 0) {
      if (near_length_ == block) {
        finish_block(decide);
      }
      room = block - near_length_;
    }
    const int64_t rows = std::min(room, length - done);
    attend(q.narrow(2, done, rows), k.narrow(2, done, rows), v.narrow(2, done, rows),
           out.narrow(2, done, rows));
    done += rows;
  }
  return out;
}

void LayerCache::attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        at::Tensor out) {
  const int64_t groups = k.size(1), rows = q.size(2);
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  const auto by_group = [&](const at::Tensor& x) {
    return x.unflatten(1, {groups, -1}).flatten(0, 1);
  };  // [B, H, ..] -> [B G, g, ..]
  const auto queries = by_group(q);

  const bool after_sinks = length_ >= tree_.sinks();
  const int64_t before = std::min(length_, tree_.sinks()) + near_length_;
  near_keys_.narrow(2, before, rows).copy_(k);
  near_values_.narrow(2, before, rows).copy_(v);
  std::vector<Part> parts;
  const auto exact = [&](int64_t begin, int64_t count, bool causal) {
    parts.push_back(part(queries, near_keys_.narrow(2, begin, count).flatten(0, 1),
                         near_values_.narrow(2, begin, count).flatten(0, 1), causal, scale));
  };
  if (rows == 1) {
    exact(0, before + 1, /*causal=*/false);
  } else {
    exact(before, rows, /*causal=*/true);
    if (before > 0) {
      exact(0, before, /*causal=*/false);
    }
  }
  for (const Node& node : nodes_) {
    Part whole;
    for (const FarPart& f : node.parts) {
      const auto mine = f.items.defined() ? queries.index_select(0, f.items) : queries;
      Part p = part(project(mine, f.p_q), f.keys, f.values, /*causal=*/false, scale);
      if (f.residual.defined()) {
        p.logsumexp += residual_correction(mine, f.residual);
      }
      p.out = project(p.out, f.p_o.defined() ? f.p_o.transpose(1, 2) : at::Tensor());
      if (!f.items.defined()) {
        whole = std::move(p);
        break;
      }
      if (!whole.out.defined()) {
        whole = {at::empty_like(parts.front().out), at::empty_like(parts.front().logsumexp)};
      }
      whole.out.index_copy_(0, f.items, p.out);
      whole.logsumexp.index_copy_(0, f.items, p.logsumexp);
    }
    parts.push_back(std::move(whole));
  }
  if (after_sinks) {
    if (near_query_gram_.defined()) {
      near_query_gram_.add_(token_gram(q, groups, rows));
      near_query_sum_.add_(q.unflatten(1, {groups, -1}).sum(3, /*keepdim=*/false, at::kDouble));
    }
    near_length_ += rows;
  }
  length_ += rows;
  by_group(out).copy_(merged(parts));
}

// Whether a left node is part of a larger one before the horizon: of the first of its ancestors
// that is a left node itself.
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

  std::vector<at::Tensor> keys, values, weights;
  at::Tensor query_gram = near_query_gram_.clone();
  for (size_t i = nodes_.size() - static_cast<size_t>(level); i < nodes_.size(); ++i) {
    check(ErrorKind::kInternal, nodes_[i].query_gram.defined(), "block ", begun,
          ": a final node cannot be merged");
    keys.push_back(nodes_[i].parts.front().keys);
    values.push_back(nodes_[i].parts.front().values);
    weights.push_back(nodes_[i].weights);
    query_gram.add_(nodes_[i].query_gram);
  }
  const auto near_keys = near_keys_.narrow(2, tree_.sinks(), block);
  keys.push_back(near_keys.flatten(0, 1));
  values.push_back(near_values_.narrow(2, tree_.sinks(), block).flatten(0, 1));
  const auto wide = near_keys.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  weights.push_back(
      attention_mass((near_query_sum_ / static_cast<double>(block)).to(wide), near_keys)
          .unsqueeze(2));
  const auto k = at::cat(keys, 1);  // [B G, rows, d]; a copy even of one
  const auto v = at::cat(values, 1);
  const auto w = at::cat(weights, 2);
  const int64_t batch = near_keys_.size(0), groups = near_keys_.size(1);
  const auto gram = [&](const at::Tensor& x) {
    return token_gram(x.unflatten(0, {batch, groups}), groups, block, w).unsqueeze(2);
  };
  const NodeFactors factors = decide(level, node / 2, {query_gram.unsqueeze(2), gram(k), gram(v)});
  TORCH_CHECK(static_cast<int64_t>(factors.ranks.size()) == batch * groups,
              "LayerCache: ", factors.ranks.size(), " decisions for ", batch * groups,
              " (sequence, KV group)");
  nodes_.resize(nodes_.size() - static_cast<size_t>(level));
  nodes_.push_back(merges_again(level, node)
                       ? Node{through_projections(k, v, factors), query_gram, w}
                       : Node{at_ranks(k, v, factors), {}, {}});
  near_length_ = 0;
  near_query_gram_.zero_();
  near_query_sum_.zero_();
}

std::vector<LayerCache::FarPart> LayerCache::through_projections(const at::Tensor& k,
                                                                 const at::Tensor& v,
                                                                 const NodeFactors& factors) {
  const int64_t d = k.size(2);
  const auto wide = k.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // [B G, d, d]: a b^T of each item at its rank, the identity at rank d; undefined if that is all.
  const auto products = [&](const at::Tensor& a, const at::Tensor& b, int64_t Ranks::* rank) {
    at::Tensor result;
    for (size_t i = 0; i < factors.ranks.size(); ++i) {
      const int64_t columns = factors.ranks[i].*rank;
      if (columns < d) {
        if (!result.defined()) {
          result = at::eye(d, k.options()).repeat({k.size(0), 1, 1});
        }
        const auto item = static_cast<int64_t>(i);
        const auto basis = [&](const at::Tensor& x) {
          return x[item].narrow(1, 0, columns).to(wide);
        };
        result[item].copy_(at::mm(basis(a), basis(b).t()));
      }
    }
    return result;
  };
  FarPart f;
  f.p_q = products(factors.scores.left, factors.scores.right, &Ranks::qk);
  f.p_o = products(factors.values.right, factors.values.left, &Ranks::v);
  if (factors.residual.defined()) {
    f.residual = factors.residual.clone();
    for (size_t i = 0; i < factors.ranks.size(); ++i) {
      if (factors.ranks[i].qk == k.size(2)) {
        f.residual[static_cast<int64_t>(i)].zero_();
      }
    }
  }
  f.keys = k;
  f.values = v;
  return {f};
}

std::vector<LayerCache::FarPart> LayerCache::at_ranks(const at::Tensor& k, const at::Tensor& v,
                                                      const NodeFactors& factors) {
  const int64_t d = k.size(2);
  const auto items_of = group_by_ranks(static_cast<int64_t>(factors.ranks.size()), [&](int64_t i) {
    return factors.ranks[static_cast<size_t>(i)];
  });
  std::vector<FarPart> parts;
  for (const auto& [ranks, which] : items_of) {
    FarPart f;
    if (items_of.size() > 1) {
      f.items = at::tensor(which, at::kLong).to(k.device());
    }
    const auto take = [&](const at::Tensor& x) {
      return f.items.defined() ? x.index_select(0, f.items) : x;
    };
    const auto columns = [&](const at::Tensor& basis, int64_t rank) {
      return take(basis.narrow(2, 0, rank)).to(k.scalar_type()).contiguous();
    };
    f.keys = take(k);
    f.values = take(v);
    if (ranks.qk < d) {
      f.p_q = columns(factors.scores.left, ranks.qk);
      f.residual = factors.residual.defined() ? columns(factors.residual, factors.residual.size(2))
                                              : at::Tensor();
      f.keys = at::bmm(f.keys, columns(factors.scores.right, ranks.qk));
    }
    if (ranks.v < d) {
      f.p_o = columns(factors.values.right, ranks.v);
      f.values = at::bmm(f.values, columns(factors.values.left, ranks.v));
    }
    parts.push_back(std::move(f));
  }
  return parts;
}

int64_t LayerCache::bytes() const {
  int64_t sum = 0;
  const auto add = [&](const at::Tensor& x) {
    sum += x.defined() ? static_cast<int64_t>(x.storage().nbytes()) : 0;
  };
  add(near_keys_);
  add(near_values_);
  add(near_query_gram_);
  add(near_query_sum_);
  for (const Node& node : nodes_) {
    add(node.query_gram);
    add(node.weights);
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

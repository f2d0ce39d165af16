#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "core/basis.h"
#include "core/block_tree.h"
#include "core/gram.h"
#include "core/lowrank_attention.h"

namespace drrl {

/// How one far node is stored: one entry per (sequence, KV group), bases [B G, d, columns] as in LowRankPlan.
struct NodeFactors {
  std::vector<Ranks> ranks;
  Basis scores;
  Basis values;
  at::Tensor residual;  ///< residual_form of each item's scores, [B G, d, d]; undefined: no correction
};

/// Decides the factors of the pair number `pair` of `level` (BlockTree) from the Grams of its left node, [B, G, 1, d, d] each.
using DecideNode = std::function<NodeFactors(int64_t level, int64_t pair, const PairGrams& grams)>;

/// Keys and values of one layer for sequences that grow: near + sinks + far attention, the same operator as lowrank_attention, one row after the
/// other.
///
/// A query of block n sees sinks and its own block exactly and, for every bit that is set in n, the node of 2^bit blocks to the left of its own
/// (popcount(n) nodes that tile the past, as a binary counter does). A node is held at its ranks, (rows (r + r_v)) numbers with its bases d (r + r_v).
///
/// When block n begins, the nodes of the low bits of n - 1 and the finished block become one node of 2^ctz(n) blocks, with bases of its own. They must
/// see the keys themselves, or the result would not be that of a pass over the whole sequence. So a node keeps exact keys, values and the Gram of its
/// queries for as long as it will be merged once more; the *horizon*, the length that the sequence will not exceed, tells which ones. With H blocks,
/// nothing left of the largest power of two below H is held exactly once that many blocks are there. That is the least that this operator allows:
/// whatever is dropped earlier is needed again.
class LayerCache {
 public:
  /// horizon: the tree of the longest sequence. One block and no sinks make a plain cache of exact keys and values.
  explicit LayerCache(BlockTree horizon) : tree_(std::move(horizon)) {}

  /// Appends the next L >= 1 tokens and returns their attention, [B, H, L, d]. q [B, H, L, d] and k, v [B, G, L, d], positions encoded. Builds no
  /// graph. `decide` is asked once for each node. Errors: c10::Error on shapes that differ from earlier ones, Error(kUsage) beyond the horizon.
  at::Tensor extend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const DecideNode& decide);

  int64_t length() const noexcept { return length_; }
  const BlockTree& horizon() const noexcept { return tree_; }
  /// Where the decider's updates of bases start from, kept for it from node to node.
  at::Tensor& start() noexcept { return start_; }
  /// Memory of all tensors that are held: sinks, near block (room for a whole one), nodes, bases, Grams [bytes].
  int64_t bytes() const;

 private:
  // The items (sequence, KV group) of a node that share their ranks. Projections are undefined where the rank is d.
  struct FarPart {
    at::Tensor items;         // [n] int64; undefined: all
    at::Tensor p_q, p_o;      // [n, d, r], [n, d, r_v]
    at::Tensor residual;      // [n, d, d]
    at::Tensor keys, values;  // [n, rows, r], [n, rows, r_v]
  };
  struct Node {
    std::vector<FarPart> parts;
    // Only of nodes that will be merged again: [B, G, rows, d] and [B, G, d, d].
    at::Tensor exact_keys, exact_values, query_gram;
  };

  bool merges_again(int64_t level, int64_t node) const;
  void finish_block(const DecideNode& decide);
  void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out);

  BlockTree tree_;
  int64_t length_ = 0;
  int64_t near_length_ = 0;
  at::Tensor sink_keys_, sink_values_;  // [B, G, s, d]
  at::Tensor near_keys_, near_values_;  // [B, G, block, d], the first near_length_ rows are filled
  at::Tensor near_query_gram_;          // [B, G, d, d] float64, of the block's queries so far; undefined in a plain cache
  at::Tensor start_;
  std::vector<Node> nodes_;             // from the oldest and largest to the newest
};

/// The caches of all layers of a model.
class KvCache {
 public:
  KvCache(int64_t layers, int64_t horizon, Geometry geometry);

  /// Tokens that every layer has seen.
  int64_t length() const { return layers_.back().length(); }
  int64_t horizon() const { return layers_.back().horizon().sequence_length(); }
  LayerCache& layer(int64_t index) { return layers_.at(static_cast<size_t>(index)); }
  int64_t bytes() const;

 private:
  std::vector<LayerCache> layers_;
};

}  // namespace drrl

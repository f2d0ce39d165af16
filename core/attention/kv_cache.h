#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/ATen.h>

#include "core/linalg/gram.h"
#include "core/types/basis.h"
#include "core/types/block_tree.h"
#include "core/types/lowrank_plan.h"

namespace drrl {

/// How one far node is stored: one entry per (sequence, KV group), bases [B G, d, columns] as in
/// LowRankPlan.
struct NodeFactors {
  std::vector<Ranks> ranks;
  Basis scores;
  Basis values;
  at::Tensor residual;  ///< residual_factor of each item's scores, [B G, d, m], not read where the
                        ///< rank is d; undefined: no correction
};

/// Decides the factors of the pair number `pair` of `level` (BlockTree) from the Grams of its left
/// node, [B, G, 1, d, d] each.
using DecideNode = std::function<NodeFactors(int64_t level, int64_t pair, const PairGrams& grams)>;

/// Keys and values of one layer for sequences that grow: near + sinks + far attention, the same
/// operator as lowrank_attention, one row after the other.
///
/// A query of block n sees sinks and its own block exactly and, for every bit that is set in n, the
/// node of 2^bit blocks to the left of its own (popcount(n) nodes that tile the past, as a binary
/// counter does).
///
/// When block n begins, the nodes of the low bits of n - 1 and the finished block become one node
/// of 2^ctz(n) blocks, with bases of its own. They must see the keys themselves, or the result
/// would not be that of a pass over the whole sequence. So a node is held in one of two forms. One
/// that will be merged again keeps its exact keys and values, their weights and the Gram of its
/// queries, and is read through d x d projections: (q P_q)(k P_k)^T = (q P_q P_k^T) k^T. One that
/// will not is final: rows (r + r_v) numbers, with bases of d (r + r_v).
///
/// The *horizon*, the length that the sequence will not exceed, tells them apart: with H blocks,
/// all that lies left of the largest power of two below H is final once that many blocks are there,
/// and so on to the right. Nothing is held twice, and nothing is held that will not be needed.
class LayerCache {
 public:
  /// horizon: the tree of the longest sequence. One block and no sinks make a plain cache of exact
  /// keys and values.
  explicit LayerCache(BlockTree horizon) : tree_(std::move(horizon)) {}

  /// Appends the next L >= 1 tokens and returns their attention, [B, H, L, d]. q [B, H, L, d] and
  /// k, v [B, G, L, d], positions encoded. Builds no graph. `decide` is asked once for each node.
  /// Errors: c10::Error on shapes that differ from earlier ones, Error(kUsage) beyond the horizon.
  at::Tensor extend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const DecideNode& decide);

  int64_t length() const noexcept { return length_; }
  const BlockTree& horizon() const noexcept { return tree_; }
  /// Where the decider's updates of bases start from, kept for it from node to node; not part of
  /// bytes().
  at::Tensor& start() noexcept { return start_; }
  /// Memory of all tensors that are held: sinks, near block (room for a whole one), nodes, bases,
  /// Grams [bytes].
  int64_t bytes() const;

 private:
  // The items (sequence, KV group) of a node that are held alike: of a final node those that share
  // their ranks, of another one all, at r = r_v = d.
  struct FarPart {
    at::Tensor items;         // [n] int64; undefined: all
    at::Tensor p_q, p_o;      // [n, d, r], [n, d, r_v]; undefined: the identity
    at::Tensor residual;      // [n, d, m]; undefined: no correction
    at::Tensor keys, values;  // [n, rows, r], [n, rows, r_v]
  };
  struct Node {
    std::vector<FarPart> parts;
    at::Tensor query_gram;  // [B, G, d, d] float64; undefined in a final node, like the next
    at::Tensor weights;     // [B, G, blocks, block] attention_mass
  };

  bool merges_again(int64_t level, int64_t node) const;
  void finish_block(const DecideNode& decide);
  static std::vector<FarPart> through_projections(const at::Tensor& k, const at::Tensor& v,
                                                  const NodeFactors& factors);
  static std::vector<FarPart> at_ranks(const at::Tensor& k, const at::Tensor& v,
                                       const NodeFactors& factors);
  void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor out);

  BlockTree tree_;
  int64_t length_ = 0;
  int64_t near_length_ = 0;
  at::Tensor near_keys_,
      near_values_;  // [B, G, s + block, d]: the sinks, then near_length_ rows of the block
  at::Tensor near_query_gram_;  // [B, G, d, d] float64, of the block's queries so far; undefined in
                                // a plain cache, like the next
  at::Tensor near_query_sum_;   // [B, G, g, d] float64
  at::Tensor start_;
  std::vector<Node> nodes_;  // from the oldest and largest to the newest
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

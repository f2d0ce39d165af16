#include "core/cpu/lowrank_kernel.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "core/cpu/attention_kernel.h"
#include "core/cpu/tasks.h"
#include "core/linalg/basis.h"

namespace drrl::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The shapes of one call, and where rows lie in its contiguous tensors.
struct Layout {
  Layout(const at::Tensor& q, const at::Tensor& k)
      : batch(q.size(0)),
        heads(q.size(1)),
        groups(k.size(1)),
        length(q.size(2)),
        d(q.size(3)),
        heads_per_group(heads / groups),
        sequences(batch * groups),
        scale(static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)))) {}

  // Heads of a group are neighbours, so sequence s = b G + group has the query heads s g + (0 .. g
  // - 1) of all B H.
  template <typename T>
  Matrix<T> query_rows(T* x, int64_t sequence, int64_t token) const {
    return {x + (sequence * heads_per_group * length + token) * d, length * d, d};
  }
  template <typename T>
  Matrix<T> query_numbers(T* x, int64_t sequence, int64_t token) const {
    return {x + sequence * heads_per_group * length + token, length, 1};
  }
  template <typename T>
  Matrix<T> key_rows(T* x, int64_t sequence, int64_t token) const {
    return {x + (sequence * length + token) * d, 0, d};
  }

  int64_t batch, heads, groups, length, d, heads_per_group, sequences;
  float scale;
};

// One far pair of one (batch, KV group).
struct Item {
  int64_t sequence, index;  // index: within the plan
  int64_t query_begin, queries, key_begin, keys;
  Ranks ranks;
};

Item item_of(const PairRun& run, int64_t i, int64_t sequence, const LowRankPlan& plan) {
  const int64_t index = sequence * plan.tree.num_pairs() + run.first_pair + i;
  return {sequence,
          index,
          run.query_begin + i * run.stride,
          run.query_rows,
          run.key_begin + i * run.stride,
          run.key_rows,
          plan.ranks[static_cast<size_t>(index)]};
}

// A basis matrix [d, r] of one item and the panels for multiplying by it or by its transpose.
class BasisPanels {
 public:
  // Packs, for each item, the given factors; a rank of d packs nothing.
  BasisPanels(const std::vector<Item>& items, const LowRankPlan& plan, int64_t d, bool backward)
      : d_(d), residual_columns_(plan.residual.defined() ? plan.residual.size(2) : 0) {
    int64_t size = 0;
    for (const Item& item : items) {
      begin_.push_back(size);
      size += (item.ranks.qk < d ? d * (4 * item.ranks.qk + residual_columns_) : 0) +
              (item.ranks.v < d ? 4 * d * item.ranks.v : 0);
    }
    storage_ = at::empty({size}, at::kFloat);
    for_each_task(static_cast<int64_t>(items.size()), 0, [&](int64_t i, float*) {
      const Item& item = items[static_cast<size_t>(i)];
      const auto pack = [&](const Basis& basis, int64_t rank, float* to) {
        const int64_t columns = basis.left.size(2);
        const float* left = basis.left.const_data_ptr<float>() + item.index * d * columns;
        const float* right = basis.right.const_data_ptr<float>() + item.index * d * columns;
        const int64_t step = d * rank;
        pack_matrix(left, columns, d, rank, to);
        pack_matrix(right, columns, d, rank, to + step);
        pack_transposed(right, columns, d, rank, to + 3 * step);
        if (backward) {
          pack_transposed(left, columns, d, rank, to + 2 * step);
        }
      };
      if (item.ranks.qk < d) {
        pack(plan.scores, item.ranks.qk, at(i));
        if (residual_columns_ > 0) {
          pack_matrix(plan.residual.const_data_ptr<float>() + item.index * d * residual_columns_,
                      residual_columns_, d, residual_columns_, at(i) + 4 * d * item.ranks.qk);
        }
      }
      if (item.ranks.v < d) {
        pack(plan.values, item.ranks.v, values_at(i, item));
      }
    });
  }

  // P_q, P_k, P_q^T, P_k^T of item i; null if its scores have rank d.
  const float* scores(int64_t i, const Item& item, int factor) const {
    return item.ranks.qk < d_ ? at(i) + factor * d_ * item.ranks.qk : nullptr;
  }
  // P_v, P_o, P_v^T, P_o^T likewise.
  const float* values(int64_t i, const Item& item, int factor) const {
    return item.ranks.v < d_ ? values_at(i, item) + factor * d_ * item.ranks.v : nullptr;
  }
  // The residual factor of item i; null if there is none.
  const float* residual(int64_t i, const Item& item) const {
    return residual_columns_ > 0 ? scores(i, item, 4) : nullptr;
  }
  int64_t residual_columns() const { return residual_columns_; }
  static constexpr int kLeft = 0, kRight = 1, kLeftTransposed = 2, kRightTransposed = 3;

 private:
  float* at(int64_t i) const { return storage_.data_ptr<float>() + begin_[static_cast<size_t>(i)]; }
  float* values_at(int64_t i, const Item& item) const {
    return at(i) + (item.ranks.qk < d_ ? (4 * item.ranks.qk + residual_columns_) * d_ : 0);
  }

  int64_t d_;
  int64_t residual_columns_;
  std::vector<int64_t> begin_;
  at::Tensor storage_;
};

// A piece of work: rows [first, first + rows) of something numbered `owner`.
struct Piece {
  int64_t owner, head, first, rows;
};

void cut(std::vector<Piece>& pieces, int64_t owner, int64_t head, int64_t total, int64_t rows) {
  for (int64_t first = 0; first < total; first += rows) {
    pieces.push_back({owner, head, first, std::min(rows, total - first)});
  }
}

// The near blocks of a sequence; number -1 stands for the sinks.
struct NearBlocks {
  explicit NearBlocks(const BlockTree& tree)
      : sinks(tree.sinks()),
        block(tree.geometry().near_block),
        blocks(tree.num_blocks()),
        last_rows(tree.last_block_rows()) {}

  int64_t rows_of(int64_t n) const { return n < 0 ? sinks : n + 1 < blocks ? block : last_rows; }
  int64_t first_of(int64_t n) const { return n < 0 ? 0 : sinks + n * block; }
  int64_t count() const { return 1 + blocks; }  // the sinks too

  int64_t sinks, block, blocks, last_rows;
};

// Where a tile is in LowRankContext::kept_from.
struct Tiles {
  Tiles(int64_t length, int64_t sinks_in)
      : sinks(sinks_in),
        rows(ceil_div(length - sinks_in, kTileRows)),
        keys(ceil_div(length - sinks_in, kTileKeys)) {}

  int64_t key_tile(int64_t key) const { return (key - sinks) / kTileKeys; }
  // head: of all B H.
  int64_t index(int64_t head, int64_t query, int64_t key) const {
    return (head * rows + (query - sinks) / kTileRows) * keys + key_tile(key);
  }

  int64_t sinks, rows, keys;
};

class ForwardPass {
 public:
  ForwardPass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              const LowRankPlan& plan)
      : plan_(plan),
        layout_(q, k),
        near_(plan.tree),
        q_(q),
        keys_(k.const_data_ptr<float>()),
        values_(v.const_data_ptr<float>()),
        items_(list_items()),
        panels_(items_, plan, layout_.d, /*backward=*/false),
        gated_(plan.gated(layout_.d)) {
    static_assert(kRowsOfTile == kTileRows && kKeysOfTile == kTileKeys);
    TORCH_INTERNAL_ASSERT(!(gated_ || plan.drops()) || key_chunk_rows() == kGateChunk);
  }

  // Output and log-sum-exp. context <- what gates made exact, and which tiles are kept.
  std::tuple<at::Tensor, at::Tensor> run(LowRankContext& context) {
    pack();
    if (plan_.drops()) {
      kept_from_ = at::full({layout_.batch, layout_.heads, tiles_.rows, tiles_.keys},
                            FarServed::kNoTile, at::kByte);
    }
    auto result = attend();
    context.served.exact = gated_ ? exact_entries() : ExactEntries();
    context.served.kept_from = kept_from_;
    return result;
  }

 private:
  // All far pairs, and by (sequence, block) those that the block's rows see.
  std::vector<Item> list_items() {
    std::vector<Item> items;
    seen_by_.resize(static_cast<size_t>(layout_.sequences * near_.blocks));
    for (int64_t sequence = 0; sequence < layout_.sequences; ++sequence) {
      for (const PairRun& run : plan_.tree.runs()) {
        for (int64_t i = 0; i < run.count; ++i) {
          const Item item = item_of(run, i, sequence, plan_);
          const int64_t begin = item.query_begin - near_.sinks;
          for (int64_t n = begin / near_.block; n < ceil_div(begin + item.queries, near_.block);
               ++n) {
            seen_by_[static_cast<size_t>(sequence * near_.blocks + n)].push_back(
                static_cast<int64_t>(items.size()));
          }
          items.push_back(item);
        }
      }
    }
    return items;
  }

  // What is packed: near blocks of all sequences, then far items. Numbers: `owner`.
  int64_t first_item() const { return layout_.sequences * near_.count(); }
  int64_t near_owner(int64_t sequence, int64_t n) const { return sequence * near_.count() + 1 + n; }
  Shape exact_shape(int64_t keys) const {
    return {1, 0, keys, layout_.d, layout_.d, false, layout_.scale};
  }
  Shape far_shape(const Item& item) const {
    return {1, 0, item.keys, item.ranks.qk, item.ranks.v, false, layout_.scale};
  }
  float* packed_of(int64_t owner) const {
    return packed_.data_ptr<float>() + packed_begin_[static_cast<size_t>(owner)];
  }

  void pack() {
    int64_t size = 0;
    const auto add = [&](const Shape& shape) {
      packed_begin_.push_back(size);
      size += packed_size(shape);
    };
    for (int64_t sequence = 0; sequence < layout_.sequences; ++sequence) {
      for (int64_t n = -1; n < near_.blocks; ++n) {
        add(exact_shape(near_.rows_of(n)));
      }
    }
    for (const Item& item : items_) {
      add(far_shape(item));
    }
    packed_ = at::empty({size}, at::kFloat);

    std::vector<Piece> chunks;
    for (size_t i = 0; i < items_.size(); ++i) {
      cut(chunks, first_item() + static_cast<int64_t>(i), 0, items_[i].keys, key_chunk_rows());
    }
    for (int64_t owner = 0; owner < first_item(); ++owner) {
      cut(chunks, owner, 0, near_.rows_of(owner % near_.count() - 1), key_chunk_rows());
    }
    for_each_task(static_cast<int64_t>(chunks.size()), 2 * key_chunk_rows() * layout_.d,
                  [&](int64_t task, float* scratch) {
                    const Piece& chunk = chunks[static_cast<size_t>(task)];
                    if (chunk.owner < first_item()) {
                      pack_near(chunk);
                    } else {
                      pack_far(chunk, scratch);
                    }
                  });
  }

  void pack_near(const Piece& chunk) const {
    const int64_t sequence = chunk.owner / near_.count(), n = chunk.owner % near_.count() - 1,
                  token = near_.first_of(n) + chunk.first, d = layout_.d;
    pack_chunk(exact_shape(near_.rows_of(n)), layout_.key_rows(keys_, sequence, token).data, d,
               layout_.key_rows(values_, sequence, token).data, d, chunk.first / key_chunk_rows(),
               packed_of(chunk.owner));
  }

  void pack_far(const Piece& chunk, float* scratch) const {
    const int64_t i = chunk.owner - first_item(), d = layout_.d;
    const Item& item = items_[static_cast<size_t>(i)];
    const auto projected = [&](const float* all, const float* panels, int64_t rank, float* to) {
      const float* x = layout_.key_rows(all, item.sequence, item.key_begin + chunk.first).data;
      if (panels == nullptr) {
        return x;
      }
      multiply(chunk.rows, rank, d, x, d, panels, to, rank, /*add=*/false);
      return static_cast<const float*>(to);
    };
    const float* k = projected(keys_, panels_.scores(i, item, BasisPanels::kRight), item.ranks.qk,
                               scratch);
    const float* v = projected(values_, panels_.values(i, item, BasisPanels::kLeft), item.ranks.v,
                               scratch + key_chunk_rows() * d);
    pack_chunk(far_shape(item), k, item.ranks.qk, v, item.ranks.v, chunk.first / key_chunk_rows(),
               packed_of(chunk.owner));
  }

  std::tuple<at::Tensor, at::Tensor> attend() {
    auto out = at::empty_like(q_);
    auto logsumexp = at::empty({layout_.batch, layout_.heads, layout_.length}, q_.options());
    // Later blocks see more: they go first, so that no thread is left with one at the end.
    for (int64_t n = near_.blocks - 1; n >= -1; --n) {
      for (int64_t head = 0; head < layout_.batch * layout_.heads; ++head) {
        cut(pieces_, n, head, near_.rows_of(n), query_block_rows());
      }
    }
    exact_.resize(gated_ ? pieces_.size() : 0);
    // Tiles that are dropped depend on the piece before of the same block: these are one task.
    std::vector<size_t> first_pieces;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      if (!kept_from_.defined() || pieces_[i].first == 0) {
        first_pieces.push_back(i);
      }
    }
    const size_t tasks = first_pieces.size();
    first_pieces.push_back(pieces_.size());
    const int64_t d = layout_.d;
    for_each_task(
        static_cast<int64_t>(tasks), forward_rows_scratch_size(d),
        [&](int64_t task, float* scratch) {
          std::vector<uint8_t> needed(kept_from_.defined() ? static_cast<size_t>(tiles_.keys) : 0);
          for (size_t i = first_pieces[static_cast<size_t>(task)];
               i < first_pieces[static_cast<size_t>(task) + 1]; ++i) {
            const int64_t row = row_of(pieces_[i]);
            const std::vector<Part> parts = parts_of(pieces_[i], needed);
            forward_rows(pieces_[i].rows, d, layout_.scale, q_.const_data_ptr<float>() + row * d, d,
                         parts.data(), static_cast<int64_t>(parts.size()),
                         out.data_ptr<float>() + row * d, d, logsumexp.data_ptr<float>() + row, 1,
                         gated_ ? &exact_[i] : nullptr, scratch);
          }
        });
    return {out, logsumexp};
  }

  // The first row of a piece of query rows, of all B H L.
  int64_t row_of(const Piece& piece) const {
    return piece.head * layout_.length + near_.first_of(piece.owner) + piece.first;
  }

  // What the rows of a piece attend to: their own block, the sinks, far pairs from near to far.
  // needed: by tile of keys, for Part::needed.
  std::vector<Part> parts_of(const Piece& piece, std::vector<uint8_t>& needed) const {
    const auto& [n, head, first, rows] = piece;
    const int64_t sequence = head / layout_.heads_per_group, d = layout_.d;
    std::vector<Part> parts;
    if (n >= 0) {
      parts.push_back({packed_of(near_owner(sequence, n)), near_.rows_of(n), d, d, first + 1});
    }
    if (near_.sinks > 0) {
      parts.push_back(
          {packed_of(near_owner(sequence, -1)), near_.sinks, d, d, n < 0 ? first + 1 : Part::kAll});
    }
    if (n < 0) {
      return parts;
    }
    for (const int64_t i : seen_by_[static_cast<size_t>(sequence * near_.blocks + n)]) {
      const Item& item = items_[static_cast<size_t>(i)];
      parts.push_back({packed_of(first_item() + i), item.keys, item.ranks.qk, item.ranks.v,
                       Part::kAll, panels_.residual(i, item), panels_.residual_columns(),
                       panels_.scores(i, item, BasisPanels::kLeft),
                       panels_.values(i, item, BasisPanels::kRightTransposed)});
      if (item.ranks.gated(d)) {
        Part& part = parts.back();
        part.exact_k = layout_.key_rows(keys_, item.sequence, item.key_begin).data;
        part.exact_v = layout_.key_rows(values_, item.sequence, item.key_begin).data;
        part.gate = item.ranks.gate;
        part.first_key = static_cast<int32_t>(item.key_begin);
      }
      if (item.ranks.drops()) {
        Part& part = parts.back();
        part.drop = item.ranks.drop;
        part.kept_from = kept_from_.data_ptr<uint8_t>() +
                         tiles_.index(head, near_.first_of(n) + first, item.key_begin);
        part.kept_stride = tiles_.keys;
        part.needed = needed.data() + tiles_.key_tile(item.key_begin);
      }
    }
    return parts;
  }

  // The lists of all pieces as one, by rows.
  ExactEntries exact_entries() const {
    const auto begin = at::zeros({layout_.batch * layout_.heads * layout_.length + 1}, at::kLong);
    int64_t* begin_of = begin.data_ptr<int64_t>();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      for (const ExactList::Entry& entry : exact_[i].entries) {
        ++begin_of[row_of(pieces_[i]) + entry.row + 1];
      }
    }
    std::partial_sum(begin_of, begin_of + begin.numel(), begin_of);
    const auto keys = at::empty({begin_of[begin.numel() - 1]}, at::kInt);
    auto* keys_of = keys.data_ptr<int32_t>();
    for_each_task(static_cast<int64_t>(pieces_.size()), 0, [&](int64_t task, float*) {
      const Piece& piece = pieces_[static_cast<size_t>(task)];
      const ExactList& list = exact_[static_cast<size_t>(task)];
      std::vector<int64_t> next(begin_of + row_of(piece), begin_of + row_of(piece) + piece.rows);
      size_t end = list.entries.size();
      for (auto part = list.parts.rbegin(); part != list.parts.rend();
           end = *part++) {  // farther parts have smaller keys
        for (size_t e = *part; e < end; ++e) {
          keys_of[next[static_cast<size_t>(list.entries[e].row)]++] = list.entries[e].key;
        }
      }
    });
    return {begin, keys};
  }

  const LowRankPlan& plan_;
  Layout layout_;
  NearBlocks near_;
  const at::Tensor& q_;
  const float *keys_, *values_;
  std::vector<std::vector<int64_t>> seen_by_;  // before items_, which fill it
  std::vector<Item> items_;
  BasisPanels panels_;
  bool gated_;
  at::Tensor packed_;  // keys and values: near blocks, then far items in their bases
  std::vector<int64_t> packed_begin_;
  std::vector<Piece> pieces_;     // of query rows; owner: the block
  std::vector<ExactList> exact_;  // of each piece
  Tiles tiles_{layout_.length, near_.sinks};
  at::Tensor kept_from_;  // undefined: nothing is dropped
};

// What all parts of a backward pass read and write.
struct BackwardRows {
  BackwardRows(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
               const at::Tensor& v, const at::Tensor& logsumexp, const at::Tensor& delta,
               const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v,
               const LowRankContext& context, int64_t sinks)
      : layout(q, k),
        tiles(q.size(2), sinks),
        options(q.options()),
        queries(q.const_data_ptr<float>()),
        grads(grad_out.const_data_ptr<float>()),
        sums(logsumexp.const_data_ptr<float>()),
        delta_of(delta.const_data_ptr<float>()),
        keys(k.const_data_ptr<float>()),
        values(v.const_data_ptr<float>()),
        into_q(grad_q.data_ptr<float>()),
        into_k(grad_k.data_ptr<float>()),
        into_v(grad_v.data_ptr<float>()),
        exact_begin(context.served.exact.defined()
                        ? context.served.exact.begin().const_data_ptr<int64_t>()
                        : nullptr),
        exact_keys(context.served.exact.defined()
                       ? context.served.exact.keys().const_data_ptr<int32_t>()
                       : nullptr),
        kept_from(context.served.kept_from.defined()
                      ? context.served.kept_from.const_data_ptr<uint8_t>()
                      : nullptr) {}

  Layout layout;
  Tiles tiles;
  at::TensorOptions options;
  const float *queries, *grads, *sums, *delta_of, *keys, *values;
  float *into_q, *into_k, *into_v;
  const int64_t* exact_begin;  // null: no entry is exact
  const int32_t* exact_keys;
  const uint8_t* kept_from;  // null: nothing is dropped
};

// The exact part of one sequence: every block with the sinks in front of its own keys, and the
// sinks among themselves as a block of no keys of its own.
class NearBackward {
 public:
  NearBackward(const BackwardRows& rows, const BlockTree& tree, int64_t sequence)
      : rows_(rows), near_(tree), sequence_(sequence), widest_(near_.sinks + near_.block) {
    for (at::Tensor* x : {&k_, &v_, &grad_k_, &grad_v_}) {
      *x = at::empty({near_.count(), widest_, rows.layout.d}, rows.options);
    }
  }

  void run() {
    copy_keys();
    std::vector<BackwardProblem> problems;
    for (int64_t n = -1; n < near_.blocks; ++n) {
      if (near_.rows_of(n) > 0) {
        problems.push_back(problem_of(n));
      }
    }
    run_backward(problems);
    add_gradients();
  }

 private:
  // Keys of block n, those of the sinks first.
  float* at_block(const at::Tensor& x, int64_t n) const {
    return x.data_ptr<float>() + (n + 1) * widest_ * rows_.layout.d;
  }

  void copy_keys() const {
    const int64_t d = rows_.layout.d, sinks = near_.sinks;
    for_each_task(near_.count(), 0, [&](int64_t i, float*) {
      const int64_t n = i - 1;
      for (const auto& [all, to] :
           {std::pair{rows_.keys, at_block(k_, n)}, std::pair{rows_.values, at_block(v_, n)}}) {
        const float* from = rows_.layout.key_rows(all, sequence_, 0).data;
        std::copy_n(from, sinks * d, to);
        if (n >= 0) {
          std::copy_n(from + near_.first_of(n) * d, near_.rows_of(n) * d, to + sinks * d);
        }
      }
    });
  }

  BackwardProblem problem_of(int64_t n) const {
    const Layout& l = rows_.layout;
    const int64_t d = l.d, token = near_.first_of(n), rows = near_.rows_of(n);
    const Shape shape{l.heads_per_group,
                      rows,
                      n < 0 ? near_.sinks : near_.sinks + rows,
                      d,
                      d,
                      /*causal=*/true,
                      l.scale,
                      n < 0 ? 0 : near_.sinks};
    return {shape,
            {l.query_rows(rows_.queries, sequence_, token),
             l.query_rows(rows_.grads, sequence_, token),
             l.query_numbers(rows_.sums, sequence_, token),
             l.query_numbers(rows_.delta_of, sequence_, token),
             {at_block(k_, n), 0, d},
             {at_block(v_, n), 0, d},
             l.query_rows(rows_.into_q, sequence_, token),
             {at_block(grad_k_, n), 0, d},
             {at_block(grad_v_, n), 0, d}}};
  }

  void add_gradients() const {
    const int64_t d = rows_.layout.d, sinks = near_.sinks;
    for_each_task(2, 0, [&](int64_t task, float*) {
      const at::Tensor& from = task == 0 ? grad_k_ : grad_v_;
      float* to = rows_.layout.key_rows(task == 0 ? rows_.into_k : rows_.into_v, sequence_, 0).data;
      for (int64_t n = -1; n < near_.blocks; ++n) {
        const float* block = at_block(from, n);
        add_rows(sinks, d, block, d, to, d);
        if (n >= 0) {
          std::copy_n(block + sinks * d, near_.rows_of(n) * d, to + near_.first_of(n) * d);
        }
      }
    });
  }

  const BackwardRows& rows_;
  NearBlocks near_;
  int64_t sequence_, widest_;
  at::Tensor k_, v_, grad_k_, grad_v_;  // [1 + blocks, widest, d]
};

// The far pairs of one level of one sequence.
class FarLevelBackward {
 public:
  FarLevelBackward(const BackwardRows& rows, const LowRankPlan& plan, int64_t level,
                   int64_t sequence)
      : rows_(rows),
        items_(items_of(plan, level, sequence)),
        panels_(items_, plan, rows.layout.d, /*backward=*/true),
        low_(items_.size()) {
    const int64_t g = rows.layout.heads_per_group;
    workspace_ = at::empty({lay_out(nullptr)}, rows.options);
    lay_out(workspace_.data_ptr<float>());
    for (size_t i = 0; i < items_.size(); ++i) {
      for (int64_t head = 0; head < g; ++head) {
        cut(pieces_, static_cast<int64_t>(i), head, items_[i].queries, key_chunk_rows());
      }
      cut(pieces_, static_cast<int64_t>(i), g, items_[i].keys, key_chunk_rows());
    }
  }

  void run() {
    for_each_task(static_cast<int64_t>(pieces_.size()), key_chunk_rows() * kResidualColumns,
                  [&](int64_t task, float* scratch) {
                    const Piece& piece = pieces_[static_cast<size_t>(task)];
                    if (of_keys(piece)) {
                      project_keys(piece);
                    } else {
                      project_queries(piece, scratch);
                    }
                  });
    std::vector<BackwardProblem> problems;
    for (size_t i = 0; i < items_.size(); ++i) {
      problems.push_back(problem_of(i));
    }
    run_backward(problems);
    for_each_task(static_cast<int64_t>(pieces_.size()), 0,
                  [&](int64_t task, float*) { expand(pieces_[static_cast<size_t>(task)]); });
  }

 private:
  // An item's operands in its bases: [g][queries][..] q, grad_out and grad_q, [keys][..] k, v and
  // their gradients. Where the rank is d the caller's rows serve, but for keys' gradients, which
  // are written and not added to.
  struct Low {
    Matrix<float> q, grad_out, grad_q;
    Matrix<float> k, v, grad_k, grad_v;
    Matrix<float> logsumexp;  // as the uncorrected scores see it
  };

  static std::vector<Item> items_of(const LowRankPlan& plan, int64_t level, int64_t sequence) {
    std::vector<Item> items;
    for (const PairRun& run : plan.tree.runs()) {
      for (int64_t i = 0; run.level == level && i < run.count; ++i) {
        items.push_back(item_of(run, i, sequence, plan));
      }
    }
    return items;
  }

  // Sets low_ to places from `base` on; returns how many floats they take.
  int64_t lay_out(float* base) {
    const int64_t d = rows_.layout.d, g = rows_.layout.heads_per_group;
    int64_t size = 0;
    for (size_t i = 0; i < items_.size(); ++i) {
      const Item& item = items_[i];
      const auto take = [&](Matrix<float>& m, bool is_query, int64_t width) {
        const int64_t rows = is_query ? item.queries : item.keys;
        m = {base + size, rows * width, width};
        size += (is_query ? g : 1) * rows * width;
      };
      if (item.ranks.qk < d) {
        take(low_[i].q, true, item.ranks.qk);
        take(low_[i].grad_q, true, item.ranks.qk);
        take(low_[i].k, false, item.ranks.qk);
        take(low_[i].logsumexp, true, 1);
      }
      if (item.ranks.v < d) {
        take(low_[i].grad_out, true, item.ranks.v);
        take(low_[i].v, false, item.ranks.v);
      }
      take(low_[i].grad_k, false, item.ranks.qk);
      take(low_[i].grad_v, false, item.ranks.v);
    }
    return size;
  }

  bool of_keys(const Piece& piece) const { return piece.head == rows_.layout.heads_per_group; }

  void project(const Piece& piece, const float* x, const float* panels, int64_t rank,
               float* to) const {
    const int64_t d = rows_.layout.d;
    multiply(piece.rows, rank, d, x, d, panels, to, rank, /*add=*/false);
  }

  void project_queries(const Piece& piece, float* scratch) const {
    const Layout& l = rows_.layout;
    const int64_t d = l.d, i = piece.owner, head = piece.head, first = piece.first;
    const Item& item = items_[static_cast<size_t>(i)];
    const Low& to = low_[static_cast<size_t>(i)];
    const int64_t token = item.query_begin + first;
    const float* q = l.query_rows(rows_.queries, item.sequence, token).at(head, 0);
    if (item.ranks.qk < d) {
      project(piece, q, panels_.scores(i, item, BasisPanels::kLeft), item.ranks.qk,
              to.q.at(head, first));
      std::fill_n(to.grad_q.at(head, first), piece.rows * item.ranks.qk, 0.0f);
      float* own = to.logsumexp.at(head, first);
      const float* merged = l.query_numbers(rows_.sums, item.sequence, token).at(head, 0);
      if (const float* factor = panels_.residual(i, item); factor != nullptr) {
        corrections(piece.rows, d, panels_.residual_columns(), q, d, factor, own, scratch);
        std::transform(merged, merged + piece.rows, own, own, std::minus<>());
      } else {
        std::copy_n(merged, piece.rows, own);
      }
    }
    if (item.ranks.v < d) {
      project(piece, l.query_rows(rows_.grads, item.sequence, token).at(head, 0),
              panels_.values(i, item, BasisPanels::kRight), item.ranks.v,
              to.grad_out.at(head, first));
    }
  }

  void project_keys(const Piece& piece) const {
    const int64_t d = rows_.layout.d, i = piece.owner;
    const Item& item = items_[static_cast<size_t>(i)];
    const Low& to = low_[static_cast<size_t>(i)];
    const int64_t token = item.key_begin + piece.first;
    if (item.ranks.qk < d) {
      project(piece, rows_.layout.key_rows(rows_.keys, item.sequence, token).data,
              panels_.scores(i, item, BasisPanels::kRight), item.ranks.qk, to.k.at(0, piece.first));
    }
    if (item.ranks.v < d) {
      project(piece, rows_.layout.key_rows(rows_.values, item.sequence, token).data,
              panels_.values(i, item, BasisPanels::kLeft), item.ranks.v, to.v.at(0, piece.first));
    }
  }

  BackwardProblem problem_of(size_t i) const {
    const Layout& l = rows_.layout;
    const Item& item = items_[i];
    const Low& low = low_[i];
    const bool low_scores = item.ranks.qk < l.d, low_values = item.ranks.v < l.d;
    const auto constant = [](const Matrix<float>& m) {
      return Matrix<const float>{m.data, m.head, m.row};
    };
    const Shape shape{l.heads_per_group, item.queries,     item.keys, item.ranks.qk,
                      item.ranks.v,      /*causal=*/false, l.scale};
    BackwardProblem problem{
        shape,
        {low_scores ? constant(low.q)
                    : l.query_rows(rows_.queries, item.sequence, item.query_begin),
         low_values ? constant(low.grad_out)
                    : l.query_rows(rows_.grads, item.sequence, item.query_begin),
         low_scores ? constant(low.logsumexp)
                    : l.query_numbers(rows_.sums, item.sequence, item.query_begin),
         l.query_numbers(rows_.delta_of, item.sequence, item.query_begin),
         low_scores ? constant(low.k) : l.key_rows(rows_.keys, item.sequence, item.key_begin),
         low_values ? constant(low.v) : l.key_rows(rows_.values, item.sequence, item.key_begin),
         low_scores ? low.grad_q : l.query_rows(rows_.into_q, item.sequence, item.query_begin),
         low.grad_k, low.grad_v}};
    if (item.ranks.gated(l.d)) {
      problem.operands.skip = {
          rows_.exact_begin + item.sequence * l.heads_per_group * l.length + item.query_begin,
          l.length, rows_.exact_keys, static_cast<int32_t>(item.key_begin)};
    }
    if (item.ranks.drops()) {
      const Tiles& tiles = rows_.tiles;
      problem.operands.kept = {rows_.kept_from + tiles.index(item.sequence * l.heads_per_group,
                                                             item.query_begin, item.key_begin),
                               tiles.rows * tiles.keys, tiles.keys};
    }
    return problem;
  }

  // Adds a piece's gradients, expanded by their bases.
  void expand(const Piece& piece) const {
    const Layout& l = rows_.layout;
    const int64_t d = l.d, i = piece.owner, first = piece.first;
    const Item& item = items_[static_cast<size_t>(i)];
    const Low& from = low_[static_cast<size_t>(i)];
    const auto add = [&](const float* x, int64_t rank, const float* panels, float* to) {
      if (panels != nullptr) {
        multiply(piece.rows, d, rank, x, rank, panels, to, d, /*add=*/true);
      } else {
        add_rows(piece.rows, d, x, d, to, d);
      }
    };
    if (!of_keys(piece)) {
      if (item.ranks.qk < d) {
        add(from.grad_q.at(piece.head, first), item.ranks.qk,
            panels_.scores(i, item, BasisPanels::kLeftTransposed),
            l.query_rows(rows_.into_q, item.sequence, item.query_begin + first).at(piece.head, 0));
      }
      return;
    }
    add(from.grad_k.at(0, first), item.ranks.qk,
        panels_.scores(i, item, BasisPanels::kRightTransposed),
        l.key_rows(rows_.into_k, item.sequence, item.key_begin + first).data);
    add(from.grad_v.at(0, first), item.ranks.v,
        panels_.values(i, item, BasisPanels::kLeftTransposed),
        l.key_rows(rows_.into_v, item.sequence, item.key_begin + first).data);
  }

  const BackwardRows& rows_;
  std::vector<Item> items_;
  BasisPanels panels_;
  std::vector<Low> low_;
  at::Tensor workspace_;
  std::vector<Piece> pieces_;  // owner: the item; head g: its keys
};

// The entries of one sequence that gates made exact: by rows, then, as gradients of keys and values
// are sums over rows, by keys.
class ExactEntriesBackward {
 public:
  ExactEntriesBackward(const BackwardRows& rows, int64_t sequence)
      : rows_(rows),
        sequence_(sequence),
        first_row_(sequence * rows.layout.heads_per_group * rows.layout.length),
        row_count_(rows.layout.heads_per_group * rows.layout.length),
        first_(rows.exact_begin[first_row_]),
        count_(rows.exact_begin[first_row_ + row_count_] - first_) {}

  void run() {
    if (count_ == 0) {
      return;
    }
    numbers_ = at::empty({2, count_}, rows_.options);
    by_key_ = at::empty({2, count_}, at::kInt);
    sort_by_key();
    const auto tasks_of = [](int64_t all) { return ceil_div(all, key_chunk_rows()); };
    for_each_task(tasks_of(row_count_), 0, [&](int64_t task, float*) {
      for (int64_t row = task * key_chunk_rows();
           row < std::min(row_count_, (task + 1) * key_chunk_rows()); ++row) {
        of_row(first_row_ + row);
      }
    });
    for_each_task(tasks_of(rows_.layout.length), 0, [&](int64_t task, float*) {
      std::vector<float> gathered;
      for (int64_t key = task * key_chunk_rows();
           key < std::min(rows_.layout.length, (task + 1) * key_chunk_rows()); ++key) {
        of_key(key, gathered);
      }
    });
  }

 private:
  float* weights() const { return numbers_.data_ptr<float>(); }
  float* scores() const { return weights() + count_; }  // their gradients
  int32_t* row_of() const { return by_key_.data_ptr<int32_t>(); }
  int32_t* entry_of() const { return row_of() + count_; }

  // A share of the rows at a time: next[share][key] is where the share's next entry of the key
  // goes.
  void sort_by_key() {
    constexpr int64_t kShares = 16;
    const int64_t length = rows_.layout.length;
    const int64_t* begin = rows_.exact_begin;
    std::vector<int64_t> next(static_cast<size_t>(kShares * length), 0);
    key_begin_.assign(static_cast<size_t>(length) + 1, 0);
    const auto first_of = [&](int64_t share) { return first_row_ + share * row_count_ / kShares; };
    for_each_task(kShares, 0, [&](int64_t share, float*) {
      int64_t* entries = next.data() + share * length;
      for (int64_t e = begin[first_of(share)]; e < begin[first_of(share + 1)]; ++e) {
        ++entries[rows_.exact_keys[e]];
      }
    });
    for (int64_t key = 0, sum = 0; key < length; ++key) {
      for (int64_t share = 0; share < kShares; ++share) {
        sum += std::exchange(next[static_cast<size_t>(share * length + key)], sum);
      }
      key_begin_[static_cast<size_t>(key) + 1] = sum;
    }
    for_each_task(kShares, 0, [&](int64_t share, float*) {
      int64_t* places = next.data() + share * length;
      for (int64_t row = first_of(share); row < first_of(share + 1); ++row) {
        for (int64_t e = begin[row]; e < begin[row + 1]; ++e) {
          const int64_t at = places[rows_.exact_keys[e]]++;
          row_of()[at] = static_cast<int32_t>(row - first_row_);
          entry_of()[at] = static_cast<int32_t>(e - first_);
        }
      }
    });
  }

  void of_row(int64_t row) const {
    const int64_t d = rows_.layout.d, e = rows_.exact_begin[row];
    exact_row_backward(d, rows_.layout.scale, rows_.queries + row * d, rows_.grads + row * d,
                       rows_.sums[row], rows_.delta_of[row], rows_.exact_keys + e,
                       rows_.exact_begin[row + 1] - e,
                       rows_.layout.key_rows(rows_.keys, sequence_, 0).data,
                       rows_.layout.key_rows(rows_.values, sequence_, 0).data,
                       rows_.into_q + row * d, weights() + (e - first_), scores() + (e - first_));
  }

  void of_key(int64_t key, std::vector<float>& gathered) const {
    const int64_t d = rows_.layout.d, at = key_begin_[static_cast<size_t>(key)],
                  count = key_begin_[static_cast<size_t>(key) + 1] - at;
    gathered.resize(static_cast<size_t>(count));
    const auto add = [&](const float* of_entries, const float* from, float* to) {
      std::transform(entry_of() + at, entry_of() + at + count, gathered.begin(),
                     [&](int32_t e) { return of_entries[e]; });
      add_gathered(d, gathered.data(), from + first_row_ * d, row_of() + at, count, to);
    };
    add(scores(), rows_.queries, rows_.layout.key_rows(rows_.into_k, sequence_, key).data);
    add(weights(), rows_.grads, rows_.layout.key_rows(rows_.into_v, sequence_, key).data);
  }

  const BackwardRows& rows_;
  int64_t sequence_, first_row_, row_count_;
  int64_t first_, count_;           // entries
  at::Tensor numbers_;              // [2, entries]: weights, gradients of scores
  at::Tensor by_key_;               // [2, entries]: rows, entries
  std::vector<int64_t> key_begin_;  // of each key in by_key_
};

}  // namespace

bool lowrank_available(const at::Tensor& q, const LowRankPlan& plan) {
  static const bool available = kernel_available();
  const auto fits = [](int64_t width) { return width % kWidth == 0; };
  return available && (!plan.residual.defined() || fits(plan.residual.size(2))) && q.is_cpu() &&
         q.scalar_type() == at::kFloat && fits(q.size(3)) &&
         (!plan.drops() || plan.tree.geometry().near_block % kTileKeys == 0) &&
         std::all_of(plan.ranks.begin(), plan.ranks.end(),
                     [&](const Ranks& r) { return fits(r.qk) && fits(r.v); });
}

std::tuple<at::Tensor, at::Tensor> lowrank_forward(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const LowRankPlan& plan,
                                                   LowRankContext& context) {
  return ForwardPass(q, k, v, plan).run(context);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lowrank_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& logsumexp, const LowRankPlan& plan,
    const LowRankContext& context) {
  const auto delta = (grad_out * out).sum(3);
  auto grad_q = at::zeros_like(q), grad_k = at::zeros_like(k), grad_v = at::zeros_like(v);
  const BackwardRows rows(grad_out, q, k, v, logsumexp, delta, grad_q, grad_k, grad_v, context,
                          plan.tree.sinks());
  // One sequence at a time: copies of one (batch, group)'s rows are held, not of all.
  for (int64_t sequence = 0; sequence < rows.layout.sequences; ++sequence) {
    NearBackward(rows, plan.tree, sequence).run();
    for (int64_t level = 0; level < plan.tree.num_levels(); ++level) {
      FarLevelBackward(rows, plan, level, sequence).run();
    }
    if (rows.exact_begin != nullptr) {
      ExactEntriesBackward(rows, sequence).run();
    }
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace drrl::cpu

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

}  // namespace

bool lowrank_available(const at::Tensor& q, const LowRankPlan& plan) {
  static const bool available = kernel_available();
  const auto fits = [](int64_t width) { return width % kWidth == 0; };
  return available && (!plan.residual.defined() || fits(plan.residual.size(2))) && q.is_cpu() &&
         q.scalar_type() == at::kFloat && fits(q.size(3)) &&
         std::all_of(plan.ranks.begin(), plan.ranks.end(),
                     [&](const Ranks& r) { return fits(r.qk) && fits(r.v); });
}

std::tuple<at::Tensor, at::Tensor> lowrank_forward(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const LowRankPlan& plan) {
  const Layout layout(q, k);
  const BlockTree& tree = plan.tree;
  const int64_t d = layout.d, sinks = tree.sinks(), block = tree.geometry().near_block,
                blocks = tree.num_blocks();
  const auto rows_of = [&](int64_t n) { return n + 1 < blocks ? block : tree.last_block_rows(); };
  const float* keys = k.const_data_ptr<float>();
  const float* values = v.const_data_ptr<float>();

  std::vector<Item> items;
  std::vector<std::vector<int64_t>> seen_by(
      static_cast<size_t>(layout.sequences * blocks));  // (sequence, block) -> items
  for (int64_t sequence = 0; sequence < layout.sequences; ++sequence) {
    for (const PairRun& run : tree.runs()) {
      for (int64_t i = 0; i < run.count; ++i) {
        const Item item = item_of(run, i, sequence, plan);
        for (int64_t n = (item.query_begin - sinks) / block;
             n < ceil_div(item.query_begin + item.queries - sinks, block); ++n) {
          seen_by[static_cast<size_t>(sequence * blocks + n)].push_back(
              static_cast<int64_t>(items.size()));
        }
        items.push_back(item);
      }
    }
  }
  const BasisPanels panels(items, plan, d, /*backward=*/false);

  // Packed keys and values: sinks, blocks, then far items in their bases.
  const auto exact_shape = [&](int64_t count) {
    return Shape{1, 0, count, d, d, false, layout.scale};
  };
  const auto far_shape = [&](const Item& item) {
    return Shape{1, 0, item.keys, item.ranks.qk, item.ranks.v, false, layout.scale};
  };
  std::vector<int64_t> begin;
  int64_t size = 0;
  const int64_t near = 1 + blocks;  // exact key ranges of one sequence
  for (int64_t sequence = 0; sequence < layout.sequences; ++sequence) {
    for (int64_t n = -1; n < blocks; ++n) {
      begin.push_back(size);
      size += packed_size(exact_shape(n < 0 ? sinks : rows_of(n)));
    }
  }
  for (const Item& item : items) {
    begin.push_back(size);
    size += packed_size(far_shape(item));
  }
  const auto packed = at::empty({size}, at::kFloat);
  const auto packed_of = [&](int64_t i) {
    return packed.data_ptr<float>() + begin[static_cast<size_t>(i)];
  };
  const int64_t first_item = layout.sequences * near;
  const bool gated = plan.gated(d);
  TORCH_INTERNAL_ASSERT(!gated || key_chunk_rows() == kGateChunk);

  std::vector<Piece> chunks;
  for (int64_t i = 0; i < static_cast<int64_t>(items.size()); ++i) {
    cut(chunks, first_item + i, 0, items[static_cast<size_t>(i)].keys, key_chunk_rows());
  }
  for (int64_t i = 0; i < first_item; ++i) {
    const int64_t n = i % near - 1;
    cut(chunks, i, 0, n < 0 ? sinks : rows_of(n), key_chunk_rows());
  }
  for_each_task(
      static_cast<int64_t>(chunks.size()), 2 * key_chunk_rows() * d,
      [&](int64_t task, float* scratch) {
        const auto& [owner, head, first, rows] = chunks[static_cast<size_t>(task)];
        const int64_t chunk = first / key_chunk_rows();
        if (owner < first_item) {
          const int64_t n = owner % near - 1;
          const int64_t token = (n < 0 ? 0 : sinks + n * block) + first;
          pack_chunk(exact_shape(n < 0 ? sinks : rows_of(n)),
                     layout.key_rows(keys, owner / near, token).data, d,
                     layout.key_rows(values, owner / near, token).data, d, chunk, packed_of(owner));
          return;
        }
        const Item& item = items[static_cast<size_t>(owner - first_item)];
        const float* far_keys = layout.key_rows(keys, item.sequence, item.key_begin + first).data;
        const float* far_values = layout.key_rows(values, item.sequence, item.key_begin + first)
                                      .data;
        const auto project = [&](const float*& x, const float* p, int64_t rank, float* to) {
          if (p != nullptr) {
            multiply(rows, rank, d, x, d, p, to, rank, /*add=*/false);
            x = to;
          }
        };
        project(far_keys, panels.scores(owner - first_item, item, BasisPanels::kRight),
                item.ranks.qk, scratch);
        project(far_values, panels.values(owner - first_item, item, BasisPanels::kLeft),
                item.ranks.v, scratch + key_chunk_rows() * d);
        pack_chunk(far_shape(item), far_keys, item.ranks.qk, far_values, item.ranks.v, chunk,
                   packed_of(owner));
      });

  auto out = at::empty_like(q);
  auto logsumexp = at::empty({layout.batch, layout.heads, layout.length}, q.options());
  std::vector<Piece> pieces;  // later blocks see more: they go first, so that no thread is left
                              // with one at the end
  for (int64_t n = blocks - 1; n >= -1; --n) {
    for (int64_t head = 0; head < layout.batch * layout.heads; ++head) {
      cut(pieces, n, head, n < 0 ? sinks : rows_of(n), query_block_rows());
    }
  }
  std::vector<ExactList> exact(gated ? pieces.size() : 0);
  for_each_task(
      static_cast<int64_t>(pieces.size()), forward_rows_scratch_size(d),
      [&](int64_t task, float* scratch) {
        const auto& [n, head, first, rows] = pieces[static_cast<size_t>(task)];
        const int64_t sequence = head / layout.heads_per_group;
        const int64_t token = (n < 0 ? 0 : sinks + n * block) + first;
        const int64_t row = head * layout.length + token;
        std::vector<Part> parts;
        if (n >= 0) {
          parts.push_back({packed_of(sequence * near + 1 + n), rows_of(n), d, d, first + 1});
        }
        if (sinks > 0) {
          parts.push_back(
              {packed_of(sequence * near), sinks, d, d, n < 0 ? first + 1 : Part::kAll});
        }
        if (n >= 0) {
          for (const int64_t i : seen_by[static_cast<size_t>(sequence * blocks + n)]) {
            const Item& item = items[static_cast<size_t>(i)];
            parts.push_back({packed_of(first_item + i), item.keys, item.ranks.qk, item.ranks.v,
                             Part::kAll, panels.residual(i, item), panels.residual_columns(),
                             panels.scores(i, item, BasisPanels::kLeft),
                             panels.values(i, item, BasisPanels::kRightTransposed)});
            if (item.ranks.gated(d)) {
              Part& part = parts.back();
              part.exact_k = layout.key_rows(keys, item.sequence, item.key_begin).data;
              part.exact_v = layout.key_rows(values, item.sequence, item.key_begin).data;
              part.gate = item.ranks.gate;
              part.first_key = static_cast<int32_t>(item.key_begin);
            }
          }
        }
        forward_rows(rows, d, layout.scale, q.const_data_ptr<float>() + row * d, d, parts.data(),
                     static_cast<int64_t>(parts.size()), out.data_ptr<float>() + row * d, d,
                     logsumexp.data_ptr<float>() + row, 1,
                     gated ? &exact[static_cast<size_t>(task)] : nullptr, scratch);
      });
  plan.exact = {};
  if (gated) {
    const auto exact_begin = at::zeros({layout.batch * layout.heads * layout.length + 1},
                                       at::kLong);
    int64_t* begin_of = exact_begin.data_ptr<int64_t>();
    const auto row_of = [&](const Piece& piece) {
      return piece.head * layout.length + (piece.owner < 0 ? 0 : sinks + piece.owner * block) +
             piece.first;
    };
    for (size_t i = 0; i < pieces.size(); ++i) {
      for (const ExactList::Entry& entry : exact[i].entries) {
        ++begin_of[row_of(pieces[i]) + entry.row + 1];
      }
    }
    std::partial_sum(begin_of, begin_of + exact_begin.numel(), begin_of);
    const auto exact_keys = at::empty({begin_of[exact_begin.numel() - 1]}, at::kInt);
    auto* keys_of = exact_keys.data_ptr<int32_t>();
    for_each_task(static_cast<int64_t>(pieces.size()), 0, [&](int64_t task, float*) {
      const Piece& piece = pieces[static_cast<size_t>(task)];
      const ExactList& mine = exact[static_cast<size_t>(task)];
      std::vector<int64_t> next(begin_of + row_of(piece), begin_of + row_of(piece) + piece.rows);
      size_t end = mine.entries.size();
      for (auto part = mine.parts.rbegin(); part != mine.parts.rend();
           end = *part++) {  // farther parts have smaller keys
        for (size_t e = *part; e < end; ++e) {
          keys_of[next[static_cast<size_t>(mine.entries[e].row)]++] = mine.entries[e].key;
        }
      }
    });
    plan.exact = {exact_begin, exact_keys};
  }
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lowrank_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& logsumexp, const LowRankPlan& plan) {
  const Layout layout(q, k);
  const BlockTree& tree = plan.tree;
  const int64_t d = layout.d, sinks = tree.sinks(), block = tree.geometry().near_block,
                blocks = tree.num_blocks(), g = layout.heads_per_group;
  const auto delta_rows = (grad_out * out).sum(3);
  auto grad_q = at::zeros_like(q), grad_k = at::zeros_like(k), grad_v = at::zeros_like(v);
  const float* queries = q.const_data_ptr<float>();
  const float* grads = grad_out.const_data_ptr<float>();
  const float* sums = logsumexp.const_data_ptr<float>();
  const float* delta = delta_rows.const_data_ptr<float>();
  const float* keys = k.const_data_ptr<float>();
  const float* values = v.const_data_ptr<float>();
  const int64_t* exact_begin = plan.exact.defined() ? plan.exact.begin().const_data_ptr<int64_t>()
                                                    : nullptr;
  const int32_t* exact_keys = plan.exact.defined() ? plan.exact.keys().const_data_ptr<int32_t>()
                                                   : nullptr;
  float* into_q = grad_q.data_ptr<float>();
  float* into_k = grad_k.data_ptr<float>();
  float* into_v = grad_v.data_ptr<float>();

  // Exact part: every block with the sinks in front of its own keys, and the sinks among themselves
  // as a block of no keys of its own.
  const auto exact_part = [&](int64_t sequence) {
    const int64_t near = 1 + blocks;
    const auto rows_of = [&](int64_t n) {
      return n < 0 ? sinks : (n + 1 < blocks ? block : tree.last_block_rows());
    };
    const auto first_of = [&](int64_t n) { return n < 0 ? 0 : sinks + n * block; };
    const int64_t widest = sinks + block;
    const auto buffer = [&] { return at::empty({near, widest, d}, q.options()); };
    const auto near_k = buffer(), near_v = buffer(), near_grad_k = buffer(), near_grad_v = buffer();
    const auto rows_at = [&](const at::Tensor& x, int64_t i) {
      return x.data_ptr<float>() + i * widest * d;
    };
    for_each_task(near, 0, [&](int64_t i, float*) {
      const int64_t n = i - 1;
      for (const auto& [all, to] :
           {std::pair{keys, rows_at(near_k, i)}, std::pair{values, rows_at(near_v, i)}}) {
        const float* from = layout.key_rows(all, sequence, 0).data;
        std::copy_n(from, sinks * d, to);
        if (n >= 0) {
          std::copy_n(from + first_of(n) * d, rows_of(n) * d, to + sinks * d);
        }
      }
    });
    std::vector<BackwardProblem> problems;
    for (int64_t i = 0; i < near; ++i) {
      const int64_t n = i - 1, token = first_of(n), rows = rows_of(n);
      if (rows > 0) {
        const Shape shape{g,
                          rows,
                          n < 0 ? sinks : sinks + rows,
                          d,
                          d,
                          /*causal=*/true,
                          layout.scale,
                          n < 0 ? 0 : sinks};
        problems.push_back({shape,
                            {layout.query_rows(queries, sequence, token),
                             layout.query_rows(grads, sequence, token),
                             layout.query_numbers(sums, sequence, token),
                             layout.query_numbers(delta, sequence, token),
                             {rows_at(near_k, i), 0, d},
                             {rows_at(near_v, i), 0, d},
                             layout.query_rows(into_q, sequence, token),
                             {rows_at(near_grad_k, i), 0, d},
                             {rows_at(near_grad_v, i), 0, d}}});
      }
    }
    run_backward(problems);
    for_each_task(2, 0, [&](int64_t task, float*) {
      const at::Tensor& from = task == 0 ? near_grad_k : near_grad_v;
      float* to = layout.key_rows(task == 0 ? into_k : into_v, sequence, 0).data;
      for (int64_t n = -1; n < blocks; ++n) {
        const float* rows = rows_at(from, n + 1);
        add_rows(sinks, d, rows, d, to, d);
        if (n >= 0) {
          std::copy_n(rows + sinks * d, rows_of(n) * d, to + first_of(n) * d);
        }
      }
    });
  };

  const auto far_level = [&](int64_t level, int64_t sequence) {
    std::vector<Item> items;
    for (const PairRun& run : tree.runs()) {
      for (int64_t i = 0; run.level == level && i < run.count; ++i) {
        items.push_back(item_of(run, i, sequence, plan));
      }
    }
    const BasisPanels panels(items, plan, d, /*backward=*/true);

    // Each item's operands in its bases: [g][queries][..] q, grad_out and grad_q, [keys][..] k, v
    // and their gradients. Where the rank is d the caller's rows serve, but for keys' gradients,
    // which are written and not added to.
    struct Low {
      Matrix<float> q, grad_out, grad_q;
      Matrix<float> k, v, grad_k, grad_v;
      Matrix<float> logsumexp;  // as the uncorrected scores see it
    };
    std::vector<Low> low(items.size());
    int64_t size = 0;
    const auto lay_out = [&](float* base) {
      size = 0;
      for (size_t i = 0; i < items.size(); ++i) {
        const Item& item = items[i];
        const auto take = [&](Matrix<float>& m, bool is_query, int64_t width) {
          const int64_t rows = is_query ? item.queries : item.keys;
          m = {base + size, rows * width, width};
          size += (is_query ? g : 1) * rows * width;
        };
        if (item.ranks.qk < d) {
          take(low[i].q, true, item.ranks.qk);
          take(low[i].grad_q, true, item.ranks.qk);
          take(low[i].k, false, item.ranks.qk);
        }
        if (item.ranks.qk < d) {
          take(low[i].logsumexp, true, 1);
        }
        if (item.ranks.v < d) {
          take(low[i].grad_out, true, item.ranks.v);
          take(low[i].v, false, item.ranks.v);
        }
        take(low[i].grad_k, false, item.ranks.qk);
        take(low[i].grad_v, false, item.ranks.v);
      }
    };
    lay_out(nullptr);
    const auto workspace = at::empty({size}, q.options());
    lay_out(workspace.data_ptr<float>());

    std::vector<Piece> pieces;  // head g: keys
    for (size_t i = 0; i < items.size(); ++i) {
      for (int64_t head = 0; head < g; ++head) {
        cut(pieces, static_cast<int64_t>(i), head, items[i].queries, key_chunk_rows());
      }
      cut(pieces, static_cast<int64_t>(i), g, items[i].keys, key_chunk_rows());
    }
    for_each_task(
        static_cast<int64_t>(pieces.size()), key_chunk_rows() * kResidualColumns,
        [&](int64_t task, float* scratch) {
          const auto& [i, head, first, rows] = pieces[static_cast<size_t>(task)];
          const Item& item = items[static_cast<size_t>(i)];
          const Low& to = low[static_cast<size_t>(i)];
          const auto project = [&](const float* x, const float* p, int64_t rank, float* y) {
            multiply(rows, rank, d, x, d, p, y, rank, /*add=*/false);
          };
          if (head < g) {
            const int64_t token = item.query_begin + first;
            if (item.ranks.qk < d) {
              project(layout.query_rows(queries, item.sequence, token).at(head, 0),
                      panels.scores(i, item, BasisPanels::kLeft), item.ranks.qk,
                      to.q.at(head, first));
              std::fill_n(to.grad_q.at(head, first), rows * item.ranks.qk, 0.0f);
            }
            if (to.logsumexp.data != nullptr) {
              float* own = to.logsumexp.at(head, first);
              const float* merged = layout.query_numbers(sums, item.sequence, token).at(head, 0);
              if (const float* factor = panels.residual(i, item); factor != nullptr) {
                corrections(rows, d, panels.residual_columns(),
                            layout.query_rows(queries, item.sequence, token).at(head, 0), d, factor,
                            own, scratch);
                std::transform(merged, merged + rows, own, own, std::minus<>());
              } else {
                std::copy_n(merged, rows, own);
              }
            }
            if (item.ranks.v < d) {
              project(layout.query_rows(grads, item.sequence, token).at(head, 0),
                      panels.values(i, item, BasisPanels::kRight), item.ranks.v,
                      to.grad_out.at(head, first));
            }
            return;
          }
          const int64_t token = item.key_begin + first;
          if (item.ranks.qk < d) {
            project(layout.key_rows(keys, item.sequence, token).data,
                    panels.scores(i, item, BasisPanels::kRight), item.ranks.qk, to.k.at(0, first));
          }
          if (item.ranks.v < d) {
            project(layout.key_rows(values, item.sequence, token).data,
                    panels.values(i, item, BasisPanels::kLeft), item.ranks.v, to.v.at(0, first));
          }
        });

    std::vector<BackwardProblem> problems;
    for (size_t i = 0; i < items.size(); ++i) {
      const Item& item = items[i];
      const auto constant = [](const Matrix<float>& m) {
        return Matrix<const float>{m.data, m.head, m.row};
      };
      const bool low_scores = item.ranks.qk < d, low_values = item.ranks.v < d;
      const Shape shape{
          g, item.queries, item.keys, item.ranks.qk, item.ranks.v, /*causal=*/false, layout.scale};
      problems.push_back(
          {shape,
           {low_scores ? constant(low[i].q)
                       : layout.query_rows(queries, item.sequence, item.query_begin),
            low_values ? constant(low[i].grad_out)
                       : layout.query_rows(grads, item.sequence, item.query_begin),
            low[i].logsumexp.data != nullptr
                ? constant(low[i].logsumexp)
                : layout.query_numbers(sums, item.sequence, item.query_begin),
            layout.query_numbers(delta, item.sequence, item.query_begin),
            low_scores ? constant(low[i].k) : layout.key_rows(keys, item.sequence, item.key_begin),
            low_values ? constant(low[i].v)
                       : layout.key_rows(values, item.sequence, item.key_begin),
            low_scores ? low[i].grad_q : layout.query_rows(into_q, item.sequence, item.query_begin),
            low[i].grad_k, low[i].grad_v}});
      if (item.ranks.gated(d)) {
        problems.back().operands.skip = {
            exact_begin + item.sequence * g * layout.length + item.query_begin, layout.length,
            exact_keys, static_cast<int32_t>(item.key_begin)};
      }
    }
    run_backward(problems);

    for_each_task(static_cast<int64_t>(pieces.size()), 0, [&](int64_t task, float*) {
      const auto& [i, head, first, rows] = pieces[static_cast<size_t>(task)];
      const Item& item = items[static_cast<size_t>(i)];
      const Low& from = low[static_cast<size_t>(i)];
      const auto expand = [&](const float* x, int64_t rank, const float* p, float* y) {
        if (p != nullptr) {
          multiply(rows, d, rank, x, rank, p, y, d, /*add=*/true);
        } else {
          add_rows(rows, d, x, d, y, d);
        }
      };
      if (head < g) {
        if (item.ranks.qk < d) {
          expand(from.grad_q.at(head, first), item.ranks.qk,
                 panels.scores(i, item, BasisPanels::kLeftTransposed),
                 layout.query_rows(into_q, item.sequence, item.query_begin + first).at(head, 0));
        }
        return;
      }
      expand(from.grad_k.at(0, first), item.ranks.qk,
             panels.scores(i, item, BasisPanels::kRightTransposed),
             layout.key_rows(into_k, item.sequence, item.key_begin + first).data);
      expand(from.grad_v.at(0, first), item.ranks.v,
             panels.values(i, item, BasisPanels::kLeftTransposed),
             layout.key_rows(into_v, item.sequence, item.key_begin + first).data);
    });
  };

  // The entries that gates made exact: by rows, then, as gradients of keys and values are sums over
  // rows, by keys.
  const auto exact_entries = [&](int64_t sequence) {
    const int64_t first_row = sequence * g * layout.length, rows = g * layout.length,
                  first = exact_begin[first_row];
    const int64_t count = exact_begin[first_row + rows] - first;
    if (count == 0) {
      return;
    }
    const float* k_rows = layout.key_rows(keys, sequence, 0).data;
    const float* v_rows = layout.key_rows(values, sequence, 0).data;
    const auto numbers = at::empty({2, count}, q.options());  // weights, gradients of scores
    float* weights = numbers.data_ptr<float>();
    float* scores = weights + count;
    const auto tasks_of = [](int64_t all) { return ceil_div(all, key_chunk_rows()); };
    const auto by_key = at::empty({2, count}, at::kInt);  // rows, entries
    auto* row_of = by_key.data_ptr<int32_t>();
    int32_t* entry_of = row_of + count;
    // Sorted by key, a share of the rows at a time: next[share][key] is where the share's next
    // entry of the key goes.
    constexpr int64_t kShares = 16;
    std::vector<int64_t> key_begin(static_cast<size_t>(layout.length) + 1, 0),
        next(static_cast<size_t>(kShares * layout.length), 0);
    const auto first_of = [&](int64_t share) { return first_row + share * rows / kShares; };
    for_each_task(kShares, 0, [&](int64_t share, float*) {
      int64_t* entries = next.data() + share * layout.length;
      for (int64_t e = exact_begin[first_of(share)]; e < exact_begin[first_of(share + 1)]; ++e) {
        ++entries[exact_keys[e]];
      }
    });
    for (int64_t key = 0, sum = 0; key < layout.length; ++key) {
      for (int64_t share = 0; share < kShares; ++share) {
        sum += std::exchange(next[static_cast<size_t>(share * layout.length + key)], sum);
      }
      key_begin[static_cast<size_t>(key) + 1] = sum;
    }
    for_each_task(kShares, 0, [&](int64_t share, float*) {
      int64_t* places = next.data() + share * layout.length;
      for (int64_t row = first_of(share); row < first_of(share + 1); ++row) {
        for (int64_t e = exact_begin[row]; e < exact_begin[row + 1]; ++e) {
          const int64_t at = places[exact_keys[e]]++;
          row_of[at] = static_cast<int32_t>(row - first_row);
          entry_of[at] = static_cast<int32_t>(e - first);
        }
      }
    });
    for_each_task(tasks_of(rows), 0, [&](int64_t task, float*) {
      for (int64_t row = task * key_chunk_rows();
           row < std::min(rows, (task + 1) * key_chunk_rows()); ++row) {
        const int64_t at = first_row + row, e = exact_begin[at];
        exact_row_backward(d, layout.scale, queries + at * d, grads + at * d, sums[at], delta[at],
                           exact_keys + e, exact_begin[at + 1] - e, k_rows, v_rows, into_q + at * d,
                           weights + (e - first), scores + (e - first));
      }
    });
    for_each_task(tasks_of(layout.length), 0, [&](int64_t task, float*) {
      std::vector<float> gathered;
      for (int64_t key = task * key_chunk_rows();
           key < std::min(layout.length, (task + 1) * key_chunk_rows()); ++key) {
        const int64_t at = key_begin[static_cast<size_t>(key)],
                      many = key_begin[static_cast<size_t>(key) + 1] - at;
        const auto add = [&](const float* of_entries, const float* from, float* to) {
          gathered.resize(static_cast<size_t>(many));
          std::transform(entry_of + at, entry_of + at + many, gathered.begin(),
                         [&](int32_t e) { return of_entries[e]; });
          add_gathered(d, gathered.data(), from + first_row * d, row_of + at, many, to);
        };
        add(scores, queries, layout.key_rows(into_k, sequence, key).data);
        add(weights, grads, layout.key_rows(into_v, sequence, key).data);
      }
    });
  };

  for (int64_t sequence = 0; sequence < layout.sequences;
       ++sequence) {  // one at a time: copies of one (batch, group)'s rows are held, not of all
    exact_part(sequence);
    for (int64_t level = 0; level < tree.num_levels(); ++level) {
      far_level(level, sequence);
    }
    if (exact_begin != nullptr) {
      exact_entries(sequence);
    }
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace drrl::cpu

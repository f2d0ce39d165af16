#pragma once

// Attention in float32 on CPUs with AVX2 and FMA: register-blocked products on packed operands with
// the softmax between them, so that no score leaves the second-level cache. Includes no torch
// header, because it alone is compiled for those instructions.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace drrl::cpu {

inline constexpr int64_t kWidth = 16;  ///< head dims of the kernel are multiples of this
inline constexpr int64_t kRowsOfTile = 16, kKeysOfTile = 64;  ///< as kTileRows, kTileKeys

/// Whether this machine can run what follows.
bool kernel_available();

/// A problem's rows: row i of head h starts at data + h head + i row; elements of a row are
/// contiguous.
template <typename T>
struct Matrix {
  T* data;
  int64_t head;
  int64_t row;
  T* at(int64_t h, int64_t i) const { return data + h * head + i * row; }
};

/// `heads` query heads that share one set of keys and values.
struct Shape {
  int64_t heads;
  int64_t queries, keys;  ///< rows of each head, rows of k and v
  int64_t qk, v;          ///< widths of q and k, and of v and out; multiples of kWidth
  bool causal;  ///< query i sees the first offset + i + 1 keys; then keys = offset + queries
  float scale;
  int64_t offset = 0;

  int64_t padded_keys() const { return (keys + kWidth - 1) / kWidth * kWidth; }
  int64_t query_blocks() const;
  int64_t key_blocks() const;
};

// --- forward: out = softmax(scale q k^T) v and its log-sum-exp -----------------------------------

/// Floats of the packed keys and values of one problem.
int64_t packed_size(const Shape& shape);
/// Lays keys out as the products want them.
void pack(const Shape& shape, Matrix<const float> k, Matrix<const float> v, float* packed);

int64_t forward_scratch_size(const Shape& shape);
/// Query block `block` (of shape.query_blocks()) of one head.
void forward_block(const Shape& shape, Matrix<const float> q, const float* packed,
                   Matrix<float> out, Matrix<float> logsumexp, int64_t head, int64_t block,
                   float* scratch);

/// Keys and values that a block of query rows attends to, one part of its softmax.
struct Part {
  static constexpr int64_t kAll = INT64_MAX / 2;

  const float* packed;  ///< as `pack` lays them out
  int64_t keys;
  int64_t qk, v;  ///< widths of the packed keys and values
  int64_t
      visible;  ///< keys that the first row sees, each later row one more; kAll: every row sees all
  const float* correct = nullptr;  ///< panels of F [d, correct_columns]: || q F ||^2 is added to a
                                   ///< row's scaled scores
  int64_t correct_columns = 0;
  const float* project = nullptr;  ///< panels of P [d, qk] that queries are multiplied with first,
                                   ///< if qk is not their width
  const float*
      expand = nullptr;  ///< panels of P^T [v, d] that the part's output is multiplied with

  // A part with a gate: an entry (row, key) whose weight at low rank is at least `gate` of all
  // weights that its row has met, those of its chunk of keys (key_chunk_rows) included, is attended
  // exactly.
  const float* exact_k = nullptr;  ///< rows of the same keys and values at full width, [keys][d];
                                   ///< null: no gate
  const float* exact_v = nullptr;
  float gate = 0;
  int32_t first_key = 0;  ///< number of the part's first key among all

  // A part that drops tiles (kTileRows x kTileKeys, ranks.h): keys is a multiple of kTileKeys,
  // every row sees all, and row 0 begins a tile of rows.
  float drop = 0;                ///< 0: nothing is dropped
  uint8_t* kept_from = nullptr;  ///< written, [tiles of rows][kept_stride]: a number for each tile
  int64_t kept_stride = 0;
  /// Which tiles of a chunk of keys the last tile of rows needs, a bit each: [chunks]. Read as that
  /// of the rows before (0 at the begin of a block), then written.
  uint8_t* needed = nullptr;
};

/// Most rows of one forward_rows.
int64_t query_block_rows();
int64_t forward_rows_scratch_size(int64_t d);

/// What gates made exact: rows of some query rows and keys, by number. One after another for each
/// part with a gate, which begins at parts[i]; within a part a row's keys ascend.
struct ExactList {
  struct Entry {
    int32_t row, key;
  };
  std::vector<Entry> entries;
  std::vector<std::size_t> parts;
};

/// One softmax over all parts, in their order, for `rows` query rows of width d: out[i] <- sum over
/// parts of weights x values, logsumexp[i] its log-sum-exp. Appends to `exact`, which must be there
/// if a part has a gate.
void forward_rows(int64_t rows, int64_t d, float scale, const float* q, int64_t q_stride,
                  const Part* parts, int64_t count, float* out, int64_t out_stride,
                  float* logsumexp, int64_t logsumexp_stride, ExactList* exact, float* scratch);

// --- bases ---------------------------------------------------------------------------------------

/// Panels of p [rows, columns] for `multiply` by it; `pack_transposed`: for multiplying by its
/// transpose. rows, columns: multiples of kWidth.
void pack_matrix(const float* p, int64_t stride, int64_t rows, int64_t columns, float* panels);
void pack_transposed(const float* p, int64_t stride, int64_t rows, int64_t columns, float* panels);
/// to[rows, columns] = x [rows, depth] times the matrix [depth, columns] of the panels; add: +=
/// instead.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_stride,
              const float* panels, float* to, int64_t to_stride, bool add);
/// correction[i] = || q_i F ||^2, at most kLargestCorrection, for the panels of F [d, columns];
/// scratch: rows columns floats.
void corrections(int64_t rows, int64_t d, int64_t columns, const float* q, int64_t q_stride,
                 const float* panels, float* correction, float* scratch);
void add_rows(int64_t rows, int64_t columns, const float* x, int64_t x_stride, float* to,
              int64_t to_stride);
/// gram [d, d] += X^T diag(weights) X for x [rows, d] and weights [rows], null: ones; its upper
/// triangle, other entries are not defined. d: a multiple of kWidth; scratch: key_chunk_rows() d
/// floats.
void add_gram(int64_t rows, int64_t d, const float* x, int64_t x_stride, const float* weights,
              float* gram, float* scratch);

/// Rows of keys in one chunk of the packed layout, and chunk `chunk` of `pack`: all its rows belong
/// to keys [chunk key_chunk_rows(), ...).
int64_t key_chunk_rows();
void pack_chunk(const Shape& shape, const float* k, int64_t k_stride, const float* v,
                int64_t v_stride, int64_t chunk, float* packed);

// --- backward ------------------------------------------------------------------------------------

/// Keys of rows: row i of head h has keys[begin[h head + i]], .., ascending.
struct EntryList {
  const int64_t* begin = nullptr;  ///< null: none
  int64_t head = 0;
  const int32_t* keys = nullptr;
  int32_t first_key = 0;  ///< number of a problem's key 0
};

/// Which rows keep which tiles, as a Part wrote it down: head h's tile is kept_from[h head + tile
/// of rows x stride + tile of keys].
struct KeptTiles {
  const uint8_t* kept_from = nullptr;  ///< null: all are kept
  int64_t head = 0, stride = 0;
};

struct BackwardOperands {
  Matrix<const float> q, grad_out, logsumexp, delta;  ///< logsumexp and delta: one float a row
  Matrix<const float> k, v;                           ///< head is not used
  Matrix<float> grad_q;                               ///< zero on entry
  Matrix<float> grad_k, grad_v;                       ///< written; head is not used
  EntryList skip = {};  ///< entries without weight here: those that are exact
  KeptTiles kept = {};
};

/// Floats of the packed queries and output gradients of all heads of one problem.
int64_t packed_queries_size(const Shape& shape);
void pack_queries(const Shape& shape, const BackwardOperands& x, int64_t head, float* packed);

int64_t backward_scratch_size(const Shape& shape);
/// Key block `block` of one problem: writes its grad_k and grad_v and adds its share to grad_q.
/// `turn(.., head, query_block)` is called before and `done(.., head, query_block)` after the
/// addition to each block of grad_q, so that a caller can order the key blocks: with a fixed order
/// the result does not depend on the number of threads.
struct Order {
  void* context;
  int64_t key_block;
  void (*turn)(void* context, int64_t key_block, int64_t head, int64_t query_block);
  void (*done)(void* context, int64_t key_block, int64_t head, int64_t query_block);
};
void backward_block(const Shape& shape, const BackwardOperands& x, const float* packed_queries,
                    int64_t block, const Order& order, float* scratch);

/// Backward of `count` exact entries of one row: weights[e], scores[e] <- softmax weight and
/// gradient of the unscaled score of key keys[e]; grad_q += its gradient.
void exact_row_backward(int64_t d, float scale, const float* q, const float* grad_out,
                        float logsumexp, float delta, const int32_t* keys, int64_t count,
                        const float* k, const float* v, float* grad_q, float* weights,
                        float* scores);
/// to [d] += the sum of weights[e] times row index[e] of `rows` [.., d].
void add_gathered(int64_t d, const float* weights, const float* rows, const int32_t* index,
                  int64_t count, float* to);

}  // namespace drrl::cpu

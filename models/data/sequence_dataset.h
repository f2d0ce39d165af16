#pragma once

#include <cstdint>
#include <memory>

#include <ATen/ATen.h>

#include "models/data/token_file.h"

namespace drrl {

/// Inputs and next-token labels of some sequences.
struct Batch {
  at::Tensor tokens;  ///< [n, L] int64
  at::Tensor labels;  ///< [n, L] int64, labels[:, t] is the token after tokens[:, t]
};

/// Fixed-length training sequences from a range of a token stream.
///
/// Window w of the range [begin, end) holds its tokens begin + w L ... begin + (w + 1) L inclusive:
/// L inputs and, one further, L labels; neighbours share one token, so every token but the first is
/// a label exactly once an epoch. Documents follow each other without masking, as in Megatron's GPT
/// data set.
///
/// Global sample g (0, 1, 2, ... over the whole run) is window permutation(seed, g / windows)(g %
/// windows): a new order in each epoch, and nothing but (seed, g) decides it. Which rank reads g,
/// in which microbatch, never changes what is trained on: a run is resumed by its number of
/// consumed samples, on any layout.
class SequenceDataset {
 public:
  /// Errors: Error(kUsage) seq_len < 1; Error(kData) naming the file when the range holds no window
  /// of seq_len + 1 tokens.
  SequenceDataset(std::shared_ptr<const TokenFile> file, int64_t begin, int64_t end,
                  int64_t seq_len, uint64_t seed);

  int64_t windows() const noexcept { return windows_; }
  int64_t seq_len() const noexcept { return seq_len_; }
  int64_t begin() const noexcept { return begin_; }
  int64_t end() const noexcept { return end_; }

  /// Global samples [first, first + count), shuffled.
  Batch samples(int64_t first, int64_t count) const;

  /// Windows [first, first + count) in the order of the file, for evaluation. first + count <=
  /// windows().
  Batch ordered(int64_t first, int64_t count) const;

  /// The window behind global sample g.
  int64_t window_of(int64_t sample) const;

 private:
  template <typename WindowOf>
  Batch gather(int64_t count, WindowOf window_of) const;

  std::shared_ptr<const TokenFile> file_;
  int64_t begin_, end_, seq_len_, windows_;
  uint64_t seed_;
};

/// A pseudo-random permutation of [0, n) keyed by `key`, evaluated at one point in O(1) time and
/// memory: a Feistel network on the next even power of two, walked until it lands inside [0, n)
/// (Black & Rogaway, CT-RSA 2002, cycle walking).
int64_t permuted_index(int64_t index, int64_t n, uint64_t key);

}  // namespace drrl

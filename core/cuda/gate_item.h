#pragma once

#include "core/cuda/block.h"

/// What a gate (core/lowrank_attention.h, Ranks::gate) does to one row of a pair, by one warp.
namespace drrl::cuda {

template <typename T>
DRRL_HOST_DEVICE T log_add(T a, T b) {
  const T more = a > b ? a : b, less = a > b ? b : a;
  return less == -INFINITY ? more : more + log1p(exp(less - more));
}

template <typename Warp, typename T>
DRRL_HOST_DEVICE T log_sum_exp(const Warp& warp, int n, const T* x) {
  const T most = warp.max(n, [=](int j) { return x[j]; });
  return most == -INFINITY ? most : most + log(warp.sum(n, [=](int j) { return exp(x[j] - most); }));
}

/// scores [keys]: the row's at low rank, becomes the row's as they count; full: exact ones; before: the log-sum-exp of what the row met before the pair. A weight of
/// at least exp(log_gate) of the softmax so far is exact. Calls store(j, weight, whether exact) for each key, with the weight exp(score - sum); returns
/// sum, the log-sum-exp over the keys.
template <typename Warp, typename T, typename Store>
DRRL_HOST_DEVICE T gate_row(const Warp& warp, int keys, int chunk, T* scores, const T* full, bool* exact, T before, T log_gate, Store store) {
  T met = before, sum = -INFINITY;
  for (int begin = 0; begin < keys; begin += chunk) {  // each entry is read and written by one thread of the warp alone
    const int count = keys - begin < chunk ? keys - begin : chunk;
    T* some = scores + begin;
    const T least = log_add(met, log_sum_exp(warp, count, some)) + log_gate;
    warp.each(count, [=](int j) {
      exact[begin + j] = some[j] >= least;
      if (exact[begin + j]) {
        some[j] = full[begin + j];
      }
    });
    const T counted = log_sum_exp(warp, count, some);
    met = log_add(met, counted);
    sum = log_add(sum, counted);
  }
  warp.each(keys, [=](int j) { store(j, exp(scores[j] - sum), exact[j]); });
  return sum;
}

}  // namespace drrl::cuda

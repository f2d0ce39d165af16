#pragma once

#include "core/cuda/block.h"

/// What a gate (core/attention/lowrank_attention.h, Ranks::gate) does to one row of a pair, by one
/// warp.
namespace drrl::cuda {

/// The logarithm of a sum of exponentials, most + rest: apart, so that exp(x - most - rest) has all
/// its digits however large scores are.
template <typename T>
struct LogSum {
  T most = -INFINITY, rest = 0;

  DRRL_HOST_DEVICE T value() const { return most + rest; }
  DRRL_HOST_DEVICE T weight(T score) const { return exp(score - most - rest); }
};

template <typename T>
DRRL_HOST_DEVICE LogSum<T> log_add(const LogSum<T>& a, const LogSum<T>& b) {
  const LogSum<T>&more = a.most > b.most ? a : b, &less = a.most > b.most ? b : a;
  return less.most == -INFINITY
             ? more
             : LogSum<T>{more.most,
                         more.rest + log1p(exp(less.most - more.most + less.rest - more.rest))};
}

template <typename Warp, typename T>
DRRL_HOST_DEVICE LogSum<T> log_sum_exp(const Warp& warp, int n, const T* x) {
  const T most = warp.max(n, [=](int j) { return x[j]; });
  return most == -INFINITY
             ? LogSum<T>{}
             : LogSum<T>{most, log(warp.sum(n, [=](int j) { return exp(x[j] - most); }))};
}

/// scores [keys]: the row's at low rank, becomes the row's as they count; full: exact ones; before:
/// the log-sum-exp of what the row met before the pair. A weight of at least exp(log_gate) of the
/// softmax so far is exact. Calls store(j, weight, whether exact) for each key, with the weight
/// exp(score - sum); returns sum, the log-sum-exp over the keys.
template <typename Warp, typename T, typename Store>
DRRL_HOST_DEVICE T gate_row(const Warp& warp, int keys, int chunk, T* scores, const T* full,
                            bool* exact, T before, T log_gate, Store store) {
  LogSum<T> met{before}, sum;
  for (int begin = 0; begin < keys;
       begin += chunk) {  // each entry is read and written by one thread of the warp alone
    const int count = keys - begin < chunk ? keys - begin : chunk;
    T* some = scores + begin;
    const T least = log_add(met, log_sum_exp(warp, count, some)).value() + log_gate;
    warp.each(count, [=](int j) {
      exact[begin + j] = some[j] >= least;
      if (exact[begin + j]) {
        some[j] = full[begin + j];
      }
    });
    const LogSum<T> counted = log_sum_exp(warp, count, some);
    met = log_add(met, counted);
    sum = log_add(sum, counted);
  }
  warp.each(keys, [=](int j) { store(j, sum.weight(scores[j]), exact[j]); });
  return sum.value();
}

}  // namespace drrl::cuda

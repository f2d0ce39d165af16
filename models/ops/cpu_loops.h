#pragma once

#include <cstdint>

/// The inner loops of fused_ops and cross_entropy on the CPU: plain pointers, one thread, a range
/// of rows. This is the one translation unit compiled for AVX2 + FMA, so it includes nothing whose
/// inline functions could leak into the rest.
namespace drrl::loops {

/// The bits of a bfloat16; arithmetic happens in float.
struct Bf16 {
  uint16_t bits;
};

/// What T is computed in: double in double, float and Bf16 in float.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulateType<T>::type;

/// Whether this processor has the instructions that this file was compiled for.
bool supported();

/// x [rows, n] -> y = x * rstd * weight, rstd [rows] = (mean(x^2) + eps)^-1/2.
template <typename T>
void rms_norm_forward(const T* x, const Acc<T>* weight, T* y, Acc<T>* rstd, int64_t rows, int64_t n,
                      double eps);

/// dx = dh + rstd g - x rstd^3 mean(g x) with g = dy weight (dh may be null); d_weight [n] += sum
/// over rows of dy x rstd.
template <typename T>
void rms_norm_backward(const T* dy, const T* dh, const T* x, const Acc<T>* weight,
                       const Acc<T>* rstd, T* dx, Acc<T>* d_weight, int64_t rows, int64_t n);

/// [batch, heads, tokens, d] in memory: element (b, h, t, i) at data[b * batch + h * head + t *
/// token + i].
template <typename T>
struct Heads {
  T* data;
  int64_t heads, batch, head, token;
};

/// Tokens [begin, end) of batch x length: rows of qkv [tokens, (q.heads + k.heads + v.heads) d] are
/// dealt out; q and k are rotated by the angle table cos, sin [length, d / 2] in pairs (i, i + d /
/// 2).
template <typename T>
void rope_split_forward(const T* qkv, const float* cos, const float* sin, Heads<T> q, Heads<T> k,
                        Heads<T> v, int64_t length, int64_t d, int64_t begin, int64_t end);

/// The adjoint: rotate back, gather into d_qkv.
template <typename T>
void rope_split_backward(T* d_qkv, const float* cos, const float* sin, Heads<const T> dq,
                         Heads<const T> dk, Heads<const T> dv, int64_t length, int64_t d,
                         int64_t begin, int64_t end);

/// gate_up [rows, 2 n] = [gate | up] -> y [rows, n] = silu(gate) * up.
template <typename T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t n);

/// dy -> d_gate_up [rows, 2 n], and y once more.
template <typename T>
void swiglu_backward(const T* gate_up, const T* dy, T* d_gate_up, T* y, int64_t rows, int64_t n);

/// row <- exp(row - max(row)); the maximum and the sum of the exponentials (before rounding to T)
/// are returned.
template <typename T>
void exp_row(T* row, int64_t n, Acc<T>* max, Acc<T>* sum);

template <typename T>
void scale_row(T* row, int64_t n, Acc<T> factor);

/// table[ids[t] - first, c] += x[t, c] for columns [begin, end) of n, for every token whose row is
/// one of the `rows` in the table.
template <typename T>
void scatter_add(const T* x, const int64_t* ids, int64_t tokens, Acc<T>* table, int64_t first,
                 int64_t rows, int64_t n, int64_t begin, int64_t end);

}  // namespace drrl::loops

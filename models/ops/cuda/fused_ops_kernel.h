#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

/// The loops of cpu_loops.h as CUDA kernels: what they compute stands there. Pointers to elements
/// of type `element`; weights, statistics and their gradients are float (double with double), angle
/// tables float. Asynchronous on `stream`; all return the launch's error. Every result is the same
/// in every run.
namespace drrl::cuda {

enum class OpElement { kFloat, kDouble, kBFloat16 };

/// x [rows, n] -> y, rstd [rows].
cudaError_t launch_rms_norm(OpElement element, const void* x, const void* weight, void* y,
                            void* rstd, int64_t rows, int64_t n, double eps, cudaStream_t stream);

/// Stripes of rows that add up their gradients of the weight on their own, and the longest row
/// whose sums a block can keep.
int64_t norm_stripes(int64_t rows);
int64_t longest_norm_row(OpElement element);
/// -> dx [rows, n]; d_weight [norm_stripes(rows), n], one partial sum a stripe. dh may be null.
cudaError_t launch_rms_norm_backward(OpElement element, const void* dy, const void* dh,
                                     const void* x, const void* weight, const void* rstd, void* dx,
                                     void* d_weight, int64_t rows, int64_t n, cudaStream_t stream);

/// [batch, heads, length, d]: element (b, h, t, i) at data + b batch + h head + t token + i.
struct OpHeads {
  void* data;
  int64_t heads, batch, head, token;
};

/// Rows of qkv [tokens, (q.heads + k.heads + v.heads) d], tokens = batch x length, to and from
/// heads; cos, sin [length, d / 2]. backward: rotates back, and qkv is what is written.
cudaError_t launch_rope_split(OpElement element, bool backward, void* qkv, const float* cos,
                              const float* sin, OpHeads q, OpHeads k, OpHeads v, int64_t tokens,
                              int64_t length, int64_t d, cudaStream_t stream);

/// gate_up [rows, 2 n] -> y [rows, n]; with dy also d_gate_up.
cudaError_t launch_swiglu(OpElement element, const void* gate_up, void* y, int64_t rows, int64_t n,
                          cudaStream_t stream);
cudaError_t launch_swiglu_backward(OpElement element, const void* gate_up, const void* dy,
                                   void* d_gate_up, void* y, int64_t rows, int64_t n,
                                   cudaStream_t stream);

/// Rows of n elements, `stride` apart: row <- exp(row - max(row)), max and sum [rows]; row <- row
/// factor.
cudaError_t launch_exp_rows(OpElement element, void* x, int64_t stride, void* max, void* sum,
                            int64_t rows, int64_t n, cudaStream_t stream);
cudaError_t launch_scale_rows(OpElement element, void* x, int64_t stride, const void* factor,
                              int64_t rows, int64_t n, cudaStream_t stream);

}  // namespace drrl::cuda

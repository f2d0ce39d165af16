#include "core/attention/exact_attention.h"

#include <atomic>
#include <cmath>
#include <optional>

#include <ATen/SDPBackend.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/attention/rows.h"
#include "core/cpu/attention_kernel.h"
#include "core/cpu/tasks.h"
#ifdef DRRL_WITH_CUDA
#include "core/cuda/rows.h"
#endif

namespace drrl {
namespace {

// --- drrl's kernel -------------------------------------------------------------------------------

bool use_kernel(const at::Tensor& q) {
  static const bool available = cpu::kernel_available();
  return available && q.is_cpu() && q.scalar_type() == at::kFloat;
}

// Zero columns up to the kernel's width. Ranks and head dims that it runs on are multiples of that
// already.
at::Tensor padded(const at::Tensor& x) {
  const int64_t missing = (cpu::kWidth - x.size(-1) % cpu::kWidth) % cpu::kWidth;
  const auto rows = x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
  return missing == 0 ? rows : at::constant_pad_nd(rows, {0, missing});
}

// Problem (i, j) of a [N1, N2, ..] tensor. heads: the third dimension is the head, else there is
// none; columns: the last one is.
template <typename T>
cpu::Matrix<T> matrix(const at::Tensor& x, int64_t i, int64_t j, bool heads, bool columns = true) {
  auto* data = const_cast<T*>(static_cast<const T*>(x.const_data_ptr())) + i * x.stride(0) +
               j * x.stride(1);
  const int64_t row = x.dim() - (columns ? 2 : 1);
  return {data, heads ? x.stride(2) : 0, x.stride(row)};
}

cpu::Shape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                    double scale) {
  return {q.size(2), q.size(3), k.size(2), q.size(4), v.size(3), causal, static_cast<float>(scale)};
}

void kernel_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                    double scale, const at::Tensor& out, const at::Tensor& logsumexp) {
  const cpu::Shape shape = shape_of(q, k, v, causal, scale);
  const int64_t columns = q.size(1);
  const int64_t problems = q.size(0) * columns;
  const auto packed = at::empty({problems, cpu::packed_size(shape)}, q.options());
  const auto packed_of = [&](int64_t p) { return packed.data_ptr<float>() + p * packed.size(1); };
  cpu::for_each_task(problems, 0, [&](int64_t p, float*) {
    cpu::pack(shape, matrix<const float>(k, p / columns, p % columns, false),
              matrix<const float>(v, p / columns, p % columns, false), packed_of(p));
  });
  const int64_t blocks = shape.query_blocks();
  cpu::for_each_task(problems * shape.heads * blocks, cpu::forward_scratch_size(shape),
                     [&](int64_t task, float* scratch) {
                       const int64_t p = task / (shape.heads * blocks);
                       // Causal blocks grow: the largest first, so that no thread is left with one
                       // at the end.
                       const int64_t block = blocks - 1 - task % blocks;
                       cpu::forward_block(
                           shape, matrix<const float>(q, p / columns, p % columns, true),
                           packed_of(p), matrix<float>(out, p / columns, p % columns, true),
                           matrix<float>(logsumexp, p / columns, p % columns, true, false),
                           task / blocks % shape.heads, block, scratch);
                     });
}

void kernel_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v, const at::Tensor& logsumexp, const at::Tensor& delta,
                     bool causal, double scale, const at::Tensor& grad_q, const at::Tensor& grad_k,
                     const at::Tensor& grad_v) {
  const cpu::Shape shape = shape_of(q, k, v, causal, scale);
  const int64_t columns = q.size(1);
  const int64_t problems = q.size(0) * columns;
  std::vector<cpu::BackwardProblem> operands;
  for (int64_t p = 0; p < problems; ++p) {
    const int64_t i = p / columns, j = p % columns;
    operands.push_back(
        {shape,
         {matrix<const float>(q, i, j, true), matrix<const float>(grad_out, i, j, true),
          matrix<const float>(logsumexp, i, j, true, false),
          matrix<const float>(delta, i, j, true, false), matrix<const float>(k, i, j, false),
          matrix<const float>(v, i, j, false), matrix<float>(grad_q, i, j, true),
          matrix<float>(grad_k, i, j, false), matrix<float>(grad_v, i, j, false)}});
  }
  cpu::run_backward(operands);
}

// --- PyTorch's kernels ---------------------------------------------------------------------------

bool is_half(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

at::Tensor widened(const at::Tensor& x, int64_t width) {
  return x.size(-1) == width ? x : at::constant_pad_nd(x, {0, width - x.size(-1)});
}

// The heads of a problem become rows of one head where nothing is masked; else the keys are shown
// to each head. q [N1, N2, g, Lq, d] -> [N, g or 1, Lq or g Lq, width]
at::Tensor flat_queries(const at::Tensor& x, int64_t width, bool causal) {
  const auto wide = widened(x, width);
  return causal ? wide.flatten(0, 1)
                : wide.reshape({x.size(0) * x.size(1), 1, x.size(2) * x.size(3), width});
}
at::Tensor flat_keys(const at::Tensor& x, int64_t width, int64_t heads, bool causal) {
  const auto flat = widened(x, width).flatten(0, 1).unsqueeze(1);
  return causal ? flat.expand({-1, heads, -1, -1}) : flat;
}

// CUDA's memory-efficient kernel gives and wants the log-sum-exp in rows padded to a multiple
// of 32.
at::Tensor padded_logsumexp(const at::Tensor& logsumexp) {
  const int64_t missing = (32 - logsumexp.size(2) % 32) % 32;
  return missing == 0 ? logsumexp.contiguous() : at::constant_pad_nd(logsumexp, {0, missing});
}

// An `out` whose rowsum(grad * out) is `delta`: flash kernels take no delta of their own, and the
// merged out has another width than a part with projected values. Any vector with that product
// serves; this is the shortest one.
at::Tensor carrier_of_delta(const at::Tensor& grad, const at::Tensor& delta) {
#ifdef DRRL_WITH_CUDA
  if (auto carrier = carrier_cuda(grad, delta)) {
    return *carrier;
  }
#endif
  const auto norm = at::linalg_vector_norm(grad, 2, {-1}, /*keepdim=*/true, delta.scalar_type());
  const auto inverse = at::where(norm > 0, norm.reciprocal(), at::zeros({}, norm.options()));
  return (grad * inverse).mul_(delta.unsqueeze(-1) * inverse).to(grad.scalar_type());
}

// What cuDNN gets: q [N1, N2, g, Lq, d] -> [N, g, Lq, width], k [N1, N2, Lk, d] -> [N, 1, Lk,
// width]. All contiguous, as its plans are kept by shape.
at::Tensor cudnn_queries(const at::Tensor& x) {
  return packed(widened(x, kernel_width(x.size(-1)))).flatten(0, 1);
}
at::Tensor cudnn_keys(const at::Tensor& x) {
  return cudnn_queries(x.unsqueeze(2));
}

// The first columns of what a kernel gave: as many as `like` has.
at::Tensor narrowed(const at::Tensor& x, const at::Tensor& like) {
  return x.narrow(-1, 0, like.size(-1));
}

struct CudnnOperands {
  at::Tensor q, k, v;
};

// Defined if PyTorch would take cuDNN's kernel for this part, as it does on Hopper: it takes dk !=
// dv and shared keys, and is up to twice as fast as others.
std::optional<CudnnOperands> for_cudnn(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, bool causal, double scale) {
  if (!q.is_cuda() || !is_half(q)) {
    return std::nullopt;
  }
  CudnnOperands operands{cudnn_queries(q), cudnn_keys(k), cudnn_keys(v)};
  const int64_t choice = at::_fused_sdp_choice(operands.q, operands.k, operands.v, /*attn_mask=*/{},
                                               0.0, causal, scale, /*enable_gqa=*/q.size(2) > 1);
  return choice == static_cast<int64_t>(at::SDPBackend::cudnn_attention)
             ? std::optional(std::move(operands))
             : std::nullopt;
}

std::atomic<int64_t> cudnn_logsumexp_dims{
    4};  // [N, g, Lq, 1] in torch 2.11, [N, g, Lq] in others; as the last forward gave it

// Out and log-sum-exp.
std::pair<at::Tensor, at::Tensor> cudnn_forward(const CudnnOperands& in, bool causal,
                                                double scale) {
  const auto all = at::_scaled_dot_product_cudnn_attention(in.q, in.k, in.v, /*attn_bias=*/{},
                                                           /*compute_log_sumexp=*/true, 0.0, causal,
                                                           /*return_debug_mask=*/false, scale);
  cudnn_logsumexp_dims = std::get<1>(all).dim();
  return {std::get<0>(all), std::get<1>(all)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cudnn_backward(const CudnnOperands& in,
                                                              const at::Tensor& grad_out,
                                                              const at::Tensor& logsumexp,
                                                              const at::Tensor& delta, bool causal,
                                                              double scale) {
  const auto grad = cudnn_queries(grad_out);
  const auto out = carrier_of_delta(grad, delta.reshape(grad.sizes().slice(0, 3))).contiguous();
  auto sums = logsumexp.reshape(grad.sizes().slice(0, 3)).contiguous();
  if (cudnn_logsumexp_dims == 4) {
    sums = sums.unsqueeze(3);
  }
  const auto state = at::zeros({}, grad.options().dtype(at::kLong));  // no dropout: not read
  return at::_scaled_dot_product_cudnn_attention_backward(
      grad, in.q, in.k, in.v, out, sums, state, state, /*attn_bias=*/{}, /*cum_seq_q=*/{},
      /*cum_seq_k=*/{}, in.q.size(2), in.k.size(2), 0.0, causal, scale);
}

void flash_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                   double scale, at::Tensor& out, at::Tensor& logsumexp) {
  if (const auto operands = for_cudnn(q, k, v, causal, scale)) {
    const auto [result, sums] = cudnn_forward(*operands, causal, scale);
    unpack(narrowed(result, out).contiguous(), out);
    logsumexp.copy_(sums.reshape(logsumexp.sizes()));
    return;
  }
  const int64_t width = kernel_width(std::max(q.size(4), v.size(3)));
  const auto queries = flat_queries(q, width, causal);
  const auto keys = flat_keys(k, width, q.size(2), causal);
  const auto values = flat_keys(v, width, q.size(2), causal);
  at::Tensor result, sums;
  if (!q.is_cuda()) {
    std::tie(result, sums) = at::_scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, {}, scale);
  } else if (is_half(q)) {
    const auto all = at::_scaled_dot_product_flash_attention(queries, keys, values, 0.0, causal,
                                                             /*return_debug_mask=*/false, scale);
    result = std::get<0>(all);
    sums = std::get<1>(all);
  } else {
    const auto all = at::_scaled_dot_product_efficient_attention(
        queries, keys, values, /*attn_bias=*/{}, /*compute_log_sumexp=*/true, 0.0, causal, scale);
    result = std::get<0>(all);
    sums = std::get<1>(all).narrow(2, 0, queries.size(2));
  }
  out.copy_(narrowed(result, v).reshape(out.sizes()));
  logsumexp.copy_(sums.reshape(logsumexp.sizes()));
}

void flash_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                    const at::Tensor& v, const at::Tensor& logsumexp, const at::Tensor& delta,
                    bool causal, double scale, at::Tensor& grad_q, at::Tensor& grad_k,
                    at::Tensor& grad_v) {
  if (const auto operands = for_cudnn(q, k, v, causal, scale)) {
    const auto [dq, dk, dv] = cudnn_backward(*operands, grad_out, logsumexp, delta, causal, scale);
    unpack(narrowed(dq, grad_q).contiguous(), grad_q);
    unpack(narrowed(dk, grad_k).contiguous(), grad_k.unsqueeze(2));
    unpack(narrowed(dv, grad_v).contiguous(), grad_v.unsqueeze(2));
    return;
  }
  const int64_t width = kernel_width(std::max(q.size(4), v.size(3)));
  const int64_t heads = q.size(2);
  const auto queries = flat_queries(q, width, causal);
  const auto keys = flat_keys(k, width, heads, causal);
  const auto values = flat_keys(v, width, heads, causal);
  const auto grad = flat_queries(grad_out, width, causal);
  const auto sums = logsumexp.reshape(queries.sizes().slice(0, 3));
  const auto out = carrier_of_delta(grad, delta.reshape(sums.sizes()));
  at::Tensor dq, dk, dv;
  if (!q.is_cuda()) {
    // The kernel reads the log-sum-exp of [N, h, Lq] with the heads innermost, as its forward
    // returns it.
    const auto heads_innermost = sums.transpose(1, 2).contiguous().transpose(1, 2);
    std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        grad, queries, keys, values, out, heads_innermost, 0.0, causal, {}, scale);
  } else {
    // No dropout: the random state is not read.
    const auto state = at::zeros({2}, q.options().dtype(at::kUInt64));
    const auto unused = at::empty({0}, q.options().dtype(at::kUInt64));
    if (is_half(q)) {
      std::tie(dq, dk, dv) = at::_scaled_dot_product_flash_attention_backward(
          grad, queries, keys, values, out, sums.contiguous(), {}, {}, queries.size(2),
          keys.size(2), 0.0, causal, state, unused, scale);
    } else {
      at::Tensor bias;
      std::tie(dq, dk, dv, bias) = at::_scaled_dot_product_efficient_attention_backward(
          grad, queries, keys, values, /*attn_bias=*/{}, out, padded_logsumexp(sums), state, unused,
          0.0, {true, true, true, false}, causal, scale);
    }
  }
  grad_q.copy_(narrowed(dq, q).reshape(grad_q.sizes()));
  grad_k.copy_(narrowed(dk, k).sum(1).view(grad_k.sizes()));
  grad_v.copy_(narrowed(dv, v).sum(1).view(grad_v.sizes()));
}

// --- exact attention -----------------------------------------------------------------------------

// [B, H or G, L, d] -> [B G, 1, g, L, d], and keys [B, G, L, d] -> [B G, 1, L, d]
at::Tensor as_queries(const at::Tensor& x, int64_t groups) {
  return x.view({x.size(0) * groups, 1, x.size(1) / groups, x.size(2), x.size(3)});
}
at::Tensor as_keys(const at::Tensor& x) {
  return x.view({x.size(0) * x.size(1), 1, x.size(2), x.size(3)});
}

class ExactAttention : public torch::autograd::Function<ExactAttention> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
    auto out = at::empty_like(q);
    const auto logsumexp = at::empty({q.size(0) * k.size(1), 1, q.size(1) / k.size(1), q.size(2)},
                                     q.options());
    attention_part(as_queries(q, k.size(1)), as_keys(k), as_keys(v), /*causal=*/true, scale,
                   as_queries(out, k.size(1)), logsumexp);
    context->save_for_backward({q, k, v, out, logsumexp});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3];
    const int64_t groups = k.size(1);
    const auto grad = grads[0].contiguous();
    const auto
        delta = (grad * out).sum(3).view({q.size(0) * groups, 1, q.size(1) / groups, q.size(2)});
    auto dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
    attention_part_backward(as_queries(grad, groups), as_queries(q, groups), as_keys(k), as_keys(v),
                            saved[4], delta, /*causal=*/true,
                            1.0 / std::sqrt(static_cast<double>(q.size(3))), as_queries(dq, groups),
                            as_keys(dk), as_keys(dv));
    return {dq, dk, dv};
  }
};

// The queries' side of items that have rows only: [n, rows, ..] -> [n, 1, 1, rows, ..].
at::Tensor one_head(const at::Tensor& x) {
  return x.unsqueeze(1).unsqueeze(1);
}

}  // namespace

void attention_part(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                    double scale, at::Tensor out, at::Tensor logsumexp) {
  if (!use_kernel(q)) {
    flash_forward(q, k, v, causal, scale, out, logsumexp);
    return;
  }
  const auto wide_v = padded(v);
  const bool direct = wide_v.size(3) == v.size(3) && out.stride(4) == 1;
  const auto wide_out = direct ? out
                               : at::empty({out.size(0), out.size(1), out.size(2), out.size(3),
                                            wide_v.size(3)},
                                           out.options());
  kernel_forward(padded(q), padded(k), wide_v, causal, scale, wide_out, logsumexp);
  if (!direct) {
    out.copy_(wide_out.narrow(4, 0, v.size(3)));
  }
}

void attention_part_backward(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v, const at::Tensor& logsumexp,
                             const at::Tensor& delta, bool causal, double scale, at::Tensor grad_q,
                             at::Tensor grad_k, at::Tensor grad_v) {
  if (!use_kernel(q)) {
    flash_backward(grad_out, q, k, v, logsumexp, delta, causal, scale, grad_q, grad_k, grad_v);
    return;
  }
  const auto wide_q = padded(q), wide_v = padded(v);
  const bool direct = wide_q.size(4) == q.size(4) && wide_v.size(3) == v.size(3) &&
                      grad_q.stride(4) == 1 && grad_k.stride(3) == 1 && grad_v.stride(3) == 1;
  const auto room = [&](const at::Tensor& x, int64_t width) {
    auto sizes = x.sizes().vec();
    sizes.back() = width;
    return direct ? x : at::empty(sizes, x.options());
  };
  const auto dq = room(grad_q, wide_q.size(4)), dk = room(grad_k, wide_q.size(4)),
             dv = room(grad_v, wide_v.size(3));
  dq.zero_();
  kernel_backward(padded(grad_out), wide_q, padded(k), wide_v, logsumexp, delta, causal, scale, dq,
                  dk, dv);
  if (!direct) {
    grad_q.copy_(dq.narrow(4, 0, q.size(4)));
    grad_k.copy_(dk.narrow(3, 0, k.size(3)));
    grad_v.copy_(dv.narrow(3, 0, v.size(3)));
  }
}

std::pair<at::Tensor, at::Tensor> attention_rows(const at::Tensor& q, const at::Tensor& k,
                                                 const at::Tensor& v, double scale) {
  if (const auto operands = for_cudnn(one_head(q), k.unsqueeze(1), v.unsqueeze(1), /*causal=*/false,
                                      scale)) {  // its results as they are
    const auto [result, sums] = cudnn_forward(*operands, /*causal=*/false, scale);
    return {narrowed(result, v).reshape({q.size(0), q.size(1), v.size(2)}),
            sums.reshape({q.size(0), q.size(1)})};
  }
  auto out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  auto logsumexp = at::empty(
      {q.size(0), q.size(1)},
      q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  attention_part(one_head(q), k.unsqueeze(1), v.unsqueeze(1), /*causal=*/false, scale,
                 one_head(out), one_head(logsumexp));
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_rows_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& logsumexp, const at::Tensor& delta, double scale) {
  if (const auto operands = for_cudnn(one_head(q), k.unsqueeze(1), v.unsqueeze(1), /*causal=*/false,
                                      scale)) {
    const auto [dq, dk, dv] = cudnn_backward(*operands, one_head(grad_out), one_head(logsumexp),
                                             one_head(delta), /*causal=*/false, scale);
    return {narrowed(dq, q).reshape(q.sizes()), narrowed(dk, k).reshape(k.sizes()),
            narrowed(dv, v).reshape(v.sizes())};
  }
  auto dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  attention_part_backward(one_head(grad_out), one_head(q), k.unsqueeze(1), v.unsqueeze(1),
                          one_head(logsumexp), one_head(delta), /*causal=*/false, scale,
                          one_head(dq), dk.unsqueeze(1), dv.unsqueeze(1));
  return {dq, dk, dv};
}

at::Tensor exact_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.sizes() == k.sizes() && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0 && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.size(3) == k.size(3),
              "exact_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(),
              ", expected q [B, H, L, d], k and v [B, G, L, d] with H a multiple of G");
  if (use_kernel(q)) {
    return ExactAttention::apply(q.contiguous(), k.contiguous(), v.contiguous());
  }
  const int64_t heads = q.size(1) / k.size(1);
  const auto by_group = [&](const at::Tensor& x) {  // [B, H or G, L, d] -> [B G, heads, L, d]
    const auto split = x.reshape({k.size(0) * k.size(1), -1, x.size(2), x.size(3)});
    return split.size(1) == heads ? split : split.expand({-1, heads, -1, -1});
  };
  return at::scaled_dot_product_attention(by_group(q), by_group(k), by_group(v), {}, 0.0,
                                          /*is_causal=*/true)
      .reshape(q.sizes());
}

}  // namespace drrl

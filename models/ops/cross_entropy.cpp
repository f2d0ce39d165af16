#include "models/ops/cross_entropy.h"

#include <algorithm>
#include <utility>

#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"
#include "models/ops/fused_ops.h"
#include "models/ops/gradients.h"

namespace drrl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Sweep {
  at::Tensor rows;      // loss of each row [N], fp32
  at::Tensor d_x;       // [N, hidden], summed over ranks
  at::Tensor d_weight;  // [rows_local, hidden], fp32
};

// labels are all counted here. Gradients of scale * sum(rows) if `with_gradients`.
Sweep sweep(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& labels,
            int64_t first_row, double scale, int64_t chunk_rows, const Group& tp,
            bool with_gradients) {
  const Implementation how = implementation_for(x);
  const int64_t n = x.size(0);
  const int64_t vocabulary = weight.size(0);
  const auto wide = x.options().dtype(weight.scalar_type());
  const at::Tensor cast = weight.to(x.scalar_type());

  Sweep result{at::empty({n}, wide), {}, {}};
  if (with_gradients) {
    result.d_x = at::empty_like(x);
    result.d_weight = n > 0 ? at::Tensor() : at::zeros_like(weight);
  }
  // Rows a power of two apart compete for the same cache sets, and vocabularies are round numbers:
  // rows are padded. Matrix products on the buffer are 10 to 20 % faster.
  const at::Tensor buffer = at::empty({std::min(n, chunk_rows), vocabulary + 16}, x.options())
                                .narrow(1, 0, vocabulary);

  for (int64_t begin = 0; begin < n; begin += chunk_rows) {
    const int64_t count = std::min(chunk_rows, n - begin);
    const at::Tensor x_chunk = x.narrow(0, begin, count);
    at::Tensor logits = buffer.narrow(0, 0, count);
    at::mm_out(logits, x_chunk, cast.t());

    // The label's logit, from the one rank that has it.
    const at::Tensor local = labels.narrow(0, begin, count) - first_row;
    const at::Tensor mine = (local >= 0).logical_and_(local < vocabulary).to(wide.dtype());
    const at::Tensor label = local.clamp(0, vocabulary - 1).unsqueeze(1);
    at::Tensor sums = at::empty({2, count}, wide);  // [sum of exponentials; logit of the label]
    sums[1].copy_(logits.gather(1, label).squeeze(1).to(wide.dtype()).mul_(mine));

    auto [max, sum] = raw::exp_rows_(logits, how);
    at::Tensor global_max = max;
    at::Tensor rescale;
    if (tp.size() > 1) {
      global_max = max.clone();
      tp.all_reduce(global_max, ReduceOp::kMax);
      rescale = at::exp(max - global_max);
      sums[0].copy_(sum.mul_(rescale));
      tp.all_reduce(sums);
    } else {
      sums[0].copy_(sum);
    }
    result.rows.narrow(0, begin, count).copy_(at::log(sums[0]).add_(global_max).sub_(sums[1]));

    if (with_gradients) {
      // d logits = scale (softmax - one_hot(label)), in place of the exponentials
      at::Tensor factor = at::reciprocal(sums[0]).mul_(scale);
      if (rescale.defined()) {
        factor.mul_(rescale);
      }
      raw::scale_rows_(logits, factor, how);
      logits.scatter_add_(1, label, mine.mul(-scale).to(logits.scalar_type()).unsqueeze(1));
      at::Tensor d_x_chunk = result.d_x.narrow(0, begin, count);
      at::mm_out(d_x_chunk, logits, cast);
      add_product(result.d_weight, logits.t(), x_chunk, weight.scalar_type());
    }
  }
  if (with_gradients) {
    tp.all_reduce(result.d_x);
  }
  return result;
}

// The rows that count, and their numbers (undefined if all do).
struct Counted {
  at::Tensor x, labels, index;
};
Counted counted_rows(const at::Tensor& x, const at::Tensor& labels) {
  const at::Tensor index = at::nonzero(labels >= 0).squeeze(1);
  if (index.numel() == labels.numel()) {
    return {x, labels, {}};
  }
  return {x.index_select(0, index), labels.index_select(0, index), index};
}

struct FusedLinearCrossEntropy : torch::autograd::Function<FusedLinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& labels, int64_t first_row, double loss_scale,
                            int64_t chunk_rows, const Group& tp, bool with_gradients) {
    const Counted counted = counted_rows(x, labels);
    Sweep result = sweep(counted.x, weight, counted.labels, first_row, loss_scale, chunk_rows, tp,
                         with_gradients);
    if (with_gradients) {
      if (counted.index.defined()) {
        at::Tensor all = at::zeros_like(x);
        all.index_copy_(0, counted.index, result.d_x);
        result.d_x = std::move(all);
      }
      // Not `save_for_backward`: these are results of this function's own, handed out once.
      ctx->saved_data["d_x"] = result.d_x;
      ctx->saved_data["d_weight"] = result.d_weight;
    }
    ctx->save_for_backward({weight});
    return result.rows.sum(at::kDouble).to(result.rows.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor weight = ctx->get_saved_variables()[0];
    TORCH_CHECK(ctx->saved_data.count("d_x") == 1,
                "fused_linear_cross_entropy: backward runs once");
    at::Tensor d_x = ctx->saved_data["d_x"].toTensor();
    at::Tensor d_weight = ctx->saved_data["d_weight"].toTensor();
    ctx->saved_data.clear();
    const double outer = grads[0].item<double>();
    if (outer != 1.0) {
      d_x.mul_(outer);
    }
    add_gradient(weight, std::move(d_weight), outer);
    return {d_x, {}, {}, {}, {}, {}, {}, {}};
  }
};

void check_arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& labels,
                     int64_t chunk_rows) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
              "linear cross entropy: x ", x.sizes(), " and weight ", weight.sizes(),
              " must be [N, hidden] and [vocabulary, hidden]");
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == x.size(0) && labels.scalar_type() == at::kLong,
              "linear cross entropy: labels must be [", x.size(0), "] int64, not ", labels.sizes(),
              " ", labels.scalar_type());
  TORCH_CHECK(chunk_rows >= 1, "linear cross entropy: chunk_rows must be at least 1, not ",
              chunk_rows);
}

}  // namespace

at::Tensor fused_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& labels, int64_t first_row,
                                      double loss_scale, int64_t chunk_rows, const Group& tp) {
  check_arguments(x, weight, labels, chunk_rows);
  const bool with_gradients = at::GradMode::is_enabled() &&
                              (x.requires_grad() || weight.requires_grad());
  return FusedLinearCrossEntropy::apply(x, weight, labels, first_row, loss_scale, chunk_rows, tp,
                                        with_gradients);
}

at::Tensor linear_cross_entropy_rows(const at::Tensor& x, const at::Tensor& weight,
                                     const at::Tensor& labels, int64_t first_row,
                                     int64_t chunk_rows, const Group& tp) {
  check_arguments(x, weight, labels, chunk_rows);
  at::NoGradGuard no_grad;
  const Counted counted = counted_rows(x, labels);
  const at::Tensor rows = sweep(counted.x, weight, counted.labels, first_row, 1.0, chunk_rows, tp,
                                /*with_gradients=*/false)
                              .rows;
  if (!counted.index.defined()) {
    return rows;
  }
  at::Tensor all = at::zeros({labels.size(0)}, rows.options());
  return all.index_copy_(0, counted.index, rows);
}

}  // namespace drrl

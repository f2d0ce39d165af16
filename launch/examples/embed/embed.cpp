// Low-rank attention in somebody else's training code: one layer, forward and backward, against exact attention.
#include "policy/controller.h"

#include <ATen/ATen.h>

#include <cstdio>
#include <memory>

int main() {
  const int64_t B = 1, H = 9, G = 3, L = 2048, d = 64;
  at::manual_seed(0);
  // Keys and queries that share a low-dimensional structure, as those of trained models do, plus a little noise.
  const at::Tensor mixing = at::randn({24, d}) / 4;
  const auto structured = [&](int64_t heads) { return at::matmul(at::randn({B, heads, L, 24}), mixing) + 0.02 * at::randn({B, heads, L, d}); };
  const at::Tensor q = structured(H).requires_grad_(), k = structured(G).requires_grad_(), v = structured(G).requires_grad_();
  const at::Tensor w_o = at::randn({H * d, H * d}) / 24;

  drrl::LowRankController attention(drrl::make_fixed_policy(/*rank=*/32, /*head_dim=*/d), {.near_block = 256, .sink_tokens = 4});
  std::shared_ptr<drrl::LayerPlan> plan;  // null: decide now; hand the same plan in again to recompute under an activation checkpoint
  const at::Tensor out = attention.attend(/*layer=*/0, q, k, v, w_o, plan);
  out.sum().backward();

  std::shared_ptr<drrl::LayerPlan> exact_plan;
  const at::Tensor exact = drrl::make_full_attention()->attend(0, q.detach(), k.detach(), v.detach(), w_o, exact_plan);
  const drrl::AttentionStatistics work = attention.take_statistics();
  const double error = ((out.detach() - exact).norm() / exact.norm()).item<double>();
  std::printf("relative error %.4f at %.2f of exact attention's operations\n", error, work.flops / work.exact_flops);
  return error < 0.05 && q.grad().defined() && k.grad().defined() && v.grad().defined() ? 0 : 1;
}

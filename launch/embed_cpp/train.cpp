// A data-parallel trainer of its own, with drrl's attention in it: an attention layer learns to do
// what another one does. It owns MPI and its processes' group; drrl finds both as they are.
//   mpirun -np 2 build/embed/train
#include <array>
#include <cstdio>
#include <memory>

#include <ATen/ATen.h>
#include <mpi.h>

#include "distributed/collectives/agreement.h"
#include "distributed/mpi/mpi_group.h"
#include "policy/attention/lowrank_controller.h"

constexpr int64_t kBatch = 1, kHeads = 4, kGroups = 2, kLength = 512, kHeadDim = 32,
                  kHidden = kHeads * kHeadDim, kSteps = 30;

// Queries, keys and values from x [B, L, hidden], and the way back.
struct Layer {
  std::array<at::Tensor, 4> weights;

  at::Tensor heads(const at::Tensor& x, size_t which) const {
    return at::matmul(x, weights[which]).view({kBatch, kLength, -1, kHeadDim}).transpose(1, 2);
  }

  at::Tensor forward(drrl::AttentionController& attention, const at::Tensor& x) const {
    std::shared_ptr<drrl::LayerPlan> plan;  // null: decide now; hand the same plan in again to
                                            // recompute under an activation checkpoint
    const at::Tensor out = attention.attend(/*layer=*/0, heads(x, 0), heads(x, 1), heads(x, 2),
                                            /*w_o=*/weights[3].t().detach(), plan);
    return at::matmul(out.transpose(1, 2).reshape({kBatch, kLength, kHidden}), weights[3]);
  }
};

double train() {
  const drrl::Group replicas = drrl::make_mpi_group("replicas", MPI_COMM_WORLD,
                                                    std::chrono::seconds(60));
  drrl::LowRankController attention(drrl::make_fixed_policy(/*rank=*/16, kHeadDim),
                                    {.near_block = 64, .sink_tokens = 4});

  at::manual_seed(1);  // the same layers everywhere
  Layer teacher, student;
  for (size_t i = 0; i < 4; ++i) {
    teacher.weights[i] = at::randn({kHidden, i == 1 || i == 2 ? kGroups * kHeadDim : kHidden}) / 8;
    student.weights[i] = (teacher.weights[i] + 0.05 * at::randn_like(teacher.weights[i]))
                             .requires_grad_();
  }
  at::manual_seed(100 + static_cast<uint64_t>(replicas.rank()));  // and other data
  double first = 0, last = 0;
  for (int64_t step = 0; step < kSteps; ++step) {
    const at::Tensor x = at::randn({kBatch, kLength, kHidden});
    at::Tensor loss = (student.forward(attention, x) -
                       teacher.forward(*drrl::make_exact_attention(), x))
                          .square()
                          .mean();
    loss.backward();

    drrl::check_agreement(replicas, attention.take_decisions_digest(), "rank decisions");
    for (at::Tensor& weight : student.weights) {
      const at::NoGradGuard no_grad;
      at::Tensor grad = weight.grad();
      replicas.all_reduce(grad);
      weight.sub_(grad, 10.0 / static_cast<double>(replicas.size()));
      grad.zero_();
    }
    at::Tensor mean = loss.detach() / replicas.size();
    replicas.all_reduce(mean);
    (step == 0 ? first : last) = mean.item<double>();
  }
  const drrl::AttentionStatistics work = attention.take_statistics();
  for (const at::Tensor& weight : student.weights) {
    drrl::check_agreement(replicas, drrl::hash_bytes(weight.const_data_ptr(), weight.nbytes()),
                          "trained weights");
  }
  if (replicas.rank() == 0) {
    std::printf("%ld processes: loss %.4f -> %.4f at %.2f of exact attention's operations\n",
                replicas.size(), first, last, work.flops / work.exact_flops);
  }
  return last / first;
}

int main(int argc, char** argv) {
  int threads = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &threads);
  try {
    const double ratio = train();
    MPI_Finalize();
    return ratio < 0.5 ? 0 : 1;
  } catch (
      const std::exception& error) {  // drrl throws; what becomes of the program is decided here
    std::fprintf(stderr, "%s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
}

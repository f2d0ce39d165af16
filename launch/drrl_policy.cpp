// drrl-policy calibrate: measures on real text how much each layer suffers at each rank, for --rank_policy=dp. Options: drrl-policy --help.

#include "core/error.h"
#include "distributed/mesh.h"
#include "launch/console.h"
#include "launch/flags.h"
#include "launch/log.h"
#include "launch/policy_flags.h"
#include "launch/program.h"
#include "models/config.h"
#include "models/data.h"
#include "models/llama.h"
#include "models/tensor_parallel.h"
#include "models/token_file.h"
#include "policy/calibration.h"
#include "policy/controller.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gflags/gflags.h>

#include <cstdio>
#include <cstring>
#include <iostream>

DEFINE_int64(calibration_tokens, 8192, "text to calibrate on, from evenly spread sequences of --data, rounded up to whole ones [tokens]");

namespace drrl {
namespace {

/// Labels drawn from the model's own next-token distribution: with them a gradient is a Fisher score vector.
at::Tensor sampled_labels(CausalLM& model, const at::Tensor& tokens) {
  at::NoGradGuard no_grad;
  const at::Tensor logits = model.logits(tokens);  // [1, L, vocabulary]
  std::vector<at::Tensor> drawn;
  for (const at::Tensor& rows : logits.squeeze(0).split(256)) {
    // The inverse of the distribution function at one uniform number a row; at::multinomial draws one for each word of the vocabulary.
    const at::Tensor cumulative = at::softmax(rows, 1).to(at::kCPU).cumsum(1, at::kDouble);
    const at::Tensor uniform = at::rand({rows.size(0), 1}, at::kDouble) * cumulative.slice(1, -1);
    drawn.push_back(at::searchsorted(cumulative, uniform).clamp_max(cumulative.size(1) - 1).squeeze(1));
  }
  return at::cat(drawn).unsqueeze(0).to(at::kCPU);
}

/// All processes' measurements together: each has its own KV groups (tensor parallel) and its own text (data parallel). Collective.
Calibration gathered(const CalibrationController& mine, const ModelConfig& config, const Mesh& mesh, double tokens) {
  const Share groups = partition(config.num_key_value_heads, mesh.tp().size(), mesh.tp().rank());
  const auto whole = [&](const at::Tensor& part) {
    auto sizes = part.sizes().vec();
    sizes[1] = config.num_key_value_heads;
    auto all = at::zeros(sizes, part.options());
    all.narrow(1, groups.begin, groups.count).copy_(part);
    mesh.world().all_reduce(all);
    return all;
  };
  auto counted = at::tensor({tokens}, at::kDouble);
  mesh.dp().all_reduce(counted);
  Calibration result;
  result.tokens = counted[0].item<int64_t>();
  result.damage = whole(mine.damage()) / counted;
  result.bases = starting_bases(whole(mine.grams()));
  return result;
}

/// KL(exact || low rank) of the next-token distributions of some sequences, summed over their positions [nats].
double divergence(CausalLM& exact, CausalLM& low, const at::Tensor& tokens) {
  at::NoGradGuard no_grad;
  const at::Tensor p = exact.logits(tokens).flatten(0, 1), q = low.logits(tokens).flatten(0, 1);
  double sum = 0;
  for (int64_t row = 0; row < p.size(0); row += 256) {
    const auto log_p = at::log_softmax(p.slice(0, row, row + 256), 1), log_q = at::log_softmax(q.slice(0, row, row + 256), 1);
    sum += (log_p.exp() * (log_p - log_q)).sum(at::kDouble).item<double>();
  }
  return sum;
}

/// Each layer's damage at each rank, over its KV groups and levels.
void print_damage(const Calibration& c) {
  std::cout << "layer";
  for (const char* kind : {"scores", "values"}) {
    for (const int64_t rank : c.ranks) {
      std::printf("%*s%lld", 7, kind, static_cast<long long>(rank));
    }
  }
  std::printf("   (KL in 1e-3 nats per token)\n");
  const at::Tensor sums = c.damage.sum(at::IntArrayRef{1, 3}).contiguous();  // [layers, 2, ranks]
  for (int64_t layer = 0; layer < c.layers(); ++layer) {
    std::printf("%5lld", static_cast<long long>(layer));
    for (int64_t i = 0; i < sums[layer].numel(); ++i) {
      std::printf("%9.4f", 1e3 * sums[layer].const_data_ptr<double>()[i]);
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

ExitCode calibrate(const Environment& environment) {
  require("model", FLAGS_model);
  require("data", FLAGS_data);
  require("policy", FLAGS_policy);
  check(ErrorKind::kUsage, FLAGS_calibration_tokens >= 1, "--calibration_tokens must be at least 1, got ", FLAGS_calibration_tokens);
  const MeshShape shape = mesh_flags(environment);
  const at::Device device = device_flag(environment);
  const ModelConfig config = ModelConfig::load(FLAGS_model);
  const Geometry geometry = geometry_flags();
  check(ErrorKind::kUsage, FLAGS_seq_len > geometry.near_block + geometry.sink_tokens && FLAGS_seq_len <= config.max_position_embeddings,
        "--seq_len=", FLAGS_seq_len, " must be more than --near_block + --sink_tokens = ", geometry.near_block + geometry.sink_tokens,
        " and at most ", config.max_position_embeddings, ", the positions of ", FLAGS_model);
  const auto file = open_token_file(FLAGS_data, config, environment);
  const SequenceDataset data(file, 0, file->tokens(), FLAGS_seq_len, FLAGS_seed);
  const int64_t windows = std::min(data.windows(), (FLAGS_calibration_tokens + FLAGS_seq_len - 1) / FLAGS_seq_len);

  const Mesh mesh = Mesh::create(environment, shape, device, std::chrono::seconds(FLAGS_timeout_s));
  guarded(environment, [&] {
    const bool leader = environment.world_rank == 0;
    std::vector<int64_t> ranks = rank_buckets(device, config.head_dim);
    ranks.pop_back();  // exact does no damage
    check(ErrorKind::kUsage, !ranks.empty(), "a head_dim of ", config.head_dim, " has no smaller ranks to calibrate");
    const auto controller = std::make_shared<CalibrationController>(config.num_hidden_layers, geometry, ranks);
    CausalLM model(config, mesh.tp(), controller, {.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device, .activation_checkpoint = false});
    model.load(FLAGS_model);
    for (Parameter& parameter : model.parameters()) {  // only activations' gradients are wanted; the embedding starts the graph
      parameter.value.requires_grad_(&parameter == &model.parameters().front());
    }
    if (leader) {
      print_banner(std::cout, "drrl-policy calibrate",
                   {{"model", FLAGS_model}, {"data", c10::str(FLAGS_data, ": ", windows, " sequences of ", FLAGS_seq_len)},
                    {"ranks", c10::str(c10::IntArrayRef(ranks))}, {"versions", version_line()}});
      for (const std::string& warning : config.warnings) {
        log_warning(warning);
      }
    }
    // All ranks of a tensor-parallel group must draw the same labels.
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    generator.set_current_seed(FLAGS_seed * 1000003 + static_cast<uint64_t>(mesh.dp().rank()));
    double tokens = 0;
    for (int64_t i = mesh.dp().rank(); i < windows; i += mesh.dp().size()) {
      const Batch batch = data.ordered(i * data.windows() / windows, 1);
      const at::Tensor labels = sampled_labels(model, batch.tokens);
      model.loss(batch.tokens, labels).loss_sum.backward();
      model.parameters().front().value.mutable_grad().reset();
      tokens += static_cast<double>(FLAGS_seq_len);
      if (leader) {
        std::cout << "sequence " << i + 1 << " of " << windows << std::endl;
      }
    }
    Calibration result = gathered(*controller, config, mesh, tokens);
    result.geometry = geometry;
    result.seq_len = FLAGS_seq_len;
    result.model = FLAGS_model;
    result.data = FLAGS_data;
    result.ranks = ranks;

    // The damages are those of one item at a time. Errors of many layers do not add up independently, those of values less so than those of scores, so
    // each kind is scaled to what is measured when all its items have the middle rank at once.
    const size_t middle = (ranks.size() - 1) / 2;
    const Share groups = partition(config.num_key_value_heads, mesh.tp().size(), mesh.tp().rank());
    const BasisOptions bases{.update_steps = FLAGS_basis_updates, .start = result.bases.narrow(1, groups.begin, groups.count).to(device)};
    const auto low_controller = std::make_shared<LowRankController>(make_full_policy(), geometry, bases, groups.begin);
    CausalLM low(config, mesh.tp(), low_controller, {.dtype = dtype_flag("dtype", FLAGS_dtype), .device = device});
    low.load(FLAGS_model);
    for (int64_t kind = 0; kind < 2; ++kind) {
      const Ranks chosen = kind == 0 ? Ranks{ranks[middle], config.head_dim} : Ranks{config.head_dim, ranks[middle]};
      low_controller->set_policy(make_table_policy(
          RankTable(config.num_hidden_layers, config.num_key_value_heads, BlockTree(FLAGS_seq_len, geometry).num_levels(), chosen), "middle rank"));
      double nats = 0;
      for (int64_t i = mesh.dp().rank(); i < windows; i += mesh.dp().size()) {
        nats += divergence(model, low, data.ordered(i * data.windows() / windows, 1).tokens);
      }
      auto together = at::tensor({nats}, at::kDouble);
      mesh.dp().all_reduce(together);
      const double measured = together[0].item<double>() / static_cast<double>(result.tokens);
      const double summed = result.damage.select(2, kind).select(3, static_cast<int64_t>(middle)).sum().item<double>();
      if (leader) {
        std::cout << (kind == 0 ? "scores" : "values") << " of all layers at rank " << ranks[middle] << ": " << measured << " nats per token, " << summed
                  << " summed over layers" << std::endl;
      }
      if (summed > 0) {
        result.damage.select(2, kind) *= measured / summed;
      }
    }
    if (leader) {
      result.save(FLAGS_policy);
      print_damage(result);
      std::cout << "wrote " << FLAGS_policy << std::endl;
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

}  // namespace
}  // namespace drrl

int main(int argc, char** argv) {
  const bool known = argc > 1 && (std::strcmp(argv[1], "calibrate") == 0 || argv[1][0] == '-');
  if (!known) {
    std::fprintf(stderr, "usage: drrl-policy calibrate --model DIR --data PREFIX --policy FILE [options] (--help lists them)\n");
    return static_cast<int>(drrl::ExitCode::kUsage);
  }
  const int skipped = argv[1][0] == '-' ? 0 : 1;
  argv[skipped] = argv[0];
  return drrl::run_program(argc - skipped, argv + skipped, "drrl-policy calibrate: measures how much each layer suffers at each rank.",
                           &drrl::calibrate);
}

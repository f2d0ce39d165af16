#include "launch/eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include <gflags/gflags.h>

#include "launch/eval/totals.h"
#include "launch/options/flags.h"
#include "launch/runtime/process.h"

DEFINE_int64(max_tokens, 0,
             "stop after this many predicted tokens, rounded up to whole sequences; 0: all of "
             "--data [tokens]");
DEFINE_bool(compare_exact, false,
            "evaluate every sequence with exact attention too, in turn, and report both");

namespace drrl {
namespace {

nlohmann::ordered_json result_json(const Totals& t, int64_t head_dim) {
  const double nll = t.nll / static_cast<double>(t.tokens);
  nlohmann::ordered_json json = {{"perplexity", std::exp(nll)},
                                 {"nll", nll},
                                 {"tokens", t.tokens},
                                 {"sequence_nll", t.sequence_nll},
                                 {"seq_len", FLAGS_seq_len}};
  json.update(attention_json(t.attention, head_dim));
  return json;
}

}  // namespace

int64_t window_flag(const SequenceDataset& data) {
  return FLAGS_max_tokens > 0 ? std::min(data.windows(), (FLAGS_max_tokens - 1) / FLAGS_seq_len + 1)
                              : data.windows();
}

nlohmann::ordered_json perplexity(CausalLM& model, LowRankController& controller,
                                  DecisionRecorder* decisions, const SequenceDataset& data,
                                  int64_t windows, const Mesh& mesh) {
  const std::shared_ptr<RankPolicy> chosen = controller.policy();
  const std::shared_ptr<RankPolicy> exact = make_exact_policy();
  Totals policy_totals, exact_totals;
  policy_totals.sequence_nll.resize(static_cast<size_t>(windows));
  exact_totals.sequence_nll.resize(static_cast<size_t>(windows));
  const auto run = [&](int64_t window, const Batch& batch,
                       const std::shared_ptr<RankPolicy>& policy, Totals& totals) {
    controller.set_policy(policy);
    controller.take_statistics();
    if (decisions != nullptr) {
      decisions->set_sequence(policy == chosen ? std::optional(window) : std::nullopt);
    }
    const at::Tensor nll = model.token_nll(batch.tokens, batch.labels);
    totals.attention += controller.take_statistics();
    const double sum = nll.sum(at::kDouble).item<double>();
    totals.nll += sum;
    totals.tokens += batch.labels.numel();
    sign_of_life();
    totals.sequence_nll[static_cast<size_t>(window)] = sum /
                                                       static_cast<double>(batch.labels.numel());
  };
  const auto watched = watch(watchdog(), "evaluation");
  for (int64_t window = mesh.dp().rank(); window < windows; window += mesh.dp().size()) {
    const Batch batch = data.ordered(window, 1);
    // Exact attention first in every other sequence, so that neither profits from a warm cache.
    if (FLAGS_compare_exact && window % 2 == 1) {
      run(window, batch, exact, exact_totals);
    }
    run(window, batch, chosen, policy_totals);
    if (FLAGS_compare_exact && window % 2 == 0) {
      run(window, batch, exact, exact_totals);
    }
  }
  nlohmann::ordered_json json = result_json(reduce(policy_totals, mesh), model.config().head_dim);
  const std::optional<double> latency = chosen->latency_fraction();
  json["latency_fraction"] = latency ? nlohmann::ordered_json(*latency) : nlohmann::ordered_json();
  if (FLAGS_compare_exact) {
    const nlohmann::ordered_json results = result_json(reduce(exact_totals, mesh),
                                                       model.config().head_dim);
    for (const char* key : {"perplexity", "nll", "sequence_nll", "attention_ms"}) {
      json[std::string("exact_") + key] = results[key];
    }
  }
  return json;
}

void print_perplexity(const nlohmann::ordered_json& json) {
  std::cout << "perplexity " << json["perplexity"].get<double>() << " (" << json["tokens"]
            << " tokens), attention FLOPs " << json["attention_flops_fraction"].get<double>()
            << " of exact, mean ranks " << json["mean_rank_qk"].get<double>() << " / "
            << json["mean_rank_v"].get<double>() << ", attention "
            << json["attention_ms"].get<double>() << " ms of which bases "
            << json["basis_ms"].get<double>() << " ms\n";
  print_exact_pairs(json);
  if (!json["latency_fraction"].is_null()) {
    std::cout << "by the latency table these ranks take " << json["latency_fraction"].get<double>()
              << " of exact attention's time\n";
  }
  if (FLAGS_compare_exact) {
    const double exact_perplexity = json["exact_perplexity"].get<double>();
    std::cout << "exact attention: perplexity " << exact_perplexity << ", "
              << json["exact_attention_ms"].get<double>() << " ms; this policy: perplexity "
              << std::showpos << 100 * (json["perplexity"].get<double>() / exact_perplexity - 1)
              << std::noshowpos << " %, "
              << json["exact_attention_ms"].get<double>() / json["attention_ms"].get<double>()
              << " times as fast\n";
  }
}

}  // namespace drrl

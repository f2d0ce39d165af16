#include "models/causal_lm/causal_lm.h"

#include <cmath>
#include <exception>
#include <map>
#include <utility>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "core/error.h"
#include "models/causal_lm/model_folder.h"
#include "models/causal_lm/tensor_parallel.h"
#include "models/causal_lm/weights.h"
#include "models/ops/cross_entropy.h"
#include "models/ops/fused_ops.h"

namespace drrl {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a checkpointed layer needs to run once more.
struct Replay : torch::CustomClassHolder {
  Replay(CausalLM* of, int64_t at, at::Tensor rows)
      : model(of), index(at), positions(std::move(rows)) {}
  CausalLM* model;
  int64_t index;
  at::Tensor positions;
  std::shared_ptr<LayerPlan> plan;
};

// Runs `body` on every rank; if it throws on one, all of them throw, so that none is left waiting
// in the next collective.
template <typename Body>
void all_or_none(const Group& group, at::Device device, ErrorKind kind, const char* what,
                 Body&& body) {
  std::exception_ptr failure;
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  at::Tensor failed = at::full({1}, failure ? group.rank() + 1 : 0,
                               at::TensorOptions(device).dtype(at::kLong));
  group.all_reduce(failed, ReduceOp::kMax);
  if (failure) {
    std::rethrow_exception(failure);
  }
  check(kind, failed.item<int64_t>() == 0, what, " failed on ", group.name(), " rank ",
        failed.item<int64_t>() - 1);
}

std::vector<FileReader> companions_of(const std::filesystem::path& folder) {
  std::vector<FileReader> files;
  for (const std::string& name : companion_names()) {
    if (!folder.empty() && path_exists(folder / name, ErrorKind::kModel)) {
      files.emplace_back(folder / name, ErrorKind::kModel);
    }
  }
  return files;
}

}  // namespace

// Keeps a layer's input instead of its activations. The recomputation replays the attention plan of
// the forward pass, so that its gradients are bit for bit those of the layer itself. The model must
// outlive the graph.
struct CheckpointedLayer : torch::autograd::Function<CheckpointedLayer> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, CausalLM* model,
                            int64_t index, const at::Tensor& positions) {
    auto replay = c10::make_intrusive<Replay>(model, index, positions);
    const at::Tensor out = model->layer(index, h, positions, replay->plan);
    ctx->save_for_backward({h});
    ctx->saved_data["replay"] = c10::IValue::make_capsule(replay);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto replay = c10::static_intrusive_pointer_cast<Replay>(
        ctx->saved_data["replay"].toCapsule());
    at::Tensor h = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    at::Tensor out;
    {
      at::AutoGradMode with_grad(true);
      out = replay->model->layer(replay->index, h, replay->positions, replay->plan);
    }
    torch::autograd::backward({out}, {grads[0]});
    return {h.grad(), {}, {}, {}};
  }
};

CausalLM::CausalLM(const ModelConfig& config, const Group& tp,
                   std::shared_ptr<AttentionController> attention, const ModelOptions& options)
    : config_(config), tp_(tp), attention_(std::move(attention)), options_(options) {
  check(ErrorKind::kUsage, attention_ != nullptr, "a model needs an attention controller");
  check(ErrorKind::kUsage,
        options_.dtype == at::kFloat || options_.dtype == at::kBFloat16 ||
            options_.dtype == at::kDouble,
        "models compute in float32, bfloat16 or float64, not in ", options_.dtype);
  check(ErrorKind::kUsage, options_.loss_chunk_rows >= 1,
        "loss_chunk_rows must be at least 1, not ", options_.loss_chunk_rows);

  const auto each = static_cast<double>(options_.dtype == at::kDouble ? sizeof(double)
                                                                      : sizeof(float));
  const auto layouts = parameter_layouts(config_, tp_.size(), tp_.rank());
  if (options_.device.is_cpu()) {
    int64_t weights = 0;
    for (const ParameterLayout& layout : layouts) {
      weights += c10::multiply_integers(layout.shape);
    }
    check_memory(static_cast<double>(weights) * each, c10::str(weights, " weights"));
  }
  const auto master = at::TensorOptions(options_.device)
                          .dtype(options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
  std::map<std::string, int64_t> index;
  for (const ParameterLayout& layout : layouts) {
    index[layout.name] = static_cast<int64_t>(parameters_.size());
    at::Tensor tensor = at::zeros(layout.shape, master).requires_grad_(true);
    parameters_.push_back({layout.name, std::move(tensor), layout.shape.size() > 1, layout.sharded,
                           layout.shared_rows});
  }
  const auto find = [&](const std::string& name) {
    const auto found = index.find(name);
    return found == index.end() ? -1 : found->second;
  };
  const ParameterNames& names = parameter_names(config_);
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const std::string layer = names.layers + std::to_string(i) + ".";
    const auto weight = [&](const char* name) { return find(layer + name + ".weight"); };
    const auto bias = [&](const char* name) { return find(layer + name + ".bias"); };
    layers_.push_back({.input_norm = weight(names.input_norm),
                       .input_norm_bias = bias(names.input_norm),
                       .qkv = weight(names.qkv),
                       .qkv_bias = bias(names.qkv),
                       .o = weight(names.o),
                       .o_bias = bias(names.o),
                       .post_norm = weight(names.post_norm),
                       .post_norm_bias = bias(names.post_norm),
                       .into_mlp = weight(names.into_mlp),
                       .into_mlp_bias = bias(names.into_mlp),
                       .down = weight(names.down),
                       .down_bias = bias(names.down)});
  }
  embedding_ = find(names.embedding + std::string(".weight"));
  positions_ = names.positions == nullptr ? -1 : find(names.positions + std::string(".weight"));
  final_norm_ = find(names.final_norm + std::string(".weight"));
  final_norm_bias_ = find(names.final_norm + std::string(".bias"));
  head_ = config_.tie_word_embeddings ? embedding_ : find("lm_head.weight");
  const HeadShare heads = head_share(config_, tp_.size(), tp_.rank());
  groups_ = heads.kv_heads.count;
  heads_ = heads.query_heads.count;
  first_vocabulary_row_ = partition(config_.vocab_size, tp_.size(), tp_.rank()).begin;
}

std::optional<at::Tensor> CausalLM::optional_value(int64_t index) const {
  return index < 0 ? std::nullopt : std::optional<at::Tensor>(value(index));
}

void CausalLM::prepare_angles(int64_t length) {
  if (cos_.defined() && cos_.size(0) >= length) {
    return;
  }
  at::NoGradGuard no_grad;
  // In fp32 on the CPU, as Transformers does: at position 8192 the rounding of the product is
  // already 5e-4 of an angle.
  const at::Tensor angles = at::outer(at::arange(length, at::kFloat),
                                      config_.inverse_frequencies());
  cos_ = angles.cos().to(options_.device);
  sin_ = angles.sin().to(options_.device);
}

std::pair<at::Tensor, at::Tensor> CausalLM::norm(const at::Tensor& h, int64_t weight,
                                                 int64_t bias) const {
  return bias < 0 ? rms_norm(h, value(weight), config_.norm_eps)
                  : layer_norm(h, value(weight), value(bias), config_.norm_eps);
}

at::Tensor CausalLM::layer(int64_t index, const at::Tensor& h, const at::Tensor& positions,
                           std::shared_ptr<LayerPlan>& plan, KvCache* cache) {
  const LayerParameters& p = layers_[static_cast<size_t>(index)];
  const int64_t tokens = h.size(0);
  const int64_t batch = tokens / positions.size(0);

  const auto [residual, x] = norm(h, p.input_norm, p.input_norm_bias);
  const at::Tensor qkv = column_parallel_linear(x, value(p.qkv), optional_value(p.qkv_bias), tp_);
  auto [q, k, v] = rope_split(qkv, cos_.index_select(0, positions), sin_.index_select(0, positions),
                              batch, heads_, groups_);
  if (const double factor = config_.score_factor(index); factor != 1.0) {
    q = q * factor;
  }
  const at::Tensor w_o = value(p.o).detach();
  const at::Tensor attended =  // [B, H, L, d]
      cache == nullptr ? attention_->attend(index, q, k, v, w_o, plan)
                       : attention_->extend(index, q, k, v, w_o, *cache);
  const at::Tensor flat = attended.transpose(1, 2).reshape({tokens, heads_ * config_.head_dim});
  const at::Tensor middle = row_parallel_linear(flat, value(p.o), optional_value(p.o_bias),
                                                residual, tp_);

  const auto [residual_mlp, y] = norm(middle, p.post_norm, p.post_norm_bias);
  const at::Tensor wide = column_parallel_linear(y, value(p.into_mlp),
                                                 optional_value(p.into_mlp_bias), tp_);
  return row_parallel_linear(wide, value(p.down), optional_value(p.down_bias), residual_mlp, tp_,
                             config_.activation);
}

at::Tensor CausalLM::rows_of(int64_t length) {
  prepare_angles(length);
  const at::Tensor own = attention_->split(length);
  return own.defined() ? own.to(options_.device)
                       : at::arange(length, at::TensorOptions(options_.device).dtype(at::kLong));
}

at::Tensor CausalLM::forward(const at::Tensor& tokens, const at::Tensor& positions,
                             KvCache* cache) {
  at::Tensor h = vocabulary_parallel_embedding(tokens.reshape({-1}), value(embedding_),
                                               first_vocabulary_row_, options_.dtype, tp_);
  if (positions_ >= 0) {
    h = add_positions(h, value(positions_), positions, tokens.size(0));
  }
  const bool checkpoint = options_.activation_checkpoint && at::GradMode::is_enabled();
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    if (gradients_complete_ && h.requires_grad()) {
      // The gradient of a layer's input arrives when all of the layer's weights have theirs.
      h.register_hook([this, first = layers_[static_cast<size_t>(i)].input_norm](
                          const at::Tensor&) { gradients_complete_(first); });
    }
    std::shared_ptr<LayerPlan> plan;
    h = checkpoint ? CheckpointedLayer::apply(h, this, i, positions)
                   : layer(i, h, positions, plan, cache);
  }
  return norm(h, final_norm_, final_norm_bias_).second;
}

at::Tensor CausalLM::check_tokens(const at::Tensor& tokens) const {
  check(ErrorKind::kUsage,
        tokens.dim() == 2 && tokens.scalar_type() == at::kLong && tokens.numel() > 0,
        "tokens must be a non-empty [B, L] of int64, not ", tokens.sizes(), " of ",
        tokens.scalar_type());
  check(ErrorKind::kUsage, tokens.size(1) <= config_.max_position_embeddings, "a sequence of ",
        tokens.size(1), " tokens is longer than the model's max_position_embeddings, ",
        config_.max_position_embeddings);
  const auto [low, high] = at::aminmax(tokens);
  check(ErrorKind::kData, low.item<int64_t>() >= 0 && high.item<int64_t>() < config_.vocab_size,
        "token ids from ", low.item<int64_t>(), " to ", high.item<int64_t>(),
        " do not fit a vocabulary of ", config_.vocab_size);
  return tokens.to(options_.device);
}

at::Tensor CausalLM::check_labels(const at::Tensor& tokens, const at::Tensor& labels) const {
  check(ErrorKind::kUsage, labels.sizes() == tokens.sizes() && labels.scalar_type() == at::kLong,
        "labels must be int64 of the tokens' shape ", tokens.sizes(), ", not ", labels.sizes(),
        " of ", labels.scalar_type());
  const auto [low, high] = at::aminmax(labels.masked_fill(labels == kIgnoredLabel, 0));
  check(ErrorKind::kData, low.item<int64_t>() >= 0 && high.item<int64_t>() < config_.vocab_size,
        "labels from ", low.item<int64_t>(), " to ", high.item<int64_t>(),
        " do not fit a vocabulary of ", config_.vocab_size, " (", kIgnoredLabel,
        " means: not counted)");
  return labels.to(options_.device);
}

at::Tensor CausalLM::hidden(const at::Tensor& tokens) {
  const at::Tensor checked = check_tokens(tokens);
  const at::Tensor rows = rows_of(tokens.size(1));
  return forward(checked.index_select(1, rows), rows)
      .view({tokens.size(0), -1, config_.hidden_size});
}

LossResult CausalLM::loss(const at::Tensor& tokens, const at::Tensor& labels, double loss_scale) {
  const at::Tensor checked = check_tokens(tokens);
  const at::Tensor rows = rows_of(tokens.size(1));
  const at::Tensor flat = check_labels(tokens, labels).index_select(1, rows).reshape({-1});
  const int64_t counted = flat.ne(kIgnoredLabel).sum().item<int64_t>();
  const at::Tensor x = forward(checked.index_select(1, rows), rows);
  return {fused_linear_cross_entropy(x, value(head_), flat, first_vocabulary_row_, loss_scale,
                                     options_.loss_chunk_rows, tp_),
          counted};
}

at::Tensor CausalLM::token_nll(const at::Tensor& tokens, const at::Tensor& labels) {
  at::NoGradGuard no_grad;
  const at::Tensor checked = check_tokens(tokens);
  const at::Tensor rows = rows_of(tokens.size(1));
  const at::Tensor flat = check_labels(tokens, labels).index_select(1, rows).reshape({-1});
  const at::Tensor x = forward(checked.index_select(1, rows), rows);
  const at::Tensor own = linear_cross_entropy_rows(x, value(head_), flat, first_vocabulary_row_,
                                                   options_.loss_chunk_rows, tp_)
                             .to(at::kFloat);
  at::Tensor all = at::zeros(tokens.sizes(), own.options());
  all.index_copy_(1, rows, own.view({tokens.size(0), -1}));
  context().all_reduce(all);
  return all;
}

at::Tensor CausalLM::logits(const at::Tensor& tokens) {
  at::NoGradGuard no_grad;
  const at::Tensor checked = check_tokens(tokens);
  const at::Tensor rows = rows_of(tokens.size(1));
  const at::Tensor x = forward(checked.index_select(1, rows), rows);
  return head(x.view({-1, config_.hidden_size})).view({tokens.size(0), -1, config_.vocab_size});
}

at::Tensor CausalLM::logits_at(const at::Tensor& tokens, const at::Tensor& positions) {
  at::NoGradGuard no_grad;
  const at::Tensor checked = check_tokens(tokens);
  const int64_t length = tokens.size(1);
  check(ErrorKind::kUsage, context().size() == 1,
        "logits at chosen positions of sequences that are split over ", context().size(),
        " processes");
  check(ErrorKind::kUsage,
        positions.dim() == 1 && positions.numel() > 0 &&
            at::logical_and(positions.ge(0), positions.lt(length)).all().item<bool>(),
        "logits at positions ", positions, " of ", length, ", expected a list of some in [0, ",
        length, ")");
  const at::Tensor x = forward(checked, rows_of(length))
                           .view({tokens.size(0), length, config_.hidden_size})
                           .index_select(1, positions.to(options_.device));
  return head(x.reshape({-1, config_.hidden_size}).to(value(head_).scalar_type()))
      .view({tokens.size(0), positions.numel(), config_.vocab_size});
}

at::Tensor CausalLM::head(const at::Tensor& x) const {
  const at::Tensor local = at::mm(x, value(head_).to(x.scalar_type()).t())
                               .to(options_.dtype == at::kDouble ? at::kDouble : at::kFloat);
  return tp_.size() == 1 ? local : tp_.all_gather_uneven(local.t().contiguous()).t().contiguous();
}

std::unique_ptr<KvCache> CausalLM::make_cache(int64_t horizon) const {
  check(ErrorKind::kUsage, horizon >= 1 && horizon <= config_.max_position_embeddings,
        "a cache for ", horizon, " tokens; expected 1 to the model's max_position_embeddings, ",
        config_.max_position_embeddings);
  return attention_->make_cache(config_.num_hidden_layers, horizon);
}

at::Tensor CausalLM::extend(const at::Tensor& tokens, KvCache& cache) {
  at::NoGradGuard no_grad;
  const at::Tensor checked = check_tokens(tokens);
  check(ErrorKind::kUsage, cache.length() + tokens.size(1) <= cache.horizon(), "a cache for ",
        cache.horizon(), " tokens holds ", cache.length(), " and cannot take ", tokens.size(1),
        " more");
  prepare_angles(cache.horizon());
  const at::Tensor positions = at::arange(cache.length(), cache.length() + tokens.size(1),
                                          checked.options());
  const at::Tensor x = forward(checked, positions, &cache)
                           .view({tokens.size(0), tokens.size(1), config_.hidden_size});
  return head(x.select(1, tokens.size(1) - 1));
}

void CausalLM::initialize(uint64_t seed) {
  at::NoGradGuard no_grad;
  uint64_t draw = 0;
  const auto layouts = parameter_layouts(config_, tp_.size(), tp_.rank());
  for (size_t i = 0; i < layouts.size(); ++i) {
    for (const WeightPart& part : layouts[i].parts) {
      at::Tensor to = region(parameters_[i].value, part);
      ++draw;
      if (part.name.ends_with(".bias")) {
        to.zero_();
      } else if (part.shape.size() == 1) {
        to.fill_(1.0);
      } else {
        auto generator = at::make_generator<at::CPUGeneratorImpl>(seed * 0x9e3779b97f4a7c15ull +
                                                                  draw);
        const at::Tensor whole = at::empty(part.shape, at::kFloat)
                                     .normal_(0.0, config_.initializer_range, generator);
        // GPT-2 draws what is added to the residual stream, 2 matrices a layer, so that their sum
        // keeps its size.
        const double depth = config_.is_gpt2() && part.name.ends_with("c_proj.weight")
                                 ? std::sqrt(2.0 * config_.num_hidden_layers)
                                 : 1.0;
        to.copy_(whole.narrow(part.dim, part.start, part.length).div(depth));
      }
    }
  }
}

void CausalLM::load(const std::filesystem::path& hf_dir) {
  at::NoGradGuard no_grad;
  const auto layouts = parameter_layouts(config_, tp_.size(), tp_.rank());
  all_or_none(tp_, options_.device, ErrorKind::kModel, "loading the model", [&] {
    const WeightStore store = WeightStore::open(hf_dir);
    check_weights(config_, store);
    check_tied_head(config_, store);
    for (size_t i = 0; i < layouts.size(); ++i) {
      for (const WeightPart& part : layouts[i].parts) {
        region(parameters_[i].value, part)
            .copy_(store.slice(stored_name(config_, store, part.name), part.dim, part.start,
                               part.length, parameters_[i].value.scalar_type()));
      }
    }
  });
  source_ = hf_dir;
  companions_.clear();
}

void CausalLM::open_companions() {
  all_or_none(tp_, options_.device, ErrorKind::kModel, "opening the files beside the weights", [&] {
    if (tp_.rank() == 0) {
      companions_ = companions_of(source_);
    }
  });
}

void CausalLM::save(const std::filesystem::path& hf_dir, at::ScalarType dtype) const {
  check(ErrorKind::kUsage, dtype == at::kFloat || dtype == at::kBFloat16,
        "models are saved in float32 or bfloat16, not in ", dtype);
  at::NoGradGuard no_grad;
  std::vector<std::vector<ParameterLayout>> layouts;
  for (int64_t rank = 0; rank < tp_.size(); ++rank) {
    layouts.push_back(parameter_layouts(config_, tp_.size(), rank));
  }
  std::vector<NamedTensor> tensors;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const at::Tensor local = parameters_[i].value.detach();
    const bool gathered = parameters_[i].sharded && tp_.size() > 1;
    const at::Tensor flat = gathered ? tp_.all_gather_uneven(local.reshape({-1}))
                                     : local.reshape({-1});
    if (tp_.rank() != 0) {
      continue;
    }
    std::map<std::string, at::Tensor> whole;
    int64_t offset = 0;
    for (int64_t rank = 0; rank < (gathered ? tp_.size() : 1); ++rank) {
      const ParameterLayout& layout = layouts[static_cast<size_t>(rank)][i];
      const int64_t count = c10::multiply_integers(layout.shape);
      const at::Tensor shard = flat.narrow(0, offset, count).view(layout.shape);
      offset += count;
      for (const WeightPart& part : layout.parts) {
        auto [found, is_new] = whole.try_emplace(part.name);
        if (is_new) {
          found->second = at::empty(part.shape, at::TensorOptions().dtype(dtype));
        }
        found->second.narrow(part.dim, part.start, part.length).copy_(region(shard, part));
      }
    }
    for (auto& [name, tensor] : whole) {
      tensors.push_back({name, std::move(tensor)});
    }
  }
  all_or_none(tp_, options_.device, ErrorKind::kStorage, "saving the model", [&] {
    if (tp_.rank() != 0) {
      return;
    }
    make_directories(hf_dir);
    std::vector<std::string> kept;
    const std::vector<FileReader> now = companions_.empty() ? companions_of(source_)
                                                            : std::vector<FileReader>();
    for (const FileReader& companion : companions_.empty() ? now : companions_) {
      kept.push_back(companion.path().filename().string());
      copy_file(companion, hf_dir / kept.back());
    }
    for (const NamedTensor& tensor : tensors) {
      check(ErrorKind::kNumerics, at::isfinite(tensor.value).all().item<bool>(), hf_dir,
            " was not written: tensor ", tensor.name, " is not finite in ", dtype);
    }
    write_text(hf_dir / "config.json", config_.export_json(dtype),
               [](const std::filesystem::path& written) { ModelConfig::load(written); });
    write_safetensors(
        hf_dir / "model.safetensors", tensors, {{"format", "pt"}},
        [](const std::filesystem::path& written) { SafetensorsFile(written, ErrorKind::kModel); });
    remove_stale_files(hf_dir, kept);
    sync_directory(hf_dir);
  });
}

}  // namespace drrl

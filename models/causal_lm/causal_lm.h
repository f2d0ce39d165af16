#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "core/attention/kv_cache.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "models/causal_lm/config.h"
#include "policy/attention/attention_controller.h"

namespace drrl {

/// A trainable tensor of a model, or this rank's shard of it.
///
/// Names are Hugging Face's, with two exceptions: what is multiplied by the same input is stored
/// stacked, as one matrix product wants it, and says so in its name (the way Phi-3 does):
///   model.layers.N.self_attn.qkv_proj.{weight,bias}
///     rows [q_proj; k_proj; v_proj] of this rank's heads
///   model.layers.N.mlp.gate_up_proj.{weight,bias}
///     rows [gate_proj; up_proj] of this rank's columns
/// All matrices are [out, in], GPT-2's too, whose files hold [in, out]. Loading and saving stack,
/// split and turn them; files only ever hold Hugging Face's own names.
struct Parameter {
  std::string name;
  at::Tensor value;  ///< fp32 master copy, a leaf that requires grad; the local shard
  bool decay;        ///< weight decay applies: matrices yes, norms and biases no
  bool sharded;      ///< false: the same on every tensor-parallel rank, and so is its gradient
  int64_t shared_rows = 0;  ///< the last so many belong to a KV head that other ranks hold, too
                            ///< (Mesh::kv): the gradient that backward() gives them is this rank's
                            ///< part of a sum (sum_shared_rows, gradient_reducer.h)
};

struct ModelOptions {
  at::ScalarType dtype = at::kFloat;  ///< of activations and products: kFloat, kBFloat16 (kDouble
                                      ///< in tests: masters too)
  at::Device device = at::kCPU;
  bool activation_checkpoint = false;  ///< keep only each layer's input, recompute the rest in the
                                       ///< backward pass
  int64_t loss_chunk_rows = 512;  ///< tokens whose logits exist at the same time (loss_chunk_rows x
                                  ///< vocabulary / tp values)
};

struct LossResult {
  at::Tensor loss_sum;  ///< scalar, fp32, differentiable: sum over counted targets of -log
                        ///< p(target); the same on every TP rank
  int64_t tokens;       ///< counted targets (label != kIgnoredLabel), of this process's rows
};

/// The label of a position that does not count.
inline constexpr int64_t kIgnoredLabel = -100;

/// A decoder-only transformer of the Llama family or GPT-2, computed as Hugging Face Transformers
/// computes it, tensor-parallel over `tp`.
///
/// tokens [B, L] int64 -> embedding [B, L, hidden] -> layers of (norm, attention, norm, MLP) ->
/// norm -> head. The families differ in the norm (RMSNorm, LayerNorm), the positions (rotated
/// queries and keys, a learned embedding) and the MLP's activation. Rank t of T owns whole KV
/// groups with their query heads, MLP columns and vocabulary rows, each split by `partition()`
/// (mesh.h): 3 groups on 2 ranks are 2 + 1. With more ranks than KV heads some hold the same one
/// and share out its query heads (head_share, weights.h).
///
/// Gradients: `backward()` on a loss adds to `value.grad()` of every parameter in place; an
/// undefined gradient counts as zero. Do not update a parameter between a forward and its backward
/// pass.
///
/// Context parallelism: an attention controller that splits sequences (`split`) makes this process
/// compute the rows of its positions only. All processes of its group get the same tokens and
/// labels; loss() is of the own rows, to be summed over the group like gradients, token_nll() of
/// all.
///
/// Every method is collective over `tp`: all its ranks call it with the same arguments.
/// Errors: Error(kUsage) more TP ranks than query heads, a sequence beyond max_position_embeddings,
/// wrong shapes; Error(kData) a token or label outside the vocabulary; each names the values.
class CausalLM {
 public:
  /// Allocates the local parameters, all zero; `load` or `initialize` gives them values.
  CausalLM(const ModelConfig& config, const Group& tp,
           std::shared_ptr<AttentionController> attention, const ModelOptions& options = {});

  /// Reads the weights of a Hugging Face directory; each rank reads only its slices. Errors:
  /// Error(kModel) that names file and tensor, also when the config ties the head and the file has
  /// another (load_model_config, model_folder.h).
  void load(const std::filesystem::path& hf_dir);

  /// Opens the files that `save` copies from the directory that was loaded, so that a run does not
  /// find at its end that it cannot. Else `save` does it. Errors: Error(kModel) that names the
  /// file.
  void open_companions();

  /// Writes a Hugging Face directory that `AutoModelForCausalLM.from_pretrained` opens:
  /// config.json, model.safetensors in `dtype` (kFloat or kBFloat16), and the tokenizer and
  /// generation files of the directory that was loaded. Those of another model, and weights in
  /// other files, are removed there. Gathered to TP rank 0, which alone writes. Errors:
  /// Error(kStorage).
  void save(const std::filesystem::path& hf_dir, at::ScalarType dtype = at::kFloat) const;

  /// Random weights as Transformers draws them (normal with the config's initializer_range, norms
  /// 1, biases 0), from `seed` alone: the shards of every TP layout are slices of the same model.
  void initialize(uint64_t seed);

  std::vector<Parameter>& parameters() noexcept { return parameters_; }
  const std::vector<Parameter>& parameters() const noexcept { return parameters_; }
  const ModelConfig& config() const noexcept { return config_; }
  const ModelOptions& options() const noexcept { return options_; }
  /// The tensor-parallel ranks that hold this one's KV heads, by number in the group.
  IndexRange kv_sharers() const {
    return kv_sharers_of(config_.num_key_value_heads, tp_.size(), tp_.rank());
  }
  /// The processes that each sequence is split over.
  const Group& context() const { return attention_->context(); }
  /// Parameters of the whole model, not only of this shard.
  int64_t parameter_count() const { return config_.parameter_count(); }

  /// tokens [B, L] -> [B, L, hidden] after the final norm; of this process's rows.
  at::Tensor hidden(const at::Tensor& tokens);

  /// tokens, labels [B, L]; labels are already shifted (label t is the token t + 1), kIgnoredLabel
  /// does not count. `loss_sum.backward()` yields the gradient of loss_scale * loss_sum: it is
  /// computed during the forward pass, chunk by chunk, so that the logits never exist as a whole.
  /// Under NoGradGuard no gradient is computed.
  LossResult loss(const at::Tensor& tokens, const at::Tensor& labels, double loss_scale = 1.0);

  /// -log p of every label, [B, L] fp32, 0 where ignored. Builds no graph.
  at::Tensor token_nll(const at::Tensor& tokens, const at::Tensor& labels);

  /// [B, L, vocabulary] fp32 gathered over `tp`, of this process's rows. Builds no graph. For tests
  /// and short inputs.
  at::Tensor logits(const at::Tensor& tokens);

  /// The same for some positions only, [n] int64, in any order: [B, n, vocabulary]. Their head is
  /// in fp32 under bf16 too, which would let close tokens tie. Errors: Error(kUsage) for a position
  /// outside the sequence, or a sequence that is split.
  at::Tensor logits_at(const at::Tensor& tokens, const at::Tensor& positions);

  /// An empty cache for `extend`, of sequences that will not exceed `horizon` tokens. Errors:
  /// Error(kUsage) unless 1 <= horizon <= max_position_embeddings.
  std::unique_ptr<KvCache> make_cache(int64_t horizon) const;

  /// Appends tokens [B, L] to the sequences in `cache` (of this model; earlier calls had the same
  /// B) -> logits of what follows, [B, vocabulary] fp32, those of the last position. Equal up to
  /// rounding to `logits` on the whole sequences, under every rank policy. Builds no graph.
  at::Tensor extend(const at::Tensor& tokens, KvCache& cache);

  /// Calls `callback(first)` during every backward pass, layer by layer from the last, as soon as
  /// the gradients of the parameters from index `first` on are complete, so that their reduction
  /// over data-parallel ranks can overlap the rest. Never called for the embeddings (the first
  /// parameters), which are complete when the backward pass returns. Not collective. Empty: none.
  void on_gradients_complete(std::function<void(int64_t first)> callback) {
    gradients_complete_ = std::move(callback);
  }

 private:
  friend struct CheckpointedLayer;

  /// Indices into parameters_; -1 where the model has no such parameter.
  struct LayerParameters {
    int64_t input_norm, input_norm_bias, qkv, qkv_bias, o, o_bias, post_norm, post_norm_bias,
        into_mlp, into_mlp_bias, down, down_bias;
  };

  const at::Tensor& value(int64_t index) const {
    return parameters_[static_cast<size_t>(index)].value;
  }
  std::optional<at::Tensor> optional_value(int64_t index) const;
  /// (h, norm(h)): RMSNorm, or LayerNorm where there is a bias.
  std::pair<at::Tensor, at::Tensor> norm(const at::Tensor& h, int64_t weight, int64_t bias) const;
  /// h [B L, hidden] of tokens at `positions` [L] -> the same after layer `index`. `plan` as in
  /// AttentionController::attend. With a cache, the tokens follow those in it.
  at::Tensor layer(int64_t index, const at::Tensor& h, const at::Tensor& positions,
                   std::shared_ptr<LayerPlan>& plan, KvCache* cache = nullptr);
  /// Before a pass over sequences of `length` tokens: the positions that this process computes,
  /// [rows].
  at::Tensor rows_of(int64_t length);
  /// checked tokens [B, L] at `positions` -> [B L, hidden] after the final norm
  at::Tensor forward(const at::Tensor& tokens, const at::Tensor& positions,
                     KvCache* cache = nullptr);
  /// x [N, hidden] after the final norm -> [N, vocabulary] fp32 (fp64 with fp64) gathered over `tp`
  at::Tensor head(const at::Tensor& x) const;
  at::Tensor check_tokens(const at::Tensor& tokens) const;
  at::Tensor check_labels(const at::Tensor& tokens, const at::Tensor& labels) const;
  void prepare_angles(int64_t length);

  ModelConfig config_;
  Group tp_;
  std::shared_ptr<AttentionController> attention_;
  ModelOptions options_;
  std::vector<Parameter> parameters_;
  std::vector<LayerParameters> layers_;
  int64_t embedding_ = -1, positions_ = -1, final_norm_ = -1, final_norm_bias_ = -1, head_ = -1;
  int64_t heads_ = 0, groups_ = 0, first_vocabulary_row_ = 0;  // of this rank
  at::Tensor cos_, sin_;                                       // [longest L seen, d / 2] fp32
  std::function<void(int64_t)> gradients_complete_;
  std::filesystem::path source_;        // the directory that was loaded
  std::vector<FileReader> companions_;  // what save() copies from there, once opened; of TP rank 0
};

}  // namespace drrl

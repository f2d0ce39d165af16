#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "core/io/file_io.h"
#include "models/causal_lm/config.h"
#include "models/causal_lm/weight_store.h"

namespace drrl {

/// Reads the config.json of a Hugging Face folder and holds it against the weights beside it,
/// before anything is allocated: names, shapes and types of all tensors. A tied head
/// (tie_word_embeddings) that the weights hold too, with other values than the embedding, is a head
/// of its own, as in Transformers: tie_word_embeddings becomes false. What is in the folder and is
/// not read goes into `warnings`. Errors: Error(kModel) that names the file, the tensor and the
/// fields of config.json that it contradicts; or an adapter, which is not applied.
ModelConfig load_model_config(const std::filesystem::path& folder);

/// The name under which the weights hold a tensor of the model: files of a bare base model, GPT-2's
/// original ones among them, leave its prefix out, and a tied embedding may be there as the head
/// alone. Itself where there is no such tensor.
std::string stored_name(const ModelConfig& config, const WeightStore& weights,
                        const std::string& name);

/// Errors as load_model_config's, for weights that are not those of `config`.
void check_weights(const ModelConfig& config, const WeightStore& weights);

/// Throws Error(kModel) when `config` ties the head to the embedding and the weights hold another
/// head.
void check_tied_head(const ModelConfig& config, const WeightStore& weights);

/// The files beside the weights that an export takes over: tokenizer, chat template, generation
/// settings.
const std::vector<std::string>& companion_names();

/// Removes what an earlier export or another model left in a folder that now holds a model in one
/// model.safetensors: other weights, and companions but those in `kept`. Errors: Error(kStorage).
void remove_stale_files(const std::filesystem::path& folder, const std::vector<std::string>& kept);

/// The bytes that this process may still allocate in main memory: what the system calls available,
/// swap, and no more than its control groups allow; INT64_MAX where the system does not tell.
int64_t free_memory();

/// Throws Error(kUsage) that names both numbers when `what` of so many bytes cannot fit into main
/// memory.
void check_memory(double bytes, const std::string& what);

}  // namespace drrl

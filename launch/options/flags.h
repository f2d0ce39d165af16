#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <gflags/gflags_declare.h>

// The options that several programs share. launch/options/flags.cpp says what they mean.
DECLARE_string(model);
DECLARE_string(data);
DECLARE_int64(seq_len);
DECLARE_int64(tp);
DECLARE_int64(dp);
DECLARE_string(device);
DECLARE_string(dtype);
DECLARE_uint64(seed);
DECLARE_int64(threads);
DECLARE_int64(timeout_s);
DECLARE_int64(watchdog_timeout_s);
DECLARE_string(json);

DECLARE_string(attention);
DECLARE_string(rank_policy);
DECLARE_int64(rank);
DECLARE_string(rank_buckets);
DECLARE_double(rank_budget);
DECLARE_double(energy);
DECLARE_int64(basis_updates);
DECLARE_double(guard_eps);
DECLARE_double(drop);
DECLARE_bool(gates);
DECLARE_double(guard_decay);
DECLARE_string(policy);
DECLARE_string(latency);
DECLARE_int64(near_block);
DECLARE_int64(sink_tokens);

namespace drrl {

struct Environment;

/// --device: "cpu", or "cuda" as the GPU of this process's local rank. Errors: Error(kUsage).
at::Device device_flag(const Environment& environment);

/// "fp32" or "bf16". Errors: Error(kUsage) naming `flag`.
at::ScalarType dtype_flag(const char* flag, const std::string& value);

/// --tp, --cp and --dp against the size of the world; --dp=0 means whatever the others leave.
/// Errors: Error(kUsage).
struct MeshShape;
MeshShape mesh_flags(const Environment& environment);

/// Errors: Error(kUsage) unless 1 <= --seq_len <= the model's positions.
struct ModelConfig;
void check_seq_len(const ModelConfig& config);

/// Errors: Error(kNumerics) unless `loss` of the `sequence`-th sequence of --data under --model is
/// finite.
void check_loss(int64_t sequence, double loss);

/// Errors: Error(kUsage) if `tp` processes are more than --model has KV heads, of which `what`
/// needs whole groups.
void check_whole_groups(const std::string& what, int64_t tp, const ModelConfig& config);

/// The config.json of --model, and its weights into a model that is part of `world` (collective),
/// watched by the watchdog. Errors: Error(kModel); Error(kCommunication) naming a process that does
/// not come.
ModelConfig read_config();

/// The same, held against the weights in --model (load_model_config).
ModelConfig read_model_config();
class CausalLM;
class Group;
void load_weights(CausalLM& model, const Group& world);

/// The token file --data or --valid_data names. World rank 0 compares all of its tokens with the
/// model's vocabulary, unless there are so many that this would delay the start; whoever reads a
/// batch checks that again. Errors: Error(kData).
class TokenFile;
std::shared_ptr<const TokenFile> open_token_file(const std::string& prefix,
                                                 const ModelConfig& config,
                                                 const Environment& environment);

/// For the start: of world rank 0, Error(kStorage) naming the flag unless the file that each of
/// these flags names can be written, Error(kUsage) if two name the same. Flags that are empty name
/// none.
void check_outputs(const Environment& environment, const std::vector<std::string>& flags);

/// Errors of `action` <- with "--flag=value: " in front.
void naming(const std::string& flag, const std::string& value, const std::function<void()>& action);

/// Errors: Error(kUsage) naming the flag when `value` is empty.
void require(const char* flag, const std::string& value);

}  // namespace drrl

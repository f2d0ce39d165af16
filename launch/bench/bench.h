#pragma once

#include <array>
#include <functional>
#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "core/device.h"
#include "core/types/block_tree.h"
#include "core/types/ranks.h"
#include "distributed/topology/environment.h"
#include "launch/runtime/exit_codes.h"

// What the subcommands of drrl-bench share: inputs, timing, tables.
namespace drrl::bench {

ExitCode attention(const Environment& environment);    // bench_attention.cpp
ExitCode latency(const Environment& environment);      // bench_latency.cpp
ExitCode peers(const Environment& environment);        // bench_peers.cpp
ExitCode collectives(const Environment& environment);  // bench_collectives.cpp
ExitCode scaling(const Environment& environment);      // bench_scaling.cpp
ExitCode model(const Environment& environment);        // bench_model.cpp

/// What one layer's attention reads.
struct Inputs {
  at::Tensor q;           ///< [1, H, L, d], positions encoded
  at::Tensor k;           ///< [1, G, L, d]
  at::Tensor v;           ///< [1, G, L, d]
  at::Tensor w_o;         ///< [hidden, H d]
  at::Tensor start = {};  ///< bases that updates start from, as those of a policy file, [1, G, 2,
                          ///< d, d]; undefined: each call solves those of its first block

  int64_t heads() const { return q.size(1); }
  int64_t groups() const { return k.size(1); }
  int64_t length() const { return q.size(2); }
  int64_t head_dim() const { return q.size(3); }
  /// The first `length` tokens. Of a causal model these are the inputs of a shorter text, bit for
  /// bit or nearly so.
  Inputs prefix(int64_t length) const;
  Inputs to(at::Device device, at::ScalarType dtype) const;
};

/// Independent normal entries. Their Grams have flat spectra, the worst case for low rank: good for
/// time, meaningless for errors.
Inputs random_inputs(int64_t heads, int64_t groups, int64_t length, int64_t head_dim,
                     uint64_t seed);

/// What the given layers of --model see when it reads `length` tokens of --data from token `start`
/// on, in fp32 on the CPU. Errors: Error(kUsage) for a layer or a length that the model does not
/// have; Error(kModel) and Error(kData) as in drrl-eval.
std::vector<Inputs> captured_inputs(const std::vector<int64_t>& layers, int64_t start,
                                    int64_t length);

/// Ranks of a comma list: "32" is r = r_v = 32, "48/16" is r = 48, r_v = 16. Errors: as parse_list
/// (options.h).
std::vector<Ranks> parse_ranks(const char* flag, const std::string& text);

/// "32" or "48/16".
std::string to_string(const Ranks& ranks);

/// The same inputs with starting bases: those of the first block, solved here once, as a
/// calibration is made once. Undefined where that block is short.
Inputs with_start(Inputs in, Geometry geometry);

/// The whole of low-rank attention at one pair of ranks for all far pairs, through the controller
/// that models use, with nothing kept from earlier calls but the starting bases, if there are any:
/// Grams, bases (updated --basis_updates times), projections, near, sinks, far. Differentiable.
/// flops_fraction <- operations of this call over those of exact attention; basis_ms <- its Grams
/// and bases, timed (CUDA: synchronized).
at::Tensor lowrank(const Inputs& in, Ranks ranks, Geometry geometry,
                   double* flops_fraction = nullptr, double* basis_ms = nullptr);

/// PyTorch's scaled_dot_product_attention, causal or not. Keys are copied for each head, or
/// `enable_gqa` leaves that to PyTorch.
at::Tensor sdpa(const Inputs& in, bool causal, bool enable_gqa);
/// Whether PyTorch has a fused kernel for enable_gqa here; without one it would compute an L x L
/// matrix for each head.
bool gqa_is_fused(const Inputs& in);

/// One forward pass, and if `grad` is defined a backward pass to q, k and v from this gradient of
/// the output.
void pass(const std::function<at::Tensor(const Inputs&)>& attention, const Inputs& in,
          const at::Tensor& grad);

using Work = std::function<void()>;

/// Wall times [ms] of each piece of work: after one run of each that is not counted, `rounds` times
/// all of them in turn, from another one on in each round, so that a slow moment of the machine
/// hits all alike. CUDA: synchronized around each.
std::vector<std::vector<double>> interleaved_ms(const std::vector<Work>& work, int64_t rounds,
                                                at::Device device);
double median(std::vector<double> values);

inline constexpr std::array<const char*, 6> kParts = {"near",        "sinks", "far",
                                                      "projections", "grams", "bases"};

/// Milliseconds of the parts of one low-rank forward by their names in kParts, each measured on its
/// own on tensors of the right shapes; Grams and bases together are what the controller reports.
/// Nothing where there are no far pairs.
std::map<std::string, double> parts_ms(const Inputs& in, Ranks ranks, Geometry geometry,
                                       int64_t repeats);

/// The most memory that `work` held at any moment beyond what was held before it, in bytes:
/// resident memory of the process on a CPU, PyTorch's allocator on CUDA. Nothing where the system
/// does not tell.
std::optional<int64_t> peak_bytes(const Work& work, at::Device device);

/// ||a - b||_F / ||b||_F, in double.
double relative_error(const at::Tensor& a, const at::Tensor& b);

/// Errors: Error(kCommunication) unless `result` is `expected` bit for bit, saying of `what` how
/// many elements are wrong, and the first one.
void check_exact(const std::string& what, const at::Tensor& result, const at::Tensor& expected);

/// Columns aligned to the right, the first row above a rule.
void print_table(std::ostream& out, const std::vector<std::vector<std::string>>& rows);

/// printf into a string.
std::string format(const char* pattern, double value);

/// Flat objects with the same keys as CSV with a header; null is an empty cell.
std::string to_csv(const nlohmann::ordered_json& rows);

/// What any result should say about its origin: versions, threads, device, the time, every option.
nlohmann::ordered_json provenance(const char* benchmark);

}  // namespace drrl::bench

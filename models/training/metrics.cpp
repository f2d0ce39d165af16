#include "models/training/metrics.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <sstream>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/io/file_io.h"

namespace drrl {
namespace {

std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0x82f63b78U : 0U);
    }
    table[byte] = crc;
  }
  return table;
}

// Protocol buffer wire format: a field is (number << 3 | type), then a varint (0), 8 bytes (1),
// length + bytes (2) or 4 bytes (5).
void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) {
    out.push_back(static_cast<char>((value & 0x7f) | 0x80));
  }
  out.push_back(static_cast<char>(value));
}

template <typename Word>
void put_little_endian(std::string& out, Word word) {
  for (size_t byte = 0; byte < sizeof(Word); ++byte) {
    out.push_back(static_cast<char>((word >> (8 * byte)) & 0xff));
  }
}

void put_varint_field(std::string& out, uint32_t number, uint64_t value) {
  put_varint(out, number << 3U);
  put_varint(out, value);
}

void put_double_field(std::string& out, uint32_t number, double value) {
  put_varint(out, number << 3U | 1U);
  put_little_endian(out, std::bit_cast<uint64_t>(value));
}

void put_float_field(std::string& out, uint32_t number, float value) {
  put_varint(out, number << 3U | 5U);
  put_little_endian(out, std::bit_cast<uint32_t>(value));
}

void put_bytes_field(std::string& out, uint32_t number, const std::string& bytes) {
  put_varint(out, number << 3U | 2U);
  put_varint(out, bytes.size());
  out += bytes;
}

double seconds_since_epoch() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

/// Event { double wall_time = 1; int64 step = 2; ... }
std::string event_header(int64_t step) {
  std::string event;
  put_double_field(event, 1, seconds_since_epoch());
  put_varint_field(event, 2, static_cast<uint64_t>(step));
  return event;
}

void open(std::ofstream& file, const std::filesystem::path& path, std::ios::openmode mode) {
  file.open(path, mode);
  check(ErrorKind::kStorage, file.good(), "cannot open ", path.string(),
        " for writing: ", std::strerror(errno));
}

void flush(std::ofstream& file, const std::filesystem::path& path) {
  file.flush();
  check(ErrorKind::kStorage, file.good(), "cannot write ", path.string(), ": ",
        std::strerror(errno));
}

/// Makes a log of `header` and those of its lines for which `keep` holds, in one step; a torn last
/// line (no newline) goes, too.
template <typename Keep>
void filter_lines(const std::filesystem::path& path, const std::string& header, Keep keep) {
  std::string kept = header;
  if (path_exists(path, ErrorKind::kStorage)) {
    std::istringstream in(read_text(path, ErrorKind::kStorage, UINT64_MAX));
    for (std::string line; std::getline(in, line) && !in.eof();) {
      if (keep(line)) {
        kept += line + "\n";
      }
    }
  }
  write_text(path, kept);
}

std::string csv_header() {
  std::string header = "step";
  for (const MetricField& field : metric_fields()) {
    header += std::string(",") + field.key;
  }
  return header;
}

}  // namespace

uint32_t crc32c(const void* bytes, size_t size) noexcept {
  static const std::array<uint32_t, 256> table = make_crc_table();
  uint32_t crc = 0xffffffffU;
  const auto* p = static_cast<const unsigned char*>(bytes);
  for (size_t i = 0; i < size; ++i) {
    crc = table[(crc ^ p[i]) & 0xffU] ^ (crc >> 8U);
  }
  return ~crc;
}

uint32_t masked_crc32c(const void* bytes, size_t size) noexcept {
  return std::rotr(crc32c(bytes, size), 15) + 0xa282ead8U;
}

EventWriter::EventWriter(const std::filesystem::path& directory, int64_t first_step) {
  make_directories(directory);
  char host[256] = "host";
  gethostname(host, sizeof(host) - 1);
  const auto stamp = static_cast<int64_t>(seconds_since_epoch());
  const std::string base = "events.out.tfevents." + std::to_string(stamp) + "." + host + "." +
                           std::to_string(getpid());
  path_ = directory / (base + ".0");
  for (int i = 1; std::filesystem::exists(path_); ++i) {
    path_ = directory / (base + "." + std::to_string(i));
  }
  open(file_, path_, std::ios::binary | std::ios::trunc);
  std::string version = event_header(0);
  put_bytes_field(version, 3, "brain.Event:2");  // string file_version = 3
  record(version);
  if (first_step > 0) {
    std::string start = event_header(first_step + 1);
    std::string session_log;
    put_varint_field(session_log, 1, 1);     // SessionLog { SessionStatus status = 1; START = 1 }
    put_bytes_field(start, 7, session_log);  // SessionLog session_log = 7
    record(start);
  }
  flush(file_, path_);
}

void EventWriter::scalars(int64_t step,
                          const std::vector<std::pair<std::string, double>>& tagged_values) {
  std::string summary;
  for (const auto& [tag, value] : tagged_values) {
    std::string entry;  // Summary.Value { string tag = 1; float simple_value = 2 }
    put_bytes_field(entry, 1, tag);
    put_float_field(entry, 2, static_cast<float>(value));
    put_bytes_field(summary, 1, entry);  // repeated Value value = 1
  }
  std::string event = event_header(step);
  put_bytes_field(event, 5, summary);  // Summary summary = 5
  record(event);
  flush(file_, path_);
}

void EventWriter::record(const std::string& event) {
  // TFRecord: uint64 length, uint32 masked crc of the length, the bytes, uint32 masked crc of the
  // bytes.
  std::string framed;
  put_little_endian<uint64_t>(framed, event.size());
  put_little_endian<uint32_t>(framed, masked_crc32c(framed.data(), 8));
  framed += event;
  put_little_endian<uint32_t>(framed, masked_crc32c(event.data(), event.size()));
  file_.write(framed.data(), static_cast<std::streamsize>(framed.size()));
}

const std::vector<MetricField>& metric_fields() {
  static const std::vector<MetricField> fields = {
      {"loss", "loss_metrics/global_avg_loss", "nats/token",
       "mean over the counted tokens of the global batch"},
      {"grad_norm", "grad_norm", "", "global norm of the gradient before clipping"},
      {"lr", "lr", "", "learning rate of the update"},
      {"tokens", "n_tokens_seen", "tokens", "tokens consumed since the start of training"},
      {"tokens_per_second", "throughput(tps)", "tokens/s",
       "global throughput, over the steps since the last logged one"},
      {"ms_per_step", "time_metrics/end_to_end(ms)", "ms",
       "wall time of a step, over the steps since the last logged one"},
      {"mean_rank_qk", "drrl/mean_rank_qk", "", "mean rank of attention scores on far tokens"},
      {"mean_rank_v", "drrl/mean_rank_v", "", "mean rank of attention values on far tokens"},
      {"attention_flops_fraction", "drrl/attention_flops_fraction", "",
       "all attention FLOPs over those of exact causal attention"},
      {"exact_pairs", "drrl/exact_pairs", "",
       "share of far pairs with exact scores or values because no low rank serves them"},
      {"policy_updates", "drrl/policy_updates", "", "online updates of the rank policy in effect"},
      {"policy_distance", "drrl/policy_distance", "",
       "root mean square of the logarithm of learned over calibrated damage, each kind's mean left "
       "out"},
      {"policy_damage", "drrl/policy_damage", "nats/token",
       "expected damage of the ranks that the learned damages lead to"},
      {"policy_damage_calibrated", "drrl/policy_damage_calibrated", "nats/token",
       "expected damage, by the learned damages, of the ranks that the calibration leads to"},
      {"policy_attention_ms", "drrl/policy_attention_ms", "ms",
       "forward attention of a process in a step, mean over processes"},
      {"policy_slowest", "drrl/policy_slowest", "",
       "the slowest process's attention time over that mean"},
      {"policy_guarded", "drrl/policy_guarded", "", "share of decisions that the guard raised"},
      {"policy_sample_ms", "drrl/policy_sample_ms", "ms",
       "time spent on measuring damages since the last logged row, world rank 0"},
      {"policy_wait_ms", "drrl/policy_wait_ms", "ms",
       "time waited for an update of the policy since the last logged row, world rank 0"},
      {"balance_slowest", "drrl/balance_slowest", "",
       "speed of the slowest tensor-parallel process over that of the fastest, as last measured"},
      {"balance_time", "drrl/balance_time", "",
       "time that attention should take at these speeds over that with ranks that are not "
       "balanced"},
      {"balance_damage", "drrl/balance_damage", "nats/token", "expected damage that balance adds"},
      {"valid_loss", "validation_metrics/loss", "nats/token", "mean over the validation tokens"},
      {"valid_ppl", "lm loss validation ppl", "", "exp(valid_loss)"},
      {"memory_gib", "memory/max_active(GiB)", "GiB",
       "peak memory of world rank 0 (resident on the host, or allocated on its GPU)"},
  };
  return fields;
}

MetricsWriter::MetricsWriter(const std::filesystem::path& directory, int64_t first_step)
    : directory_(directory) {
  make_directories(directory);
  const auto jsonl = directory / "metrics.jsonl";
  const auto csv = directory / "metrics.csv";
  if (first_step > 0) {
    filter_lines(jsonl, "", [&](const std::string& line) {
      const auto row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      return row.is_object() && row.contains("step") && row["step"].is_number_integer() &&
             row["step"].get<int64_t>() <= first_step;
    });
    filter_lines(csv, csv_header() + "\n", [&](const std::string& line) {
      return !line.empty() && std::isdigit(static_cast<unsigned char>(line.front())) != 0 &&
             std::atoll(line.c_str()) <= first_step;
    });
  } else {
    write_text(jsonl, "");
    write_text(csv, csv_header() + "\n");
  }
  open(jsonl_, jsonl, std::ios::binary | std::ios::app);
  open(csv_, csv, std::ios::binary | std::ios::app);
  events_ = std::make_unique<EventWriter>(directory, first_step);
}

void MetricsWriter::write(const MetricRow& row) {
  const auto& fields = metric_fields();
  nlohmann::ordered_json json;
  json["step"] = row.step;
  std::vector<std::string> cells(fields.size());
  std::vector<std::pair<std::string, double>> scalars;
  for (const auto& [key, value] : row.values) {
    const auto field = std::find_if(fields.begin(), fields.end(),
                                    [&key = key](const MetricField& f) { return key == f.key; });
    check(ErrorKind::kInternal, field != fields.end(), "metric ", key,
          " is not in the table of metrics");
    if (!std::isfinite(value)) {
      continue;  // JSON has no NaN: absent means "not measured"
    }
    json[key] = value;
    cells[static_cast<size_t>(field - fields.begin())] = nlohmann::json(value).dump();
    scalars.emplace_back(field->tag, value);
  }
  jsonl_ << json.dump() << "\n";
  flush(jsonl_, directory_ / "metrics.jsonl");
  csv_ << row.step;
  for (const std::string& cell : cells) {
    csv_ << "," << cell;
  }
  csv_ << "\n";
  flush(csv_, directory_ / "metrics.csv");
  events_->scalars(row.step, scalars);
}

}  // namespace drrl

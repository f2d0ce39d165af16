#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace drrl {

/// The CRC-32C (Castagnoli) of `bytes`, and the form in which TFRecord files store it: rotr(crc,
/// 15) + 0xa282ead8.
uint32_t crc32c(const void* bytes, size_t size) noexcept;
uint32_t masked_crc32c(const void* bytes, size_t size) noexcept;

/// Writes TensorBoard scalars: a TFRecord file "events.out.tfevents.SECONDS.HOST.PID" of
/// tensorflow.Event messages (tensorflow/core/util/event.proto and framework/summary.proto, encoded
/// by hand). Opened at step n > 0, it tells TensorBoard to forget what an interrupted earlier run
/// logged at later steps.
class EventWriter {
 public:
  /// Errors: Error(kStorage) naming the path.
  EventWriter(const std::filesystem::path& directory, int64_t first_step);

  void scalars(int64_t step, const std::vector<std::pair<std::string, double>>& tagged_values);
  const std::filesystem::path& path() const noexcept { return path_; }

 private:
  void record(const std::string& event);

  std::filesystem::path path_;
  std::ofstream file_;
};

/// One quantity of a training step.
struct MetricField {
  const char* key;  ///< in JSONL and CSV
  const char* tag;  ///< in TensorBoard: the name that torchtitan or Megatron gives it, "drrl/..."
                    ///< where neither has it
  const char* unit;
  const char* meaning;
};

/// Every quantity that is logged, in the order of the CSV columns. "step" comes first and has no
/// tag of its own.
const std::vector<MetricField>& metric_fields();

/// The values of one logged step; a key that is left out is missing in JSONL, empty in CSV and not
/// drawn in TensorBoard.
struct MetricRow {
  int64_t step = 0;
  std::vector<std::pair<std::string, double>> values;  ///< key -> value

  void set(const std::string& key, double value) { values.emplace_back(key, value); }
};

/// metrics.jsonl, metrics.csv and TensorBoard events in one directory. Every row is flushed, so a
/// killed run keeps what it logged. Resuming at `first_step` drops the rows after it, which the
/// interrupted run logged but did not save; should that be cut short, all rows are still there.
class MetricsWriter {
 public:
  /// Errors: Error(kStorage) naming the path.
  MetricsWriter(const std::filesystem::path& directory, int64_t first_step);

  /// Errors: Error(kStorage); Error(kInternal) for a key that metric_fields() does not list.
  void write(const MetricRow& row);

 private:
  std::filesystem::path directory_;
  std::ofstream jsonl_, csv_;
  std::unique_ptr<EventWriter> events_;
};

}  // namespace drrl

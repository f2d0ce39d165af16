#include "launch/runtime/log.h"

#include "launch/runtime/glog.h"

namespace drrl {

void log_info(const std::string& message, std::source_location where) {
  google::LogMessage(where.file_name(), static_cast<int>(where.line()), google::GLOG_INFO).stream()
      << message;
}

void log_warning(const std::string& message, std::source_location where) {
  google::LogMessage(where.file_name(), static_cast<int>(where.line()), google::GLOG_WARNING)
          .stream()
      << message;
}

void log_error(const std::string& message, std::source_location where) {
  google::LogMessage(where.file_name(), static_cast<int>(where.line()), google::GLOG_ERROR).stream()
      << message;
}

void start_logging(const char* program) {
  if (FLAGS_log_dir.empty()) {
    FLAGS_logtostderr = true;
  }
  google::InitGoogleLogging(program);
  google::InstallFailureSignalHandler();
}

}  // namespace drrl

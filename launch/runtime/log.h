#pragma once

#include <source_location>
#include <string>

namespace drrl {

/// glog, without its macros: messages for people who watch the job, on stderr (or in files, with
/// glog's --log_dir). Results belong on stdout.
void log_info(const std::string& message,
              std::source_location where = std::source_location::current());
void log_warning(const std::string& message,
                 std::source_location where = std::source_location::current());
void log_error(const std::string& message,
               std::source_location where = std::source_location::current());

/// Starts glog with a stack trace on crashes. Once a program, before the first message.
void start_logging(const char* program);

}  // namespace drrl

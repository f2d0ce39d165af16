#pragma once

#include <stdexcept>
#include <string>

#include <c10/util/StringUtil.h>

namespace drrl {

/// What went wrong, coarse enough for a program to choose an exit code
/// (launch/runtime/exit_codes.h) and no finer.
enum class ErrorKind {
  kUsage,          ///< an option or argument that cannot be honoured
  kModel,          ///< a model directory (config.json, safetensors) that is missing, damaged or not
                   ///< supported
  kData,           ///< a token file that is missing, damaged or does not fit the model
  kCheckpoint,     ///< a checkpoint that is missing, damaged or of another run
  kStorage,        ///< the file system refused a write (disk full, permissions)
  kCommunication,  ///< a collective failed, timed out, or ranks diverged
  kNumerics,       ///< a loss, norm or factorization is not finite
  kInternal,       ///< a broken promise inside drrl itself
};

/// The name of a kind as it stands in messages: "usage", "model", ...
const char* name(ErrorKind kind) noexcept;

/// The one exception type that drrl throws on purpose. The library never exits; programs translate
/// `kind()`. Violated tensor contracts (shapes, dtypes) inside operators are `c10::Error`, as in
/// PyTorch itself.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

/// Throws `Error`. The parts are streamed together: raise(ErrorKind::kData, "file ", path, " has ",
/// n, " bytes").
template <typename... Parts>
[[noreturn]] void raise(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, c10::str(parts...));
}

/// Throws `Error` of `kind` with the streamed parts unless `condition` holds. Messages name the
/// file, the value and what was expected.
template <typename... Parts>
void check(ErrorKind kind, bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    raise(kind, parts...);
  }
}

}  // namespace drrl

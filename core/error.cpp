#include "core/error.h"

namespace drrl {

const char* name(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::kUsage: return "usage";
    case ErrorKind::kModel: return "model";
    case ErrorKind::kData: return "data";
    case ErrorKind::kCheckpoint: return "checkpoint";
    case ErrorKind::kStorage: return "storage";
    case ErrorKind::kCommunication: return "communication";
    case ErrorKind::kNumerics: return "numerics";
    case ErrorKind::kInternal: return "internal";
  }
  return "unknown";
}

}  // namespace drrl

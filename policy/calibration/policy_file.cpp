#include "policy/calibration/policy_file.h"

#include <charconv>
#include <sstream>

#include "core/error.h"

namespace drrl {
namespace {

int64_t to_integer(const std::string& text, const std::string& what, int64_t least) {
  int64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  check(ErrorKind::kModel,
        problem == std::errc() && end == text.data() + text.size() && value >= least, what, " is ",
        quoted(text), ", expected an integer from ", least);
  return value;
}

}  // namespace

PolicyFile::PolicyFile(const std::filesystem::path& path, const char* what, const char* format)
    : file_(path, ErrorKind::kModel), what_(what) {
  check(ErrorKind::kModel, field("format") == format, path, ": \"format\" is ",
        quoted(field("format")), ", expected \"", format, "\"; make the ", what, " again");
}

const std::string& PolicyFile::field(const std::string& name) const {
  const auto found = file_.metadata().find(name);
  check(ErrorKind::kModel, found != file_.metadata().end(), file_.path(), " is not a ", what_,
        " file: its metadata has no \"", name, "\"");
  return found->second;
}

int64_t PolicyFile::integer(const std::string& name, int64_t least) const {
  return to_integer(field(name), c10::str(file_.path(), ": \"", name, "\""), least);
}

std::vector<int64_t> PolicyFile::ranks() const {
  std::vector<int64_t> ranks;
  std::istringstream list(field("ranks"));
  for (std::string item; std::getline(list, item, ',');) {
    ranks.push_back(to_integer(item, c10::str(file_.path(), ": an entry of \"ranks\""),
                               ranks.empty() ? 1 : ranks.back() + 1));
  }
  check(ErrorKind::kModel, !ranks.empty(), file_.path(), ": \"ranks\" is empty");
  return ranks;
}

at::Tensor PolicyFile::tensor(const std::string& name, at::ScalarType dtype, int64_t dims) const {
  const auto& entry = file_.entry(name);
  check(ErrorKind::kModel, entry.dtype == dtype && static_cast<int64_t>(entry.shape.size()) == dims,
        file_.path(), ": \"", name, "\" is ", c10::toString(entry.dtype), " ",
        at::IntArrayRef(entry.shape), ", expected ", c10::toString(dtype), " of ", dims,
        " dimensions");
  auto tensor = file_.tensor(name);
  check(ErrorKind::kModel, tensor.numel() > 0 && at::isfinite(tensor).all().item<bool>(),
        file_.path(), ": \"", name, "\" is empty or not finite");
  return tensor;
}

std::string to_list(const std::vector<int64_t>& ranks) {
  std::ostringstream list;
  for (size_t i = 0; i < ranks.size(); ++i) {
    list << (i > 0 ? "," : "") << ranks[i];
  }
  return list.str();
}

}  // namespace drrl

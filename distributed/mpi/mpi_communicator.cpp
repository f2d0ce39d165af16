#include "distributed/mpi/mpi_communicator.h"

#include <numeric>
#include <string>
#include <utility>

#include <c10/util/Exception.h>

#include "core/error.h"

namespace drrl {
namespace {

std::string describe(int status, std::string_view call) {
  char text[MPI_MAX_ERROR_STRING] = "unknown error";
  int length = 0;
  if (mpi_is_active() && MPI_Error_string(status, text, &length) == MPI_SUCCESS) {
    return c10::str(call, " failed: ", std::string(text, static_cast<std::size_t>(length)),
                    " (code ", status, ")");
  }
  return c10::str(call, " failed with code ", status);
}

const char* thread_level_name(int level) {
  switch (level) {
    case MPI_THREAD_SINGLE: return "MPI_THREAD_SINGLE";
    case MPI_THREAD_FUNNELED: return "MPI_THREAD_FUNNELED";
    case MPI_THREAD_SERIALIZED: return "MPI_THREAD_SERIALIZED";
    case MPI_THREAD_MULTIPLE: return "MPI_THREAD_MULTIPLE";
    default: return "an unknown level";
  }
}

}  // namespace

void check_mpi(int status, std::string_view call) {
  if (status != MPI_SUCCESS) [[unlikely]] {
    raise(ErrorKind::kCommunication, describe(status, call));
  }
}

void warn_mpi(int status, std::string_view call) noexcept {
  if (status != MPI_SUCCESS) {
    TORCH_WARN("drrl: ", describe(status, call));
  }
}

bool mpi_is_active() noexcept {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

void require_mpi() {
  check(ErrorKind::kUsage, mpi_is_active(),
        "MPI is not active: the program must call MPI_Init_thread(..., MPI_THREAD_MULTIPLE, ...) "
        "before it makes groups over "
        "MPI, "
        "and drop them before MPI_Finalize");
  int level = MPI_THREAD_SINGLE;
  check_mpi(MPI_Query_thread(&level), "MPI_Query_thread");
  check(
      ErrorKind::kUsage, level == MPI_THREAD_MULTIPLE, "MPI was initialised with ",
      thread_level_name(level),
      ", but drrl needs MPI_THREAD_MULTIPLE: call MPI_Init_thread(..., MPI_THREAD_MULTIPLE, ...)");
}

MpiCommunicator::MpiCommunicator(MPI_Comm communicator) : communicator_(communicator) {
  check_mpi(MPI_Comm_set_errhandler(communicator_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
}

MpiCommunicator MpiCommunicator::duplicate(MPI_Comm parent) {
  require_mpi();
  MPI_Comm result = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(parent, &result), "MPI_Comm_dup");
  return MpiCommunicator(result);
}

MpiCommunicator MpiCommunicator::split(MPI_Comm parent, int64_t color, int64_t key) {
  require_mpi();
  MPI_Comm result = MPI_COMM_NULL;
  check_mpi(MPI_Comm_split(parent, static_cast<int>(color), static_cast<int>(key), &result),
            "MPI_Comm_split");
  return MpiCommunicator(result);
}

MpiCommunicator::MpiCommunicator(MpiCommunicator&& other) noexcept
    : communicator_(std::exchange(other.communicator_, MPI_COMM_NULL)) {}

MpiCommunicator& MpiCommunicator::operator=(MpiCommunicator&& other) noexcept {
  std::swap(communicator_, other.communicator_);
  return *this;
}

MpiCommunicator::~MpiCommunicator() {
  if (communicator_ != MPI_COMM_NULL && mpi_is_active()) {
    warn_mpi(MPI_Comm_free(&communicator_), "MPI_Comm_free");
  }
}

int MpiCommunicator::rank() const {
  int result = 0;
  check_mpi(MPI_Comm_rank(communicator_, &result), "MPI_Comm_rank");
  return result;
}

int MpiCommunicator::size() const {
  int result = 0;
  check_mpi(MPI_Comm_size(communicator_, &result), "MPI_Comm_size");
  return result;
}

std::vector<int64_t> MpiCommunicator::world_ranks() const {
  const int count = size();
  std::vector<int> here(static_cast<std::size_t>(count));
  std::iota(here.begin(), here.end(), 0);
  std::vector<int> there(here.size());
  MPI_Group members = MPI_GROUP_NULL;
  MPI_Group world = MPI_GROUP_NULL;
  check_mpi(MPI_Comm_group(communicator_, &members), "MPI_Comm_group");
  check_mpi(MPI_Comm_group(MPI_COMM_WORLD, &world), "MPI_Comm_group");
  const int status = MPI_Group_translate_ranks(members, count, here.data(), world, there.data());
  MPI_Group_free(&members);
  MPI_Group_free(&world);
  check_mpi(status, "MPI_Group_translate_ranks");
  return {there.begin(), there.end()};
}

}  // namespace drrl

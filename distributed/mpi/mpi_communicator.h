#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include <mpi.h>

namespace drrl {

/// Throws Error(kCommunication) with MPI's own text unless `status` is MPI_SUCCESS. `call` names
/// the MPI function.
void check_mpi(int status, std::string_view call);

/// As check_mpi where nothing may be thrown: only warns.
void warn_mpi(int status, std::string_view call) noexcept;

/// True between MPI_Init and MPI_Finalize.
bool mpi_is_active() noexcept;

/// Errors: Error(kUsage) unless the program has called MPI_Init_thread(..., MPI_THREAD_MULTIPLE,
/// ...), got that level, and has not called MPI_Finalize. drrl never initialises MPI: that is the
/// program's to do, once.
void require_mpi();

/// Owns a communicator of drrl's own and frees it. Errors on it come back as status codes, not as
/// an abort.
///
/// Creating one is collective over the parent, and so is freeing it: members drop their
/// communicators in the same order. Ownership ends before MPI_Finalize; a communicator that
/// outlives it is left alone, since MPI may no longer be called.
class MpiCommunicator {
 public:
  MpiCommunicator() = default;

  /// A communicator of the same processes as `parent`, which stays the caller's.
  static MpiCommunicator duplicate(MPI_Comm parent);

  /// The processes of `parent` that name the same `color` (>= 0), ordered by `key`.
  static MpiCommunicator split(MPI_Comm parent, int64_t color, int64_t key);

  MpiCommunicator(MpiCommunicator&& other) noexcept;
  MpiCommunicator& operator=(MpiCommunicator&& other) noexcept;
  ~MpiCommunicator();

  MPI_Comm get() const noexcept { return communicator_; }

  /// Gives up ownership without freeing: for a communicator on which an operation hangs.
  void abandon() noexcept { communicator_ = MPI_COMM_NULL; }

  int rank() const;
  int size() const;

  /// Ranks of the members in MPI_COMM_WORLD, in the order of their ranks here.
  std::vector<int64_t> world_ranks() const;

 private:
  explicit MpiCommunicator(MPI_Comm communicator);

  MPI_Comm communicator_ = MPI_COMM_NULL;
};

}  // namespace drrl

#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <mpi.h>

#include "distributed/collectives/group.h"
#include "distributed/mpi/mpi_backend.h"

namespace drrl {

/// A c10d::ProcessGroup whose CPU tensors travel over `backend`.
c10::intrusive_ptr<c10d::ProcessGroup> make_process_group(
    const c10::intrusive_ptr<MpiBackend>& backend);

/// The processes of `parent` that name the same `color` (>= 0), in the order of their ranks there,
/// as a Group over Open MPI. Collective over `parent`, which stays the caller's; the group owns a
/// communicator of its own. One alone gets a group of one without MPI. Errors: Error(kUsage) when
/// MPI is not active with MPI_THREAD_MULTIPLE.
Group make_mpi_group(const std::string& name, MPI_Comm parent, std::chrono::milliseconds timeout,
                     int64_t color = 0);

}  // namespace drrl

// hang: rank 1 takes part in one all-reduce and then never again; rank 0 must say so and end the
// job. unsafe: MPI without threads. outlive: groups that are still there after MPI_Finalize, with
// all their work done.
#include <unistd.h>

#include <cstdio>
#include <optional>
#include <string>

#include "core/error.h"
#include "distributed/mpi/mpi_group.h"

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, mode == "unsafe" ? MPI_THREAD_SINGLE : MPI_THREAD_MULTIPLE,
                  &provided);
  std::optional<drrl::Group> survivor;
  try {
    const drrl::Group world = drrl::make_mpi_group("world", MPI_COMM_WORLD,
                                                   std::chrono::milliseconds(300));
    at::Tensor tensor = at::ones({4});
    world.all_reduce(tensor);
    if (mode == "outlive") {
      survivor = world;
    } else if (world.rank() == 1) {
      pause();
    }
    world.all_reduce(tensor);
  } catch (const drrl::Error& error) {
    std::fprintf(stderr, "%s: %s\n", drrl::name(error.kind()), error.what());
    MPI_Abort(MPI_COMM_WORLD, 7);
  }
  MPI_Finalize();
  survivor.reset();
  std::puts("ended");
  return 0;
}

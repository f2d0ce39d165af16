// Started by torchrun: the environment is what torchrun says, and all workers meet in its agent's
// store.
#include <cstdio>

#include "core/error.h"
#include "distributed/topology/environment.h"
#include "distributed/topology/rendezvous.h"

int main() {
  try {
    const auto environment = drrl::Environment::detect();
    const auto store = drrl::make_store(environment, {}, std::chrono::seconds(30));
    const auto arrived = store->add("arrived", 1);
    if (arrived == environment.world_size) {
      store->set("all", "yes");
    }
    store->wait({"all"}, std::chrono::seconds(30));
    std::printf("%s: rank %d of %d, local %d of %d, agent store %d, all met\n",
                drrl::name(environment.launcher), static_cast<int>(environment.world_rank),
                static_cast<int>(environment.world_size), static_cast<int>(environment.local_rank),
                static_cast<int>(environment.local_size), environment.agent_store);
  } catch (const drrl::Error& error) {
    std::fprintf(stderr, "%s: %s\n", drrl::name(error.kind()), error.what());
    return 1;
  }
  return 0;
}

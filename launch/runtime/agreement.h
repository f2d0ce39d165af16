#pragma once

#include <string>
#include <vector>

#include "distributed/topology/environment.h"

namespace drrl {

/// Checks that all processes were started with the same `command`, "drrl-policy record" say, of the
/// same version and with the same options. Only what does not matter to the others may differ:
/// threads, timeouts, where files are. Collective over the world, before there are groups. Errors,
/// on all alike: Error(kUsage).
void agree_on_options(const Environment& environment, const std::string& command);

/// Checks that all processes have the same contents in the files that these options name, wherever
/// they are: "config" is config.json of --model, "model" that and its weights. An option without a
/// value is passed over. Collective over the world, before there are groups. Errors: Error(kUsage)
/// on all alike; for a file that cannot be read, that of its kind.
void agree_on_inputs(const Environment& environment, const std::vector<std::string>& inputs);

/// Before MPI ends.
void end_agreements();

}  // namespace drrl

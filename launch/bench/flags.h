#pragma once

#include <gflags/gflags_declare.h>

// Options that several subcommands of drrl-bench share, defined in launch/bench.cpp.
DECLARE_string(ranks);
DECLARE_int64(repeats);
DECLARE_string(csv);

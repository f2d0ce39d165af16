#pragma once

#include <cstdlib>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include "tests/support/error_of.h"

namespace drrl {

/// Fixture of tests that run under mpirun: it fails unless the world has the size that the test was
/// registered for.
class MpiTest : public testing::Test {
 protected:
  void SetUp() override {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
    const char* expected = std::getenv("DRRL_TEST_RANKS");
    ASSERT_NE(expected, nullptr) << "DRRL_TEST_RANKS is not set: run through ctest";
    ASSERT_EQ(std::to_string(size_), expected);
  }

  int rank_ = 0;
  int size_ = 1;
};

}  // namespace drrl

#pragma once

#include <string>

#include <gtest/gtest.h>

#include "core/error.h"

namespace drrl {

/// The message of the Error of `kind` that `action` throws; a failure when it throws none, or
/// something else.
template <typename Action>
std::string error_of(ErrorKind kind, const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "not a drrl::Error: " << error.what();
    return {};
  }
  ADD_FAILURE() << "no error";
  return {};
}

}  // namespace drrl

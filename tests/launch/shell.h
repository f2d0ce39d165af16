#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <string>

namespace drrl::test {

struct Ended {
  int code;
  std::string output;  // stdout and stderr
};

/// Runs a shell command line.
inline Ended shell(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  char buffer[4096];
  while (const size_t n = fread(buffer, 1, sizeof(buffer), pipe)) {
    output.append(buffer, n);
  }
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), output};
}

}  // namespace drrl::test

#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "models/training/trainer.h"

namespace drrl {

/// "134.5 M", "1.24 G", "576": three or four significant digits.
std::string short_count(double count);

/// "01:02:03", with days in front when there are any.
std::string clock_time(double seconds);

/// Aligned "name  value" lines under a title, then every option that has an effect in this run with
/// its value, those that were given marked with *, and the names of those that were given and have
/// none.
void print_banner(std::ostream& out, const std::string& title,
                  const std::vector<std::pair<std::string, std::string>>& lines);

/// One line a logged step, and between the lines, on a terminal only, a progress bar that the next
/// line overwrites.
class TrainConsole {
 public:
  TrainConsole(std::ostream& out, bool terminal, int64_t steps)
      : out_(out), terminal_(terminal), steps_(steps) {}

  void step(const StepReport& report);
  void microbatch(int64_t step, int64_t done, int64_t total);
  void note(const std::string& text);

 private:
  void clear_bar();

  std::ostream& out_;
  bool terminal_;
  int64_t steps_;
  bool bar_shown_ = false;
  std::string eta_;
};

}  // namespace drrl

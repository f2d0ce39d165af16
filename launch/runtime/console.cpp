#include "launch/runtime/console.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "launch/options/options.h"

namespace drrl {
namespace {

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  char buffer[160];
  std::snprintf(buffer, sizeof(buffer), pattern, values...);
  return buffer;
}

}  // namespace

std::string short_count(double count) {
  for (const auto& [unit, name] :
       {std::pair{1e12, "T"}, std::pair{1e9, "G"}, std::pair{1e6, "M"}, std::pair{1e4, "k"}}) {
    if (count >= unit) {
      const double scaled = count / (unit == 1e4 ? 1e3 : unit);
      return format(scaled < 10 ? "%.2f %s" : "%.1f %s", scaled, name);
    }
  }
  return format("%.0f", count);
}

std::string clock_time(double seconds) {
  const auto s = static_cast<long long>(std::max(0.0, std::round(seconds)));
  std::string text = format("%02lld:%02lld:%02lld", s / 3600 % 24, s / 60 % 60, s % 60);
  return s >= 86400 ? format("%lld d ", s / 86400) + text : text;
}

void print_banner(std::ostream& out, const std::string& title,
                  const std::vector<std::pair<std::string, std::string>>& lines) {
  size_t width = 0;
  for (const auto& line : lines) {
    width = std::max(width, line.first.size());
  }
  out << title << "\n";
  for (const auto& [name, value] : lines) {
    out << "  " << name << std::string(width - name.size() + 2, ' ') << value << "\n";
  }
  out << "  options (* given)\n";
  std::string unused;
  for (const Option& option : options()) {
    if (!option.unused.empty()) {
      unused += option.is_default ? "" : " --" + option.name;
      continue;
    }
    out << "    " << (option.is_default ? "  " : "* ") << "--" << option.name << "=" << option.value
        << (option.unit.empty() || option.value.empty() ? "" : " " + option.unit) << "\n";
  }
  if (!unused.empty()) {
    out << "  given, but without effect here:" << unused << "\n";
  }
  out << std::flush;
}

void TrainConsole::step(const StepReport& report) {
  clear_bar();
  const auto digits = static_cast<int>(std::to_string(report.steps).size());
  out_ << format("step %*lld/%lld  loss %.4f  grad %.3f  lr %.2e  %.0f tok/s  %.0f ms", digits,
                 static_cast<long long>(report.step), static_cast<long long>(report.steps),
                 report.loss, report.grad_norm, report.lr, report.tokens_per_second,
                 report.ms_per_step);
  if (std::isfinite(report.mean_rank_qk)) {
    out_ << format("  rank %.1f/%.1f", report.mean_rank_qk, report.mean_rank_v);
  }
  if (report.exact_pairs > 0) {
    out_ << format("  exact pairs %.1f %%", 100 * report.exact_pairs);
  }
  if (std::isfinite(report.attention_flops_fraction)) {
    out_ << format("  attention %.3f", report.attention_flops_fraction);
  }
  if (std::isfinite(report.valid_loss)) {
    out_ << format("  valid %.4f (ppl %.3f)", report.valid_loss, std::exp(report.valid_loss));
  }
  eta_ = clock_time(report.eta_seconds);
  out_ << "  eta " << eta_ << "\n" << std::flush;
}

void TrainConsole::microbatch(int64_t step, int64_t done, int64_t total) {
  if (!terminal_) {
    return;
  }
  constexpr int kWidth = 30;
  const double fraction = (static_cast<double>(step - 1) +
                           static_cast<double>(done) / static_cast<double>(total)) /
                          static_cast<double>(steps_);
  const int filled = static_cast<int>(fraction * kWidth);
  out_ << "\r\033[K[" << std::string(static_cast<size_t>(filled), '#')
       << std::string(static_cast<size_t>(kWidth - filled), '.')
       << format("] %3.0f %%  step %lld/%lld  microbatch %lld/%lld", 100 * fraction,
                 static_cast<long long>(step), static_cast<long long>(steps_),
                 static_cast<long long>(done), static_cast<long long>(total))
       << (eta_.empty() ? "" : "  eta " + eta_) << std::flush;
  bar_shown_ = true;
}

void TrainConsole::note(const std::string& text) {
  clear_bar();
  out_ << text << "\n" << std::flush;
}

void TrainConsole::clear_bar() {
  if (bar_shown_) {
    out_ << "\r\033[K";
    bar_shown_ = false;
  }
}

}  // namespace drrl

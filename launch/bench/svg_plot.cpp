#include "launch/bench/svg_plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

namespace drrl {
namespace {

constexpr double kWidth = 760, kHeight = 440;  // of the whole drawing [px]
constexpr double kLeft = 60, kTop = 40, kRight = 560,
                 kBottom = 390;  // of the axes; the legend is to their right

// Colours that the colour-blind can tell apart: Okabe and Ito, Color Universal Design, 2008.
constexpr std::array<const char*, 7> kColours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                 "#e69f00", "#56b4e9", "#000000"};
constexpr std::array<const char*, 3> kDashes = {"none", "7 3",
                                                "2 3"};  // when the colours are used up

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  std::array<char, 400> buffer;
  std::snprintf(buffer.data(), buffer.size(), pattern, values...);
  return buffer.data();
}

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    result += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  }
  return result;
}

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const std::string& more = "") {
  return format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>", x, y, anchor, more.c_str()) +
         escaped(text) + "</text>\n";
}

std::string line_from_to(double x1, double y1, double x2, double y2, const char* style) {
  return format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2,
                style);
}

/// 1, 2 or 5 times a power of ten: about five steps up to `largest`.
double tick_step(double largest) {
  const double power = std::pow(10.0, std::floor(std::log10(largest / 5)));
  const double leading = largest / 5 / power;
  return power * (leading <= 1 ? 1 : leading <= 2 ? 2 : leading <= 5 ? 5 : 10);
}

}  // namespace

std::string svg_plot(const std::string& title, const std::string& x_label,
                     const std::string& y_label, const std::vector<PlotLine>& lines) {
  double first = HUGE_VAL, last = -HUGE_VAL, highest = 1;  // log2 x, log2 x, y
  for (const PlotLine& line : lines) {
    for (const auto& [x, y] : line.points) {
      first = std::min(first, std::log2(x));
      last = std::max(last, std::log2(x));
      highest = std::isfinite(y) ? std::max(highest, y) : highest;
    }
  }
  if (first > last) {
    first = last = 0;
  }
  if (first == last) {
    first -= 0.5;
    last += 0.5;
  }
  const double step = tick_step(highest), top = step * std::ceil(highest / step + 0.1);
  const auto to_x = [&](double x) {
    return kLeft + (std::log2(x) - first) / (last - first) * (kRight - kLeft);
  };
  const auto to_y = [&](double y) { return kBottom - y / top * (kBottom - kTop); };

  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f "
      "%.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" "
      "fill=\"white\"/>\n",
      kWidth, kHeight, kWidth, kHeight);
  svg += text_at((kLeft + kRight) / 2, 22, "middle", title, " font-size=\"15\"");
  for (double y = 0; y <= top + step / 2; y += step) {
    svg += line_from_to(kLeft, to_y(y), kRight, to_y(y), "stroke=\"#dddddd\"") +
           text_at(kLeft - 6, to_y(y) + 4, "end", format("%g", y));
  }
  for (double power = std::ceil(first); power <= last; ++power) {
    const double x = to_x(std::exp2(power));
    svg += line_from_to(x, kBottom, x, kBottom + 5, "stroke=\"black\"") +
           text_at(x, kBottom + 18, "middle", format("%.0f", std::exp2(power)));
  }
  svg += line_from_to(kLeft, to_y(1), kRight, to_y(1),
                      "stroke=\"#777777\" stroke-dasharray=\"4 4\"");
  svg += line_from_to(kLeft, kTop, kLeft, kBottom, "stroke=\"black\"") +
         line_from_to(kLeft, kBottom, kRight, kBottom, "stroke=\"black\"");
  svg += text_at((kLeft + kRight) / 2, kBottom + 38, "middle", x_label);
  svg += text_at(0, 0, "middle", y_label,
                 format(" transform=\"translate(18 %.1f) rotate(-90)\"", (kTop + kBottom) / 2));

  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string style = format("stroke=\"%s\" stroke-dasharray=\"%s\" stroke-width=\"2\"",
                                     kColours[i % kColours.size()],
                                     kDashes[i / kColours.size() % kDashes.size()]);
    std::string points;
    for (const auto& [x, y] : lines[i].points) {
      if (std::isfinite(y)) {
        points += format("%.1f,%.1f ", to_x(x), to_y(y));
        svg += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", to_x(x), to_y(y),
                      kColours[i % kColours.size()]);
      }
    }
    svg += "<polyline points=\"" + points + "\" fill=\"none\" " + style + "/>\n";
    const double y = kTop + 10 + 18 * static_cast<double>(i);
    svg += line_from_to(kRight + 15, y, kRight + 40, y, style.c_str()) +
           text_at(kRight + 46, y + 4, "start", lines[i].label);
  }
  return svg + "</svg>\n";
}

}  // namespace drrl

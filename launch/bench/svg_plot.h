#pragma once

#include <string>
#include <utility>
#include <vector>

namespace drrl {

/// One line of a plot: its legend text and its points (x, y), by ascending x.
struct PlotLine {
  std::string label;
  std::vector<std::pair<double, double>> points;
};

/// A line plot with axes, ticks, grid, legend and a dashed line at y = 1, as an SVG document: x (>
/// 0) in powers of two, y linear from 0. Points that are not finite are left out.
std::string svg_plot(const std::string& title, const std::string& x_label,
                     const std::string& y_label, const std::vector<PlotLine>& lines);

}  // namespace drrl

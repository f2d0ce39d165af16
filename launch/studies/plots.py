#!/usr/bin/env python3
"""Pictures of what the studies wrote with --json, as SVG: launch/studies/plots.py [--out DIR]
RESULT.json...

    policies         increase of perplexity over operations, and over attention time if it was
                     measured, a row of panels for each length
    updates          the same over decompositions, and over the time of Grams and bases
    ranks            NAME-map: ranks by layer, KV group and level; NAME-along: by layer and position
                     in the sequence
    ablations        increase of perplexity over dp

Bars and dots with whiskers: 95 % intervals. The same figures make the same file. Matplotlib
(installed into a folder of its own under the cache, not part of launch/setup/requirements.txt).
Exit status: 0 drawn, 1 pip failed or a file is none of theirs.
"""

import argparse
import json
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "prepare"))
import packages  # noqa: E402

PACKAGES = [
    "matplotlib==3.10.8",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "kiwisolver==1.5.1",
    "packaging==26.4",
    "pillow==13.0.0",
    "pyparsing==3.3.3",
    "python-dateutil==2.9.0.post0",
    "six==1.17.0",
]

# Colours that the colour-blind can tell apart: Okabe and Ito, Color Universal Design, 2008; and a
# marker each.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
POLICIES = [
    "dp",
    "fixed",
    "gates",
    "random",
    "energy",
    "greedy",
    "rl",
]  # in the order of the colours
KINDS = {
    "rank_qk": "rank of scores",
    "rank_v": "rank of values",
    "exact": "share of entries that gates make exact",
}


def style(i):
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.2,
        "capsize": 2,
    }


def line(axes, points, **look):
    """Points (x, (mean, low, high)) with their intervals, by x."""
    x, y = zip(*sorted(points))
    mean = [m for m, _, _ in y]
    axes.errorbar(
        x, mean, yerr=[[m - low for m, low, _ in y], [high - m for m, _, high in y]], **look
    )


def loss_axis(axes, name="y"):
    """An axis of increases in percent: logarithmic, but for what is smaller than 0.1 or
    negative."""
    {"x": axes.set_xscale, "y": axes.set_yscale}[name]("symlog", linthresh=0.1, linscale=0.5)
    {"x": axes.xaxis, "y": axes.yaxis}[name].set_major_formatter("{x:+g} %")
    {"x": axes.axvline, "y": axes.axhline}[name](0, color="#777777", linewidth=0.8)
    axes.grid(color="#dddddd", linewidth=0.6)


def policies(result, new_figure):
    rows = [row for row in result["rows"] if row["met"]]
    lengths = sorted({row["seq_len"] for row in rows})
    units = {
        "operations": "operations over exact attention's",
        **(
            {"time": "attention time over exact attention's"}
            if all(row["time"] for row in rows)
            else {}
        ),
    }
    figure, panels = new_figure(len(lengths), len(units))
    for length, of_length in zip(lengths, panels):
        for (unit, label), axes in zip(units.items(), of_length):
            for i, policy in enumerate(POLICIES):
                points = [
                    (row[unit], row["increase_percent"])
                    for row in rows
                    if row["policy"] == policy and row["seq_len"] == length
                ]
                if points:
                    line(axes, points, label=policy, **style(i))
            refused = sorted(
                {
                    row["value"]
                    for row in result["rows"]
                    if not row["met"] and row["seq_len"] == length
                }
            )
            axes.set(
                title=f"L = {length}"
                + (f", cannot be met: {', '.join(map(str, refused))}" if refused else ""),
                xlabel=label,
                ylabel="perplexity",
            )
            loss_axis(axes)
    panels[0][0].legend(fontsize=8)
    return {"": figure}


def updates(result, new_figure):
    rows = [row for row in result["rows"] if row["met"]]
    figure, (panels,) = new_figure(1, 2)
    xs = {
        "full decompositions per 1000 tokens": "decompositions",
        "Grams and bases, ms per 1000 tokens": "basis_ms",
    }
    for axes, (label, key) in zip(panels, xs.items()):
        for i, name in enumerate(dict.fromkeys(row["policy"] for row in rows)):
            points = [
                (1e3 * row[key] / row["tokens"], row["increase_percent"], row["value"])
                for row in rows
                if row["policy"] == name
            ]
            line(
                axes,
                [point[:2] for point in points],
                label=name,
                **{**style(i), "linestyle": ":" if key == "basis_ms" else ""},
            )
            for x, y, value in points:
                axes.annotate(
                    "solved" if value < 0 else str(value),
                    (x, y[0]),
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=7,
                )
        axes.set(xlabel=label, ylabel="perplexity")
        loss_axis(axes)
    panels[0].set_xscale("symlog", linthresh=1)
    panels[0].set_xlim(left=0)
    panels[1].set_xscale("log")
    panels[0].legend(fontsize=8, title="numbers: rounds of updates", title_fontsize=8)
    return {"": figure}


def ranks(result, new_figure):
    decisions, figures = result["decisions"], {}
    kinds = [
        kind for kind in KINDS if any(kind in of_policy["map"] for of_policy in decisions.values())
    ]
    largest = max(
        rank
        for of in decisions.values()
        for kind in ("rank_qk", "rank_v")
        for layer in of["map"][kind]
        for group in layer
        for rank in group
    )
    for view in ("map", "along"):
        figure, panels = new_figure(len(decisions), len(kinds))
        for (policy, of_policy), of_row in zip(decisions.items(), panels):
            for kind, axes in zip(kinds, of_row):
                if kind not in of_policy[view]:
                    axes.set_axis_off()
                    continue
                data, edges = of_policy[view][kind], None
                if view == "map":  # KV groups side by side, the levels of each within
                    groups, levels = len(data[0]), len(data[0][0])
                    data, edges = (
                        [[x for group in layer for x in group] for layer in data],
                        list(range(groups * levels + 1)),
                    )
                    axes.set_xticks(
                        [levels * (g + 0.5) for g in range(groups)],
                        [f"group {g}" for g in range(groups)],
                    )
                    for g in range(1, groups):
                        axes.axvline(levels * g, color="white", linewidth=1.5)
                    axes.set(xlabel=f"levels 0 .. {levels - 1} of each KV group")
                else:
                    edges = [*of_policy["along"]["begin"], of_policy["along"]["end"][-1]]
                    axes.set(xlabel="position of the query [tokens]")
                image = axes.pcolormesh(
                    edges,
                    range(len(data) + 1),
                    data,
                    cmap="viridis",
                    vmin=0,
                    vmax=None if kind == "exact" else largest,
                    rasterized=False,
                )
                axes.set(title=f"{policy}: {KINDS[kind]}", ylabel="layer")
                figure.colorbar(image, ax=axes)
        figures[f"-{view}"] = figure
    return figures


def ablations(result, new_figure):
    rows = [row for row in result["rows"] if row["met"]][::-1]
    figure, ((axes,),) = new_figure(1, 1)
    for y, row in enumerate(rows):
        mean, low, high = row["over_dp_percent"]
        axes.errorbar([mean], [y], xerr=[[mean - low], [high - mean]], **style(0))
    axes.set_yticks(
        range(len(rows)), [f"{row['policy']} ({row['operations']:.3f})" for row in rows]
    )
    axes.set(xlabel="perplexity over dp (operations over exact attention's)")
    loss_axis(axes, "x")
    return {"": figure}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder for the pictures (default: where the result is)"
    )
    arguments = parser.parse_args()
    packages.add("plots", PACKAGES)
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "drrl",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot

    def new_figure(rows, columns):
        return pyplot.subplots(
            rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False, layout="constrained"
        )

    draw = {"policies": policies, "updates": updates, "ranks": ranks, "ablations": ablations}
    for path in arguments.results:
        result = json.loads(path.read_text())
        if result.get("study") not in draw:
            sys.exit(
                f'{path}: "study" is {result.get("study")!r}, expected one of {", ".join(draw)}'
            )
        for suffix, figure in draw[result["study"]](result, new_figure).items():
            file = (arguments.out or path.parent) / f"{path.stem}{suffix}.svg"
            figure.savefig(file, metadata={"Date": None})
            pyplot.close(figure)
            print(file)


if __name__ == "__main__":
    main()

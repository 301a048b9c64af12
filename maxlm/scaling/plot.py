"""`fit.png`: the law through the runs, the compute-optimal frontier with its band, and the residuals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maxlm.scaling.analysis import Analysis
from maxlm.scaling.budgets import budgets

CURVE_POINTS = 200
BAND_REPLICATES = 400
MOST_CURVES = 12


def draw(analysis: Analysis, path: Path) -> None:
    panels = 3 if analysis.flops else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    if analysis.flops and not analysis.fitted.held:
        _draw_budgets(axes[0], analysis)
    elif len(analysis.fitted.law.inputs) == 1:
        _draw_curve(axes[0], analysis)
    else:
        _draw_agreement(axes[0], analysis)
    if analysis.flops:
        _draw_frontier(axes[1], analysis)
    _draw_residuals(axes[-1], analysis)
    title = f"{analysis.fitted.law.equation}   ({len(analysis.runs)} runs of {analysis.runs.source})"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_budgets(axes: Axes, analysis: Analysis) -> None:
    """Loss against parameters, one colour and one curve of the law a budget; where curves are least is the frontier."""
    columns, fitted = analysis.runs.columns, analysis.fitted
    rank = budgets(columns["flops"])
    colours = colormaps["viridis"](np.linspace(0, 0.9, rank.max() + 1))
    sizes = np.geomspace(columns["params"].min() / 2, columns["params"].max() * 2, CURVE_POINTS)
    axes.scatter(columns["params"], columns["loss"], c=colours[rank], s=14, zorder=3)
    shown = np.unique(np.linspace(0, rank.max(), MOST_CURVES).round().astype(int))
    for k in shown:
        flops = np.exp(np.log(columns["flops"][rank == k]).mean())
        tokens = flops / (analysis.per_param_token * sizes)
        loss = np.exp(fitted.log_loss({"params": sizes, "tokens": tokens}))
        axes.plot(sizes, loss, color=colours[k], linewidth=1, label=f"{flops:.1e} FLOPs")
    flops = np.geomspace(columns["flops"].min(), columns["flops"].max(), CURVE_POINTS)
    best = fitted.frontier(flops, analysis.per_param_token)
    axes.plot(best["params"], best["loss"], "k--", linewidth=1, label="frontier")
    low, high = columns["loss"].min(), columns["loss"].max()
    axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="loss", ylim=(low * 0.97, high * 1.05))
    axes.legend(fontsize=6)


def _draw_frontier(axes: Axes, analysis: Analysis) -> None:
    columns, fitted = analysis.runs.columns, analysis.fitted
    flops = np.geomspace(columns["flops"].min(), max(analysis.flops), CURVE_POINTS)
    per = analysis.per_param_token
    replicates = fitted.frontier(flops, per, analysis.found.stated[:BAND_REPLICATES])
    tail = 50 * (1 - analysis.level)
    for name, label, colour in (("params", "N*", "tab:blue"), ("tokens", "D*", "tab:orange")):
        low, high = np.nanpercentile(replicates[name], [tail, 100 - tail], axis=0)
        axes.plot(flops, fitted.frontier(flops, per)[name], color=colour, label=label)
        axes.fill_between(flops, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.axvline(columns["flops"].max(), color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="compute C (dotted: largest fitted)", ylabel="parameters, tokens")
    axes.legend(fontsize=8)


def _draw_curve(axes: Axes, analysis: Analysis) -> None:
    """The loss against the one input of the law, with the band of the replicates."""
    (name,) = analysis.fitted.law.inputs
    target = analysis.fitted.law.target
    values, loss = analysis.runs.columns[name], analysis.runs.columns[target]
    grid = {name: np.geomspace(values.min(), values.max() * 10, CURVE_POINTS)}
    replicates = np.exp(analysis.fitted.log_loss(grid, analysis.found.stated[:BAND_REPLICATES]))
    tail = 50 * (1 - analysis.level)
    axes.scatter(values, loss, s=14)
    axes.plot(grid[name], np.exp(analysis.fitted.log_loss(grid)), color="black", linewidth=1)
    axes.fill_between(grid[name], *np.percentile(replicates, [tail, 100 - tail], axis=0), alpha=0.25, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel=target)


def _draw_agreement(axes: Axes, analysis: Analysis) -> None:
    """Observed against predicted, for a law of several inputs without one that could be the abscissa."""
    fitted, columns = analysis.fitted, analysis.runs.columns
    predicted, observed = np.exp(fitted.log_loss(columns)), columns[fitted.law.target]
    ends = [min(predicted.min(), observed.min()), max(predicted.max(), observed.max())]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.scatter(predicted, observed, s=14)
    axes.set(xscale="log", yscale="log", xlabel=f"predicted {fitted.law.target}", ylabel="observed")


def _draw_residuals(axes: Axes, analysis: Analysis) -> None:
    name = "flops" if "flops" in analysis.runs.columns else analysis.fitted.law.inputs[0]
    axes.axhline(0, color="grey", linewidth=1)
    axes.scatter(analysis.runs.columns[name], 100 * analysis.fitted.residuals(analysis.runs), s=14)
    axes.set(xscale="log", xlabel=name, ylabel="residual, %")

"""Scaling laws: runs as data (runs.py), the laws (laws.py, isoflop.py), fitting them (solver.py, fit.py), how far to
trust a fit (uncertainty.py, holdout.py, diagnostics.py), and `maxlm fit` (command.py, analysis.py, report.py,
plot.py)."""

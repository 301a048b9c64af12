"""The verbs of scaling laws: sweep, fit, mix, forecast. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from maxlm.scaling import command, forecast_command, mixture_command, sweep_command

Verb = Callable[..., argparse.ArgumentParser]


def add_verbs(verb: Verb, group: Callable[[str, str], Verb], on_cpu: Callable[[Callable], Callable]) -> None:
    """`verb(name, function, help)` and `group(name, help)` make them; `on_cpu` wraps what needs no accelerator."""
    sweep_command.add_options(verb("sweep", sweep_command.sweep, "train the runs of a sweep and collect their results"))
    command.add_options(verb("fit", on_cpu(command.fit), "fit a scaling law to finished runs, with intervals"))
    mixture_command.add_options(verb("mix", on_cpu(mixture_command.mix), "the mixture that is best for several losses"))
    forecast = group("forecast", "sealed forecasts of runs")
    forecast_command.add_verbs(lambda name, function, text: forecast(name, on_cpu(function), text))

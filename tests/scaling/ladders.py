"""Simulated ladders of runs with known laws, and files of them."""

import csv
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "chinchilla_epoch.csv"
GADRE = GOLDEN.with_name("gadre_overtraining.csv")
TRUTH = {"E": 1.7, "A": 500.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}


def ladder(budgets=5, sizes=7, first=1e18, last=1e20):
    """(params, tokens) [budgets * sizes] of an isoFLOP ladder with C = 6 N D."""
    params, tokens = [], []
    for flops in np.geomspace(first, last, budgets):
        for factor in np.geomspace(1 / 5, 5, sizes):
            params.append(0.09 * flops**0.5 * factor)
            tokens.append(flops / 6 / params[-1])
    return np.array(params), np.array(tokens)


def chinchilla_loss(params, tokens, truth=TRUTH):
    return truth["E"] + truth["A"] / params ** truth["alpha"] + truth["B"] / tokens ** truth["beta"]


def noisy(loss, sd=0.003, seed=0):
    return loss * np.exp(sd * np.random.default_rng(seed).standard_normal(loss.size))


def write_csv(path, **columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def simulated(path, seed=0, **changes):
    params, tokens = ladder()
    loss = noisy(chinchilla_loss(params, tokens), seed=seed)
    columns = {"params": params.tolist(), "tokens": tokens.tolist(), "loss": loss.tolist()}
    return write_csv(path, **{**columns, **changes})

"""The `mix` verb: the data mixture that is best for a weighted sum of several domains' losses.

Each loss gets an exponential mixing law (mixing.py), and the weighted sum of these, which is convex in the shares, is
minimised over all mixtures. One run gives all of its losses, so a bootstrap replicate draws the same runs for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from maxlm.schema import ConfigError, require

LAW = "mixture-exponential"


def add_options(mix: argparse.ArgumentParser) -> None:
    mix.add_argument("runs", type=Path, metavar="RUNS", help="runs.jsonl, or a CSV, with share_NAME and the losses")
    mix.add_argument("--losses", required=True, metavar="COLUMN=WEIGHT,...", help="such as loss_web=0.7,loss_code=0.3")
    mix.add_argument("--out", required=True, type=Path, help="folder for mixture.json")
    mix.add_argument("--columns", default="", metavar="OURS=THEIRS,...", help="such as share_web=w0,share_code=w1")
    mix.add_argument("--where", default="", metavar="EXPR", help="only these rows")
    mix.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="replicates (default: 1000)")
    mix.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    mix.add_argument("--seed", type=int, default=0, help="of the bootstrap, 0 or more")


def mix(arguments: argparse.Namespace) -> None:
    """Writes mixture.json and prints it as a table. Raises ConfigError for a user's mistake."""
    require(0.5 <= arguments.level < 1, f"--level {arguments.level} must be from 0.5 to below 1")
    require(arguments.bootstrap >= 100, f"--bootstrap {arguments.bootstrap} must be at least 100")
    require(arguments.seed >= 0, f"--seed {arguments.seed} must be 0 or more")
    found = optimum(arguments, parse_losses(arguments.losses))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "mixture.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'':24} {'best':>8}  {arguments.level:.0%} interval    tried")
    for name, row in found["shares"].items():
        (low, high), (least, most) = row["interval"], row["tried"]
        print(f"{name:24} {row['value']:>8.4f}  [{low:.4f}, {high:.4f}]  {least:.3f} to {most:.3f}")
    low, high = found["loss"]["interval"]
    print(f"{'weighted loss':24} {found['loss']['value']:>8.4f}  [{low:.4f}, {high:.4f}]  least tried "
          f"{found['loss']['least_tried']:.4f}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")


def parse_losses(text: str) -> dict[str, float]:
    """'loss_web=0.7,loss_code=0.3' as numbers."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    try:
        found = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise ConfigError(f"--losses {text!r} must read COLUMN=WEIGHT,... such as loss_web=0.7,loss_code=0.3") from None
    require(len(found) == len(pairs) > 0 and all(0 < weight < float("inf") for weight in found.values()),
            f"--losses {text!r} must give each column once, with a weight above 0")
    return found


def optimum(arguments: argparse.Namespace, losses: dict[str, float]) -> dict[str, Any]:
    """What mixture.json says. Raises ConfigError where a law cannot be fitted to a loss."""
    import numpy as np

    from maxlm.scaling.command import read_for
    from maxlm.scaling.fit import point_fit
    from maxlm.scaling.mixing import PREFIX, best_shares
    from maxlm.scaling.uncertainty import bootstrap, percentile

    weights = np.array(list(losses.values()))
    slopes, offsets, fits, observed = [], [], {}, 0.0
    for name, weight in losses.items():
        law, runs = read_for(LAW, arguments.runs, ",".join(filter(None, (arguments.columns, f"loss={name}"))),
                             arguments.where)
        fitted = point_fit(law, runs)
        theta = np.vstack([fitted.theta, bootstrap(fitted, runs, arguments.bootstrap, arguments.seed).stated])
        natural = fitted.natural(theta)
        offsets.append(natural["c"])
        slopes.append(np.stack([natural["t_" + share.removeprefix(PREFIX)] for share in law.inputs], axis=1))
        fits[name] = {"weight": weight, "residual_sd": float(np.std(fitted.residuals(runs))),
                      "parameters": {key: float(value) for key, value in fitted.natural().items()}}
        observed = observed + weight * runs.columns["loss"]
    slopes_RJK = np.stack(slopes, axis=1)
    best = best_shares(slopes_RJK, weights)
    least = (weights * (np.stack(offsets, axis=1) + np.exp(np.einsum("rjk,rk->rj", slopes_RJK, best)))).sum(1)
    shares = {name: {"value": float(best[0, i]), "interval": percentile(best[1:, i], arguments.level),
                     "tried": [float(runs.columns[name].min()), float(runs.columns[name].max())]}
              for i, name in enumerate(law.inputs)}
    outside = [name for name, row in shares.items() if not row["tried"][0] <= row["value"] <= row["tried"][1]]
    warnings = [f"{name} = {shares[name]['value']:.3f} is outside the mixtures tried: train one there before it is "
                "believed" for name in outside]
    return {"law": law.name, "source": law.source, "n": len(runs), "data_sha256": runs.sha256, "level": arguments.level,
            "shares": shares, "loss": {"value": float(least[0]), "interval": percentile(least[1:], arguments.level),
                                       "least_tried": float(observed.min())}, "fits": fits, "warnings": warnings}

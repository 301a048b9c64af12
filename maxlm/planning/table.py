"""The reports of `maxlm compile` and `maxlm plan` for people."""

from __future__ import annotations

import sys
from typing import Any


def print_report(record: dict[str, Any]) -> None:
    """The record of a compile on stdout: memory, time and collectives, then a line for each warning."""
    console = _console()
    mesh = " ".join(f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1) or "one device"
    chips = f"{record['chips']} x {record['device_kind']}"
    slices = f", {record['slices']} slices" if record["slices"] > 1 else ""
    console.print(f"{record['topology']} ({chips}{slices}), mesh {mesh}; {record['kernels']}")
    for table in (_memory(record), _time(record), _collectives(record)):
        console.print(table)
    for warning in record["warnings"]:
        console.print(f"warning: {warning}", style="yellow")
    console.print(verdict(record), style="bold")


def verdict(record: dict[str, Any]) -> str:
    """One line: whether it fits, and how fast it can go at most."""
    took = "from the cache" if record["cached"] else f"compiled in {record['compile_seconds']:.1f} s"
    if record["fits"] is None:
        return f"needs {_size(record['bytes_per_chip'])}; the chip is not known, so no room and no time ({took})"
    fits = "fits" if record["fits"] else "DOES NOT FIT"
    memory = f"{_size(record['bytes_per_chip'])} of {_size(record['hbm_bytes'])} a chip"
    if not record["fits"] or record["step_seconds_estimate"] is None:
        return f"{fits}: {memory} ({took})"
    rate, mfu = record["tokens_per_second_per_chip_estimate"], share(record["mfu_estimate"])
    return (f"{fits}: {memory}; {record['step_seconds_estimate']:.3g} s a step, {rate:,.0f} tokens/s/chip, MFU {mfu} "
            f"at the roofline ({took})")


def share(mfu: float | None) -> str:
    """An MFU for people; of a chip without a peak in the recipe's arithmetic there is none."""
    return "unknown" if mfu is None else f"{mfu:.1%}"


def _memory(record: dict[str, Any]) -> Any:
    drawn = _drawn("memory a chip", "bytes", "of HBM")
    room = record["hbm_bytes"]
    for kind, value in {**record["bytes_by_kind"], "all": record["bytes_per_chip"]}.items():
        if kind == "program" and not value:
            continue
        drawn.add_row(kind.replace("_", " "), _size(value), f"{value / room:.1%}" if room else "")
    return drawn


def _time(record: dict[str, Any]) -> Any:
    drawn = _drawn("time a step", "seconds", "of the step")
    for name, value in (record["roofline"] or {}).items():
        drawn.add_row(name.removesuffix("_seconds").replace("_", " "), f"{value:.4g}",
                      f"{value / record['step_seconds_estimate']:.0%}")
    if record["dominating_term"]:
        drawn.caption = record["dominating_term"]
    return drawn


def _collectives(record: dict[str, Any]) -> Any:
    drawn = _drawn("collectives", "over", "a step", "sent by a device", "asynchronous", "seconds")
    for axis, kinds in record["collectives"].items():
        for kind, row in kinds.items():
            share = row["asynchronous_bytes"] / row["bytes"] if row["bytes"] else 0.0
            drawn.add_row(kind, axis, f"{row['count']:,}", _size(row["bytes"]), f"{share:.0%}", f"{row['seconds']:.3g}")
    return drawn


def _console() -> Any:
    """Of stdout; wide where that is a file, so that nothing is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _drawn(*columns: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    drawn = Table(columns[0], box=SIMPLE, pad_edge=False)
    for name in columns[1:]:
        drawn.add_column(name, justify="right")
    return drawn


def _size(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e7 else f"{value / 1e6:,.3f} MB"


def print_plan(rows: list[dict[str, Any]]) -> None:
    """The ranked table of a plan on stdout, and the options of its best row."""
    console = _console()
    drawn = _drawn("mesh", "rows", "microbatches", "remat", "GB a chip", "s a step", "tokens/s/chip", "MFU",
                   "analytic s")
    for row in rows:
        values = row["values"]
        mesh = " ".join(f"{key.removeprefix('mesh.')}={size}" for key, size in values.items()
                        if key.startswith("mesh.") and size != 1)
        told = ("", "refused", "", "") if row["refused"] else (
            f"{row['bytes_per_chip'] / 1e9:.1f}" + ("" if row["fits"] else " too much"),
            *(("", "", "") if row["step_seconds_estimate"] is None else (
                f"{row['step_seconds_estimate']:.3g}", f"{row['tokens_per_second_per_chip_estimate']:,.0f}",
                share(row["mfu_estimate"]))))
        drawn.add_row(mesh or "one device", str(row["rows_per_device"]), str(values["train.grad_accumulation"]),
                      values["remat.policy"], *told, f"{row['analytic_step_seconds']:.3g}")
    console.print(drawn)
    if rows and rows[0].get("fits"):
        console.print(f"best: {rows[0]['dominating_term']}", style="bold")
        print(rows[0]["set"])
    else:
        console.print("none of the compiled layouts fits; the table says by how much", style="bold")

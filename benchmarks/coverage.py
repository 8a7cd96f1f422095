"""What can be explained: exports many models, canonizes, explains and checks them, and writes the table of it.

    python -m benchmarks.coverage [--only NAME ...] [--small] [--json FILE] [--fresh] [--markdown]

Every row runs in a process of its own, which is ended after --limit seconds, and goes into the JSON file as soon as it
is done; a row that is there is not run again unless it is named by --only or everything is --fresh. Rows of a package
that this Python lacks (transformers, keras with tensorflow-cpu and tf2onnx) are left as they are, so the table may be
filled in by several environments. docs/coverage.md is written from that file (--markdown does nothing else). A row says

- exports: whether the exporter writes a model that onnxruntime loads; what fails there is the exporter's;
- canonizes: the relative L2 difference of the canonical model's outputs to the original's;
- explains: relevance of the largest output, finite and not 0;
- conserves: (relevance of the inputs + what is itemised as lost) / explained output, and whether every layer whose
  rule is itemised sends what it receives;
- parity: the relative L2 difference of the input's relevance to that in float64 by zennit, where it finds a module for
  every operation, or by dense formulas on torch's functions (tests/support/functional.py); where float32 misses it by
  more than 1e-4, the relevance model is also evaluated in float64, which tells rounding from a mistake;
- nodes by rule; whether anything is approximated (rounding that passes relevance unchanged).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.zoo import Case, cases, export

ROOT = Path(__file__).resolve().parent.parent
JSON, TABLE = ROOT / "docs" / "coverage.json", ROOT / "docs" / "coverage.md"
Row = dict[str, Any]


def run(case: Case, exporter: str) -> Row:
    """One row; whatever fails is in it as text."""
    row: Row = {"name": case.name, "group": case.group, "exporter": exporter, "composite": case.composite}
    start = time.perf_counter()
    stage = "made"
    try:
        model, feeds = case.make()
        row["inputs"] = {name: list(value.shape[1:]) for name, value in feeds.items()}
        stage = "exports"
        with tempfile.TemporaryDirectory() as folder:
            path = export(model, feeds, exporter, Path(folder))
            _loads(path, feeds)
            row["exports"] = True
            stage = "explains"
            _explain(row, case, path, feeds)
            if case.oracle and row.get("explains"):
                stage = "parity"
                _parity(row, case, model, path, feeds)
    except Exception as error:  # a row of the table, whatever it is
        if stage == "made":
            raise
        row[stage] = False
        row["error"] = _first_line(error)
        row["trace"] = traceback.format_exc(limit=-4)
    row["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    return row


def _loads(path: Path, feeds: dict[str, np.ndarray]) -> None:
    """Whether onnxruntime accepts the file; exporters write operators that nobody knows, and constants as inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if more := [port.name for port in session.get_inputs() if port.name not in feeds]:
        raise ValueError(f"the exporter made inputs of constants: {', '.join(more)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = re.sub(r"\S*/model\.onnx", "model.onnx", lines[0] if lines else "")
    return f"{type(error).__name__}: {line}"[:300]


def _explain(row: Row, case: Case, path: Path, feeds: dict[str, np.ndarray]) -> None:
    """Canonical outputs, relevance of two samples, conservation and conditional sums of the first."""
    from onnxcrp.analysis.verify import verify
    from onnxcrp.explainer import Explainer

    explainer = Explainer(path, case.composite, threads=1, cache_limit=CACHE)
    canonical, facts = explainer.canonical, explainer.facts
    row["nodes"] = len(facts.nodes)
    row["opset"] = canonical.source_opset
    row["batch"] = canonical.batch
    row["shares_forward"] = facts.shares_forward
    row["approximated"] = sorted({n.op for n in facts.nodes if facts.carries(n) and n.op in APPROXIMATED})
    layers = explainer.layers
    row["rules"] = dict(Counter(layer.rule or "rearrangement" for layer in layers).most_common())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = explainer.explain(feeds, "top")
    R = {name: np.asarray(value, np.float64) for name, value in result.relevance.items()}
    finite = all(np.isfinite(value).all() for value in R.values())
    row["explains"] = bool(finite and all(value.any() for value in R.values()))
    if not row["explains"]:
        row["error"] = "relevance is not finite" if not finite else "relevance is 0"
        return
    row["together"] = _together(explainer, feeds, row["shares_forward"])
    del explainer, canonical, facts, layers  # large nets are held many times over otherwise
    gc.collect()
    one = {name: value[:1] for name, value in feeds.items()}
    report = verify(path, one, composite=case.composite, threads=1, cache_limit=CACHE)
    checks = {check.name: check for check in report.checks}
    outputs = checks["canonical outputs"]
    row["canonizes"], row["outputs"] = (outputs.figure or 0.0) <= TIGHT, outputs.figure
    flows = report.flows
    arrived = sum(flow.received for flow in flows if flow.op == "input")
    known = {kind: amount for kind, amount in report.losses.items() if kind != "not itemised"}
    row["conserves"] = checks["conservation"].ok
    row["sum"] = (arrived + sum(known.values())) / flows[0].received
    row["arrives"] = arrived / flows[0].received
    row["losses"] = {kind: amount / flows[0].received for kind, amount in report.losses.items() if amount}
    row["not_itemised"] = sorted({flow.rule for flow in flows if flow.losses.get("not itemised")})
    row["conditions"] = [checks[name].ok for name in checks if name.startswith("conditional")]
    wrong = [check for check in report.checks if check.ok is False and (check is not outputs or not row["canonizes"])]
    found = [f"{check.name}: {check.detail}" for check in wrong]
    if row["together"] > TOGETHER:
        found.append(f"two samples under two conditions differ from one by one: {row['together']:.1e}")
    if found:
        row["error"] = "; ".join(found)[:300]


CACHE = 1 << 28  # bytes of relevance models to keep
TOGETHER = 1e-3  # relative L2 of what is asked at once and one by one
AMPLIFIED = 100.0  # times the explained output; sums of such terms say nothing about the output
TIGHT = 1e-4  # relative L2 of parity and of outputs
APPROXIMATED = ("QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil")


def _together(explainer: Any, feeds: dict[str, np.ndarray], shares_forward: bool) -> float:
    """Relevance under two conditions on two samples at once, against one of each: the largest relative L2 difference.

    On two layers, one of the lower and one of the upper half; where samples are repeated for every condition, on six.
    """
    layers = [layer for layer in explainer.layers if (layer.channels or 0) > 1]
    count = min(len(layers), 2 if shares_forward else 6)
    two = {name: value[:2] for name, value in feeds.items()}
    whole = np.ones((1, *explainer.explain(two, "top", inputs=()).explained.shape[1:]), np.float32)
    worst = 0.0
    for layer in [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]:
        asked: dict[str, Any] = {"seed": whole, "record": [layer.name], "bypass": "keep"}
        conditions = [{layer.name: [0]}, {layer.name: [layer.channels - 1]}]
        together = explainer.explain(two, conditions=conditions, **asked).relevance
        for row in range(len(next(iter(two.values())))):
            sample = {name: value[row : row + 1] for name, value in two.items()}
            for number, condition in enumerate(conditions):
                for name, alone in explainer.explain(sample, conditions=condition, **asked).relevance.items():
                    size = max(float(np.linalg.norm(alone)), 1e-30)
                    worst = max(worst, float(np.linalg.norm(together[name][row, number] - alone[0])) / size)
    return worst


def _parity(row: Row, case: Case, model: Any, path: Path, feeds: dict[str, np.ndarray]) -> None:
    """Relative L2 of the first input's relevance to the oracle's: the runtime's and, if need be, that in float64."""
    from onnxcrp.explainer import Explainer

    one = {name: value[:1] for name, value in feeds.items()}
    explainer = Explainer(path, case.composite, threads=1, cache_limit=CACHE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = explainer.explain(one, "top")
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(result.explained[0])), result.explained[0].shape))
        theirs = _theirs(case, model, one, index)

    def distance(ours: np.ndarray) -> float:
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    name = next(name for name in one if name in result.relevance)
    row["oracle"], row["parity"] = case.oracle, distance(result.relevance[name])
    if row["parity"] > TIGHT:
        row["parity64"] = distance(_exact(explainer, case.composite, one, index, name))


def _exact(explainer: Any, composite: str, one: dict[str, np.ndarray], index: tuple[int, ...], name: str) -> np.ndarray:
    """The relevance model evaluated in float64."""
    from onnxcrp.analysis.verify import interface_of
    from onnxcrp.backward import compile
    from onnxcrp.evaluate import evaluate

    model = compile(explainer.canonical, composite)
    ports = interface_of(model)
    shape = [1, *np.shape(explainer.explain(one, index).explained)[1:]]
    target = np.zeros(shape, np.float32)
    target[(0, *index)] = 1
    port = ports["inputs"][name]
    return evaluate(model, {**one, ports["target"]: target}, [port])[port]


def _theirs(case: Case, model: Any, one: dict[str, np.ndarray], index: tuple[int, ...]) -> np.ndarray:
    if case.oracle == "functions":
        from tests.support import functional

        return functional.relevance(model, one, case.composite, index)
    import torch

    from tests.support.oracle import Oracle

    x = next(iter(one.values()))
    oracle = Oracle(model, torch.from_numpy(x))
    target = np.zeros_like(oracle.logits(x))
    target[(0, *index)] = 1
    return oracle.relevance(case.composite, x, target)["input"]


# ---- the table -------------------------------------------------------------------------------------------------------
def _mark(value: Any) -> str:
    return {True: "yes", False: "**no**", None: "–"}[value]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def written(rows: Sequence[Row]) -> str:
    """The table, by group, with what failed below."""
    exported = [row for row in rows if row.get("exports")]
    explained = [row for row in exported if row.get("explains")]
    text = [
        "# What is explained",
        "",
        "Written by `python -m benchmarks.coverage`: random weights, the smallest members of families, small inputs,",
        "each exporter with its own defaults.",
        "",
        "- exports: the exporter writes a model that onnxruntime loads; what fails there is the exporter's.",
        "- canonizes: relative L2 difference of the canonical model's outputs to the original's.",
        "- conserves: (relevance of the inputs + what biases, stabilizers, norms and the softmax in attention keep)",
        "  / the explained output; every layer sends what it receives.",
        "- parity: relative L2 difference of the input's relevance to float64, by zennit (z) or by dense formulas on",
        "  every function that torch calls. Where float32 misses it by more than 1e-4, in brackets what the same",
        "  relevance model gives in float64: LRP-epsilon divides by small sums, of which float32 knows no better.",
        "- exact, or what is taken for the identity on the way back.",
        "",
        f"{len(rows)} rows: {len(exported)} export, {len(explained)} of these are explained, "
        f"{sum(row.get('conserves') is True for row in explained)} conserve relevance layer by layer.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        text += ["", f"## {group}", "", HEADER, RULER]
        text += [_line(row) for row in rows if row["group"] == group]
    failed = [row for row in rows if row.get("error")]
    if failed:
        text += ["", "## What failed, and how", ""]
        text += [f"- {row['name']} ({row['exporter']}): {_plain(row['error'])}" for row in failed]
    return "\n".join(text) + "\n"


COLUMNS = ("model", "exporter", "composite", "exports", "canonizes", "explains", "conserves", "parity", "nodes by rule",
           "exact", "conditions share a forward pass")  # fmt: skip
HEADER, RULER = f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"


def _line(row: Row) -> str:
    def conserved() -> str:
        if "sum" not in row:
            return "–"
        if abs(row["arrives"]) > AMPLIFIED:
            return f"amplified: {row['arrives']:.0e} of the output arrives"
        lacking = f" ({', '.join(row['not_itemised'])} not itemised)" if row["not_itemised"] else ""
        return f"{row['sum']:.4f}{'' if row['conserves'] is not False else ' **no**'}{lacking}"

    def parity() -> str:
        if not row.get("parity"):
            return "**no**" if row.get("parity") is False else "–"
        rounded = f" ({_number(row['parity64'])} in float64)" if "parity64" in row else ""
        return f"{_number(row['parity'])}{rounded}{'' if row['oracle'] == 'functions' else ' z'}"

    cells = [
        row["name"],
        row["exporter"],
        row["composite"],
        _mark(row.get("exports", False)),
        "–" if "canonizes" not in row else _number(row["outputs"]) if row["canonizes"] else "**no**",
        _mark(row.get("explains")) if row.get("exports") else "–",
        conserved(),
        parity(),
        ", ".join(f"{rule} {count}" for rule, count in row.get("rules", {}).items()) or "–",
        "–" if "approximated" not in row else ", ".join(row["approximated"]) or "exact",
        _mark(row["shares_forward"]) if "shares_forward" in row else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- the command -----------------------------------------------------------------------------------------------------
def wanted(only: Iterable[str], small: bool) -> list[tuple[Case, str]]:
    """Rows to run: those whose name or name (exporter) is in `only` (all), the small ones."""
    only = set(only)
    found = [(case, exporter) for case in cases() for exporter in case.exporters if case.small or not small]
    if not only:
        return found
    chosen = [(c, e) for c, e in found if {c.name, f"{c.name} ({e})", c.group} & only]
    known = {name for c, e in found for name in (c.name, f"{c.name} ({e})", c.group)}
    if missing := only - known:
        raise click.BadParameter(f"no row {', '.join(sorted(missing))}; there are {', '.join(sorted(known))}")
    return chosen


class Worker:
    """Runs rows in another process, which is ended when a row takes too long, and now and then for its memory."""

    def __init__(self, limit: float) -> None:
        self.limit, self.rows = limit, 0
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, key: str) -> Row:
        """One row; the error says so if the process died or did not end in time."""
        alone = "on torch" in key  # Keras chooses its backend once
        if alone:
            self.end()
        if self.process is None:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "--worker"]
            environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
            )
        process, self.rows = self.process, self.rows + 1
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self.limit, process.kill)
        timer.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{key}\n")
            process.stdin.flush()
        answer = ""
        while not answer.startswith(ANSWER) and (answer := process.stdout.readline()):
            pass  # what others print
        late = not timer.is_alive()
        timer.cancel()
        if answer:
            if self.rows % ROWS_PER_PROCESS == 0 or alone:
                self.end()
            return json.loads(answer.removeprefix(ANSWER))
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["the process died"])[-1]
        self.end()
        case, exporter = next((c, e) for c, e in wanted((), False) if f"{c.name} ({e})" == key)
        row: Row = {"name": case.name, "group": case.group, "exporter": exporter, "composite": case.composite}
        if late:  # which says nothing of the exporter
            return row | {"exports": None, "error": f"not done within {self.limit:g} s"}
        return row | {"exports": False, "error": last}

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.log.close()
        self.process = None


ANSWER, ROWS_PER_PROCESS = "row: ", 12


def work() -> None:
    """What the other process does: rows by name from stdin, JSON to stdout."""
    known = {f"{case.name} ({exporter})": (case, exporter) for case, exporter in wanted((), False)}
    for line in sys.stdin:
        print(ANSWER + json.dumps(run(*known[line.strip()])), flush=True)


def lacks(case: Case) -> bool:
    """Whether this Python has not what a row needs."""
    return importlib.util.find_spec(case.needs) is None


@click.command()
@click.option("--only", multiple=True, help="A model, `model (exporter)` or a group, run again even if it is there.")
@click.option("--small", is_flag=True, help="The few rows that tests run.")
@click.option("--group", multiple=True, help="All rows of a group that are not there yet.")
@click.option("--limit", default=400.0, show_default=True, help="Seconds that a row may take.")
@click.option("--markdown", is_flag=True, help="Only write the table from the JSON file.")
@click.option("--row", help="Run this one row here and print it as JSON.")
@click.option("--worker", is_flag=True, hidden=True)
@click.option("--fresh", is_flag=True, help="Forget what the JSON file holds.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=JSON, help="Where rows are kept.")
@click.option("--table", type=click.Path(path_type=Path), default=TABLE, help="Where the table is written.")
def main(
    only: tuple[str, ...],
    small: bool,
    group: tuple[str, ...],
    limit: float,
    markdown: bool,
    row: str | None,
    worker: bool,
    fresh: bool,
    file: Path,
    table: Path,
) -> None:
    """Run what is missing and write the table."""
    if worker:
        work()
        return
    everything = wanted((), False)
    if row is not None:
        print(json.dumps(run(*next((c, e) for c, e in everything if f"{c.name} ({e})" == row))))
        return
    order = {f"{case.name} ({exporter})": i for i, (case, exporter) in enumerate(everything)}
    asked = [] if markdown else wanted(only, small)
    apart = Worker(limit)
    for case, exporter in asked:
        key = f"{case.name} ({exporter})"
        if (key in kept_in(file, fresh) and not only) or (group and case.group not in group):
            continue
        if lacks(case):
            print(f"{key}: left out, there is no {case.needs} here", file=sys.stderr, flush=True)
            continue
        found = apart(key)
        trace = found.pop("trace", "")
        kept = kept_in(file, fresh) | {key: found}  # read again: another environment may fill in other rows meanwhile
        fresh = False
        rows = sorted((r for k, r in kept.items() if k in order), key=lambda r: order[_key(r)])
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        table.write_text(written(rows), encoding="utf-8")
        print(_line(found), flush=True)
        if found.get("error"):
            print(f"  {found['error']}\n{trace}", file=sys.stderr, flush=True)
    apart.end()
    if markdown:
        table.write_text(written(list(kept_in(file, False).values())), encoding="utf-8")


def kept_in(file: Path, fresh: bool) -> dict[str, Row]:
    """Rows that are there, by `model (exporter)`."""
    if fresh or not file.is_file():
        return {}
    return {_key(row): row for row in json.loads(file.read_text(encoding="utf-8"))}


def _key(row: Row) -> str:
    return f"{row['name']} ({row['exporter']})"


if __name__ == "__main__":
    main()

"""``python bench/report.py``: writes bench/results/README.md from the JSON beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import cases_of  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PEERS = "-peers.json"  # cases beside other packages and torch.compile, in a run of their own


def main() -> None:
    found = records()
    for name, record in found.items():
        # Not drawn in a GPU's minutes; a record with its scaling is one of all cases
        if is_gpu(record) and "scaling" in record:
            from bench.pictures import draw

            print(*draw(record, RESULTS / name.removesuffix(".json")), sep="\n")
    page = render(found)
    (RESULTS / "README.md").write_text(page)
    print(f"wrote {RESULTS / 'README.md'}")


def records() -> dict[str, dict]:
    """Every record of bench/run.py, bench/gpu_session.py and bench/memory.py, by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def render(found: dict[str, dict]) -> str:
    lines = [
        "# Results",
        "",
        "`python bench/report.py` writes this page from the JSON files in this folder. The",
        "candidates of a table ran in turn in one run: compare within a table, never between",
        'tables. A speed-up is the median time of "eager", which is what people run today, divided',
        "by ours. Bandwidth and matrix rate are shares of what was measured in the same run; the",
        "matrix rate is that of a product of large square matrices of the same dtype.",
    ]
    if not any(is_gpu(record) for record in found.values()):
        lines += ["", *gpu_targets()]
    for name, record in found.items():
        make = memory_section if "memory" in record else section
        lines += ["", *make(name, record)]
    return "\n".join(lines) + "\n"


def gpu_targets() -> list[str]:
    """The targets on a GPU, shown when none has been measured."""
    lines = [
        "No GPU figure is measured so far; `make gpu` measures them. These are the targets for an"
    ]
    lines += ["H200, and what its bandwidth and launches predict (written before any run):", ""]
    lines += ["| case | target | predicted |", "|---|---|---|"]
    for case in cases_of(device="cuda"):
        share = case.bandwidth_target
        targets = [f"{case.target_us:g} us"] if case.target_us else []
        targets += [f"{share:.0%} of copy bandwidth"] if share else []
        if targets:
            predicted = f"{case.predicted_us:g} us" if case.predicted_us else ""
            lines.append(f"| {case.name} | {', '.join(targets)} | {predicted} |")
    lines += [
        "",
        "[gpu-predicted.md](gpu-predicted.md) has the times that the instruction counts of",
    ]
    return [*lines, "the compiled kernels predict, and what stands in the way of each target."]


def is_gpu(record: dict) -> bool:
    return record["machine"].get("GPU", "none") != "none"


def section(name: str, record: dict) -> list[str]:
    machine = record["machine"]
    gpu = is_gpu(record)
    device = machine["GPU"] if gpu else f"{machine['CPU']}, {machine['CPU threads']} threads"
    others = ", beside other packages and torch.compile" if name.endswith(PEERS) else ""
    lines = [f"## {device}{others}", ""]
    facts = [
        f"torch {machine['torch']}",
        f"triton {machine['triton']}",
        f"Python {machine['python']}",
    ]
    if gpu:
        facts.append(f"driver {machine.get('driver', 'unknown')}")
    else:
        facts.append(machine["CPU instruction set"])
    facts += [f"commit {machine['commit']}", machine["date"], f"[{name}]({name})"]
    lines += ["; ".join(facts), ""]
    heads = ("case", "us", "speed-up", "torch.compile", "over the best peer", "of bandwidth")
    lines += [f"| {' | '.join(heads)} | of matrix rate | target |", "|---" * 8 + "|"]
    for row in record["results"]:
        if "failed" in row:
            lines.append(f"| {row['case']} | failed | | | | | | {row['failed']} |")
            continue
        fused, compiled = row["candidates"]["fused"], row["candidates"].get("torch.compile")
        rate = row.get("share of matrix rate")
        share = f"{row['share of bandwidth']:.0%}" if row["bytes"] else ""
        threads = f", {row['threads']} threads" if "threads" in row else ""
        speedup = f"{fused['speed-up']:.1f}" if "speed-up" in fused else ""  # eager may fail
        best = f"{row['to best peer']} ({row['best peer']})" if "best peer" in row else ""
        lines.append(
            f"| {row['case']}{threads} | {fused['us']:.1f} | {speedup} | "
            f"{compiled['speed-up'] if compiled else ''} | {best} | {share} | "
            f"{f'{rate:.0%}' if rate else ''} | {'; '.join(verdicts(row, machine))} |"
        )
    return lines + pictures_of(f"{name.removesuffix('.json')}-*.png")


def memory_section(name: str, record: dict) -> list[str]:
    """Peak bytes of the OPUT loss over the LM head, forward and backward."""
    sizes, machine = record["sizes"], record["machine"]
    ways = list(dict.fromkeys(point["way"] for point in record["memory"]))
    by_rows: dict[int, dict[str, dict]] = {}
    for point in record["memory"]:
        by_rows.setdefault(point["rows"], {})[point["way"]] = point
    shape = f"V = {sizes['vocab']}, D = {sizes['dim']}, {sizes['dtype']}"
    lines = [f"## Memory of the loss over the LM head, {shape}", ""]
    lines += [
        "Peak megabytes of one forward and backward pass on top of the inputs, gradients included."
    ]
    lines += ['"eager" and "fused" take both passes jointly; "alternating" takes one at a time.']
    lines += ["; ".join([f"Commit {machine['commit']}", machine["date"], f"[{name}]({name})"]), ""]
    lines += [f"| positions x 2 | {' | '.join(ways)} | gradients alone |"]
    lines += ["|" + "---|" * (len(ways) + 2)]
    for rows, points in by_rows.items():
        cells = [f"{points[way]['bytes'] / 1e6:.0f}" for way in ways]
        gradients = f"{points[ways[0]]['gradients'] / 1e6:.0f}"
        lines.append(f"| {rows} | {' | '.join(cells)} | {gradients} |")
    return lines + pictures_of(name.replace(".json", ".png"))


def pictures_of(pattern: str) -> list[str]:
    names = sorted(path.name for path in RESULTS.glob(pattern))
    return [line for name in names for line in ("", f"![{name}]({name})")]


def verdicts(row: dict, machine: dict) -> list[str]:
    """For each target: whether it is met, or by how much it is missed. Times are an H200's."""
    texts = []
    for name, target in row["targets"].items():
        value = row["candidates"]["fused"].get(name, row.get(name))
        if value is None:  # eager failed
            continue
        if name == "us" and "H200" not in machine["GPU"]:
            texts.append(f"{target:g} us on an H200")
            continue
        met = value <= target if name == "us" else value >= target
        by = f"missed by {abs(value / target - 1):.0%}"
        texts.append(f"{name} {target:g}: {'met' if met else by}")
    return texts


if __name__ == "__main__":
    main()

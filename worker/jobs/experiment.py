"""Run an experiment and publish its report: `report.json`, `report.html` and the plots.

A claim that fails is a result: the job succeeds, and its verdict says so. Experiments run on the CPU in one thread
whatever the device: their models are small, and their figures must not depend on the machine.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from service.contract.experiments import EXPERIMENTS, PAPERS, ExperimentReport
from service.contract.jobs import ExperimentArgs, ExperimentResult
from service.contract.manifest import code_version
from worker.pages import drawing
from worker.theory import experiments, page, plots
from worker.theory.findings import Setting, unasserted, verdict_of

if TYPE_CHECKING:
    from worker.runner import Context


def run(args: ExperimentArgs, ctx: Context) -> ExperimentResult:
    """Run all seeds and publish the report."""
    torch.set_num_threads(1)
    known = EXPERIMENTS[args.experiment]
    num_seeds = args.seeds or known.seeds
    seeds = tuple(range(args.seed, args.seed + num_seeds))
    total = experiments.num_runs(args.experiment, num_seeds)
    began, cpu_began, done = time.monotonic(), time.process_time(), 0

    def step() -> None:
        nonlocal done
        done += 1
        ctx.check()
        ctx.progress(done, total, (total - done) * (time.monotonic() - began) / done)

    ctx.progress(0, total)
    outcome = experiments.run(args.experiment, Setting(seeds, args.quick, step, ctx.check))
    findings = unasserted(outcome.findings) if args.quick else outcome.findings
    report = ExperimentReport(
        experiment=args.experiment,
        paper=PAPERS[known.paper],
        place=known.place,
        claim=known.claim,
        set_up=outcome.set_up,
        seeds=list(seeds),
        quick=args.quick,
        findings=findings,
        notes=outcome.notes,
        curves=outcome.curves,
        maps=outcome.maps,
        verdict=verdict_of(findings),
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - cpu_began,
        code_version=code_version(),
        torch=torch.__version__,
    )
    folder = ctx.scratch / "report"
    folder.mkdir()
    drawing.prepare(ctx.scratch)
    drawn = {curve.name: plots.draw(curve) for curve in report.curves}
    drawn |= {each.name: plots.draw_map(each) for each in report.maps}
    for name, content in drawn.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    (folder / "report.html").write_text(page.page(report, drawn), encoding="utf-8")
    key = f"reports/{ctx.job}/{ctx.epoch}"
    summary = {each.name: each.mean for each in report.findings}
    ctx.store.publish(folder, key, kind="report", id=ctx.job, body={"verdict": report.verdict, "summary": summary})
    return ExperimentResult(artifact=key, verdict=report.verdict, summary=summary)

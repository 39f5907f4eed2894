"""The command line. Every command is a thin call of the library and a picture or table of its answer.

Exit codes: 0; 1 for what the model itself raises, with its traceback; 2 for a mistake that autosp can explain; 130
after Ctrl-C, with how to go on.
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

try:
    import typer

    from autosp import answers, fronts
    from autosp.database import database
    from autosp.options import (
        BudgetOrAll,
        DeviceName,
        Factory,
        Group,
        HostBudget,
        Isolate,
        MaxTrials,
        ModeName,
        Output,
        PlanFile,
        Plot,
        Storage,
        Study,
        Timeout,
        TrialTimeout,
    )
    from autosp.terminal import Commands, budget_of, check_folder, console, interruptible, load_pictures, save, tell
    from autosp.tryout import demo, doctor
except ImportError as missing:  # the console script exists without the extra, too
    raise SystemExit(f"the command line needs {missing.name}: pip install 'autosp[cli]'") from missing

from autosp.errors import SettingError, StudyNotFoundError
from autosp.factory import make_subject
from autosp.files import write_atomically
from autosp.spec import Plan

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(database, name="db")
app.command()(fronts.estimate)
app.command()(fronts.pareto)
app.command()(fronts.tune_batch)


def main() -> None:
    """The `autosp` command."""
    app()


def _now() -> str:
    """As plans have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"autosp {version('autosp')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a PyTorch model that does not fit, under a hard memory budget, planned and measured for you."""


@app.command()
def tune(
    factory: Factory,
    max_gpu_gb: BudgetOrAll = None,
    max_cpu_gb: HostBudget = None,
    slack: Annotated[
        float | None, typer.Option(help="0.05: the least memory that takes at most 5 % longer than the fastest.")
    ] = None,
    mode: ModeName = "inference",
    group: Group = 1,
    storage: Storage = None,
    study_name: Annotated[str | None, typer.Option(help="Default: made from the model's name.")] = None,
    max_trials: MaxTrials = None,
    timeout_s: Timeout = None,
    device: DeviceName = None,
    seed: Annotated[int, typer.Option(help="Of the pass whose outputs are compared.")] = 0,
    isolate: Isolate = False,
    trial_timeout_s: TrialTimeout = None,
    output: Output = None,
) -> None:
    """Find the fastest plan under a memory budget, measured on this device."""
    import autosp

    check_folder(output)
    subject = make_subject(factory)
    began = _now()
    budget = None if max_gpu_gb is None else budget_of(max_gpu_gb)
    host_budget = None if max_cpu_gb is None else budget_of(max_cpu_gb)
    kept = partial(answers.kept_study, subject, mode, budget, host_budget, slack, device, group, storage, study_name)
    with interruptible(factory, storage, device, isolate, kept):
        plan = autosp.tune(
            subject.model,
            subject.batch,
            budget,
            max_cpu_gb=host_budget,
            slack=slack,
            mode=mode,
            step=subject.step,
            device=device,
            group=group,
            storage=storage,
            study_name=study_name,
            max_trials=max_trials,
            timeout_s=timeout_s,
            seed=seed,
            isolate=isolate,
            trial_timeout_s=trial_timeout_s,
            progress=sys.stderr.isatty(),
        )
    if plan.created_at < began:
        tell(f"answered from the database: study {plan.study_name} of {plan.created_at}")
    answers.show_answer(plan, storage, output)


@app.command()
def resume(
    study: Study,
    factory: Factory,
    storage: Storage = None,
    max_trials: MaxTrials = None,
    timeout_s: Timeout = None,
    device: DeviceName = None,
    isolate: Isolate = False,
    trial_timeout_s: TrialTimeout = None,
    output: Output = None,
) -> None:
    """Continue an interrupted study, or a finished one with a higher limit. Nothing that was measured is repeated."""
    import autosp

    check_folder(output)
    answers.read_study(study, storage)  # a wrong name is known before the model is made
    subject = make_subject(factory)
    began = _now()
    with interruptible(factory, storage, device, isolate, lambda: study):
        plan = autosp.resume(
            study,
            subject.model,
            subject.batch,
            step=subject.step,
            device=device,
            storage=storage,
            max_trials=max_trials,
            timeout_s=timeout_s,
            isolate=isolate,
            trial_timeout_s=trial_timeout_s,
            progress=sys.stderr.isatty(),
        )
    if plan.created_at < began:
        tell(f"study {study} of {plan.created_at} is done; a higher --max-trials goes on")
    answers.show_answer(plan, storage, output)


@app.command()
def studies(storage: Storage = None) -> None:
    """List the studies in the database."""
    from autosp.report.tables import studies_table
    from autosp.studies import list_studies

    found = list_studies(storage)
    if not found:
        tell("no studies yet: `autosp tune` makes one")
    else:
        console().print(studies_table(found))
        tell("`autosp show STUDY --plot timeline.png` draws a plan's transfers, compute and memory")
        tell("`autosp estimate --study STUDY --max-gpu-gb GB --plot front.png` draws memory against latency")


@app.command()
def delete(study: Study, storage: Storage = None) -> None:
    """Delete a study from the database, with its trials and plans."""
    from autosp.studies import delete_study

    trials = delete_study(study, storage)
    typer.echo(f"deleted study {study}: {trials} trial{'' if trials == 1 else 's'}")


@app.command()
def show(study: Study, storage: Storage = None, plot: Plot = None) -> None:
    """Print a study's trials, plan, layers and link; draw its plan's timeline."""
    from autosp.report.tables import layers_table, link_table

    if plot is not None:
        load_pictures("drawing").checked_path(plot)
    stored = answers.read_study(study, storage)
    plan, profile = stored.plan, stored.profile
    if profile is not None:
        console().print(layers_table(profile), *map(link_table, profile.links), sep="\n")
    answers.print_study(stored)
    if plan is None:
        tell(f"study {study} is unfinished: go on with `autosp resume {shlex.quote(study)} MODULE:FACTORY`")
    if plot is not None:
        if plan is None or profile is None:
            raise StudyNotFoundError(f"study {study!r} has no plan to draw yet")
        load_pictures("plots").timeline(profile, plan.candidate, plot, plan.budget_bytes)
    elif plan is not None:
        name = shlex.quote(study)
        tell(f"draw its timeline: `autosp show {name} --plot timeline.png`")
        tell(f"trace a run: `autosp export {name} -o plan.json`, `autosp trace MODULE:FACTORY --plan plan.json`")


@app.command()
def export(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]")] = None,
    output: Output = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema of a plan instead.")] = False,
    storage: Storage = None,
) -> None:
    """Write a study's plan as JSON, to a file or to the terminal."""
    import json

    from autosp.studies import load_plan

    if schema == (study is not None):
        raise SettingError("name a study, or pass --schema, one of them")
    check_folder(output)
    if study is None:
        text = json.dumps(Plan.model_json_schema(), indent=2)
        if output is None:
            typer.echo(text)
        else:
            save("schema", output, lambda path: write_atomically(path, text + "\n"))
        return
    plan = load_plan(study, storage)
    if output is None:
        typer.echo(plan.model_dump_json(indent=2))
    else:
        save("plan", output, plan.save)


@app.command()
def run(
    factory: Factory,
    plan: PlanFile,
    passes: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Run a model under a plan, and compare what it takes with what the plan promised."""
    import autosp
    from autosp.report.run_tables import passes_table, run_table

    promised = Plan.load(plan)
    workload, device = answers.workload_of(factory, promised)
    streamed = autosp.apply(workload.model, promised)
    with streamed:
        done = [answers.timed_pass(workload, device, streamed) for _ in range(passes)]
        peak_bytes = streamed.stats().peak_bytes
    console().print(passes_table(done, promised.floor_s), run_table(promised, done, peak_bytes), sep="\n")


@app.command()
def trace(
    factory: Factory,
    plan: PlanFile,
    out: Annotated[Path, typer.Option("--out", "--output", "-o", dir_okay=False, help="Write the trace here.")] = Path(
        "trace.json"
    ),
    passes: Annotated[int, typer.Option(min=1)] = 3,
    storage: Storage = None,
    plot: Plot = None,
) -> None:
    """Run a model under a plan, and trace every transfer, forward and stall, predicted beside measured."""
    import autosp
    from autosp.report.trace import save_trace
    from autosp.report.traffic import expected, periods_of

    check_folder(out)
    if plot is not None:
        load_pictures("drawing").checked_path(plot)
    promised = Plan.load(plan)
    profile = answers.profile_of(promised, storage)
    if plot is not None and profile is None:
        raise SettingError(f"{plot} cannot be drawn without the profile of the plan's study: leave out --plot")
    workload, _ = answers.workload_of(factory, promised)
    streamed = autosp.apply(workload.model, promised)
    with streamed:
        for _ in range(passes):
            workload.run_under(streamed)
        measured = streamed.timeline()
    partition, candidate = promised.partition, promised.candidate
    predicted = None if profile is None else expected(profile, candidate, periods_of(measured, partition, candidate))
    save("trace", out, lambda path: save_trace(path, promised, predicted, measured))
    if plot is not None and profile is not None:
        load_pictures("plots").timeline(profile, candidate, plot, promised.budget_bytes, measured)
    answers.print_traffic(promised, predicted, measured)
    tell(f"open {out} in https://ui.perfetto.dev or chrome://tracing")


app.command()(doctor)
app.command()(demo)

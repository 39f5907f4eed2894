from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autosp.cli import app
from autosp.spec import Candidate, Plan
from autosp.store import Repository
from autosp.studies import list_studies
from builders import prediction, study_key, trial

FACTORIES = """
import os
import torch
from torch import nn

NUMBER = 3

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes == int(os.environ.get("INTERRUPT_AT", "0")):
            raise KeyboardInterrupt
        return self.blocks(x)

def make():
    torch.manual_seed(0)
    return Tiny(), torch.randn(4, 128)

def wider():
    return make()[0], torch.randn(8, 128)

def stepped():
    return *make(), lambda model, batch: model(batch).sum()

def batches():
    return make()[0], lambda size: torch.randn(size, 128)

def nothing():
    return None

def swapped():
    return make()[::-1]

def broken():
    raise RuntimeError("their own")
"""
ROOM = ("--max-gpu-gb", "0.2")

Environment = pytest.MonkeyPatch


def enter(folder: Path, patch: Environment) -> None:
    """A user's shell in a folder with a module of factories, a database and a cache of its own."""
    (folder / "tiny_models.py").write_text(FACTORIES)
    (folder / "needs_more.py").write_text("import not_there_at_all\n")
    patch.chdir(folder)
    patch.setattr(sys, "path", list(sys.path))
    patch.delitem(sys.modules, "tiny_models", raising=False)
    patch.setenv("AUTOSP_STORAGE", str(folder / "autosp.db"))
    patch.setenv("AUTOSP_CACHE_DIR", str(folder / "cache"))
    patch.setenv("COLUMNS", "200")


def autosp(*arguments: str, code: int = 0) -> str:
    """Run a command; its stdout and stderr, blanks folded."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}\n{result.output}") from result.exception
    return re.sub(r"[ \n]+", " ", result.output)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: Environment) -> Path:
    enter(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database has one finished study, `tiny`; its plan is in plan.json. For reading only."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        said = autosp("tune", "tiny_models:make", *ROOM, "--study-name", "tiny", "--max-trials", "2", "-o", "plan.json")
    assert "Trials under 200 MB" in said
    assert "chosen" in said
    assert "Plan of study tiny" in said
    assert "why k=" in said
    assert Plan.load(folder / "plan.json").study_name == "tiny"
    return folder


@pytest.fixture
def study(tuned: Path, monkeypatch: Environment) -> Path:
    enter(tuned, monkeypatch)
    return tuned


# What works


def test_a_group_is_tuned_and_run(shell: Path) -> None:
    said = autosp("tune", "tiny_models:make", *ROOM, "--group", "2", "--max-trials", "1", "-o", "plan.json")
    assert "2 microbatches share a pass" in said
    plan = Plan.load(shell / "plan.json")
    assert plan.candidate.group == 2
    assert "T/floor" in autosp("run", "tiny_models:make", "--plan", "plan.json", "--passes", "2")
    assert "2 microbatches" in autosp("estimate", "--study", plan.study_name or "", *ROOM)


def test_help_names_every_command() -> None:
    said = autosp("--help")
    for command in (
        "tune",
        "resume",
        "estimate",
        "pareto",
        "tune-batch",
        "studies",
        "show",
        "delete",
        "export",
        "run",
        "trace",
        "doctor",
        "db",
        "demo",
    ):
        assert f" {command} " in said


def test_pareto_prints_draws_and_saves_the_front(shell: Path) -> None:
    options = ("--points", "2", "--max-trials", "1", "--plot", "front.png", "-o", "plans")
    said = autosp("pareto", "tiny_models:make", *ROOM, *options)
    assert "Memory against latency" in said
    assert (shell / "front.png").stat().st_size > 1000
    plans = [Plan.load(path) for path in sorted((shell / "plans").iterdir())]
    assert plans
    peaks = [plan.measurement.peak_bytes for plan in plans if plan.measurement]
    assert peaks == sorted(peaks)


def test_tune_with_slack_and_without_a_budget(shell: Path) -> None:
    said = autosp("tune", "tiny_models:make", "--slack", "0.5", "--max-trials", "1")
    assert "within 50% of the fastest" in said
    assert "Tiny-inference-slack-0.5" in {summary.name for summary in list_studies()}


def test_tune_batch_finds_a_size(shell: Path) -> None:
    said = autosp(
        "tune-batch", "tiny_models:batches", *ROOM, "--size", "1", "--size", "4", "--max-trials", "1", "-o", "plan.json"
    )
    assert "Samples per second by batch size" in said
    assert Plan.load(shell / "plan.json").batch_signature in {"float32[1,128]", "float32[4,128]"}


def test_version() -> None:
    assert re.fullmatch(r"autosp \d+\.\d+\.\d+ ", autosp("--version"))


def test_a_second_tune_or_resume_answers_from_the_database(study: Path, tmp_path: Path) -> None:
    shutil.copy("autosp.db", tmp_path / "copy.db")
    earlier = Plan.load("plan.json").model_copy(update={"created_at": "2020-01-02T03:04:05+00:00"})
    with Repository(tmp_path / "copy.db") as repository:
        repository.save_plan("tiny", earlier)
    said = autosp("tune", "tiny_models:make", *ROOM, "--storage", str(tmp_path / "copy.db"))
    assert "answered from the database: study tiny of 2020-01-02" in said
    assert "Plan of study tiny" in said
    said = autosp("resume", "tiny", "tiny_models:make", "--storage", str(tmp_path / "copy.db"))
    assert "study tiny of 2020-01-02T03:04:05+00:00 is done" in said
    assert [summary.trials for summary in list_studies(tmp_path / "copy.db")] == [2]


def test_trials_in_another_process(shell: Path) -> None:
    said = autosp("tune", "tiny_models:make", *ROOM, "--study-name", "apart", "--max-trials", "1", "--isolate")
    assert "Plan of study apart" in said
    assert "trial_timeout_s goes with isolate=True" in autosp(
        "resume", "apart", "tiny_models:make", "--trial-timeout-s", "5", code=2
    )


def test_studies(study: Path) -> None:
    assert "1 study" in autosp("studies")
    assert "tiny Tiny float32[4,128] 200 MB 2 " in autosp("studies")


def test_delete_says_what_was_there(shell: Path) -> None:
    for study, trials in (("one", 1), ("none", 0)):
        with Repository() as repository:
            repository.create_study(study, study_key())
            for number in range(trials):
                repository.add_trial(study, trial(prediction(Candidate(k=1, k_prime=1)), number=number))
    assert autosp("delete", "one") == "deleted study one: 1 trial "
    assert autosp("delete", "none", "--storage", "autosp.db") == "deleted study none: 0 trials "
    assert list_studies() == []


def test_no_studies(shell: Path) -> None:
    assert "no studies yet" in autosp("studies")
    assert f"there is no database {shell / 'other.db'}" in autosp("studies", "--storage", "other.db", code=2)
    assert not (shell / "other.db").exists()


def test_show_prints_all_and_draws(study: Path) -> None:
    said = autosp("show", "tiny", "--plot", "timeline.svg")
    for title in ("Layers, in the order", "Link disk → device", "Trials under 200 MB", "Plan of study tiny"):
        assert title in said
    assert "budget, 200 MB" in (study / "timeline.svg").read_text()


def test_export(study: Path) -> None:
    assert Plan.model_validate_json(autosp("export", "tiny")) == Plan.load(study / "plan.json")
    assert "plan written to again.json" in autosp("export", "tiny", "-o", "again.json")
    assert Plan.load(study / "again.json") == Plan.load(study / "plan.json")


def test_export_of_the_schema(shell: Path) -> None:
    assert json.loads(autosp("export", "--schema")) == Plan.model_json_schema()
    autosp("export", "--schema", "-o", "schema.json")
    assert json.loads((shell / "schema.json").read_text())["title"] == "Plan"


def test_estimate_from_a_stored_profile(study: Path) -> None:
    said = autosp("estimate", "--study", "tiny", *ROOM, "--top", "3", "--plot", "front.svg")
    assert "Predictions, the best 3 of" in said
    assert "chosen plan, measured" in (study / "front.svg").read_text()


def test_estimate_under_another_budget_draws_both(study: Path) -> None:
    autosp("estimate", "--study", "tiny", "--max-gpu-gb", "0.3", "--plot", "both.svg")
    for budget in ("budget 300 MB", "budget 200 MB"):
        assert budget in (study / "both.svg").read_text()


def test_drawing_and_tracing_are_mentioned(study: Path) -> None:
    assert "`autosp show STUDY --plot timeline.png`" in autosp("studies")
    said = autosp("show", "tiny")
    assert "`autosp show tiny --plot timeline.png`" in said
    assert "`autosp trace MODULE:FACTORY --plan plan.json`" in said
    assert "`--plot front.png`" in autosp("estimate", "--study", "tiny", *ROOM)


def test_estimate_of_a_model(shell: Path) -> None:
    assert "everything resident" in autosp("estimate", "tiny_models:stepped", *ROOM, "--top", "100")
    assert not list_studies()


@pytest.mark.parametrize("candidate", [Candidate(k=2, k_prime=1), Candidate(k=6, k_prime=1, residents=tuple(range(6)))])
def test_run_compares_with_what_was_promised(candidate: Candidate, study: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan.load("plan.json").model_copy(update={"candidate": candidate}).save(path)
    said = autosp("run", "tiny_models:make", "--plan", str(path), "--passes", "3")
    assert "median of passes 2 to 3" in said
    assert "% of the budget of 200 MB" in said
    assert "misses 0" in said
    assert "do not hold" not in said


def test_run_with_another_batch_says_so(study: Path, tmp_path: Path) -> None:
    Plan.load("plan.json").model_copy(update={"candidate": Candidate(k=2, k_prime=1)}).save(tmp_path / "plan.json")
    said = autosp("run", "tiny_models:wider", "--plan", str(tmp_path / "plan.json"), "--passes", "1")
    assert "the plan is for float32[4,128]: its figures do not hold for float32[8,128]" in said


STREAMED = Candidate(k=3, k_prime=1, residents=(3,))


def test_trace_shows_predicted_beside_measured(study: Path, tmp_path: Path) -> None:
    Plan.load("plan.json").model_copy(update={"candidate": STREAMED}).save(tmp_path / "plan.json")
    out, picture = tmp_path / "made.json", tmp_path / "t.svg"
    said = autosp(
        *("trace", "tiny_models:make", "--plan", str(tmp_path / "plan.json"), "--passes", "4"),
        *("--out", str(out), "--plot", str(picture)),
    )
    for part in ("latency", "of it stalled", "disk → device, moved", "B/s", "T / floor", "trace written to"):
        assert part in said
    assert "Stalls, the longest 5 of 5 streamed layers" in said
    assert "blocks.2" in said
    assert "nothing is predicted" not in said
    events = json.loads(out.read_text())["traceEvents"]
    slices = {process: [one for one in events if one["ph"] == "X" and one["pid"] == process] for process in (1, 2)}
    for process, forwards in ((1, 4 * 6), (2, 4 * 5)):  # resident layers are not seen in what was measured
        assert len([one for one in slices[process] if one["cat"] == "compute"]) == forwards
        assert len([one for one in slices[process] if one["cat"] == "passes"]) == 4
        assert len([one for one in slices[process] if one["cat"] == "link"]) >= 4 * 5
    assert "<!-- measured" in picture.read_text()


def test_trace_of_a_plan_without_a_profile(study: Path, tmp_path: Path) -> None:
    plan = Plan.load("plan.json").model_copy(update={"candidate": STREAMED})
    elsewhere = plan.device.model_copy(update={"fingerprint": "another"})
    for other, reason in (
        (plan.model_copy(update={"study_name": None}), "the plan comes from no study"),
        (plan.model_copy(update={"study_name": "tinny"}), "no study 'tinny' among the 1"),
        (plan.model_copy(update={"device": elsewhere}), "the database has no profile of study tiny that fits"),
    ):
        other.save(tmp_path / "plan.json")
        command = ("trace", "tiny_models:make", "--plan", str(tmp_path / "plan.json"), "--passes", "1")
        said = autosp(*command, "--out", str(tmp_path / "trace.json"))
        assert f"nothing is predicted: {reason}" in said
        assert "latency –" in said
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert {one["pid"] for one in events} == {2}
        said = autosp(*command, "--out", str(tmp_path / "no.json"), "--plot", str(tmp_path / "t.png"), code=2)
        assert "cannot be drawn without the profile" in said
        assert not (tmp_path / "no.json").exists()


def test_trace_of_a_plan_that_streams_nothing(study: Path, tmp_path: Path) -> None:
    everything = Candidate(k=6, k_prime=1, residents=tuple(range(6)))
    Plan.load("plan.json").model_copy(update={"candidate": everything}).save(tmp_path / "plan.json")
    said = autosp("trace", "tiny_models:make", "--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "t.json"))
    assert "disk → device, moved 0 B 0 B –" in said
    assert "Stalls" not in said


def test_an_interrupted_study_is_kept_and_resumed(shell: Path, monkeypatch: Environment) -> None:
    monkeypatch.setenv("INTERRUPT_AT", "48")
    said = autosp("tune", "tiny_models:make", *ROOM, "--storage", "my.db", "--max-trials", "2", code=130)
    assert "study Tiny-inference keeps what was measured" in said
    assert "`autosp resume Tiny-inference tiny_models:make --storage my.db`" in said
    assert "Traceback" not in said
    said = autosp("show", "Tiny-inference", "--storage", "my.db")
    assert "is unfinished: go on with `autosp resume" in said
    assert "has no plan to draw" in autosp("show", "Tiny-inference", "--storage", "my.db", "--plot", "t.png", code=2)
    assert "has no plan yet" in autosp("export", "Tiny-inference", "--storage", "my.db", code=2)

    monkeypatch.delenv("INTERRUPT_AT")
    resume = ("resume", "Tiny-inference", "tiny_models:make", "--storage", "my.db", "--max-trials", "2")
    assert "Plan of study Tiny-inference" in autosp(*resume, "-o", "plan.json")
    assert (shell / "plan.json").is_file()


def test_an_interrupted_resume_says_the_same(study: Path, monkeypatch: Environment) -> None:
    monkeypatch.setenv("INTERRUPT_AT", "1")
    said = autosp("resume", "tiny", "tiny_models:make", "--device", "cpu", "--max-trials", "3", code=130)
    assert "`autosp resume tiny tiny_models:make --device cpu`" in said


def test_an_interrupt_before_the_study(shell: Path, monkeypatch: Environment) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autosp.tune", interrupted)
    assert "before the study began" in autosp("tune", "tiny_models:make", *ROOM, code=130)
    monkeypatch.setattr("autosp.studies.list_studies", interrupted)
    assert "interrupted" in autosp("studies", code=130)


def test_an_interrupted_study_is_the_one_that_was_named(study: Path, monkeypatch: Environment) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autosp.tune", interrupted)
    command = ("tune", "tiny_models:make", *ROOM, "--isolate")
    assert "before the study began" in autosp(*command, "--study-name", "mine", code=130)
    for named in ((), ("--study-name", "tiny")):
        assert "`autosp resume tiny tiny_models:make --isolate`" in autosp(*command, *named, code=130)


def test_doctor_looks_and_leaves_no_trace(shell: Path) -> None:
    said = autosp("doctor", "--probe-mb", "4", "--device", "cpu")
    for part in ("torch 2.", "device cpu", "slow tier disk", "not there yet", "Link disk → device", "under compute"):
        assert part in said
    assert not (shell / "autosp.db").exists()
    assert not list((shell / "cache").iterdir())


def test_doctor_and_the_states_of_a_database(study: Path, tmp_path: Path) -> None:
    assert "schema 0001, up to date" in autosp("doctor", "--probe-mb", "0")
    (tmp_path / "junk.db").write_bytes(b"junk" * 1000)
    assert "unusable: " in autosp("doctor", "--probe-mb", "0", "--storage", str(tmp_path / "junk.db"))
    sqlite3.connect(tmp_path / "old.db").execute("CREATE TABLE theirs (x)").connection.close()
    said = autosp("doctor", "--probe-mb", "0", "--storage", str(tmp_path / "old.db"))
    assert "no schema of autosp, this version has 0001; `autosp db upgrade`" in said


def test_db_upgrade_tells_the_revisions_and_the_copy(shell: Path) -> None:
    sqlite3.connect("old.db").execute("CREATE TABLE theirs (x)").connection.close()
    said = autosp("db", "upgrade", "--storage", "old.db")
    assert "old.db: no schema -> 0001" in said
    assert "the database as it was: " in said
    assert (shell / "old.db.base.bak").is_file()
    assert "already at 0001" in autosp("db", "upgrade", "--storage", "old.db")


def test_db_upgrade_makes_no_folder_of_a_mistyped_path(shell: Path) -> None:
    said = autosp("db", "upgrade", "--storage", "studys/old.db", code=2)
    assert f"there is no folder {shell / 'studys'} for the database {shell / 'studys' / 'old.db'}" in said
    assert not (shell / "studys").exists()


def test_db_upgrade_makes_the_folder_of_the_default_database(shell: Path, monkeypatch: Environment) -> None:
    monkeypatch.delenv("AUTOSP_STORAGE")
    monkeypatch.setenv("XDG_DATA_HOME", str(shell / "data"))
    assert "no schema -> 0001" in autosp("db", "upgrade")
    assert (shell / "data" / "autosp" / "autosp.db").is_file()


def test_demo_passes_its_options_on(shell: Path, monkeypatch: Environment) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("autosp.demo.run", lambda *arguments, **options: calls.append((arguments, options)))
    autosp("demo")
    autosp("demo", "--model", "llama-1b", "--max-gpu-gb", "2", "--storage", "x.db", "-o", "demo.json")
    assert calls == [
        (("minilm",), {"max_gpu_gb": None, "storage": None, "output": Path("plan.json")}),
        (("llama-1b",), {"max_gpu_gb": 2.0, "storage": "x.db", "output": Path("demo.json")}),
    ]


# What the user got wrong


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tiny_model:make", "no module 'tiny_model' in .*; did you mean 'tiny_models'?"),
        ("tiny_models:mak", r"no 'mak' in module tiny_models \(.*tiny_models.py\); did you mean 'make'?"),
        ("tiny_models:NUMBER", "'NUMBER' in module tiny_models .* is a int, not a function"),
        ("tiny_models:nothing", "returned a NoneType; it must return"),
        ("tiny_models:swapped", "returned a Tensor as its model .the other way round"),
        ("tiny_models", "does not name a factory: write module:factory"),
        ("./tiny_models.py:make", "does not name a factory: write module:factory, as in tiny_models:make"),
    ],
)
def test_a_wrong_factory(factory: str, message: str, shell: Path) -> None:
    assert re.search(message, autosp("tune", factory, *ROOM, code=2))


@pytest.mark.parametrize(
    ("factory", "error"), [("tiny_models:broken", RuntimeError), ("needs_more:make", ModuleNotFoundError)]
)
def test_the_users_own_error_keeps_its_traceback(factory: str, error: type[Exception], shell: Path) -> None:
    result = CliRunner().invoke(app, ["tune", factory, *ROOM])
    assert result.exit_code == 1
    assert type(result.exception) is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "tinny"), "no study 'tinny' among the 1 .*; did you mean 'tiny'?"),
        (("export", "tinny"), "did you mean 'tiny'?"),
        (("delete", "tinny"), "did you mean 'tiny'?"),
        (("resume", "tinny", "tiny_models:make"), "did you mean 'tiny'?"),
        (("estimate", "--study", "tinny", *ROOM), "did you mean 'tiny'?"),
        (("estimate", *ROOM), "either MODULE:FACTORY or --study"),
        (("estimate", "tiny_models:make", "--study", "tiny", *ROOM), "either MODULE:FACTORY or --study"),
        (("estimate", "--study", "tiny", "--max-gpu-gb", "1KB"), "no setting fits .* the least that works"),
        (("estimate", "--study", "tiny", *ROOM, "--plot", "x.gif"), "ends in one of .png"),
        (("show", "tiny", "--plot", "no/folder.png"), "there is no folder no"),
        (("export",), "name a study, or pass --schema"),
        (("export", "tiny", "-o", "no/plan.json"), "there is no folder no"),
        (("export", "--schema", "-o", "no/schema.json"), "there is no folder no"),
        (("export", "--schema", "-o", "/proc/schema.json"), "/proc/schema.json cannot be written: No such file"),
        (("tune", "tiny_models:make", *ROOM, "-o", "no/plan.json"), "there is no folder no"),
        (("tune", "tiny_models:make", "--max-gpu-gb", "much"), "max_gpu_gb='much' is not a positive amount"),
        (("tune", "tiny_models:make", *ROOM, "--max-cpu-gb", "some"), "max_cpu_gb='some' is not a positive amount"),
        (("estimate", "--study", "tiny", *ROOM, "--max-cpu-gb", "1KB"), "no setting fits .* the least that works"),
        (("tune", "tiny_models:make", *ROOM, "--max-trials", "0"), "max_trials=0"),
        (("tune", "tiny_models:make", *ROOM, "--device", "tpu9"), "is not a torch device"),
        (("tune", "tiny_models:wider", *ROOM, "--study-name", "tiny"), "study 'tiny' was made for something else"),
        (("run", "tiny_models:make", "--plan", "missing.json"), "'missing.json' does not exist"),
        (("run", "tiny_models:make", "--plan", "tiny_models.py"), "tiny_models.py is not JSON"),
        (("trace", "tiny_models:make", "--plan", "plan.json", "--out", "no/trace.json"), "there is no folder no"),
        (("trace", "tiny_models:make", "--plan", "plan.json", "--plot", "x.gif"), "ends in one of .png"),
        (("trace", "tiny_models:make"), "Missing option '--plan'"),
        (("estimate", "tiny_models:make"), "Missing option '--max-gpu-gb'"),
        (("resume", "tiny"), "Missing argument"),
        (("tune-batch", "tiny_models:make"), r"must return \(model, make_batch\)"),
        (("tune", "tiny_models:make", "--slack", "5"), "slack=5.0"),
    ],
)
def test_a_mistake_is_explained(arguments: tuple[str, ...], message: str, study: Path) -> None:
    said = autosp(*arguments, code=2)
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_a_budget_too_small_names_the_least_that_works(shell: Path) -> None:
    said = autosp("tune", "tiny_models:make", "--max-gpu-gb", "1KB", code=2)
    assert "the least that works is" in said
    assert "try max_gpu_gb=" in said


def test_an_interrupt_while_profiling_leaves_no_study(shell: Path, monkeypatch: Environment) -> None:
    monkeypatch.setenv("INTERRUPT_AT", "1")
    said = autosp("tune", "tiny_models:make", *ROOM, "--study-name", "begun", code=130)
    assert "before the study began: nothing was measured" in said
    assert "no study 'begun' among the 0" in autosp("show", "begun", code=2)


def test_a_study_without_a_profile(shell: Path) -> None:
    """A process was killed between its first two writes."""
    with Repository() as repository:
        repository.create_study("begun", study_key())
    assert "has no profile yet" in autosp("estimate", "--study", "begun", *ROOM, code=2)
    assert "study begun has no trials yet" in autosp("show", "begun")


def test_a_plan_cut_short(study: Path) -> None:
    (study / "cut.json").write_text((study / "plan.json").read_text()[:100])
    assert "cut.json is not JSON" in autosp("run", "tiny_models:make", "--plan", "cut.json", code=2)


def test_drawing_without_matplotlib(study: Path, monkeypatch: Environment) -> None:
    for name in ("plots", "drawing"):
        monkeypatch.delattr(f"autosp.report.{name}", raising=False)
        monkeypatch.delitem(sys.modules, f"autosp.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'autosp[viz]'" in autosp("show", "tiny", "--plot", "x.png", code=2)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_line_without_its_extra(package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from autosp.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"the command line needs {package}\S*: pip install 'autosp\[cli\]'\n", done.stderr)

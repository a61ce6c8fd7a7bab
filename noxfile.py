"""The sessions that check this project: `nox -l` lists them."""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests", "lint", "types", "docs"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# Each process starts its own servers. The tests wait for a quarter of their time, so two cores are busy with three processes.
AT_ONCE = ("-n", "3", "--dist", "worksteal")
# Long explorations, which reach no line that no other test reaches.
EXPLORATIONS = ("tests/crash", "tests/shared/test_model.py")
# Without this, `python -m pytest` would import the checkout instead of the wheel.
WHEEL_ONLY = {"PYTHONSAFEPATH": "1"}
# Most of these packages are only read, or imported in part. To compile all of them takes half a minute.
NOT_RUN = ("--no-compile",)
BENCHMARKS = {**WHEEL_ONLY, "PYTHONPATH": "tests/benchmarks"}


def _group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PROJECT, name)


def _tests(session: nox.Session) -> None:
    session.install(".", *_group("test"))
    session.run("pytest", *AT_ONCE, *session.posargs, env=WHEEL_ONLY)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests with the present version of Python, against the built wheel."""
    _tests(session)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests, and check that they reach every line and branch. The tracer makes them two to three times as slow."""
    session.install(".", *_group("test"))
    session.run("coverage", "erase")
    others = [f"--ignore={path}" for path in EXPLORATIONS]
    session.run("coverage", "run", "-m", "pytest", *AT_ONCE, *others, *session.posargs, env=WHEEL_ONLY)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(python=PYTHONS)
def all_pythons(session: nox.Session) -> None:
    """Run the tests with every supported version of Python. A missing version is an error."""
    _tests(session)


@nox.session(name="key-value")
@nox.parametrize("version", ["0.3.0", "0.4.4"])
def key_value(session: nox.Session, version: str) -> None:
    """Test the store for py-key-value with the versions that FastMCP 2 and 3 need. `tests` uses the newest version."""
    session.install(".", *_group("key-value"), f"py-key-value-aio=={version}")
    session.run("pytest", "tests/integrations/test_key_value.py", *session.posargs, env=WHEEL_ONLY)


@nox.session
def fastmcp(session: nox.Session) -> None:
    """Run the programs of the page for FastMCP. Kill a server, and check that its data survives."""
    session.install(".", *_group("fastmcp"))
    session.run("pytest", "tests/integrations/fastmcp_page.py", *session.posargs, env=WHEEL_ONLY)


S3_TESTS = (
    "tests/migrations/test_s3_schema.py",
    "tests/storage/test_s3_conformance.py",
    "tests/storage/test_s3.py",
    "tests/storage/test_s3_faults.py",
    "tests/storage/test_s3_generations.py",
    "tests/storage/test_s3_history.py",
    "tests/storage/test_s3_opening.py",
    "tests/storage/test_s3_restore.py",
    "tests/storage/test_s3_secrets.py",
)
S3_THOROUGH = {**WHEEL_ONLY, "LAB_STATE_S3_THOROUGH": "1"}


@nox.session(name="s3-faults")
def s3_faults(session: nox.Session) -> None:
    """Test `S3Storage` with moto, with all cases of the S3 tests. `tests` leaves out many faults and cancellations."""
    session.install(".", *_group("test"))
    session.run("pytest", *AT_ONCE, *(session.posargs or S3_TESTS), env=S3_THOROUGH)


@nox.session(name="s3-real")
def s3_real(session: nox.Session) -> None:
    """Test `S3Storage` with a real store: Ceph's gateway on the loopback interface. Skip the session if it is not installed."""
    session.install(".", *_group("test"))
    tests = session.posargs or S3_TESTS
    session.run("python", "tests/servers/rgw.py", "python", "-m", "pytest", *tests, env=S3_THOROUGH)


@nox.session(name="s3-scenarios")
def s3_scenarios(session: nox.Session) -> None:
    """Run 1,000 scenarios of writers behind faulty proxies. `-- --scenarios N` sets the number, `--real` uses Ceph's gateway."""
    arguments = list(session.posargs)
    number = arguments[arguments.index("--scenarios") + 1] if "--scenarios" in arguments else "1000"
    session.install(".", *_group("test"))
    session.run(
        *_real_store(arguments), "python", "-m", "pytest", "tests/storage/test_s3_scenarios.py",
        env={**WHEEL_ONLY, "LAB_STATE_TEST_S3_SCENARIOS": number},
    )  # fmt: skip


@nox.session(name="s3-bench")
def s3_bench(session: nox.Session) -> None:
    """Measure `S3Storage`. `-- --real` uses Ceph's gateway."""
    arguments = list(session.posargs)
    real = _real_store(arguments)
    session.install(".", *_group("test"), *_group("bench"))
    session.run(
        *real,
        "python",
        "tests/benchmarks/s3.py",
        *arguments,
        env={**WHEEL_ONLY, "PYTHONPATH": "tests/benchmarks:tests/helpers"},
    )


def _real_store(arguments: list[str]) -> tuple[str, ...]:
    """Return the command that starts Ceph's gateway, if `--real` is among the arguments. Remove `--real` from the arguments."""
    if "--real" not in arguments:
        return ()
    arguments.remove("--real")
    return ("python", "tests/servers/rgw.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style, and the rules that tools can check."""
    session.install(*_group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with two type checkers in strict mode."""
    session.install(*NOT_RUN, ".", "nox", *_group("test"), *_group("types"), *_group("bench"), *_group("demo"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "lab_state", env=WHEEL_ONLY)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation as HTML. Every warning is an error. The session `tests` runs the examples."""
    session.install(*NOT_RUN, ".", *_group("docs"))
    session.run("sphinx-build", "-W", "-n", "-q", "-b", "html", "docs", "docs/_build/html")


CRASH: dict[str, tuple[str, dict[str, str]]] = {
    "states": (
        "crash/test_states.py crash/test_calls.py crash/test_seeded_bugs.py crash/test_disk.py crash/test_tracing.py",
        {"LAB_STATE_CRASH_STATES": "300000", "LAB_STATE_CALL_STATES": "50000", "LAB_STATE_CRASH_STRACE": "1"},
    ),
    "history": ("crash/test_history_states.py crash/test_restore_states.py", {"LAB_STATE_HISTORY_STATES": "50000"}),
    "history reads": (
        "storage/test_history_walk.py",
        {"LAB_STATE_HISTORY_READS": "10000", "LAB_STATE_HISTORY_MOMENTS": "1000"},
    ),
    "kills": (
        "crash/test_kill.py crash/test_storm.py",
        {"LAB_STATE_KILL_CYCLES": "10000", "LAB_STATE_STORM_CYCLES": "300"},
    ),
    "faults": (
        "crash/test_faults.py crash/test_kill_points.py crash/test_restore_kill.py crash/test_traced.py crash/test_lifecycle.py",
        {"LAB_STATE_FAULT_RUNS": "280", "LAB_STATE_CRASH_STRACE": "1"},
    ),
    "disks": (
        "crash/test_power_cut.py crash/test_full_disk.py",
        {
            "LAB_STATE_FAULT_RUNS": "280",
            "LAB_STATE_POWER_CUT": "1",
            "LAB_STATE_POWER_CUT_CYCLES": "300",
            "LAB_STATE_FULL_TMPFS": "1",
        },
    ),
    "reading": ("crash/test_reading_race.py", {"LAB_STATE_READINGS": "100000"}),
    "damage": ("crash/test_sweep.py storage/test_s3_sweep.py fuzz test_cancellation.py", {}),
}
EXECUTIONS = {"files": "600000", "s3": "300000", "cache": "200000"}


@nox.session
def crash(session: nox.Session) -> None:
    """Run all tests that try to lose or damage a state, at full length (an hour). `-- states kills` runs some parts.

    `faults` and `states` need strace. `disks` needs root, loop devices, and mkfs for ext4 and xfs. `fuzz` needs atheris.
    """
    parts = session.posargs or [*CRASH, "fuzz"]
    session.install(".", *_group("test"))
    for part in parts:
        if part != "fuzz":
            paths, more = CRASH[part]
            tests = [f"tests/{path}" for path in paths.split()]
            session.run("pytest", "-s", "--timeout", "7200", *tests, env={**WHEEL_ONLY, **more})
    if "fuzz" in parts:
        session.install("atheris")
        for target, number in EXECUTIONS.items():
            session.run("python", "tests/fuzz/run.py", target, "--executions", number, env=WHEEL_ONLY)


@nox.session
def cache(session: nox.Session) -> None:
    """Kill the writer, Redis or both in 200 seeded rounds, with a network that cuts connections and delays data."""
    session.install(".", *_group("test"))
    session.run(
        "pytest",
        "-s",
        "tests/cache/test_kill.py",
        *session.posargs,
        env={**WHEEL_ONLY, "LAB_STATE_CACHE_ROUNDS": "200"},
    )


@nox.session
def shared(session: nox.Session) -> None:
    """Test a shared state at full length: a million states of each scenario of its model, 2,000 rounds of processes, and all servers.

    This takes an hour. `-- --worlds N` sets the number of states of the model, and `-- --rounds N` sets the number of rounds.
    `-- --seconds N` sets the time for which the owners of each server are killed.
    """
    arguments = list(session.posargs)

    def number(option: str, usual: str) -> str:
        return arguments[arguments.index(option) + 1] if option in arguments else usual

    session.install(".", *_group("test"), *_group("servers"))
    long = ("pytest", "-s", "--timeout", "7200")
    environment = {
        **WHEEL_ONLY,
        "LAB_STATE_SHARED_WORLDS": number("--worlds", "1000000"),
        "LAB_STATE_SHARED_ROUNDS": number("--rounds", "2000"),
        "LAB_STATE_SHARED_EXAMPLES": "400",
        "LAB_STATE_SHARED_SECONDS": number("--seconds", "30"),
    }
    session.run(*long, "tests/shared", "tests/properties/test_manager_machine.py", env=environment)
    # pytest leaves out a file of this name if its directory is given as well.
    session.run(*long, "tests/shared/servers_in_full.py", env=environment)


COMMAND = ("tests/cli/processes_in_full.py", "tests/cli/beside_in_full.py", "tests/cli/shells_in_full.py")


@nox.session
def command(session: nox.Session) -> None:
    """Test each subcommand of `lab-state` in each bad surrounding, with real processes, kills by strace, and bash, zsh and fish."""
    session.install(".", *_group("test"))
    # Beside its directory, pytest would leave the files of `COMMAND` out.
    for tests in [session.posargs] if session.posargs else [["tests/cli"], COMMAND]:
        session.run("pytest", "-s", "--timeout", "3000", *tests, env={**WHEEL_ONLY, "LAB_STATE_COMMAND": "full"})


@nox.session
def operations(session: nox.Session) -> None:
    """Run the alerts and the dashboard of docs/operations.md on Prometheus; it needs Debian's package `prometheus`."""
    session.install(".", *_group("test"))
    session.run("pytest", "tests/operations_in_full.py", *session.posargs, env=WHEEL_ONLY)


@nox.session
def demo(session: nox.Session) -> None:
    """Kill two servers under load: one with lab_state, one with `json.dump`. Then kill workers that share a state. This takes less than 45 s."""
    session.install("-q", ".", *_group("demo"))
    session.run("python", "docs/examples/demo", *session.posargs, env=WHEEL_ONLY)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare lab_state with its alternatives in one run. The options are `-- --quick`, `--only PART` and `--docs`."""
    session.install(".", *_group("bench"))
    session.run("python", "tests/benchmarks/bench.py", *session.posargs, env=BENCHMARKS)


@nox.session
def soak(session: nox.Session) -> None:
    """Run 100 writers on a million keys for 30 minutes, or `-- --minutes N`. Check that memory, files and latency do not grow."""
    session.install(".", *_group("bench"))
    session.run("python", "tests/benchmarks/soak.py", *session.posargs, env=BENCHMARKS)

"""The command line: its subcommands, with their arguments and help."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import click

from lab_state.cli import _diff, _doctor, _files, _migrate, _moments, _repair, _stats, _values, _verify, _watch, _write
from lab_state.cli._arguments import PLACE, STATE
from lab_state.cli._exits import INTERRUPTED, USAGE, Stop
from lab_state.cli._output import drop, note, open_closed_streams, unwritten
from lab_state.cli._run import PROGRAM, asynchronous
from lab_state.cli._target import Place, Target
from lab_state.cli._when import parse_when

EXITS = """\b
Exit codes:
  0 ok    1 no such key or state, or a difference    2 usage
  3 locked    4 corrupt    5 unavailable    6 conflict    130 Ctrl-C
"""

HAS_MOMENT = frozenset({"get", "keys", "dump", "stats", "verify"})
"""The names of the subcommands that the option `--at` of the command applies to."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

json_option = click.option("--json", is_flag=True, help="Print one JSON object.")
nl_option = click.option("--nl", is_flag=True, help="Print JSON, one value a line.")
depose_option = click.option(
    "--depose", is_flag=True, help="Write to a state in a bucket. A process that has it open is deposed."
)
create_option = click.option("--create", is_flag=True, help="Create the state if it does not exist.")


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:  # noqa: FBT001 -- click calls it so
    if value:
        # This module and the package are in the same layer, so no import statement may name the package. The package is imported already.
        click.echo(f"{PROGRAM} {importlib.import_module('lab_state').__version__}")
        ctx.exit()


@click.group(context_settings=CONTEXT, epilog=EXITS)
@click.option(
    "--at",
    metavar="WHEN",
    help="Read the state as it was: 10m (ago), 'yesterday 18:00', ISO 8601, or r1204 (a revision).",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.pass_context
def cli(ctx: click.Context, /, at: str | None) -> None:
    """Read, change and check states of lab_state.

    STATE is directory/name, the path of its .json, or s3://bucket/prefix/name. A state may be in use: reading takes no lock.
    """
    if at is not None:
        try:
            parse_when(at, datetime.now().astimezone())
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--at") from None
        if ctx.invoked_subcommand not in HAS_MOMENT:
            raise click.UsageError(f"{ctx.invoked_subcommand} does not read a moment: leave out --at")
    ctx.obj = at


def subcommand(example: str, *, name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Return the decorator of a subcommand. The help of the subcommand ends with an example."""
    return cli.command(name, epilog=f"\b\nExample:\n  {example}")


def run() -> None:
    """Run the command with the arguments of this process, and exit with its code."""
    open_closed_streams()
    try:
        cli.main(prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        try:
            error.show()
            if isinstance(error, click.NoSuchOption) and error.option_name == "--at" and error.ctx is not None:
                note(f"Write the moment before the subcommand: {PROGRAM} --at WHEN {error.ctx.info_name} ...")
        except OSError:
            drop(sys.stderr)
        sys.exit(USAGE)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except Stop as stop:
        _end(stop)
    except OSError as error:  # the help cannot be written; an `OSError` of a subcommand has become a `Stop`
        _end(unwritten(error))


def _end(stop: Stop) -> NoReturn:
    if stop.message:
        note(f"{PROGRAM}: {stop.message}")
    sys.exit(stop.code)


@subcommand("lab-state ls state")
@click.argument("directory", type=PLACE)
@nl_option
def ls(directory: Place, **options: Any) -> None:
    """Print the states in a directory or under s3://bucket/prefix: keys, bytes, revision, age and holder."""
    asynchronous(_moments.ls)(directory, **options)


@subcommand("lab-state get state/shop stock/apple")
@click.argument("state", type=STATE)
@click.argument("key")
@json_option
@click.pass_obj
def get(at: str | None, /, state: Target, key: str, **options: Any) -> None:
    """Print the value of a key, as JSON."""
    asynchronous(_values.get)(state, key, at, **options)


@subcommand("lab-state keys state/shop stock/")
@click.argument("state", type=STATE)
@click.argument("prefix", default="")
@click.option("--tree", is_flag=True, help="Split the keys at each /, and count.")
@click.option("--after", metavar="KEY", help="Begin after this key.")
@click.option("--limit", type=click.IntRange(min=0), help="Print at most this many lines.")
@json_option
@nl_option
@click.pass_obj
def keys(at: str | None, /, state: Target, prefix: str, **options: Any) -> None:
    """Print the keys with a prefix, in order."""
    asynchronous(_values.keys)(state, prefix, at, **options)


@subcommand("lab-state dump --nl state/shop > shop.ndjson")
@click.argument("state", type=STATE)
@click.argument("prefix", default="")
@nl_option
@click.pass_obj
def dump(at: str | None, /, state: Target, prefix: str, **options: Any) -> None:
    """Print all keys with their values: one JSON object, or with --nl a line for each key, with its expiry."""
    asynchronous(_values.dump)(state, prefix, at, **options)


@subcommand("lab-state stats --top 3 state/shop")
@click.argument("state", type=STATE)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Print at most this many of the largest keys, and of the prefixes.",
)
@json_option
@click.pass_obj
def stats(at: str | None, /, state: Target, **options: Any) -> None:
    """Print keys and bytes by prefix, the largest keys, sizes, and the keys that expire."""
    asynchronous(_stats.stats)(state, at, **options)


@subcommand("lab-state diff backups/shop.json state/shop")
@click.argument("first", metavar="A", shell_complete=STATE.shell_complete)
@click.argument("second", metavar="B", shell_complete=STATE.shell_complete)
@nl_option
def diff(first: str, second: str, **options: Any) -> None:
    """Print the differences between A and B: states, backups, or STATE@WHEN. The exit code is 1 if there are any."""
    asynchronous(_diff.diff)(first, second, **options)


@subcommand("lab-state verify backups/shop.json")
@click.argument("state", type=STATE)
@json_option
@click.pass_obj
def verify(at: str | None, /, state: Target, **options: Any) -> None:
    """Check all of a state: checksums, keys and values. Nothing is changed. The exit code is 4 if it is damaged."""
    asynchronous(_verify.verify)(state, at, **options)


@subcommand("lab-state watch state/shop cart/")
@click.argument("state", type=STATE)
@click.argument("prefix", default="")
@nl_option
def watch(state: Target, prefix: str, **options: Any) -> None:
    """Print changes as they come, until Ctrl-C."""
    asynchronous(_watch.watch)(state, prefix, **options)


@subcommand("lab-state tail --since 10m state/shop")
@click.argument("state", type=STATE)
@click.argument("prefix", default="")
@click.option("--since", metavar="WHEN", help="Begin after this moment; for the forms, see lab-state --help.")
@nl_option
def tail(state: Target, prefix: str, **options: Any) -> None:
    """Print the changes that are stored one by one, with their times.

    These are the changes since the last checkpoint. With --since, changes in the history are printed, too.
    """
    asynchronous(_watch.tail)(state, prefix, **options)


@subcommand("lab-state backup state/shop backups/shop.json")
@click.argument("state", type=STATE)
@click.argument("target", type=click.Path(dir_okay=False))
@json_option
def backup(state: Target, target: str, **options: Any) -> None:
    """Write the whole state to one file, which replaces an older backup when it is complete."""
    asynchronous(_files.backup, writes=True)(state, target, **options)


@subcommand("lab-state copy state/shop s3://bucket/state/shop")
@click.argument("source", metavar="STATE", type=STATE)
@click.argument("target", metavar="NEW", type=STATE)
@json_option
def copy(source: Target, target: Target, **options: Any) -> None:
    """Copy a state to another place, read the copy back, and compare it."""
    asynchronous(_files.copy, writes=True)(source, target, **options)


@subcommand("lab-state history state/shop stock/apple")
@click.argument("state", type=STATE)
@click.argument("key", required=False)
@json_option
@nl_option
def history(state: Target, key: str | None, **options: Any) -> None:
    """Print the generations that can be read with --at, or each stored change of a key."""
    asynchronous(_moments.history)(state, key, **options)


@subcommand("lab-state restore state/shop --at 'yesterday 18:00' --into shop")
@click.argument("state", type=STATE)
@click.option("--at", metavar="WHEN", required=True, help="The moment; for the forms, see lab-state --help.")
@click.option(
    "--into", metavar="NAME", required=True, help="The name of a new state, or the same name to restore in place."
)
@click.option("--dry-run", is_flag=True, help="Print what a restore in place would change.")
@depose_option
@json_option
def restore(state: Target, **options: Any) -> None:
    """Restore a moment of a state, as a new state or in place. The state must be stopped to restore in place."""
    asynchronous(_moments.restore, writes=True)(state, **options)


@subcommand("lab-state repair --dry-run state/shop")
@click.argument("state", type=STATE)
@click.option("--dry-run", is_flag=True, help="Print what is lost, and change nothing.")
@depose_option
@json_option
def repair(state: Target, **options: Any) -> None:
    """Make a damaged state loadable. The damaged parts are kept, and all losses are listed. The state must be stopped."""
    asynchronous(_repair.repair, writes=True)(state, **options)


@subcommand("lab-state doctor state/shop")
@click.argument("state", type=STATE)
@json_option
def doctor(state: Target, **options: Any) -> None:
    """Report on holder, socket, permissions, file system, free space, and the conditions of a store."""
    asynchronous(_doctor.doctor)(state, **options)


@subcommand("lab-state set state/shop stock/apple 12", name="set")
@click.argument("state", type=STATE)
@click.argument("key")
@click.argument("value", metavar="JSON")
@click.option("--ttl", type=float, metavar="SECONDS", help="Let the key expire after this time.")
@click.option(
    "--if",
    "since",
    type=click.IntRange(min=0, max=2**63 - 1),
    metavar="REVISION",
    help="Write only if the key has not changed after REVISION.",
)
@create_option
@depose_option
@json_option
def set_(state: Target, key: str, value: str, **options: Any) -> None:
    """Store one value, and print the revision. Without --ttl, the key does not expire."""
    asynchronous(_write.set_, writes=True)(state, key, value, **options)


@subcommand("lab-state delete state/shop cart/ann cart/bob")
@click.argument("state", type=STATE)
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@depose_option
@json_option
def delete(state: Target, keys: tuple[str, ...], **options: Any) -> None:
    """Delete keys. The exit code is 1 if one of them did not exist."""
    asynchronous(_write.delete, writes=True)(state, keys, **options)


@subcommand("lab-state load --nl --create state/copy < shop.ndjson")
@click.argument("state", type=STATE)
@nl_option
@click.option("--replace", is_flag=True, help="Delete all other keys.")
@create_option
@depose_option
@json_option
def load(state: Target, **options: Any) -> None:
    """Store the JSON on stdin, as dump prints it, as one change."""
    asynchronous(_write.load, writes=True)(state, **options)


@subcommand("EDITOR=nano lab-state edit state/shop cart/ann")
@click.argument("state", type=STATE)
@click.argument("key")
@depose_option
@json_option
def edit(state: Target, key: str, **options: Any) -> None:
    """Edit one value in $EDITOR. Nothing is written if the key was changed meanwhile. An expiry is kept."""
    asynchronous(_write.edit, writes=True)(state, key, **options)


@subcommand("lab-state migrate --dry-run app:schema state/shop")
@click.argument("schema", metavar="MODULE:SCHEMA")
@click.argument("state", type=STATE)
@click.option("--dry-run", is_flag=True, help="Print what would change, and write nothing. The state may be in use.")
@depose_option
@json_option
def migrate(schema: str, state: Target, **options: Any) -> None:
    """Migrate a state that is stopped to the schema of an application, as one change."""
    asynchronous(_migrate.migrate, writes=True)(schema, state, **options)


@subcommand("lab-state check app:schema state/shop")
@click.argument("schema", metavar="MODULE:SCHEMA")
@click.argument("state", type=STATE)
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Print at most this many values."
)
@nl_option
def check(schema: str, state: Target, **options: Any) -> None:
    """Print the values that are not of the types of a schema. The exit code is 1 if there are any."""
    asynchronous(_migrate.check)(schema, state, **options)

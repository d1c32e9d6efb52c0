"""The `llmcore` command: one lazily imported module of llmcore/commands for each group.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or input, 130 interrupted (a resumable run keeps what it wrote).
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys

from llmcore.errors import EXTRAS, CannotRun, install_command

# group or command -> (module in llmcore.commands, one line of help). A module exposes `app`, a typer.Typer.
COMMANDS = {
    "align": ("align", "train on preference data, or score it"),
    "huref": ("huref", "where a checkpoint comes from: compare, fingerprint, index, plan, attack"),
    "bench": ("bench", "kernels and methods beside their peers, on this machine"),
    "demo": ("demo", "run the methods on the embedded model and write report.html"),
    "doctor": ("doctor", "device, backends, versions, what is missing and the command that mends it"),
    "guard": ("guard", "Gradient Cuff: calibrate, check prompts, serve a guarded OpenAI-compatible endpoint"),
    "saliency": ("saliency", "flow of a prompt as picture, page or JSON; the best trigger sentence for each question"),
}


def command_line() -> None:
    """What `llmcore` and `python -m llmcore` run: main() in a process of its own, which ends at once when the work is over."""
    ended: list[int] = []
    atexit.register(_leave, ended)  # handlers run last in, first out: this one after every other, when threads have been joined
    try:
        main()
        ended.append(0)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):  # a text is for the interpreter to print
            ended.append(end.code or 0)
        raise


def _leave(ended: list[int]) -> None:
    """Leave with the status in `ended`, what is alive goes with the process: to take torch's modules apart is half a second.

    After a traceback (no status), or when the reader of a pipe has gone, the interpreter ends as it always does.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):  # the reader has gone, or the program closed it
        return
    if ended:
        os._exit(ended[0] & 0xFF)


def main() -> None:
    """Run the command in sys.argv; raises SystemExit with its status."""
    import typer

    class Lazy(typer.core.TyperGroup):
        """Imports the module of a command when it is asked for, or its one line of help when the list is shown."""

        def list_commands(self, ctx):
            return list(COMMANDS)

        def get_command(self, ctx, name):
            if name not in COMMANDS:
                return None
            module, summary = COMMANDS[name]
            command = typer.main.get_command(importlib.import_module(f"llmcore.commands.{module}").app)
            command.name, command.help = name, command.help or summary
            command.short_help = summary
            return command

    app = typer.Typer(cls=Lazy, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            from llmcore import __version__

            typer.echo(__version__)
            raise typer.Exit

    @app.callback(help="Kernels and methods for aligning, auditing and interpreting large language models.")
    def root(version: bool = typer.Option(False, "--version", is_eager=True, callback=show_version, help="Print the version.")) -> None:
        pass

    try:
        app(prog_name="llmcore")
    except (ValueError, TypeError, FileNotFoundError) as error:
        # Errors raised at a public boundary name the argument, what was expected and what came: no traceback needed.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"error: this needs the package {error.name}, which is not installed; run: {install_command(error.name)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

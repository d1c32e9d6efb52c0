"""The `llmcore` command: one lazily imported module of llmcore/commands for each group.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or input, 130 interrupted (a resumable run keeps what it wrote).
"""

from __future__ import annotations

import atexit
import gc
import importlib
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


def main() -> None:
    atexit.register(gc.freeze)  # what is alive at the end goes with the process: the interpreter's last collections need not look at it
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

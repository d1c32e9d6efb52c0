"""The `llmcore` command: one lazily imported module of llmcore/commands for each group.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or input, 130 interrupted (a resumable run keeps what it wrote).
"""

from __future__ import annotations

import importlib
import sys

# group or command -> (module in llmcore.commands, one line of help). A module exposes `app`, a typer.Typer.
COMMANDS = {
    "doctor": ("doctor", "device, backends, versions, what is missing and the command that mends it"),
}


def main() -> None:
    import click
    import typer

    class Lazy(typer.core.TyperGroup):
        def list_commands(self, ctx):
            return list(COMMANDS)

        def get_command(self, ctx, name):
            if name not in COMMANDS:
                return None
            module, summary = COMMANDS[name]
            command = typer.main.get_command(importlib.import_module(f"llmcore.commands.{module}").app)
            command.name, command.short_help = name, summary
            return command

    from llmcore import __version__

    group = Lazy(name="llmcore", help=__doc__.split("\n\n")[0], no_args_is_help=True, params=[
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, help="print the version",
                     callback=lambda ctx, _, value: (click.echo(__version__), ctx.exit()) if value else None)])
    try:
        group(standalone_mode=True)
    except (ValueError, TypeError, FileNotFoundError) as error:
        # Errors raised at a public boundary name the argument, what was expected and what came: no traceback needed.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

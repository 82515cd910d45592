"""The command `griffin`: a click group that imports a command's module only when that command is asked for.

Exit codes: 0 done, 1 an error of the user's (one line on stderr), 2 wrong usage (one line), 70 a fault of Griffin's
(one line), 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
GRIFFIN_DEBUG=1, or `griffin --debug COMMAND`, shows the traceback of an error instead of its line.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..foreign import ERROR, sentence
from ..paths import sweep_ours
from ..version import __version__
from ._outcome import debugging, fail, fail_interrupted, hook_threads, told
from ._print import echo
from ._settings import apply, source_of
from ._signals import stopping

# name -> (module in this package, help line). The line stands here too so that `griffin --help` imports no command.
COMMANDS = {
    "chat": ("chat", "Talk to a model, turn by turn."),
    "sessions": ("sessions", "The saved chats, for griffin chat --resume."),
    "serve": ("serve", "Answer programs that speak OpenAI's API."),
    "generate": ("generate", "Answer one prompt, or a file of them."),
    "export-pruned": ("export_pruned", "Write the pruned model, for transformers or for llama.cpp."),
    "calibrate": ("calibrate", "Measure which layers need their neurons most."),
    "eval": ("evaluate", "Measure what pruning costs."),
    "plot": ("plot", "Draw flocking, overlap, statistic or frontier."),
    "bench": ("bench", "Speed and memory beside other ways to run a model."),
    "mem-report": ("mem_report", "What fits here, what a run needs, what the last one took."),
    "models": ("models", "The models known by name, and those on this machine."),
    "pull": ("pull", "Fetch a model now, to run it later."),
    "config": ("config", "The settings file and the variables, and what they say."),
    "completion": ("completion", "Make a shell complete commands and options."),
}
WITHOUT_SETTINGS = ("config", "completion")  # so that they run where the settings are wrong, and tell of it
# Set before transformers and huggingface_hub are imported: they read these once.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class LazyGroup(click.Group):
    """Group of commands that are imported when they are asked for: name -> (module, help line)."""

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*args, **options)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        command: click.Command = importlib.import_module(f".{self.lazy[cmd_name][0]}", __package__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; what is resolved gets the user's settings as its defaults."""
        name, command, rest = super().resolve_command(ctx, args)
        without = ctx.resilient_parsing or name in WITHOUT_SETTINGS or {"-h", "--help"} & set(rest)
        if name and command and not isinstance(command, click.Group) and not without:
            apply(ctx, name, command, COMMANDS)
        return name, command, rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, without importing the commands."""
        names = [(name, line) for name, (_, line) in self.lazy.items() if name.startswith(incomplete)]
        return [CompletionItem(name, help=line) for name, line in names] + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


class Griffin(LazyGroup):
    """Its `main` turns every outcome into an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, then leave with an exit code. Not standalone: click's own, which raises."""
        prog_name = prog_name or "griffin"
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            with told():
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.UsageError as error:
            parameter = error.param if isinstance(error, click.BadParameter) else None
            if parameter and (source := source_of(error.ctx, parameter.name)):
                fail(f"{source}: {error.message}", 1)
            path = error.ctx.command_path if error.ctx else prog_name
            fail(f"{sentence(error.format_message(), ERROR - 100).rstrip('.')}. See '{path} --help'.", 2)
        except click.ClickException as error:
            fail(error.format_message(), error.exit_code)
        except click.Abort:
            fail_interrupted()
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's; here already, since click would take an EOFError for Ctrl-D."""
        with told():
            return super().invoke(ctx)


@click.group(
    cls=Griffin,
    lazy=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="griffin", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, hidden=True, help="Show the traceback of an error.")
@click.pass_context
def griffin(ctx: click.Context, debug: bool) -> None:
    """Run language models bigger than this machine's memory.

    The model is read once, for the prompt; the feed-forward neurons that the prompt uses stay in memory, and the
    whole answer comes from them. An answer goes to stdout; progress and reports go to stderr.
    """
    if debug:
        os.environ["GRIFFIN_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:
        echo(ctx.get_help())
    else:
        sweep_ours()


def fill_closed() -> None:
    """Puts the null device in the place of standard streams that are closed: the next file that is opened would get
    the number of one, and whatever a library prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def main() -> None:
    """Entry point of the command."""
    fill_closed()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not debugging():
        warnings.simplefilter("ignore")  # torch's and transformers' advice to programmers
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:  # a model writes any character; a terminal that cannot show it gets '?'
            reconfigure(errors="replace")
    hook_threads()
    with stopping():
        griffin()

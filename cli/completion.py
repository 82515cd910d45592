"""`griffin completion`: what makes a shell complete commands and options."""

import click
from click.shell_completion import get_completion_class

from ._print import echo

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Make a shell complete commands and options.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, *, shell: str) -> None:
    """Print a script that makes a shell complete griffin's commands, options and models with Tab.

    For bash, put eval "$(griffin completion bash)" in ~/.bashrc; for zsh the same with zsh in ~/.zshrc; for fish
    write the output to ~/.config/fish/completions/griffin.fish.
    """
    made = get_completion_class(shell)
    assert made
    script = made(context.find_root().command, {}, "griffin", "_GRIFFIN_COMPLETE")
    echo(script.source_template % script.source_vars())

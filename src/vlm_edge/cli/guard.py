"""Every command runs under this guard: an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Any, NoReturn

import click

from vlm_edge.errors import ExtraMissing, SettingError, VlmEdgeError

USAGE = 2  # as click exits on a wrong option
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# The extra that brings a module which a command imports when it first needs it.
EXTRAS = {
    "onnxruntime": "cpu",
    "ml_dtypes": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "huggingface_hub": "export",
    "gguf": "demo",
    "torch": "verify",
    "transformers": "verify",
}
TENSORRT = ("build", "plan")  # commands that do with the extra "tensorrt"


def sentence(error: Exception, command: str) -> str:
    """What went wrong, for somebody who does not read Python."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.partition(".")[0]
        if module in EXTRAS:
            lean = command in TENSORRT and EXTRAS[module] == "export"
            extra = "tensorrt" if lean else EXTRAS[module]
            return str(ExtraMissing(extra, module, f"`vlm {command}`"))
    if isinstance(error, VlmEdgeError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk{_of(error)}; free some and run the command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror.lower()}{_of(error)}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, a lower precision or a shorter prompt"
    kind = type(error).__name__
    return f"unexpected {kind}: {' '.join(str(error).split())}; run again with --debug"


def _of(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Print the error, with its traceback under --debug, and exit: 2 for a wrong setting, else 1."""
    if debugging(ctx):
        traceback.print_exception(error)
    click.echo(f"error: {sentence(error, ctx.command.name or '')}", err=True)
    ctx.exit(USAGE if isinstance(error, SettingError) else 1)


def debugging(ctx: click.Context) -> bool:
    return bool(ctx.meta.get("vlm_edge.debug"))


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["vlm_edge.debug"] = True  # shared by the group and its commands


def debug_option() -> click.Option:
    """`--debug`, which the group and every command accept."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command with `--debug`, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk or a closed pipe shows here
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own: usage errors exit with 2
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            raise  # click ends quietly: the reader has left
        except Exception as error:  # the last stop before a traceback
            fail(ctx, error)


class Group(click.Group):
    """A group with `--debug`; its commands are given with `add_command`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())

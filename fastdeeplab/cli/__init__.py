"""The command line, ``fastdeeplab segment`` and others. Needs the extra ``fastdeeplab[pictures]``."""

try:
    import PIL  # noqa: F401
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("PIL", "typer", "rich"):
        raise
    raise SystemExit(f"The command line needs the package {package}: pip install 'fastdeeplab[pictures]'") from None

from fastdeeplab.cli import about, pictures, speed, training
from fastdeeplab.cli.terminal import fail
from fastdeeplab.kernels.choice import kernels_are_off

app = typer.Typer(
    help="Semantic segmentation of pictures with DeepLabV3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    pictures.segment,
    pictures.demo,
    training.train,
    training.evaluate,
    speed.tune,
    speed.verify,
    speed.bench,
    about.info,
):
    app.command()(command)


@app.callback()
def check_environment() -> None:
    try:
        kernels_are_off()
    except ValueError as error:
        fail(str(error))


def main() -> None:
    """Run the command line."""
    app()

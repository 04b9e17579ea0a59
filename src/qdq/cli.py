"""The command `qdq`: parses, calls `qdq.api`, prints. Each command is a page that reads as what it does."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import qdq
from qdq._cli import doors, show
from qdq._cli.data import DataOptions, load_batches
from qdq._cli.errors import FAILED, INTERRUPTED, CommandError, UsageError, guarded
from qdq._cli.factories import load_callable
from qdq._cli.models import load_model

app = typer.Typer(
    name="qdq",
    help="From a trained PyTorch model to a verified INT8 ONNX model.",
    epilog="Exit codes: 0 done and verified, 1 failed or not verified, 2 called wrongly, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_MODEL_HELP = (
    "package.module:factory or file.py:factory (both import and run that code; the factory returns an nn.Module), "
    "or a .pt2 file of torch.export.save"
)
_DATA_HELP = (
    ".npy, .npz or .safetensors (first axis: samples), a folder of images, or file.py:factory, which is run and "
    "returns an iterable of batches"
)
_Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
_Data = Annotated[str, typer.Option("--data", metavar="DATA", help=_DATA_HELP, show_default=False)]
_Target = Annotated[str, typer.Option("--target", metavar="T", help="onnxruntime, openvino or tensorrt.")]
_RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe, .yaml or .toml.")]
_MinSqnr = Annotated[
    float, typer.Option("--min-sqnr", metavar="DB", help="Least SQNR of the runtime against the simulation.")
]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per batch of arrays and images.")]
_Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="At most so many samples (batches, of a factory).", show_default="all"),
]
_Keys = Annotated[
    str | None,
    typer.Option(
        "--keys", metavar="A,B", help="Arrays of an .npz or .safetensors file that are inputs, in forward's order."
    ),
]
_ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Images: shorter side scaled to this, centre cropped.")
]
_Mean = Annotated[str, typer.Option("--mean", metavar="R,G,B", help="Images: mean per channel (one value: grey).")]
_Std = Annotated[str, typer.Option("--std", metavar="R,G,B", help="Images: standard deviation per channel.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_MEAN, _STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    if version:
        typer.echo(f"qdq {qdq.__version__}")
        raise typer.Exit
    logger = logging.getLogger("qdq")
    if verbose:
        logger.setLevel(logging.INFO)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ToStderr)]:
        logger.removeHandler(handler)
    logger.addHandler(_ToStderr(logging.INFO if verbose else logging.WARNING))
    if not verbose:
        # Deprecations inside PyTorch and ONNX are for their developers; qdq's own warnings go through logging.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _console() -> Console:
    """Made per command, for stdout as it is then; wide where no terminal sets a width, so that names stay whole."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


class _ToStderr(logging.Handler):
    """Log records as single lines on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"qdq: {level}{record.getMessage()}", file=sys.stderr)


@app.command()
@guarded
def quantize(
    model: _Model,
    data: _Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="The file to write.")],
    target: _Target = "onnxruntime",
    recipe: _RecipeFile = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="FN",
            help="file.py:function, run with a predict callable; its score is printed for fp32 and for the file.",
        ),
    ] = None,
    fp32: Annotated[
        Path | None, typer.Option("--fp32", metavar="FILE", help="Write the float model as ONNX too (for benchmark).")
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(
            "--save-recipe",
            metavar="FILE",
            help="Write the recipe that resulted, .yaml: with it the file can be made and verified again.",
        ),
    ] = None,
    min_sqnr: _MinSqnr = 30.0,
    batch_size: _BatchSize = 32,
    limit: _Limit = None,
    keys: _Keys = None,
    image_size: _ImageSize = None,
    mean: _Mean = _MEAN,
    std: _Std = _STD,
    debug: _Debug = False,
) -> None:
    """Calibrate, quantize, export and verify. Exits with 0 only if the file is written and verified.

    A file whose SQNR against the simulation is below --min-sqnr is kept for inspection, and the exit code is 1.
    """
    doors.check_decibels("--min-sqnr", min_sqnr)
    chosen, rules = doors.target_and_recipe(target, recipe)
    doors.check_packages(chosen)
    for path in (output, fp32):
        if path is not None:
            doors.check_writable(path)
    if fp32 is not None and fp32.resolve() == output.resolve():
        raise UsageError("--fp32 and --output name the same file")
    if save_recipe is not None:
        doors.check_writable(save_recipe, ".yaml", ".yml")
        if recipe is not None and recipe.resolve() == save_recipe.resolve():
            raise UsageError("--save-recipe and --recipe name the same file")
    scorer = load_callable(evaluate, argument="--eval") if evaluate else None
    out = _console()
    network = doors.in_eval_mode(load_model(model))
    batches = load_batches(data, _options(batch_size, limit, keys, image_size, mean, std))

    show.step(out, "quantize", f"{model} for {chosen}")
    qmodel = qdq.quantize(network, batches, target=chosen, recipe=rules, progress=_progress())
    if save_recipe is not None or rules.tune:
        show.step(out, "recipe", doors.resulting_recipe(qmodel, rules, save_recipe))
    show.step(out, "export", str(output))
    qdq.export_onnx(qmodel, output)
    if fp32 is not None:
        show.step(out, "export", f"{fp32} (float)")
        qdq.export_onnx(network, fp32, example_inputs=doors.first_batch(batches))
    show.step(out, "verify", f"{output} in its runtime against the simulation")
    fidelity = qdq.verify(qmodel, output, batches, progress=_progress())
    out.print(str(fidelity), markup=False, soft_wrap=True)
    if scorer is not None:
        show.step(out, "evaluate", str(evaluate))
        show.scores(out, doors.scores(scorer, str(evaluate), network, output))
    _verdict(out, output, fidelity, min_sqnr)


@app.command()
@guarded
def verify(
    model: _Model,
    file: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file that `qdq quantize` wrote.")],
    data: _Data,
    on: Annotated[
        str | None, typer.Option("--on", metavar="DATA", help="Compare on these data.", show_default="those of --data")
    ] = None,
    target: _Target = "onnxruntime",
    recipe: _RecipeFile = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="Compare every quantized tensor too.")] = False,
    min_sqnr: _MinSqnr = 30.0,
    batch_size: _BatchSize = 32,
    limit: _Limit = None,
    keys: _Keys = None,
    image_size: _ImageSize = None,
    mean: _Mean = _MEAN,
    std: _Std = _STD,
    debug: _Debug = False,
) -> None:
    """Compare an exported file, as its runtime executes it, with the simulation.

    The simulation is made again from MODEL, --data, --target and --recipe: give what `qdq quantize` was given. In the
    place of a recipe with `tune` give the one that it wrote with --save-recipe.
    """
    doors.check_decibels("--min-sqnr", min_sqnr)
    chosen, rules = doors.target_and_recipe(target, recipe)
    if rules.tune:
        raise UsageError(
            f"--recipe {recipe} has tune: {rules.tune}, which measures anew and may give another model: give the "
            "recipe that `qdq quantize --save-recipe FILE` wrote"
        )
    doors.check_packages(chosen)
    doors.check_readable(file)
    network = doors.in_eval_mode(load_model(model))
    options = _options(batch_size, limit, keys, image_size, mean, std)
    batches = load_batches(data, options)
    compared = load_batches(on, options, argument="--on") if on else batches
    out = _console()
    show.step(out, "quantize", f"{model} for {chosen} (the simulation)")
    qmodel = qdq.quantize(network, batches, target=chosen, recipe=rules, progress=_progress())
    show.step(out, "verify", f"{file} in its runtime against the simulation")
    fidelity = qdq.verify(qmodel, file, compared, per_tensor=per_tensor, progress=_progress())
    out.print(str(fidelity), markup=False, soft_wrap=True)
    _verdict(out, file, fidelity, min_sqnr)


@app.command()
@guarded
def benchmark(
    file: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to time in ONNX Runtime.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FP32.onnx", help="Time this file too, interleaved.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Size of a dynamic first axis.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads of the runtime.", show_default="the runtime's choice"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of about 50 ms a file.")] = 30,
    debug: _Debug = False,
) -> None:
    """Measure the latency of an ONNX file: medians of interleaved rounds."""
    doors.check_packages()
    for path in (file, against):
        if path is not None:
            doors.check_readable(path)
    speed = qdq.benchmark(file, against, batch_size=batch_size, threads=threads, rounds=rounds, progress=_progress())
    _console().print(str(speed), markup=False, soft_wrap=True)


@app.command()
@guarded
def inspect(
    file: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Any ONNX file.")],
    debug: _Debug = False,
) -> None:
    """Show what in an ONNX file is quantized, how, and what is not. Reads the file alone."""
    from qdq._cli.onnx_survey import survey

    show.survey(_console(), survey(file))


@app.command()
@guarded
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the two ONNX files go.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option("--seed", help="Of the split, the weights and the shuffling.")] = 0,
    debug: _Debug = False,
) -> None:
    """Train a small network on handwritten digits, then quantize, export, verify and time it."""
    from qdq import digits_demo

    doors.check_packages()
    doors.check_demo()
    if not digits_demo.run(folder, console=_console(), seed=seed):
        raise typer.Exit(FAILED)


@app.command()
@guarded
def migrate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Python files, and folders to search.", show_default=False)
    ],
    write: Annotated[bool, typer.Option("--write", help="Rewrite the files; else they are only shown.")] = False,
    debug: _Debug = False,
) -> None:
    """List the imports of `pytorch_quantization` and what they become in qdq, as a diff; --write rewrites them.

    Exits with 0 if nothing is to be rewritten or all of it was, 1 if something would be rewritten or a file failed, and
    2 if a path does not exist. What cannot be rewritten safely is left and listed: the old names work as well.
    """
    from qdq._cli.migrate import migrate as migrate_files

    code = migrate_files(paths, write=write, console=_console())
    if code:
        raise typer.Exit(code)


@app.command()
@guarded
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    debug: _Debug = False,
) -> None:
    """Say what this machine and this environment can do, and whether int8 will be faster than float here.

    Exits with 0 unless QDQ_ENGINE names an engine that cannot run.
    """
    from qdq._cli import doctor as report
    from qdq.analysis import environment, int8_speed

    found = environment.collect()
    speeds = int8_speed.expectations(found)
    if as_json:
        typer.echo(report.as_json(found, speeds))
    else:
        report.show(_console(), found, speeds)
    report.check_engine(found)


def _options(
    batch_size: int, limit: int | None, keys: str | None, image_size: int | None, mean: str, std: str
) -> DataOptions:
    return DataOptions(
        batch_size=batch_size,
        limit=limit,
        keys=tuple(key.strip() for key in keys.split(",") if key.strip()) if keys else (),
        image_size=image_size,
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
    )


def _numbers(text: str, argument: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{argument} {text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def _progress() -> bool:
    return sys.stderr.isatty()


def _verdict(out: Console, path: Path, fidelity: Any, min_sqnr: float) -> None:
    """The last line, and exit code 1 where the file is not what was simulated (NaN compares as not verified)."""
    if fidelity.sqnr_db >= min_sqnr:
        out.print(f"[green]VERIFIED[/green] {escape(str(path))}: {show.decibels(fidelity.sqnr_db)}", soft_wrap=True)
        return
    raise CommandError(
        f"NOT VERIFIED: {path} was written, but its runtime differs from the simulation: "
        f"{show.decibels(fidelity.sqnr_db)} is below --min-sqnr {min_sqnr:g} dB. "
        "`qdq doctor` tells whether this processor saturates 8-bit products"
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Entry point of the command: never shows a traceback for an interrupt or a closed pipe."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="qdq")
    except KeyboardInterrupt:
        print("qdq: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader is gone (qdq inspect ... | head); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


if __name__ == "__main__":
    main()

"""The commands and their options. Bodies import what they need, so that help stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="planish",
    help="From a PyTorch model to a verified bundle: export, optimize, lower precision, build engines, prove it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at the stage cache, or empty it.", invoke_without_command=True)
app.add_typer(cache_app, name="cache")

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where the bundle goes (default: bundles/<name>).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace a bundle of another source, recipe or version, or time a doubtful one again."
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep cached stages.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Open what is code: .pt2 sources, foreign engines, a checked source's Python files."),
]
Source = Annotated[
    str,
    typer.Argument(
        help="A model folder, package:folder, module:factory, hub id, .onnx or .pt2 file.", metavar="SOURCE"
    ),
]


@app.callback(invoke_without_command=True)
def planish(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
) -> None:
    """From a PyTorch model to a verified bundle."""
    if version:
        from importlib.metadata import version as installed

        print(f"planish {installed('planish')}")
        raise typer.Exit()
    _help_without_command(context)


@cache_app.callback()
def cache(context: typer.Context) -> None:
    """Look at the stage cache, or empty it."""
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.", metavar="RECIPE")],
    out: Out = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run a recipe: the whole way from the source to a bundle."""
    from pipelines.cli.actions import run_recipe
    from pipelines.recipe import load_recipe

    overrides = [*(sets or []), *(["trust=true"] if trust else [])]
    return run_recipe(load_recipe(recipe, overrides), out, overwrite, no_cache, as_json, quiet)


@app.command()
def export(
    source: Source,
    task: Annotated[str | None, typer.Option("--task", "-t", help="What the model does (default: inferred).")] = None,
    out: Out = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Evaluation data: CSV, JSONL, Parquet …")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="ROLE=NAME", help="Which column plays which role.")
    ] = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Export a model with the default recipe."""
    from pipelines.cli.actions import export_recipe, run_recipe

    recipe = export_recipe(source, task, data, column or [], sets or [], trust)
    return run_recipe(recipe, out, overwrite, no_cache, as_json, quiet)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe with a section compress.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the compressed model goes, as a model folder.")],
    sets: Sets = None,
    no_cache: NoCache = False,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run a recipe's compression alone: distil, prune, share. `planish run` goes on from there to a bundle."""
    from pipelines.cli.compressing import run_compression
    from pipelines.recipe import load_recipe

    overrides = [*(sets or []), *(["trust=true"] if trust else [])]
    return run_compression(load_recipe(recipe, overrides), out, no_cache, as_json, quiet)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="SOURCE", help="Compare with the source too.")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency too.")] = True,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check a bundle again, on this machine, from the bundle alone."""
    from pipelines.cli.actions import verify_bundle

    return verify_bundle(bundle, against, latency, trust, as_json, quiet)


@app.command()
def bench(
    subject: Annotated[str, typer.Argument(help="A bundle, or a source.", metavar="BUNDLE|SOURCE")],
    points: Annotated[str | None, typer.Option("--points", help="Operating points, as 1x16,8x128.")] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1.0, help="Seconds to measure for.")] = 60.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Compute threads (default: all cores).")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure latency only; of a source, that of its FP32 variants."""
    from pipelines.cli.actions import bench_subject

    return bench_subject(subject, points, budget_s, threads, trust, as_json, quiet)


@app.command()
def engine(
    bundle: Annotated[Path, typer.Argument(help="A bundle.", metavar="BUNDLE")],
    check: Annotated[bool, typer.Option("--check", help="Build to see whether it can be, and keep nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the engines go (default: <bundle>-tensorrt).")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu", metavar="SM", help="Compute capability, as SM89 or 8.9; repeatable (default: SM89, SM120)."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Build a bundle's files with TensorRT for RTX, for GPUs that need not be here."""
    from pipelines.cli.engines import build_engines

    return build_engines(bundle, out, gpu or [], check, as_json, quiet)


@app.command()
def certify(
    checkpoint: Annotated[str, typer.Argument(help="A model folder, package:folder or hub id.", metavar="CHECKPOINT")],
    task: Annotated[str | None, typer.Option("--task", "-t", help="What the model does (default: inferred).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the checkpoint without its dead heads and neurons there.")
    ] = None,
    claims: Annotated[
        str | None,
        typer.Option("--claims", help="What is to be true, as sparsity=0.9,2:4; exit status 1 if it is not."),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Time it against its dense twin, where it has zeros.")] = True,
    points: Annotated[str | None, typer.Option("--points", help="Operating points, as 1x16,8x128.")] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Targets to time, as onnxruntime-cpu (default: all).")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1.0, help="Seconds to measure for.")] = 60.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Compute threads (default: all cores).")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say what a compressed checkpoint really is, and whether it is faster."""
    from pipelines.cli.certifying import certify_checkpoint

    return certify_checkpoint(
        checkpoint,
        out,
        as_json,
        quiet,
        task=task,
        claims=claims,
        latency=latency,
        points=points,
        targets=targets,
        budget_s=budget_s,
        threads=threads,
        trust=trust,
    )


@app.command()
def inspect(
    subject: Annotated[str, typer.Argument(help="A bundle or a model.", metavar="BUNDLE|MODEL")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say what is inside a bundle or a model, in a screen."""
    from pipelines.cli.inspecting import inspect_subject

    return inspect_subject(subject, as_json)


@app.command()
def doctor(as_json: Json = False, quiet: Quiet = False) -> int:
    """Say what this machine has, and what each missing target needs."""
    from pipelines.cli.inspecting import doctor as examine

    return examine(as_json)


@app.command(hidden=True)
def name(source: Source) -> int:
    """Print the name that a source's bundle gets by default."""
    from exporter.sources import resolve_source

    print(resolve_source(source, trust=True).name)
    return 0


@cache_app.command("ls")
def cache_ls(as_json: Json = False, quiet: Quiet = False) -> int:
    """List the cached stages."""
    from pipelines.cli.caching import list_cache

    return list_cache(as_json)


@cache_app.command("clean")
def cache_clean(
    older_than_days: Annotated[
        float | None, typer.Option("--older-than-days", min=0.0, help="Only what is older.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Remove cached stages that no running process uses."""
    from pipelines.cli.caching import clean_cache

    return clean_cache(older_than_days, as_json)

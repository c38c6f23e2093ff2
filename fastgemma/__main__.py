"""The command line: `python -m fastgemma demo | verify | doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Fused Triton kernels under Hugging Face's Gemma 4.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the picture and the figures.")] = Path("demo_output"),
    # typer reads the annotations at run time, where Python 3.10 needs Optional spelled out for it.
    steps: Annotated[Optional[int], typer.Option(min=1, help="Optimizer steps of each run.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    per_layer_embeddings: Annotated[str, typer.Option(help="That feature's mode: auto, host or gpu.")] = "auto",
) -> None:
    """Fine-tune a small Gemma 4 twice, stock and patched, and compare losses, step time and memory."""
    from fastgemma.demo.plan import DemoError, make_plan
    from fastgemma.demo.run import run_demo

    console = Console()
    try:
        run_demo(make_plan(device, steps, per_layer_embeddings), output, console)
    except DemoError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a model, or of a PEFT adapter whose base model is local.")],
    text: Annotated[Optional[Path], typer.Option(help="Text file for the batch (default: the demo's text).")] = None,  # noqa: UP045
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    four_bit: Annotated[bool, typer.Option("--4bit/--no-4bit", help="Quantise to NF4, as QLoRA does.")] = False,
    rank: Annotated[
        int, typer.Option(min=0, help="LoRA rank on the seven projections, unless PATH is an adapter; 0 trains it all.")
    ] = 16,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Compare stock and patched loss, logits and gradients of a local model, feature by feature.

    Exit status: 0 exact, 1 not, 2 could not be run, or no verdict.
    """
    import fastgemma
    from fastgemma.verification.load import Request, load

    request = Request(path, text, seq_len, batch_size, four_bit, rank, dtype, device)
    try:
        # As in a training script: patched before the model is loaded. Trained embeddings cannot stay in the file.
        with fastgemma.patched(per_layer_embeddings="auto" if rank or request.is_adapter else "gpu"):
            report = fastgemma.verify(*load(request))
    except (fastgemma.VerifyError, fastgemma.PatchError) as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except Exception:
        # Python's own status would be 1, which is a verdict here.
        Console(stderr=True).print_exception()
        raise typer.Exit(2) from None
    Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if report.ok else 1 if report.conclusive else 2)


@app.command("demo-stage", hidden=True)
def demo_stage(stage: str, work: Path) -> None:
    """One part of the demo, in a process of its own."""
    from fastgemma.demo.run import run_stage

    run_stage(stage, work)


@app.command()
def doctor() -> None:
    """Show versions, the GPU, whether the kernels can run here, and what patch() would replace."""
    import torch

    import fastgemma
    from fastgemma.demo.plan import gpu_problem
    from fastgemma.kernels.backend import interpreting
    from fastgemma.kernels.launch import why_efficient_attention

    console = Console()
    table = Table(title="Versions", show_header=False)
    table.add_row("fastgemma", fastgemma.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for library in _LIBRARIES:
        table.add_row(library, _version(library))
    table.add_row("CUDA of PyTorch", torch.version.cuda or "none")
    console.print(table)

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        console.print(
            f"GPU {index}: {card.name}, compute capability {card.major}.{card.minor}, "
            f"{card.total_memory / 2**30:.1f} GiB",
            highlight=False,
        )
        reason = why_efficient_attention(torch.device("cuda", index))
        if reason is not None:
            console.print(f"Attention runs through PyTorch's memory-efficient kernel there: {reason}.", highlight=False)
    problem = gpu_problem()
    if problem is None:
        console.print("Kernels can run on the GPU.", style="green")
    else:
        console.print(f"Kernels cannot run on a GPU: {problem}.", style="yellow")
        if interpreting():
            console.print("TRITON_INTERPRET=1 is set: they run on the CPU, in Triton's interpreter.", style="yellow")

    try:
        report = fastgemma.patch()
    except fastgemma.PatchError as error:
        console.print(str(error), style="bold red", markup=False)
        raise typer.Exit(1) from None
    console.print(str(report), markup=False, highlight=False)
    fastgemma.unpatch()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Entry point of the `fastgemma` command."""
    app(prog_name="fastgemma")


if __name__ == "__main__":
    main()

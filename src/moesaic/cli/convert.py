"""``moesaic convert``: dense models to mixtures of experts, merges, and mixtures with fewer experts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.methods import RUN, settings_of
from moesaic.errors import ConfigError, Interrupted

_SPLIT, _UPCYCLE, _MERGE, _PRUNE = (f"--method {name}" for name in ("split", "upcycle", "merge", "prune"))
_TEACH, _TEXT = "Training after --method split, and --method distill", "Text: split, distill and prune"


def command(
    model: Annotated[str, typer.Argument(help="A model folder, that of a training run, or a .gguf file.")],
    to: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    method: Annotated[str, typer.Option(help="split, distill, upcycle, merge, prune, or dense.")],
    experts: Annotated[
        int | None,
        typer.Option(help="Routed experts of a layer; 16 for split, 8 for upcycle by default.", rich_help_panel=_SPLIT),
    ] = None,
    active: Annotated[
        float | None,
        typer.Option(
            help="The share of the feed-forward's parameters that a token uses, shared ones counted; 0.5 by default.",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(
            help="Hidden neurons of a shared expert, which every token uses; none by default.", rich_help_panel=_SPLIT
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="What puts neurons into one expert: routed (the default), coactivation, weight, or domain.",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    pre_gating: Annotated[
        str | None,
        typer.Option(
            help="none (the default): a router in each layer; stack: one that decides for all, from the token's "
            "embedding (Read-ME).",
            rich_help_panel=_SPLIT,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Learn from the dense model for so long.", rich_help_panel=_TEACH),
    ] = None,
    train_tokens: Annotated[
        int | None, typer.Option(help="Instead of --minutes: on so many tokens of text.", rich_help_panel=_TEACH)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="distill: the dense model that MODEL, a mixture, was made of.", rich_help_panel=_TEACH),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="kl (the default), reverse_kl, or taid.", rich_help_panel=_TEACH)
    ] = None,
    labels: Annotated[
        float | None,
        typer.Option(
            help="Part of the loss that is the text's own next token, 0 to 1; the rest is the dense model's "
            "word; 0.3 by default.",
            rich_help_panel=_TEACH,
        ),
    ] = None,
    mixture: Annotated[
        str | None,
        typer.Option(
            help="Shares of the text's domains: excess (more of what is furthest behind, the default), even, or "
            "tokens, as they come.",
            rich_help_panel=_TEACH,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest; 0.0004 by default.", rich_help_panel=_TEACH)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts of a token (also for merge into experts); 2 by default.", rich_help_panel=_UPCYCLE),
    ] = None,
    perturb: Annotated[
        bool | None,
        typer.Option(
            help="Make the copies different without changing what they compute; on by default.",
            rich_help_panel=_UPCYCLE,
        ),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            help="Share of each copy's neurons that is drawn anew (Drop-Upcycling); none by default.",
            rich_help_panel=_UPCYCLE,
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="What is added to each copy, relative to its own values; nothing by default.", rich_help_panel=_UPCYCLE
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="Router of the new experts (also for merge into experts); softmax_topk by default.",
            rich_help_panel=_UPCYCLE,
        ),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="A model that was fine-tuned from MODEL, which is the base; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="dense (the default): one model like the base; experts: a mixture with one expert for each "
            "(Branch-Train-MiX).",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="merge: linear (the default), slerp, task_arithmetic, ties, dare, dare_ties, breadcrumbs or "
            "consensus; prune: reap (the default), usage or similarity.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One a model, with commas: 0.7,0.3.", rich_help_panel=_MERGE)
    ] = None,
    layer_weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Other weights for some layers: 0-9=1,0 or 20:ffn=0,1 or outside=0.5,0.5; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the merge method, such as density=0.2; may be given several times.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    base_expert: Annotated[
        bool | None, typer.Option(help="The base is an expert too; on by default.", rich_help_panel=_MERGE)
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Experts of a layer that stay.", rich_help_panel=_PRUNE)] = None,
    share: Annotated[
        float | None, typer.Option(help="Instead of --keep: the part of the experts that goes.", rich_help_panel=_PRUNE)
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(help="drop them (the default), or merge them into those that stay.", rich_help_panel=_PRUNE),
    ] = None,
    similarity: Annotated[
        str | None,
        typer.Option(help="Experts are alike by their outputs (the default) or weights.", rich_help_panel=_PRUNE),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Instead of text: the trace in a report of moesaic inspect, for --by usage or --similarity weights.",
            rich_help_panel=_PRUNE,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A file or folder of text, DOMAIN=PATH, or 'stdlib', the default; may be given several times.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="split, prune: about how many of it to measure on; 16384 by default.", rich_help_panel=_TEXT),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the model sees at once; 512 by default, or as many as it has positions.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random; 0 by default.")] = None,
    shard_gib: Annotated[float, typer.Option(help="The largest file of weights, and the memory for it.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a mixture of experts from a dense model, merge models, or prune a mixture; MODEL stays as it is.

    split: each feed-forward is cut into experts of neurons that are active together; with all on, the same model.
    With --minutes (or --train-tokens) the mixture then learns from MODEL what it lost.

    distill: a mixture that was split or upcycled learns from the dense model that it was made of.

    upcycle: every expert is a copy of the feed-forward; the same model until it is trained.

    merge: several models that were fine-tuned from MODEL become one, or a mixture with an expert for each.

    prune: the least useful experts of a mixture go, or are merged into the others.

    dense: the same model as safetensors, such as of a .gguf file, which every other command then reads.

    Interrupted, the same command goes on.
    """
    given = {name.rstrip("_"): value for name, value in locals().items() if value is not None}
    for own in ("model", "to", "method", "shard_gib", "as_json"):
        del given[own]
    fields = settings_of(method, given)
    if not 0 < shard_gib < 1e6:
        raise ConfigError(f"--shard-gib is {shard_gib:g}: it must be above 0")
    try:
        lines, made = RUN[method](model, to, fields, int(shard_gib * 2**30))
    except KeyboardInterrupt:
        kept = [path for end in (".partial", ".split", ".split.partial") if (path := Path(f"{to}{end}")).exists()]
        if not kept:
            raise
        raise Interrupted(f"interrupted: the same command goes on from {str(kept[0])!r}") from None
    if as_json:
        from moesaic.cli.output import print_json

        print_json({"method": method, "folder": to, "made": made})
        return
    print("\n".join(lines))
    written = made if method == "dense" else made.written
    size = f"{written.parameters / 1e6:,.1f} M parameters, {written.nbytes / 1e6:,.0f} MB"
    print(f"wrote {to}: {size}" + (f" in {written.shards} files" if written.shards > 1 else ""))
    if method in ("split", "distill", "upcycle"):
        print("what it keeps of the dense model:")
        print(f"moesaic eval {shlex.quote(str(to))} --against {shlex.quote(teacher or model)}")

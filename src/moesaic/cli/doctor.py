"""``moesaic doctor``: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.experts.native.limits import Native
    from moesaic.hardware import Cpu, Device, Speed
    from moesaic.parallel.choice.links import Link


def command(
    network: Annotated[
        bool, typer.Option("--network", help="Only measure the links between the ranks that torchrun has started.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine can do: versions, CPU, devices, expert backends, and how fast it measures."""
    if network:
        _tell_network(as_json)
        return
    from moesaic import hardware
    from moesaic.cli.output import print_json, print_table
    from moesaic.experts import status
    from moesaic.experts.native import library, limits

    versions, cpu, devices, backends = hardware.versions(), hardware.cpu(), hardware.devices(), status()
    native = limits.measure() if library.missing() is None else None
    speeds = [
        hardware.measure(each.device, limits.read_bandwidth if native and each.device == "cpu" else None)
        for each in devices
    ]
    if as_json:
        print_json(
            {
                "versions": versions,
                "cpu": cpu,
                "devices": devices,
                "measured": speeds,
                "native": native,
                "backends": {name: {"available": not why, "reason": why} for name, why in backends.items()},
            }
        )
        return
    print_table("Versions", [], [(name, version or "not installed") for name, version in versions.items()])
    print_table("CPU", [], _cpu_rows(cpu))
    for device, speed in zip(devices, speeds, strict=True):
        print_table(f"{device.device}: {device.name}", [], _device_rows(device, speed))
    if native:
        print_table("Native kernels", [], _native_rows(native))
    rows = [(name, f"not here: {why}" if why else "available") for name, why in backends.items()]
    print_table("Expert backends", [], rows)


def _cpu_rows(cpu: Cpu) -> list[tuple[str, str]]:
    return [
        ("model", f"{cpu.model} ({cpu.architecture})"),
        ("cores", f"usable {cpu.cores}; PyTorch uses {cpu.threads} threads"),
        ("features", " ".join(cpu.features) or "unknown"),
        ("PyTorch kernels", cpu.capability),
    ]


def _device_rows(device: Device, speed: Speed) -> list[tuple[str, str]]:
    return [
        ("memory", f"{device.memory / 2**30:.1f} GiB"),
        ("streaming read", f"{speed.read_bytes_per_second / 1e9:.1f} GB/s"),
        *_rate_rows("matmul", speed.matmul_flop_per_second),
    ]


def _native_rows(native: Native) -> list[tuple[str, str]]:
    others = [isa for isa in native.isas if isa != native.isa]
    return [
        ("instruction set", f"{native.isa} (this CPU also runs {', '.join(others) or 'no other'})"),
        ("threads", "PyTorch's, by OpenMP" if native.openmp else "one: built without OpenMP"),
        *_rate_rows("multiply-adds", native.multiply_add_flop_per_second),
    ]


def _rate_rows(name: str, flop_per_second: dict[str, float]) -> list[tuple[str, str]]:
    return [(f"{name} {dtype}", f"{rate / 1e9:,.0f} GFLOP/s") for dtype, rate in flop_per_second.items()]


def _tell_network(as_json: bool) -> None:
    from moesaic.cli.output import print_json, print_table
    from moesaic.parallel.choice.network import measure_job

    told = measure_job()
    if told.rank:
        return
    if as_json:
        measured = told.links
        print_json(
            {
                **{name: getattr(told, name) for name in ("ranks", "hosts", "machines")},
                "inside": measured.inside if measured and told.has_inside else None,
                "between": measured.between if measured and told.has_between else None,
                "start": measured.start if measured else None,
                "cpu": measured.cpu if measured else None,
            }
        )
        return
    if told.links is None:
        print("One rank has nobody to talk to: torchrun --nproc-per-node N -m moesaic doctor --network")
        return
    rows = []
    if told.has_inside:
        rows.append(_link_row("inside a host", told.links.inside))
    if told.has_between:
        rows.append(_link_row("between hosts", told.links.between))
    header = ["links", "a message (alpha)", "a byte of one rank (beta)", "one rank", "all ranks of a host"]
    ranks = f"{told.ranks} ranks on {told.hosts} host{'s' if told.hosts > 1 else ''}"
    print_table(f"Network: {ranks}, all of them sending at once", header, rows)
    print(
        "An exchange takes alpha for each rank that a rank sends to, and beta for each byte that the busiest one sends "
        f"or receives; {1e6 * told.links.start:.0f} us beside that. A byte costs a core {1e9 * told.links.cpu:.2f} ns."
    )


def _link_row(name: str, link: Link) -> tuple[str, ...]:
    one = f"{1e-9 / link.beta:.2f} GB/s" if link.beta else "no limit seen"
    together = f"{1e-9 / link.shared:.2f} GB/s" if link.shared else "no limit seen"
    return name, f"{1e6 * link.alpha:.0f} us", f"{1e9 * link.beta:.2f} ns", one, together

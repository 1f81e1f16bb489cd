"""The commands ``tightfit fleet federate ...``: rounds of devices that come and go, over Flower."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.profiles.option_fields import PRIMARY
from tightfit.runtime.cli.command import Command
from tightfit.runtime.cli.options import (
    Cgroup,
    Debug,
    Json,
    read,
    with_options,
)
from tightfit.runtime.common.children import own_environment
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.federated.options import RoundOptions
from tightfit.runtime.session.options import DataOptions, EarlierRunOptions, RateOptions
from tightfit.runtime.supervision.printing import answer

if TYPE_CHECKING:
    from tightfit.planner.fleet.schema import FleetPlan
    from tightfit.runtime.federated.device import DeviceSettings

MEMBER = "{member}"
"""stands for the device's name in the path of its data"""

federate = typer.Typer(
    help="Train in rounds on devices that come and go, each on data of its own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Root = Annotated[
    str | None,
    typer.Option("--root-certificates", metavar="FILE", help="Certificates of the authority that signed the server's."),
    PRIMARY,
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where `tightfit fleet plan` put the fleet's plan.")]


@federate.command(cls=Command)
@with_options(RoundOptions)
@with_options(DataOptions, "columns", "packing")
def run(
    folder: Folder,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds in all.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the rounds, the adapter and the report.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE.jsonl|random",
            help="Run all devices on this machine too, to try it out, on these data; {member} in the path stands for"
            " each one's name. Without it, devices join from elsewhere.",
        ),
        PRIMARY,
    ] = None,
    host: Annotated[str, typer.Option(help="Address at which devices reach the server."), PRIMARY] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port of the server; 9092, or any that is free with --data.")] = None,
    certificate: Annotated[
        str | None, typer.Option("--ssl-certfile", metavar="FILE", help="The server's certificate, for TLS."), PRIMARY
    ] = None,
    certificate_key: Annotated[
        str | None,
        typer.Option("--ssl-keyfile", metavar="FILE", help="The private key of that certificate."),
        PRIMARY,
    ] = None,
    authority: Annotated[
        str | None,
        typer.Option("--ssl-ca-certfile", metavar="FILE", help="Certificates of the authority that signed it."),
        PRIMARY,
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines in the clear, without a certificate."), PRIMARY
    ] = False,
    meet: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Split rounds: where the server's runs listen for devices, which reach them there; one port for each"
            " device from this one on, 29400 if left out.",
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--device-key", metavar="FILE.pub", help="Public key of a device that may join; once for each. Needs TLS."
        ),
        PRIMARY,
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last round in the folder."), PRIMARY
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left."), PRIMARY] = False,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Start from the adapter in this folder instead of a new one.")
    ] = None,
    cgroup: Cgroup = True,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Serve rounds to the devices of a plan: send the adapter out, add the answers up by tokens, and so on."""
    EarlierRunOptions(resume=resume, overwrite=overwrite)
    tls_files = [certificate, certificate_key, authority]
    if any(tls_files) and not all(tls_files):
        raise InputError("--ssl-certfile, --ssl-keyfile and --ssl-ca-certfile belong together: give all of them")
    if data is None and not any(tls_files) and not insecure:
        raise InputError(
            "devices join over TLS: give --ssl-certfile, --ssl-keyfile and --ssl-ca-certfile, or --insecure"
        )
    from tightfit.planner.fleet.io import load_fleet
    from tightfit.runtime.cli.terminal import messages
    from tightfit.runtime.federated import flower
    from tightfit.runtime.federated.server import SuperLinkOptions, Tls, serve

    flower.check_installed()
    fleet = load_fleet(folder, in_rounds=True)
    names = fleet.names
    console = messages()
    tls = None
    if certificate and certificate_key and authority:
        tls = Tls(certificate=_existing(certificate), key=_existing(certificate_key), authority=_existing(authority))
    round_options = read(
        RoundOptions,
        options,
        rounds=rounds,
        fleet=str(folder.absolute()),
        out=str(output.absolute()),
        adapter=str(adapter.absolute()) if adapter else "",
    )
    if round_options.least > len(names):
        raise InputError(f"--min {round_options.least}: {len(names)} devices take part in this plan; give at most that")
    address = host
    if not fleet.cut:
        if meet is not None:
            raise InputError(f"--meet {meet}: the devices of this plan hold all layers and meet nobody; leave it out")
    else:
        address, meet_port = _meeting(fleet, meet, host, local=data is not None)
        round_options = round_options.but(meet=address, port=meet_port, cgroup=cgroup)
    devices: list[DeviceSettings] = []
    truncate = read(DataOptions, options).truncate
    if data is not None:
        devices = [
            _device(folder, fleet, name, data, output / "devices" / name, address, truncate=truncate, cgroup=cgroup)
            for name in names
        ]
    serving = SuperLinkOptions(
        host=host,
        port=port or (0 if devices else flower.PORT),
        tls=tls,
        keys=[_existing(key) for key in keys or []],
        devices=devices,
    )
    if not devices:
        console.print(
            f"on each device, with the folder of the plan there:\n{_joining(names, serving.port, tls is not None)}"
        )

    def print_round(record: dict[str, Any]) -> None:
        missing = f"; without {', '.join(record['left_out'])}" if record["left_out"] else ""
        console.print(
            f"round {record['round']}/{rounds}: loss {record['loss']:.4f}, {record['tokens']} tokens,"
            f" {record['seconds']:.1f} s (planned {fleet.makespan_seconds:.1f}){missing}"
        )

    report = serve(round_options, serving, resume=resume, overwrite=overwrite, told=print_round)
    answer(report, _rounds_table(report["rounds"]), as_json=as_json)


def _existing(path: str) -> str:
    """An absolute path of a file. Raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    return str(Path(path).absolute())


def _meeting(fleet: FleetPlan, meet: str | None, host: str, *, local: bool) -> tuple[str, int]:
    """Address and first port of the server's runs in split rounds. Raises InputError where devices could not reach
    them.
    """
    from tightfit.planner.fleet.parts import PORT
    from tightfit.planner.fleet.schema import SERVER
    from tightfit.runtime.session.fleet import address_of

    server = fleet.member(SERVER)
    if not server.measured:
        raise InputError(
            f"the server's times are estimated for {server.device}, not measured; profile on the server itself"
            " and plan again"
        )
    if meet is None and host in ("0.0.0.0", "::"):  # noqa: S104  compared, not bound
        raise InputError(f"--host {host} is no address that devices reach; give the server's own with --meet HOST")
    return address_of("--meet" if meet else "--host", meet or host, 0 if local else PORT)


def _device(
    folder: Path,
    fleet: FleetPlan,
    name: str,
    data: str,
    work: Path,
    server: str,
    *,
    truncate: bool,
    cgroup: bool,
) -> DeviceSettings:
    """The settings of a device that reaches the server at the host `server`. Raises InputError for one that takes no
    part in the plan, or was not measured.
    """
    from tightfit.planner.fleet.io import fleet_path, load_member_plan, plan_file
    from tightfit.runtime.federated.device import DeviceSettings

    plan = load_member_plan(folder, fleet, name)  # it is there, and the right one
    member = fleet.member(name)
    if not member.measured:
        raise InputError(
            f"member {name!r}: its times are estimated for {member.device}, not measured; profile on the device itself"
            " and plan again"
        )
    data_path = data.replace(MEMBER, name)
    device = DeviceSettings(
        member=name,
        plan=str((fleet_path(folder).parent / plan_file(name)).absolute()),
        rank=fleet.replica(name).rank,
        data=data_path if data_path == "random" else str(Path(data_path).absolute()),
        work=str(work.absolute()),
        truncate=truncate,
        cgroup=cgroup,
    )
    if not fleet.cut:
        return device
    from tightfit.runtime.federated.split_stage import prepared_device

    return prepared_device(device, plan, str(folder.absolute()), server)


def _joining(names: list[str], port: int, tls: bool) -> str:
    """The commands with which devices join."""
    trust = "--root-certificates ca.crt" if tls else "--insecure"
    return "\n".join(
        f"  tightfit fleet federate join FOLDER --member {shlex.quote(name)} --superlink HOST:{port} {trust} --data"
        " DATA -o WORK"
        for name in names
    )


@federate.command(cls=Command)
@with_options(DataOptions, "columns", "packing")
def join(
    context: typer.Context,
    folder: Folder,
    member: Annotated[str, typer.Option(metavar="NAME", help="Which device of the plan this is.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server is.")],
    data: Annotated[str, typer.Option(metavar="DIR|FILE.jsonl|random", help="This device's own training data.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="WORK", help="Folder for this device's runs.")],
    insecure: Annotated[bool, typer.Option("--insecure", help="The server has no certificate."), PRIMARY] = False,
    root_certificates: Root = None,
    private_key: Annotated[
        str | None,
        typer.Option(
            "--private-key",
            metavar="FILE",
            help="Key that the server knows this device by (ssh-keygen -t ecdsa -b 384).",
        ),
        PRIMARY,
    ] = None,
    cgroup: Cgroup = True,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Take part as a device: wait for rounds, train in each under the cap, and answer, until Ctrl-C."""
    if insecure and (root_certificates or private_key):
        raise InputError("--insecure is without certificates and keys; leave it out, or them")
    from tightfit.planner.fleet.io import load_fleet
    from tightfit.runtime.federated import flower
    from tightfit.runtime.federated.fleet_api import Endpoint
    from tightfit.runtime.federated.server import node_command

    flower.check_installed()
    server = Endpoint.of(superlink, tls=not insecure, root_certificates=root_certificates).host
    fleet = load_fleet(folder, in_rounds=True)
    truncate = read(DataOptions, options).truncate
    device = _device(folder, fleet, member, data, output, server, truncate=truncate, cgroup=cgroup)
    authority = _existing(root_certificates) if root_certificates else None
    key = _existing(private_key) if private_key else None
    settings = device.write()
    environment = own_environment()
    command = node_command(settings, superlink, authority, key, insecure=insecure)
    os.execvpe(command[0], command, environment)  # noqa: S606  our own command line


@federate.command(cls=Command, hidden=True)
@with_options(RateOptions)
@with_options(DataOptions, "columns", "packing")
def stage(
    context: typer.Context,
    folder: Folder,
    member: Annotated[str, typer.Option(metavar="NAME", help="The device whose service this is.")],
    at: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server's run listens.")],
    data: Annotated[str, typer.Option(metavar="FILE.records", help="The device's data, or their labels.")],
    steps: Annotated[int, typer.Option(help="Micro-batches of the round.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; what it holds is replaced.")],
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="The part of the adapter that training starts from.")],
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for the other stage.")],
    server: Annotated[bool, typer.Option("--server", help="Run the server's side.")] = False,
    cgroup: Cgroup = True,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Run one side of a device's service in a split round, as its node and the server do."""
    from tightfit.planner.fleet.io import key_path, load_fleet, load_member_plan, load_part_plan
    from tightfit.runtime.cli.run import carry_out
    from tightfit.runtime.federated.split_stage import stage_membership
    from tightfit.runtime.session.fleet import address_of
    from tightfit.runtime.session.options import RunOptions

    fleet = load_fleet(folder, in_rounds=True)
    if not fleet.cut:
        raise InputError(f"{folder}: its devices hold all layers; plan rounds with a [server] to split them")
    plan = load_member_plan(folder, fleet, member)
    if server:
        plan = load_part_plan(folder, fleet.replica(member).parts[-1])
    host, port = address_of("--at", at)
    seat = stage_membership(fleet, member, host, port, key_path(folder), timeout, server=server)
    training = RunOptions(
        **dict(read(RateOptions, options)),
        steps=steps,
        checkpoint_every=0,
        truncate=read(DataOptions, options).truncate,
        adapter=adapter,
        member=seat,
        out=output,
        overwrite=True,
        cgroup=cgroup,
    )
    carry_out(plan, data, training, as_json=as_json, debug=debug, replace=bool(context.obj))


def _rounds_table(lines: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tightfit.runtime.common.units import format_size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("round", "loss", "tokens", "seconds", "answers", "largest peak", "left out"):
        table.add_column(heading, justify="left" if heading in ("answers", "left out") else "right")
    for line in lines:
        peaks = [figures["peak_bytes"] + figures["flower_bytes"] for figures in line["members"].values()]
        table.add_row(
            str(line["round"]),
            f"{line['loss']:.4f}",
            str(line["tokens"]),
            f"{line['seconds']:.1f}",
            Text(", ".join(line["members"])),
            format_size(max(peaks)),
            Text("; ".join(f"{name}: {why}" for name, why in line["left_out"].items())),
        )
    return table

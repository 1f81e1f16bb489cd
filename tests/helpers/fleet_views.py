"""What a fleet's plan says of each device, as one row, and the plan with fields of one device replaced."""

from __future__ import annotations

from types import SimpleNamespace

from tightfit.planner.fleet.schema import Member, Part, Replica

RECORDS = (Member, Part, Replica)


def computing(fleet):
    """A row for each device that takes part: the fields of its replica, its part and itself."""
    return [SimpleNamespace(**_row(fleet, name)) for name in fleet.names]


def everyone(fleet):
    """The same of all devices but a server of rounds; those that take no part come last and have no micro-batches."""
    return [*computing(fleet), *(SimpleNamespace(**vars(member), micro_batches=0, plan=None) for member in fleet.idle)]


def _row(fleet, name):
    """Fields of the part win over those of the replica, but in rounds the replica's bound is the member's."""
    replica, part = fleet.replica(name), fleet.part(name)
    turn = vars(replica.turn) if replica.turn else {}
    row = vars(fleet.member(name)) | vars(replica) | turn | vars(part)
    return row | ({"bound_seconds": replica.bound_seconds} if fleet.in_rounds else {})


def changed(fleet, name, /, **changes):
    """The fleet with fields of a device, of its part, or of its replica replaced; of a part where several have it."""
    own = [{key: value for key, value in changes.items() if _owner(key, fleet) is record} for record in RECORDS]
    members = [member.model_copy(update=own[0]) if member.name == name else member for member in fleet.members]
    renamed = {"member": changes["name"]} if "name" in changes else {}
    replicas = []
    for replica in fleet.replicas:
        if name in [part.member for part in replica.parts] and (own[1] or own[2] or renamed):
            parts = [
                part.model_copy(update=own[1] | renamed) if part.member == name else part for part in replica.parts
            ]
            replica = replica.model_copy(update=own[2] | {"parts": parts})  # noqa: PLW2901
        replicas.append(replica)
    return fleet.model_copy(update={"members": members, "replicas": replicas})


def _owner(field, fleet):
    found = next((record for record in (Part, Member, Replica) if field in record.model_fields), None)
    if field == "bound_seconds" and fleet.in_rounds:
        found = Replica
    assert found is not None, field
    return found


def of(device, /, **changes):
    """Makes the fleet with fields of a device, by its name or place among those that take part, replaced."""
    return lambda fleet: changed(fleet, fleet.names[device] if isinstance(device, int) else device, **changes)


def turned(device, /, **changes):
    """The same with fields of a replica's turn."""

    def change(fleet):
        turn = fleet.replicas[device].turn.model_copy(update=changes)
        return changed(fleet, fleet.names[device], turn=turn)

    return change


def mutated(fleet, change):
    """The fleet as `change` makes it, which may give fields of its own alone."""
    made = change(fleet)
    return fleet.model_copy(update=made) if isinstance(made, dict) else made

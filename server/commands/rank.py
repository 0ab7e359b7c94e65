"""``internvl rank``: a further host of one model."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from server.checkpoint import with_model
from server.flags import add_flag, forget_secrets, given
from wire.loading import check_ranks, load
from wire.settings import SettingError, each_setting

# What a host of ranks can be told; everything else comes from the leader.
SHARED = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "nodes",
    "rank_port",
    "rank_secret_file",
)
OF_A_RANK = ("model", "revision", *SHARED, "log_level", "log_format")
_MOST = 65535  # of a port


def add(commands: Any) -> None:
    """Add the command's parser."""
    rank = commands.add_parser(
        "rank",
        help="be a further host of one model",
        description="Run the processes of this host for a model that is split over several hosts, "
        "for the server on the leader, which has the same --tensor-parallel-size, "
        "--pipeline-parallel-size and --nodes. It joins again whenever the leader starts again, "
        "until it gets SIGTERM.",
    )
    rank.add_argument(
        "--leader",
        metavar="HOST[:PORT]",
        help="where the server's host is, and its rank_port "
        "[LWS_LEADER_ADDRESS, or MASTER_ADDR and MASTER_PORT]",
    )
    rank.add_argument(
        "--node",
        metavar="N",
        help="the number of this host, from 1 on [LWS_WORKER_INDEX, or RANK]",
    )
    for _, field, kind in each_setting():
        if field.name in OF_A_RANK:
            add_flag(rank, field, kind)
    rank.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Become the process of this host's ranks. Raises SettingError."""
    from engine.client import environment

    told = host_of_ranks(given(options), os.environ)
    forget_secrets()
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "engine.node", msgspec.json.encode(told).decode()]
    # In place of this process, so that signals reach it directly.
    return os.execve(command[0], command, environment())  # noqa: S606


def host_of_ranks(flags: dict[str, str], env: Mapping[str, str]) -> dict[str, Any]:
    """What ``engine.node`` is told, from flags, settings, and the variables that LeaderWorkerSet or
    a launcher of PyTorch has set. Raises SettingError."""
    leader, node = flags.pop("leader", ""), flags.pop("node", "")
    settings = load(flags, env)
    engine, port = settings.engine, str(settings.engine.rank_port)
    if not leader and not (leader := env.get("LWS_LEADER_ADDRESS", "")):
        leader, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", port)
    found = re.fullmatch(r"\[([^]]+)\](?::(\d+))?|([^:]+)(?::(\d+))?", leader)
    if found is None:
        raise SettingError("--leader, LWS_LEADER_ADDRESS or MASTER_ADDR must say where rank 0 is")
    name, port = found[1] or found[3], found[2] or found[4] or port
    try:
        name.encode("idna")  # as whoever looks it up will
    except UnicodeError:
        raise SettingError(f"--leader: {name!r} is not the name of a host") from None
    if engine.nodes == 1:
        nodes = _number(
            "--nodes, LWS_GROUP_SIZE or WORLD_SIZE", _first(env, "LWS_GROUP_SIZE", "WORLD_SIZE")
        )
        engine = dataclasses.replace(engine, nodes=nodes)
    number = _number(
        "--node, LWS_WORKER_INDEX or RANK", node or _first(env, "LWS_WORKER_INDEX", "RANK")
    )
    if not 0 < number < engine.nodes:
        raise SettingError(
            f"--node: {number} is not one of {engine.nodes} nodes; the leader's is 0"
        )
    check_ranks(engine)
    model = with_model(settings).engine.model if engine.model else ""
    return {
        "leader": name,
        "port": _number("the leader's port", port),
        "node": number,
        "processes": engine.processes // engine.nodes,
        "model": model,
        "secret_file": engine.rank_secret_file,
        "log_level": settings.server.log_level,
        "log_format": settings.server.log_format,
    }


def _first(env: Mapping[str, str], *names: str) -> str:
    return next((env[name] for name in names if env.get(name)), "")


def _number(what: str, text: str) -> int:
    if not text:
        raise SettingError(f"{what} must be given")
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > _MOST:
        raise SettingError(f"{what}: {text!r} is not a number up to {_MOST}")
    return int(text)

"""The ``internvl`` command. Flags are generated from wire.settings, so a new setting is a new
flag; only what was given on the command line is passed on, everything else is settled there."""

import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from server import hub
from server.flags import GROUPS, add_flag, settings_page
from wire import logs
from wire.loading import ENV_PREFIX, check_ranks, load
from wire.settings import EngineSettings, SettingError, Settings, each_setting

DEMO_NAME = "internvl-demo"
EXIT_USAGE = 2
_MOST = 65535  # of a port

# Settings that a plan depends on.
PLANNED = (
    *(
        "revision",
        "dtype",
        "quantization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
    ),
    *("max_tiles", "encoder_chunk_tiles", "encoder_cache_bytes", "gpu_memory_utilization"),
)

# What a host of ranks can be told; everything else comes from the leader.
_SHARED = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "nodes",
    "rank_port",
    "rank_secret_file",
)
OF_A_RANK = ("model", "revision", *_SHARED, "log_level", "log_format")

_ABOUT = """\
An OpenAI-compatible inference server for InternVL3.

  internvl serve                          the embedded demo model on http://127.0.0.1:8000
  internvl serve --model /models/InternVL3-2B --host 0.0.0.0 --port 9000
  INTERNVL_API_KEY=secret internvl serve  clients must send this key
  internvl serve --config server.toml     the same settings from a file
  internvl key alice >> keys.toml         make a key for --api-keys-file
  internvl doctor                         what this machine has to serve with
  internvl plan /models/InternVL3-8B --gpu-memory 24GiB    whether a model fits
  internvl rank --leader 10.0.0.1         a further host of one model (--nodes)
  internvl verify /models/InternVL3-2B    compare its answers with transformers'

Every setting can be given as a flag, as an environment variable (INTERNVL_ and its name in
capitals) or in a TOML file; the flag wins, then the variable. `internvl serve --help` lists them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        parser.print_help()
        return EXIT_USAGE
    options = parser.parse_args(given)
    if options.command == "version":
        return _version()
    if options.command == "key":
        return _key(options.name)
    if options.command in ("doctor", "plan", "verify"):
        # The model's side is never imported here: it is a process of its own, as the engine is.
        run = {"doctor": _doctor, "plan": _plan, "verify": _verify}[options.command]
        return run(options)
    if options.command == "settings":
        print(settings_page(), end="")
        return 0
    if options.command == "rank":
        return _rank(options)
    return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    try:
        settings = with_critic(with_model(load(_given(options), os.environ, options.config)))
    except SettingError as error:
        print(f"internvl serve: {error}", file=sys.stderr)
        return EXIT_USAGE
    logs.setup(settings.server.log_level, "api", settings.server.log_format)
    _forget_secrets()
    # Imported late: `internvl --help` should not wait for a web framework.
    from engine.client import ProcessEngine
    from preprocessing import MediaPipeline
    from server.app import create_app
    from server.run import serve

    def engine_of(group: EngineSettings, name: str) -> ProcessEngine:
        return ProcessEngine(
            group,
            name=name,
            log_level=settings.server.log_level,
            log_format=settings.server.log_format,
            max_unread=settings.server.max_unread_tokens,
        )

    critic = None
    if settings.critic.critic_model:
        critic = engine_of(settings.critic_engine, "critic")
    media = MediaPipeline(settings.media)
    try:
        app = create_app(settings, engine_of(settings.engine, "engine"), media, critic=critic)
        return serve(app, settings)
    except SettingError as error:
        print(f"internvl serve: {error}", file=sys.stderr)
        return EXIT_USAGE


def _forget_secrets() -> None:
    """No process that is started needs to know them."""
    for _, field, _ in each_setting():
        if field.metadata["secret"]:
            os.environ.pop(ENV_PREFIX + field.name.upper(), None)


def _rank(options: argparse.Namespace) -> int:
    from engine.client import environment

    try:
        told = host_of_ranks(_given(options), os.environ)
    except SettingError as error:
        print(f"internvl rank: {error}", file=sys.stderr)
        return EXIT_USAGE
    _forget_secrets()
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "engine.node", msgspec.json.encode(told).decode()]
    # In place of this process, so that signals reach it directly.
    return os.execve(command[0], command, environment())  # noqa: S606


def host_of_ranks(given: dict[str, str], env: Mapping[str, str]) -> dict[str, Any]:
    """What ``engine.node`` is told, from flags, settings, and the variables that LeaderWorkerSet or
    a launcher of PyTorch has set. Raises SettingError."""
    leader, node = given.pop("leader", ""), given.pop("node", "")
    settings = load(given, env)
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


def _doctor(options: argparse.Namespace) -> int:
    from server.doctor import examine

    command = [sys.executable, "-m", "engine.doctor", *([options.model] if options.model else ())]
    status = subprocess.run(command, check=False).returncode
    return status or examine()


def _plan(options: argparse.Namespace) -> int:
    given = _given(options)
    memory = given.pop("gpu_memory")
    try:
        settings = with_model(load(given, {}), weights=False)
    except SettingError as error:
        print(f"internvl plan: {error}", file=sys.stderr)
        return EXIT_USAGE
    told = msgspec.json.encode(settings.engine).decode()
    command = [sys.executable, "-m", "engine.sizing", str(memory), told]
    return subprocess.run(command, check=False).returncode


def _verify(options: argparse.Namespace) -> int:
    from server.verify import CASES_OF, verify

    given = _given(options)
    against, tokens, out = (given.pop(name, None) for name in ("against", "tokens", "out"))
    names = given.pop("cases", list(CASES_OF))
    try:
        settings = with_model(load(given, {}))
        other = settings if against is None else with_model(load({"model": against}, {}))
        unknown = [name for name in names if name not in CASES_OF]
        if unknown:
            raise SettingError(f"--cases: {unknown[0]!r} is none of {', '.join(CASES_OF)}")
        # Known before hours have gone into it.
        if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
            raise SettingError(f"--out: {out} cannot be written")
    except SettingError as error:
        print(f"internvl verify: {error}", file=sys.stderr)
        return EXIT_USAGE
    return verify(settings, Path(other.engine.model), names, tokens, out)


def _some(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.ASCII | re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory, such as 24GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(options).items()
        if value is not None and name not in ("command", "config")
    }


def _key(name: str) -> int:
    from server.keys import new_key

    try:
        key, entry = new_key(name)
    except SettingError as error:
        print(f"internvl key: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(f"The key, shown only now: {key}", file=sys.stderr)
    print(entry)
    return 0


def _version() -> int:
    from server.info import installed_version

    print(installed_version())
    return 0


def with_model(settings: Settings, *, weights: bool = True) -> Settings:
    """Settings that name a folder: the demo checkpoint where none was given, and one of the cache
    for a model of a hub, of which ``weights`` may be left out. Raises SettingError if there is no
    such folder."""
    folder = settings.engine.model
    name = settings.server.served_model_name
    if not folder:
        folder, name = str(_demo_checkpoint()), name or DEMO_NAME
    elif hub.is_name(folder):
        name = name or folder
        folder = str(hub.fetch(folder, settings.engine.revision, weights=weights))
    path = _checkpoint(folder, "--model")
    return dataclasses.replace(
        settings,
        engine=dataclasses.replace(settings.engine, model=str(path)),
        server=dataclasses.replace(settings.server, served_model_name=name or path.name),
    )


def with_critic(settings: Settings) -> Settings:
    """The same for the critic's folder, if there is to be one."""
    critic = settings.critic
    folder = critic.critic_model
    if not folder:
        return settings
    if hub.is_name(folder):
        folder = str(hub.fetch(folder, critic.critic_revision))
    path = _checkpoint(folder, "--critic-model")
    critic = dataclasses.replace(critic, critic_model=str(path))
    return dataclasses.replace(settings, critic=critic)


def _checkpoint(folder: str, flag: str) -> Path:
    """The folder that was named. Raises SettingError where there is none."""
    try:
        path = Path(folder).expanduser().resolve()
        found = (path / "config.json").is_file()
    except (OSError, RuntimeError) as error:  # of a home or a link that leads nowhere
        raise SettingError(f"{flag}: {folder} cannot be read: {error}") from None
    if not found:
        raise SettingError(f"{flag}: {folder} is not a checkpoint folder (no config.json in it)")
    return path


def _demo_checkpoint() -> Path:
    # By path: the demo package stands above this one and must not be imported from here.
    spec = importlib.util.find_spec("demo")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place, "checkpoint", "hf")
        if folder.is_dir():
            return folder
    raise SettingError("the demo checkpoint is not installed; name a checkpoint with --model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "internvl", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Without --model, the embedded demo model.",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="read settings from a TOML file")
    groups = {name: serve.add_argument_group(title) for name, title in GROUPS.items()}
    for group, field, kind in each_setting():
        add_flag(groups[group], field, kind)
    key = commands.add_parser(
        "key",
        help="make an API key",
        description="Make an API key: the key itself goes to standard error, its entry for "
        "--api-keys-file to standard output.",
    )
    key.add_argument("name", metavar="NAME", help="whose it is: up to 64 of A-Z a-z 0-9 _ -")
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has to serve with",
        description="Say what this machine has to serve with, and what of it would be used. Ends "
        "with 1 if something keeps a model from being served.",
    )
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint folder")
    plan = commands.add_parser(
        "plan",
        help="say whether a model fits in a device's memory",
        description="Say whether a model fits in a device's memory, from its config.json alone: "
        "neither weights nor device need be here. Ends with 1 if it does not fit.",
    )
    plan.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    plan.add_argument(
        "--gpu-memory", type=_memory, required=True, metavar="SIZE", help="such as 24GiB"
    )
    for _, field, kind in each_setting():
        if field.name in PLANNED:
            add_flag(plan, field, kind)
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
    _add_verify(commands)
    commands.add_parser("settings", help="print all settings as Markdown")
    commands.add_parser("version", help="print the version")
    return parser


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="compare a model's answers with transformers'",
        description="Send fixed pictures and prompts through this server's pipeline and through "
        "transformers' own, and print how tiles, pixels, prompts, logits and greedy tokens differ. "
        "Ends with 1 if something is out of bounds, with 2 if it cannot be computed.",
    )
    verify.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    verify.add_argument(
        "--against",
        metavar="FOLDER",
        help="what transformers reads instead: the same model, such as in the other format",
    )
    verify.add_argument(
        "--tokens", type=_some, default=16, metavar="N", help="greedy tokens to compare [16]"
    )
    verify.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help="compute no other cases than these, such as text, picture or frames",
    )
    verify.add_argument("--out", type=Path, metavar="FILE", help="write what was found as JSON")
    for name, field, kind in each_setting():
        if name == "engine" and field.name not in ("model", *_SHARED, "rank_host", "rank_timeout"):
            add_flag(verify, field, kind)

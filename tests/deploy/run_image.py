"""Runs an unpacked image by crun, without any right, and probes it from inside: it has no network
but its own loopback. Called by build_image.sh, as root.

    python3 tests/deploy/run_image.py ROOT CONFIG FOLDER

ROOT is the image's file tree, CONFIG what `buildah inspect --type image` says, FOLDER is for files.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMOKE = Path(__file__).parents[2] / "helm" / "files" / "smoke.py"
ADDRESS = ["SERVER_HOST=127.0.0.1", "SERVER_PORT=8000"]
# crun reads neither the cgroups of version 1 nor a mixture, and needs none here.
CRUN = ["unshare", "--mount", "sh", "-c", "umount -R /sys/fs/cgroup && mount -t cgroup2 none "]
CRUN[-1] += '/sys/fs/cgroup && exec crun --root "$0" --cgroup-manager=disabled "$@"'
READY = """
import http.client
link = http.client.HTTPConnection("127.0.0.1", 8000)
link.request("GET", "/ready")
exit(link.getresponse().status != 200)
"""
CHECKS = """
import http.client, importlib.metadata, json, os, pathlib

def get(path, **options):
    link = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
    link.request("POST" if options else "GET", path, **options)
    return link.getresponse()

for path in ("/live", "/ready", "/", "/metrics"):
    assert get(path).status == 200, path
processes = 0
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    status = dict(line.split(":\\t", 1) for line in (folder / "status").read_text().splitlines())
    assert set(status["Uid"].split()) == {"10001"}
    assert not any(int(status[name], 16) for name in status if name.startswith("Cap"))
    assert status["NoNewPrivs"] == "1"
    processes += 1
assert pathlib.Path("/proc/1/comm").read_text() == "tini\\n"
assert all(os.statvfs(path).f_flag & os.ST_RDONLY for path in ("/", "/opt/app", "/models"))
bill = json.loads(pathlib.Path("/opt/venv/sbom.cdx.json").read_text())
listed = {(part["name"].lower(), part["version"]) for part in bill["components"]}
found = {(d.name.lower(), d.version) for d in importlib.metadata.distributions()}
assert found - listed == {("internvl-server", bill["metadata"]["component"]["version"])}
assert listed <= found, listed - found
print(f"{processes} processes; {len(listed)} packages in the bill of materials; written:",
      [path for top in ("/tmp", "/dev/shm") for path in pathlib.Path(top).rglob("*")])
"""
STREAM = """
import http.client, json, os, signal
asked = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 400, "stream": True,
         "ignore_eos": True}
link = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
link.request("POST", "/v1/chat/completions", json.dumps(asked))
answer = link.getresponse()
answer.readline()
os.kill(1, signal.SIGTERM)
text = answer.read().decode()
assert text.endswith("data: [DONE]\\n\\n") and '"finish_reason":"length"' in text, text[-500:]
print("a stream that ran at SIGTERM ended whole")
"""


def bundle(root: Path, config: dict[str, Any], folder: Path) -> None:
    """The settings of the container, for crun."""
    subprocess.run(["crun", "spec"], cwd=folder, check=True)
    file = folder / "config.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    user, group = config["User"].split(":")
    spec["process"] |= {
        "terminal": False,
        "user": {"uid": int(user), "gid": int(group)},
        "args": config["Entrypoint"] + config["Cmd"],
        "env": config["Env"],
        "cwd": config["WorkingDir"],
        "capabilities": {},
        "noNewPrivileges": True,
    }
    spec["root"] = {"path": str(root), "readonly": True}
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "cgroup"]
    options = ["nosuid", "nodev", "noexec", "mode=1777", "size=1g"]
    spec["mounts"].append(
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": options}
    )
    file.write_text(json.dumps(spec), encoding="utf-8")


def main(root: str, config: str, folder: str) -> None:
    image = json.loads(Path(config).read_text(encoding="utf-8"))["Docker"]["config"]
    work = Path(folder).resolve()
    (work / "config.json").unlink(missing_ok=True)
    bundle(Path(root), image, work)
    crun = [*CRUN, f"{work}/crun"]
    log = work / "server.log"

    def inside(*command: str, text: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*crun, "exec", "--no-new-privs", f"--user={image['User']}", "server", *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )

    def must(done: "subprocess.CompletedProcess[str]") -> None:
        sys.stdout.write(done.stdout)
        if done.returncode:
            subprocess.run([*crun, "kill", "server", "KILL"], check=True)
            sys.exit(f"status {done.returncode}: {done.stderr}\n{log.read_text()}")

    began = time.monotonic()
    with log.open("wb") as sink:
        server = subprocess.Popen([*crun, "run", "-b", work, "server"], stdout=sink, stderr=sink)
    while inside("python3", "-", text=READY).returncode:
        if server.poll() is not None or time.monotonic() - began > 300:
            sys.exit(f"never ready:\n{log.read_text()}")
        time.sleep(0.5)
    sys.stdout.write(f"ready after {time.monotonic() - began:.0f} s\n")
    must(inside(*image["Healthcheck"]["Test"][1:]))
    must(inside("env", *ADDRESS, "python3", "-", text=SMOKE.read_text(encoding="utf-8")))
    must(inside("python3", "-", text=CHECKS))
    must(inside("python3", "-", text=STREAM))
    sys.stdout.write(f"exit status after SIGTERM: {server.wait(60)}\n")
    sys.exit(server.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])

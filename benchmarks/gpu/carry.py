"""What a GPU host without a network lacks, as one file: our server's packages, and vLLM as a peer.

    python benchmarks/gpu/carry.py pack carried.tar.xz          where packages can be fetched
    python benchmarks/gpu/carry.py unpack carried.tar.xz DIR    on the host, by its Python

Then ``DIR/ours/bin/python`` runs this tree and ``DIR/vllm/bin/python`` vLLM, each with the host's
packages behind what was carried: torch 2.11 and transformers 5 are expected there. Needs no package
itself but pip, to pack. Of vLLM only what one dense model in 16 bits on a Hopper GPU uses is taken,
33 MiB with all the rest in place of more than a gigabyte. Our C is built on the host:

    DIR/ours/bin/python -c "import setuptools; setuptools.setup()" build_ext --inplace
"""

import argparse
import shutil
import site
import struct
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

PYTHON = "3.12"
"""Of the host, where our own compiled code is built."""
ARCHITECTURE = 90
"""Of the GPU: code for others is left out of vLLM's libraries."""
VLLM = "vllm==0.26.0"
"""The newest that was built for torch 2.11."""

PACKAGES = {
    "common": "fastapi>=0.133,<0.137 starlette uvicorn>=0.30 httptools python-multipart "
    "pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection msgspec pybase64",
    "ours": "llguidance>=1.9 shtab",
    "vllm": "apache-tvm-ffi==0.1.15.post2 blake3 cachetools cbor2 compressed-tensors==0.17.0 depyf "
    "distro httpcore2 httpx2 jiter jmespath jsonschema jsonschema-specifications lark==1.2.2 "
    "llguidance<1.8 loguru model-hosting-container-standards openai openai-harmony "
    "partial-json-parser prometheus-fastapi-instrumentator python-json-logger pyzmq referencing "
    "rpds-py setproctitle sniffio watchfiles xgrammar",
}
"""By name, without what they depend on: the rest is there, or is not reached."""
LEFT_OUT = (
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/tml_fa4/*",
    "vllm/entrypoints/serve/instrumentator/static/*",
    "vllm/vllm_flash_attn/*fa2_C*",
    "vllm/_moe_C*",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "vllm/vllm-rs",
)
_GLIBC = (5, 12, 17, *range(24, 40))
_FAT = struct.pack("<I", 0xBA55ED50)


def pack(file: Path) -> None:
    """Fetch everything and write ``file``, a tar archive in xz."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for room, packages in PACKAGES.items():
            target = str(folder / "site" / room)
            _pip("install", "--no-compile", "--target", target, *packages.split())
        shutil.copyfile(Path(__file__).with_name("absent_av.py"), folder / "site/ours/av.py")
        _pip("download", "--dest", name, VLLM)
        (wheel,) = folder.glob("vllm-*.whl")
        _unzip(wheel, folder / "site" / "vllm")
        with tarfile.open(file, "w:xz", preset=9) as archive:
            archive.add(folder / "site", "site", filter=_plain)


def unpack(file: Path, folder: Path, python: str = PYTHON) -> None:
    """Two environments in ``folder``, which may exist.

    Not by PYTHONPATH: decode workers see nothing of the environment they were started from. Raises
    RuntimeError for another Python than was packed for.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != python:
        raise RuntimeError(f"packed for Python {python}, and this is {here}")
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    for room in ("ours", "vllm"):
        venv.create(folder / room, symlinks=True)
        (packages,) = (folder / room).glob("lib/python*/site-packages")
        carried = [folder.resolve() / "site" / part for part in (room, "common")]
        lines = [str(path) for path in (*carried, *site.getsitepackages())]
        (packages / "carried.pth").write_text("\n".join(lines), encoding="utf-8")


def _pip(command: str, *arguments: str) -> None:
    wanted = ["--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    wanted += ["--python-version", PYTHON, "--abi", f"cp{PYTHON.replace('.', '')}"]
    wanted += ["--abi", "abi3", "--abi", "none", "--platform", "manylinux2014_x86_64"]
    for minor in _GLIBC:
        wanted += ["--platform", f"manylinux_2_{minor}_x86_64"]
    words = [sys.executable, "-m", "pip", command, "--quiet", *wanted, *arguments]
    subprocess.run(words, check=True)


def _unzip(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if any(fnmatch(name, pattern) for pattern in LEFT_OUT):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content = files.read(name)
            target.write_bytes(only_for(content) if name.endswith(".so") else content)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    # Where pip puts programs, beside the packages.
    return None if entry.name.split("/")[2:] == ["bin"] else entry


def only_for(library: bytes, architecture: int = ARCHITECTURE) -> bytes:
    """A shared library whose machine code and PTX for other GPUs are zeros, which pack well.

    Nvcc puts its output for all GPUs into containers: a header of 16 bytes (magic number, version,
    its own size, the size of the rest), then entries, each with a header (kind, 2 is machine code;
    its own size at byte 4; the content's at 8; the architecture at 28). The driver reads no entry
    but that of its GPU, when a kernel is first called. Kernels without one, which it would compile
    from PTX (those of some quantised weights), can then not be called.
    """
    data, at = bytearray(library), 0
    while (at := data.find(_FAT, at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if (version, header) != (1, 16) or at + header + size > len(data):
            at += len(_FAT)  # these four bytes by chance
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, own, content = struct.unpack_from("<HHIQ", data, entry)
            assert own, "no entry has a header of no size"
            (meant,) = struct.unpack_from("<I", data, entry + 28)
            if (kind, meant) != (2, architecture):
                data[entry + own : entry + own + content] = bytes(content)
            entry += own + content
    return bytes(data)


def main() -> None:
    """Read the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("pack").add_argument("file", type=Path)
    there = verbs.add_parser("unpack")
    there.add_argument("file", type=Path)
    there.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.verb == "pack":
        pack(given.file)
    else:
        unpack(given.file, given.folder)


if __name__ == "__main__":
    main()

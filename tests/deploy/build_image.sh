#!/usr/bin/env bash
# Builds the image of the target `cpu` with buildah and runs it with crun, where there is no container
# engine: as root, on Debian, with buildah, crun and debootstrap from apt. It takes minutes and 20 GB,
# so `make test` has no part in it. `--target cuda` among the options builds and runs that one.
#
#   tests/deploy/build_image.sh FOLDER [options of `buildah build`]
#
# FOLDER keeps the storage, and a base image made by debootstrap (or BASE=name of another one). Options
# may say where packages come from: --volume /etc/pip.conf:/etc/pip.conf:ro --build-arg TORCH_ARGS=
set -euo pipefail
folder=$(realpath "$1")
shift
cd "$(dirname "$0")/../.."
mkdir -p "$folder"

buildah() { command buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs "$@"; }

if [ -z "${BASE:-}" ]; then
    BASE=localhost/debian-python:bookworm
    if ! buildah inspect --type image $BASE > "$folder/base.json" 2>&1; then
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/base"
        chroot "$folder/base" apt-get clean
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$folder/base" /
        buildah commit --quiet --rm "$container" $BASE
        rm -rf "$folder/base"
    fi
fi

buildah build --isolation chroot --network host --format docker --target cpu \
    --build-arg BASE="$BASE" --build-arg REVISION="$(git rev-parse HEAD)" \
    --build-arg CREATED="$(date --utc +%Y-%m-%dT%H:%M:%SZ)" --tag internvl-server:built "$@" .

buildah inspect --type image internvl-server:built > "$folder/image.json"
container=$(buildah from internvl-server:built)
root=$(buildah mount "$container")
du --summarize --human-readable "$root"/opt/* "$root"  # the last is the rest
python3 tests/deploy/run_image.py "$root" "$folder/image.json" "$folder"
buildah rm "$container"

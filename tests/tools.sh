#!/usr/bin/env bash
# Installs what tests need beside Python packages, where that is possible: Chromium, which shows the
# chat page, by apt as root; Prometheus with its promtool unpacked into .tools, so that no service
# starts. Tests of a tool that is missing are skipped and say so (tests/tools.py).
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.tools/usr/bin

missing=()
for tool in chromium prometheus; do
  command -v "$tool" > /dev/null || missing+=("$tool")
done
((${#missing[@]})) || exit 0
command -v apt-get > /dev/null || { echo "no apt-get: ${missing[*]} is missing, its tests are skipped"; exit 0; }
mkdir -p .tools

install_chromium() {
  [[ $EUID -eq 0 ]] || { echo "not root"; return 1; }
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core
}

install_prometheus() {
  (cd .tools && apt-get download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb)
}

if [[ $EUID -eq 0 ]]; then apt-get update --quiet > .tools/update.log 2>&1 || true; fi
for tool in "${missing[@]}"; do
  echo "installing $tool ..."
  "install_$tool" > ".tools/$tool.log" 2>&1 \
    || echo "$tool is missing, its tests are skipped: $(tail -n 1 ".tools/$tool.log")"
done

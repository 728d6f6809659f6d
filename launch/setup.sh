#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One virtual environment, .venv in the checkout, with this project and what it needs. Quick when nothing has changed.
#
#   bash launch/setup.sh [--test]      --test adds what the tests need
#
#   PYTHON=python3.12                  interpreter to build the environment with; python3 by default, or the
#                                      distribution's where python3 was built without optimizations
#   TORCH_INDEX_URL=https://...        package index torch comes from; empty for pip's own. Without an NVIDIA GPU the
#                                      default is PyTorch's index of CPU builds, where it can be reached.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu_index=https://download.pytorch.org/whl/cpu
venv=$PWD/.venv
wanted=run
requirements=(requirements.txt)

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }

if [ "${1-}" = --test ]; then
    wanted="test"
    requirements+=(requirements-test.txt)
elif [ $# -gt 0 ]; then
    fail "unknown argument $1: the only one is --test"
fi

# Only one setup of a checkout at a time. The script is its own lock file, so nothing is left behind.
if command -v flock >/dev/null; then
    exec 9<launch/setup.sh
    flock -n 9 || { say "waiting for another setup of this checkout"; flock 9; }
fi

# What the environment was installed from: a hash of the requirements and the interpreter's version.
fingerprint() {
    "$venv/bin/python" - "$@" <<'PYTHON'
import hashlib, pathlib, sys

digest = hashlib.sha256(sys.version.encode())
for name in [*sys.argv[1:], "pyproject.toml"]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PYTHON
}

installed() { # whether a stamp is there for run or test
    local files=(requirements.txt)
    [ "$1" = run ] || files+=(requirements-test.txt)
    [ -f "$venv/.installed-$1" ] && [ "$(cat "$venv/.installed-$1")" = "$(fingerprint "${files[@]}")" ]
}

# The interpreter: what PYTHON says, or the one the environment has, or the first that is new enough.
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
# Two builds of one version are not the same.
build_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)' 2>/dev/null; }
# As pyenv builds by default; a distribution's is optimized, whatever its configuration says.
unoptimized() { "$1" -c 'import sys, sysconfig
sys.exit(sys.base_prefix == "/usr" or "--enable-optimizations" in sysconfig.get_config_var("CONFIG_ARGS"))' 2>/dev/null; }
# Whether it makes environments in which extensions can be compiled.
complete() { "$1" -c 'import ensurepip, os, sysconfig, venv
os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null; }

if [ -n "${PYTHON-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON is $PYTHON, which is not there: name a Python 3.11 or newer"
    [ -n "$(version_of "$PYTHON")" ] || fail "PYTHON is $PYTHON, which does not run: name a Python 3.11 or newer"
    recent "$PYTHON" || fail "$PYTHON is Python $(version_of "$PYTHON"), but 3.11 or newer is needed"
    if [ -x "$venv/bin/python" ] && [ "$(build_of "$venv/bin/python")" != "$(build_of "$PYTHON")" ]; then
        say "removing .venv: it was not made with $PYTHON"
        rm -rf "$venv"
    fi
fi
if [ -x "$venv/bin/python" ] && recent "$venv/bin/python"; then
    if installed "test" || { [ "$wanted" = run ] && installed run; }; then
        exit 0
    fi
    # Made without pip (by uv, say), or an installation that was cut off.
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip >/dev/null 2>&1 || true
fi
if [ -e "$venv" ] && ! { recent "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; }; then
    say "removing .venv, which does not work"
    rm -rf "$venv"
fi

if [ ! -e "$venv" ]; then
    python=${PYTHON-}
    for candidate in python3 python3.13 python3.12 python3.11; do
        [ -n "$python" ] && break
        if command -v "$candidate" >/dev/null && recent "$candidate"; then python=$candidate; fi
    done
    if [ -z "$python" ]; then
        command -v python3 >/dev/null || fail "there is no python3: install Python 3.11 or newer"
        fail "python3 is Python $(version_of python3), but 3.11 or newer is needed: install one and name it, as in PYTHON=python3.12"
    fi
    distribution=/usr/bin/python3
    if [ -z "${PYTHON-}" ] && unoptimized "$python" && recent "$distribution" && complete "$distribution"; then
        say "$python was built without optimizations: taking $distribution, which needs a quarter less time (PYTHON=$python keeps it)"
        python=$distribution
    fi
    # Debian and Ubuntu keep the half of the venv module that installs pip in a package of its own.
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        package=python$(version_of "$python")-venv
        if ! command -v apt-get >/dev/null; then
            fail "$python cannot make virtual environments: install its venv and ensurepip modules"
        fi
        if [ "$(id -u)" != 0 ]; then
            fail "$python cannot make virtual environments: run 'sudo apt-get install $package' and start again"
        fi
        say "installing $package"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } >/dev/null ||
            fail "apt-get could not install $package: install it by hand and start again"
    fi
    say "making .venv with Python $(version_of "$python")"
    "$python" -m venv "$venv" || { rm -rf "$venv"; fail "$python -m venv failed, see above"; }
fi

# A pip before 23.1 runs the setup.py of what has no wheel (seqeval) with the newest of its build requirements, but
# without theirs; isolated builds (PEP 517), later versions' default, install both.
pip() { PIP_USE_PEP517=1 "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

reachable() { # whether an index answers within seconds
    timeout 10 "$venv/bin/python" - "$1" 2>/dev/null <<'PYTHON'
import sys, urllib.request

urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5)
PYTHON
}

# torch first: pip's own index gives Linux the CUDA build, several gigabytes that a machine without a GPU cannot use.
torch=$(grep -E '^torch==' requirements.txt)
has_torch() { "$venv/bin/python" -c "
import importlib.metadata as m, sys
sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; }
if ! has_torch; then
    index=${TORCH_INDEX_URL-}
    if [ -z "${TORCH_INDEX_URL+set}" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        index=$cpu_index
    fi
    say "installing $torch${index:+ from $index}; the first time this downloads for a while"
    if [ -z "$index" ]; then
        pip install -q "$torch"
    elif [ -n "${TORCH_INDEX_URL-}" ]; then
        pip install -q --index-url "$index" "$torch" || fail "TORCH_INDEX_URL $index did not give $torch"
    elif ! reachable "$index" || ! pip install -q --retries 1 --timeout 20 --index-url "$index" "$torch"; then
        say "$index gives no $torch: taking it from pip's own index"
        pip install -q "$torch"
    fi
fi
for file in "${requirements[@]}"; do
    say "installing $file"
    pip install -q -r "$file"
done
pip install -q --no-deps -e .
fingerprint requirements.txt >"$venv/.installed-run"
[ "$wanted" = run ] || fingerprint requirements.txt requirements-test.txt >"$venv/.installed-test"
say "done"

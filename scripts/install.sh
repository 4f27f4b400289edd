#!/bin/sh
# Install this project, editable, into a virtual environment of its own.
#
#     scripts/install.sh VENV [EXTRAS]      e.g. scripts/install.sh .venv train,dev
#
# The one thing to decide is which build of torch to take. On Linux the default
# wheel brings gigabytes of CUDA libraries that are of no use without an NVIDIA
# driver, so without one a CPU build is preferred. Those builds live on an index
# of their own that not every network reaches: then the default wheel serves.
#
# Environment:
#     PYTHON         the interpreter to build on (otherwise the first that will do)
#     TORCH_BACKEND  a build of torch by uv's name: cpu, cu128, auto, ... (no fallback)
set -eu

venv=${1:?usage: install.sh VENV [EXTRAS]}
extras=${2-}
project=$(cd "$(dirname "$0")/.." && pwd)

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.14 python3.13 python3.12 python3.11 python3.10
    fi
    for python; do
        if is_recent "$python"; then
            echo "$python"
            return
        fi
    done
    die "Python 3.10 or newer is needed and ${PYTHON:-python3} is not;" \
        "name another one with PYTHON=/path/to/python"
}

create_venv() {
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    # Only what is an environment already, a broken one, may be swept away.
    clear=
    if [ -e "$venv/pyvenv.cfg" ]; then clear=--clear; fi
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv $clear "$venv"
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed $clear --python "$python" "$venv"
    else
        die "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
    fi
}

# Only a uv that knows about torch's builds will do.
knows_torch() { "$1" pip install --help 2>/dev/null | grep -q -e --torch-backend; }

find_uv() {
    if knows_torch uv; then
        echo uv
    else
        knows_torch "$venv/bin/uv" || "$venv/bin/python" -m pip install --quiet 'uv>=0.7' >&2
        echo "$venv/bin/uv"
    fi
}

install() {
    "$uv" pip install --python "$venv/bin/python" "$@" --editable "$project${extras:+[$extras]}"
}

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }

build_of() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null || true; }

if ! is_recent "$venv/bin/python"; then
    create_venv
elif [ -n "${PYTHON-}" ] && [ "$(build_of "$PYTHON")" != "$(build_of "$venv/bin/python")" ]; then
    say "$venv is kept, which is not built on $PYTHON; to have that, remove $venv first"
fi
uv=$(find_uv)

if [ -n "${TORCH_BACKEND-}" ]; then
    install --torch-backend "$TORCH_BACKEND"
    exit
fi

# Elsewhere than on Linux the default wheel carries no CUDA: nothing to choose.
if [ "$(uname -s)" = Linux ]; then
    if has_nvidia_driver; then backend=auto; else backend=cpu; fi
    # The dry run keeps a foreseeable failure quiet; a real one shows itself below.
    if install --torch-backend "$backend" --dry-run --quiet 2>/dev/null; then
        install --torch-backend "$backend" && exit
    fi
    say "torch's '$backend' builds are out of reach; its default wheel, though larger, serves as well"
fi
install

#!/usr/bin/env bash
# Makes .venv with the pinned packages; source it: `source scripts/setup.sh EXTRA[,EXTRA...]`. Done already: a second or less.
#
# Python 3.11 gets megatron-core 0.16.1, 3.12 and 3.13 get 0.19: constraints.txt says what goes with which. PYTHON=python3.13
# picks an interpreter. A torch of a supported version that the interpreter already has is used as it is.

sep_find_python() {
    local python
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

sep_setup() {
    local extras=$1 python stamp
    python=$(sep_find_python) || return 1
    stamp="$("$python" -V) $(cat pyproject.toml scripts/constraints.txt | cksum)"
    if [[ ! -x .venv/bin/python ]]; then
        rm -rf .venv
        sep_make_venv "$python" || return 1
    fi
    if [[ $(cat ".venv/stamp-$extras" 2>/dev/null) != "$stamp" && $(cat .venv/stamp-dev 2>/dev/null) != "$stamp" ]]; then
        echo "installing megatron_sep[$extras] into .venv (the first time takes some minutes)"
        sep_install "$extras" || return 1
        echo "$stamp" >".venv/stamp-$extras"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

sep_make_venv() {
    local python=$1 site=""
    if "$python" -c 'import torch, sys; sys.exit(not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 15))' 2>/dev/null; then
        site="--system-site-packages"
        echo "using the torch that $("$python" -V) has"
    fi
    "$python" -m venv $site .venv || { echo "could not make .venv; Debian and Ubuntu need the package python3-venv" >&2; return 1; }
    [[ -z $site ]] && touch .venv/pin-torch
    return 0
}

sep_install() {
    local extras=$1 pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    local constraints=(-c scripts/constraints.txt)
    if [[ -e .venv/pin-torch ]]; then
        "${pip[@]}" "${constraints[@]}" torch || return 1
    else
        grep -v '^torch==' scripts/constraints.txt >.venv/constraints.txt
        constraints=(-c .venv/constraints.txt)
    fi
    "${pip[@]}" "${constraints[@]}" setuptools wheel && "${pip[@]}" "${constraints[@]}" --no-build-isolation -e ".[$extras]"
}

sep_setup "${1:?extras}"

# Sourced by the scripts: makes .venv when it is missing and installs the extras named in the arguments.
# Does nothing (and needs no network) once the same extras of the same pyproject.toml are installed.
ensure_venv() {
    local python="${PYTHON:-python3}" stamp
    stamp=".venv/.installed-$1"
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit("asyncdp needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
        "$python" -m venv .venv
    fi
    if ! cat pyproject.toml scripts/constraints.txt | cmp -s - "$stamp"; then
        echo "installing asyncdp[$1] into .venv ..."
        .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".[$1]"
        cat pyproject.toml scripts/constraints.txt > "$stamp"
    fi
}

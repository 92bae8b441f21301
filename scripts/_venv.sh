# Sourced by the scripts: makes .venv when it is missing and installs the extras named in the argument.
# Does nothing (and needs no network) once the same extras of the same pyproject.toml are installed.
# PYTHON names the interpreter; ASYNCDP_CONSTRAINTS names another constraints file, as CI does.
ensure_venv() {
    local python="${PYTHON:-python3}" constraints="${ASYNCDP_CONSTRAINTS:-scripts/constraints.txt}"
    local installed=".venv/.installed-$1"
    if [ ! -f "$constraints" ]; then
        echo "no constraints file $constraints; set ASYNCDP_CONSTRAINTS to one, or unset it" >&2
        return 1
    fi
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit("asyncdp needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
        "$python" -m venv .venv
    fi
    if ! cat pyproject.toml "$constraints" | cmp -s - "$installed"; then
        echo "installing asyncdp[$1] into .venv ..."
        .venv/bin/python -m pip install --quiet --constraint "$constraints" --editable ".[$1]"
        cat pyproject.toml "$constraints" > "$installed"
    fi
}

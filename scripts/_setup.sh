# shellcheck shell=bash
# Sourced by the other scripts; `set_up` makes what they need, once, and costs nothing afterwards:
#   .venv    the project and everything in requirements.lock, by nothing but venv and pip
#   .mesh    the run directory, so that plain `supervisord -c supervisord.conf` works
# It speaks on stderr only. PYTHON=... chooses the interpreter.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)
venv=$root/.venv
# A closed stdin would lend its number to the next file that is opened
if ! { : <&0; } 2>/dev/null; then exec </dev/null; fi

set_up() {
  _make_run_directory
  _install_once
  _compile
}

_install_once() {
  _is_current && return
  # Two at once: the second waits, and then finds nothing to do. A subshell, so that the lock is
  # given back and no program that is started later holds it.
  (
    if command -v flock >/dev/null; then flock 9; fi
    _is_current && exit
    _install
  ) 9>>"$root/.mesh/set-up.lock" </dev/null >&2
}

# Where Python is told to write no bytecode (many containers), every agent would compile the mesh anew
# at its start, which is a third of it
_compile() {
  local done=$venv/.compiled
  [ -f "$done" ] && [ -z "$(find "$root/mesh" "$root/agents" -name '*.py' -newer "$done" -print -quit)" ] && return
  "$venv/bin/python" -m compileall -q "$root/mesh" "$root/agents" </dev/null >/dev/null 2>&1 && touch "$done"
  return 0
}

_is_current() {
  [ -f "$venv/.set-up" ] && [ "$(_stamp)" = "$(<"$venv/.set-up")" ] && _is_chosen_python
}

_say() { echo "set-up: $*" >&2; }

_fail() {
  _say "$*"
  exit 78
}

# What the environment was made from. A moved folder counts: the programs in .venv/bin name it.
_stamp() {
  [ -x "$venv/bin/python" ] || { echo absent && return; }
  { echo "$root" && cat "$root/requirements.lock" "$root/pyproject.toml" "$venv/pyvenv.cfg"; } | sha256sum
}

_version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

_is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (4, 0))' 2>/dev/null
}

# Without PYTHON any working environment will do
_is_chosen_python() {
  [ -z "${PYTHON:-}" ] || [ "$(_version "$PYTHON")" = "$(_version "$venv/bin/python")" ]
}

_find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    _is_supported "$PYTHON" || _fail "PYTHON=$PYTHON is no Python 3.11 or newer ($(_version "$PYTHON" || echo "it does not run"))"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null && _is_supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  _fail "no Python 3.11 or newer on PATH (python3 is $(_version python3 || echo absent)); install one, or name it: PYTHON=/path/to/python3.12 $0"
}

_make_run_directory() {
  local name
  for name in run log stacks ledger agents conf journal; do
    [ -d "$root/.mesh/$name" ] || (umask 077 && mkdir -p "$root/.mesh/$name")
  done
}

_install() {
  local began=$SECONDS python
  if _is_ours && _is_supported "$venv/bin/python" && _is_chosen_python && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    _say "bringing .venv up to date"
  else
    python=$(_find_python)
    _say "making .venv with Python $(_version "$python")"
    _make_venv "$python"
  fi
  rm -f "$venv/.set-up"
  _say "installing the packages of requirements.lock ($(grep -c '==' "$root/requirements.lock"))"
  # --no-deps: the lock is whole, and pips before 23.3 look for `coverage[toml]` beyond it, which fails
  # on the day a newer coverage appears
  _pip install --no-deps --require-hashes -r "$root/requirements.lock" ||
    _fail "pip could not install them (see above); a package index must be within reach the first time"
  # flit_core is among them: no network from here on
  _pip install --no-deps --no-build-isolation -e "$root" ||
    _fail "the project could not be installed (see above)"
  _stamp >"$venv/.set-up"
  _say "ready after $((SECONDS - began)) s"
}

# Made in this very place, or by hand without our mark
_is_ours() {
  [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" -c 'import sys; print(sys.prefix)' 2>/dev/null)" = "$venv" ] &&
    { [ ! -f "$venv/bin/pip" ] || head -n 2 "$venv/bin/pip" | grep -qF "$venv/bin/"; }
}

_make_venv() {
  local python=$1 version
  "$python" -m venv --clear "$venv" >/dev/null 2>&1 && return
  # Debian takes ensurepip out of Python; the system's own pip can stand in
  if "$python" -m pip --version >/dev/null 2>&1 &&
    "$python" -m venv --clear --without-pip "$venv" &&
    "$python" -m pip --python "$venv/bin/python" install -qq pip; then
    return
  fi
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    _say "installing python$version-venv"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$version-venv"
    "$python" -m venv --clear "$venv" && return
  fi
  _fail "this Python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python$version-venv"
}

_pip() {
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    "$venv/bin/python" -m pip -qq --no-input "$@"
}

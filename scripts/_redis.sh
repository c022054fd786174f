# shellcheck shell=bash
# Sourced by scripts/test; `need_redis` sees to a real redis-server for the tests. They start it
# themselves, on Unix sockets of their own. Where none is installed, the distribution's package is
# unpacked into .venv: nothing of the system changes, no service starts, no root is needed.
# shellcheck disable=SC2154 # venv: from _setup.sh

need_redis() {
  [ -z "${LEGION_TEST_REDIS_URL:-}" ] || return 0
  if _has_redis; then return 0; fi
  echo "set-up: unpacking a redis-server into .venv" >&2
  if command -v apt-get >/dev/null && _unpack_redis >&2 && _has_redis; then return 0; fi
  echo "no redis-server: install one (Debian, Ubuntu: apt-get install redis-server; macOS: brew install redis)," \
    "or name a server that may be emptied: LEGION_TEST_REDIS_URL=redis://..." >&2
  return 69
}

# The same two places that tests/conftest.py looks at
_has_redis() {
  redis-server --version >/dev/null 2>&1 || "$venv/bin/redis-server" --version >/dev/null 2>&1
}

_unpack_redis() {
  local scratch home=$venv/redis package status=0
  scratch=$(mktemp -d) || return
  _fetch_redis "$scratch" || status=$?
  if [ "$status" = 0 ]; then
    rm -rf "$home" && mkdir -p "$home"
    for package in "$scratch"/*.deb; do
      dpkg-deb -x "$package" "$home" || status=$?
    done
    cat >"$venv/bin/redis-server" <<'EOS'
#!/bin/sh
home=$(dirname "$(readlink -f "$0")")/../redis
libraries=$(find "$home" -name '*.so*' -exec dirname {} + | sort -u | tr '\n' ':')
LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:-} exec "$home/usr/bin/redis-server" "$@"
EOS
    chmod +x "$venv/bin/redis-server"
  fi
  rm -rf "$scratch"
  return "$status"
}

# Into folder $1: redis-server and those of the packages it needs that are not installed
_fetch_redis() {
  local apt packages
  mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
  apt=(apt-get -qq -o "APT::Sandbox::User=$(id -un)")
  packages=$("${apt[@]}" -s install --no-install-recommends redis-server 2>/dev/null | awk '$1 == "Inst" { print $2 }')
  if [ -z "$packages" ]; then
    # A machine that has no package lists yet: get them for us alone
    apt+=(-o "Dir::State::Lists=$1/lists" -o "Dir::Cache=$1/cache")
    "${apt[@]}" update || return
    packages=$("${apt[@]}" -s install --no-install-recommends redis-server | awk '$1 == "Inst" { print $2 }')
  fi
  [ -n "$packages" ] || return 1
  # shellcheck disable=SC2086 # a list of names
  (cd "$1" && "${apt[@]}" download $packages)
}

# shellcheck shell=bash
# Sourced by scripts/test and scripts/check: steps that all run, and what failed said at the end.
# shellcheck disable=SC2154 # venv: from _setup.sh

failed=()

step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

finish() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
  fi
  echo "all passed"
}

lint_and_types() {
  step "ruff check" "$venv/bin/ruff" check .
  step "ruff format" "$venv/bin/ruff" format --check .
  step "mypy" "$venv/bin/mypy"
}

# Many tests wait for processes of theirs to begin or end, so there are two workers a core; more than
# eight only get in each other's way.
run_pytest() {
  export PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS:-$(_workers)}
  "$venv/bin/python" -m pytest -n auto --dist worksteal "$@"
}

_workers() {
  local count quota period
  count=$(nproc 2>/dev/null || echo 2)
  # nproc does not see a container's limit
  if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
    count=$((quota / period < count ? quota / period : count))
  fi
  echo $((count > 4 ? 8 : 2 * count))
}

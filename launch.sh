#!/usr/bin/env bash
# Sets gapjax up, then runs its main program or its tests.
#
#   ./launch.sh [flags]              python -m experiments.reproduce [flags]
#   ./launch.sh test [pytest args]   python -m pytest [pytest args], in the project root
#
# Needs Python 3.11 or newer. Works from any directory; a relative --workdir is relative to
# where you are.
#
# Where it installs: the active virtual environment (venv or conda, other than conda's base), on
# Colab the active Python, otherwise .venv beside this file. Which JAX: for CUDA 13 or 12 by the
# NVIDIA driver and GPU, for a TPU, or for the CPU. A JAX in the active environment that already has
# its accelerator's plugin is kept. A second call installs nothing.
#
# Several processes make up one run, with --workdir where all can see it:
#   TPU pod: the same line on every worker, for example
#     gcloud compute tpus tpu-vm ssh NAME --worker=all \
#       --command='gapjax/launch.sh --detect_processes --workdir=...'
#   SLURM: srun --ntasks=N gapjax/launch.sh --workdir=...
#   a trial on one machine: NUM_PROCESSES=2 ./launch.sh ...
#
# Environment variables:
#   NUM_PROCESSES        start so many processes here, joined to one run
#   GAPJAX_ACCELERATOR   cpu, cuda12, cuda13 or tpu: install for this one, detect nothing
#   VERBOSE=1            show what pip prints (otherwise shown only when it fails)
set -euo pipefail

self=$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")
root=$(cd -- "$(dirname -- "$self")" >/dev/null && pwd -P)

say() { printf 'launch.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
runs() { "$@" >/dev/null 2>&1 </dev/null; }  # whether a command succeeds

# ---- the machine: which accelerator it has ----

# Google makes other PCI devices too; the TPUs are these, as JAX lists them.
has_tpu() {
  [ -n "${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_HOSTNAMES:-}${COLAB_TPU_ADDR:-}" ] && return 0
  local file vendor device
  for file in /sys/bus/pci/devices/*/vendor; do
    [ -r "$file" ] && read -r vendor <"$file" && [ "$vendor" = 0x1ae0 ] || continue
    read -r device <"${file%vendor}device" || continue
    case $device in 0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;; esac
  done
  return 1
}

# What may be here, found without starting anything: a second call must be quick.
hardware() {
  case ${GAPJAX_ACCELERATOR:-} in
    '') ;;
    cpu | cuda12 | cuda13 | tpu) echo "$GAPJAX_ACCELERATOR"; return ;;
    *) die "GAPJAX_ACCELERATOR=$GAPJAX_ACCELERATOR is unknown: use cpu, cuda12, cuda13 or tpu" ;;
  esac
  if has_tpu; then echo tpu; elif command -v nvidia-smi >/dev/null; then echo nvidia; else echo cpu; fi
}

# The extra of JAX for that hardware. CUDA 13 needs driver 580 and a GPU of compute
# capability 7.5 or more; CUDA 12 needs driver 525.
flavour_of() {
  [ "$1" = nvidia ] || { echo "$1"; return; }
  runs nvidia-smi -L || { echo cpu; return; }
  local driver capability  # of several GPUs the least capable counts
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1) || true
  driver=${driver%%.*} capability=${capability//[!0-9]/}
  case $driver$capability in *[!0-9]* | '') echo cuda12; return ;; esac
  if [ "${driver:-0}" -ge 580 ] && [ "${capability:-0}" -ge 75 ]; then echo cuda13; return; fi
  if [ "${driver:-0}" -ge 525 ]; then echo cuda12; return; fi
  say "NVIDIA driver $driver is too old for JAX (525 or newer will do): using the CPU"
  echo cpu
}

# ---- the environment: where to install ----

recent() { runs "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
on_colab() {
  [ -n "${COLAB_RELEASE_TAG:-}${COLAB_GPU:-}" ] ||
    { [ -d /content ] && runs python3 -c 'import google.colab'; }
}

# Sets prefix, python and own (1 if the environment is ours to rebuild).
find_environment() {
  own=0
  if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$root/.venv" ]; then
    prefix=$VIRTUAL_ENV python=$VIRTUAL_ENV/bin/python
    [ -x "$python" ] || die "VIRTUAL_ENV=$VIRTUAL_ENV has no bin/python: deactivate it or make it anew"
  elif [ -z "${VIRTUAL_ENV:-}" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    prefix=$CONDA_PREFIX python=$CONDA_PREFIX/bin/python
    [ -x "$python" ] || die "the conda environment $CONDA_PREFIX has no Python: conda install python=3.12"
  elif on_colab; then
    python=$(command -v python3) || die "no python3 on the PATH"
    prefix=$("$python" -c 'import sys; print(sys.prefix)')
  else
    own=1 prefix=$root/.venv python=$root/.venv/bin/python
  fi
}

# Makes .venv with the first Python on the PATH that can; says what is wrong with the others.
make_venv() {
  local name found old='' bare=''
  for name in python3.12 python3.13 python3.11 python3.14 python3 python; do
    while IFS= read -r found; do
      recent "$found" || { runs "$found" -c '' && old=$found; continue; }
      runs "$found" -c 'import ensurepip, venv' || { bare=$found; continue; }
      "$found" -m venv --clear "$prefix" >&3 2>&1 </dev/null && return
      cat -- "$log" >&2
      die "$found could not make $prefix; its reasons are above"
    done < <(type -ap "$name")
  done
  [ -z "$bare" ] || die "$bare cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv"
  [ -z "$old" ] || die "Python 3.11 or newer is needed; found only $("$old" -V 2>&1) ($old)"
  die "Python 3.11 or newer is needed, and there is no Python on the PATH"
}

# ---- the installation: once, and again where something of it has changed ----

# Whether the stamp, written after a complete installation, fits this call.
ready() {
  local s_sum s_extra s_hint s_flavour
  [ -x "$python" ] && [ -r "$stamp" ] && [ ! -e "$unfinished" ] || return 1
  { read -r s_sum; read -r s_extra; read -r s_hint; read -r s_flavour; } <"$stamp" || return 1
  [ "$s_sum" = "$(checksum)" ] || return 1
  [ "$s_extra" = "$extra" ] || [ "$s_extra" = test ] || return 1
  [ "$hint" = cpu ] && return 0  # any JAX runs on a CPU
  [ "$s_hint" = "$hint" ] || return 1
  # nvidia-smi was there and did not work: look again.
  [ "$hint" != nvidia ] || [ "$s_flavour" != cpu ] || [ "$(flavour_of "$hint")" = cpu ]
}

# Of what was installed, from where and for which interpreter.
checksum() {
  { cat -- "$root/setup.cfg" "$root/pyproject.toml"; printf '%s\n' "$root"; readlink -f -- "$python" || true; } | cksum | tr ' ' -
}

# Prints constraints that keep pip from lowering the JAX of an active environment;
# "jax==" where it has what the accelerator needs, so that it is left as it is.
jax_constraints() {
  "$python" - "$root/setup.cfg" "$1" <<'EOF'
import importlib.metadata, re, sys
setup_cfg, flavour = sys.argv[1:]
have = {}
for dist in importlib.metadata.distributions():
    have.setdefault(re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "").lower(), dist.version)
release = lambda version: tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))
if "jax" in have and "jaxlib" in have:
    needed = re.search(r"^\s*jax>=([\d.]+)", open(setup_cfg).read(), re.MULTILINE)[1]
    cuda = [have[f"jax-cuda{n}-plugin"] for n in (12, 13) if f"jax-cuda{n}-plugin" in have]
    same = any(release(version) == release(have["jaxlib"]) for version in cuda)
    equipped = flavour != "cpu" and ("libtpu" in have if flavour == "tpu" else same)
    sign = "==" if equipped and release(have["jax"]) >= release(needed) else ">="
    print(f"jax{sign}{have['jax']}\njaxlib{sign}{have['jaxlib']}")
EOF
}

# One launch.sh at a time installs into an environment.
lock() {
  command -v flock >/dev/null || return 0
  if [ "$own" = 1 ]; then exec 9<"$root"; else exec 9<"$prefix"; fi
  flock -n 9 || { say "waiting for another launch.sh that is installing"; flock 9 || true; }
}

# Installs gapjax with its extra and JAX, and writes the stamp.
install() {
  local flavour extras constraints='' begun=$SECONDS
  flavour=$(flavour_of "$hint")
  [ -w "$root" ] || die "$root is not writable: copy the project to a place that is"
  log=$(mktemp "${TMPDIR:-/tmp}/gapjax-install.XXXXXX")
  trap 'rm -f -- "$log" "$prefix/.gapjax-constraints"' EXIT
  if [ -n "${VERBOSE:-}" ]; then exec 3>&2; else exec 3>"$log"; fi
  if [ "$own" = 1 ]; then  # what an interrupted installation left cannot be trusted
    if [ -e "$unfinished" ] || ! runs "$python" -m pip --version; then make_venv; fi
  else
    recent "$python" || die "$python is $("$python" -V 2>&1), and 3.11 or newer is needed: use another environment"
    runs "$python" -m pip --version || runs "$python" -m ensurepip ||
      die "$python has no pip: install it there, or deactivate the environment"
    constraints=$(jax_constraints "$flavour")
  fi
  [ -w "$prefix" ] || die "$prefix is not writable: activate an environment that is"
  extras=$flavour
  case $flavour,$constraints in cpu,* | *,jax==*) extras='' ;; esac
  extras=${extras:+$extras,}$extra
  say "installing gapjax [$extras] and JAX ($flavour) in $prefix; this takes a few minutes, once"
  : >"$unfinished"
  printf '%s\n' "$constraints" >"$prefix/.gapjax-constraints"
  if ! "$python" -m pip install --no-input --progress-bar off -c "$prefix/.gapjax-constraints" \
    -e "$root[$extras]" >&3 2>&1 </dev/null; then
    if [ -s "$log" ]; then  # where pip had not begun, the environment is as good as before
      grep -q '^Installing collected packages' "$log" || rm -f -- "$unfinished"
      cat -- "$log" >&2
    fi
    die "the installation failed; pip's reasons are above"
  fi
  exec 3>&-
  rm -f -- "$log" "$prefix/.gapjax-constraints"
  trap - EXIT
  printf '%s\n' "$(checksum)" "$extra" "$hint" "$flavour" >"$stamp.new"
  mv -f -- "$stamp.new" "$stamp"
  rm -f -- "$unfinished"
  say "installed in $((SECONDS - begun)) s"
}

# ---- here it starts ----

extra=experiments  # of setup.cfg; test includes it
if [ "${1:-}" = test ]; then extra=test; shift; fi
hint=$(hardware)
find_environment
stamp=$prefix/.gapjax-stamp unfinished=$prefix/.gapjax-unfinished
if ! ready; then
  lock
  ready || install  # another launch.sh may have done it meanwhile
  exec 9<&-
fi
if [ "$extra" = test ]; then cd -- "$root"; exec "$python" -m pytest "$@"; fi

# The programs are not installed: they are run from here. -P: not from the current folder, which
# may have an "experiments" of its own.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
program=("$python" -P -m experiments.reproduce "$@")
[ "${NUM_PROCESSES:-1}" != 1 ] || exec "${program[@]}"

# Several processes here: they are joined by a port of this machine.
case $NUM_PROCESSES in '' | *[!0-9]* | 0*) die "NUM_PROCESSES=$NUM_PROCESSES is not a number of processes" ;; esac
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
processes=()
for ((id = 0; id < NUM_PROCESSES; id++)); do
  "${program[@]}" --coordinator="localhost:$port" --num_processes="$NUM_PROCESSES" --process_id="$id" &
  processes+=($!)
done
# A signal to this script is one to them all; they end together.
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM
exec 3>&2 2>/dev/null  # the shell has a line of its own for a process that was killed
code=0 deadline=''
while [ "${#processes[@]}" != 0 ]; do
  running=()
  for process in "${processes[@]}"; do  # in whichever order they end; wait -n is not in bash 3
    if kill -0 "$process" 2>/dev/null; then running+=("$process"); continue; fi
    status=0
    wait "$process" || status=$?
    [ "$code" = 0 ] && [ "$status" != 0 ] || continue
    code=$status
    [ "$status" != 130 ] || continue
    [ "$status" -le 128 ] || say "one of $NUM_PROCESSES processes was lost (signal" \
      "$((status - 128))); the others are ended, and the same command goes on" 2>&3
    # Whoever waits for one that has failed would wait for long.
    deadline=$((SECONDS + 10))
    kill -TERM "${processes[@]}" 2>/dev/null || true
  done
  processes=(${running[@]+"${running[@]}"})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    kill -KILL ${running[@]+"${running[@]}"} 2>/dev/null || true
  fi
  sleep 0.2
done
exit "$code"

# Shared by the scripts of this folder: sourced with the checkout's root as the working directory.

# One line for people, in the form of the program's own errors.
fail() { # WHAT WHERE WHAT_TO_DO
  echo "error: $1 ($2): $3" >&2
  exit 1
}

# Compiler jobs: one a core, and 1.5 GB of memory for each (a file with torch headers takes up to 1 GB).
compile_jobs() {
  local memory
  memory=$(awk '/^MemAvailable/ {print int($2 / 1500000)}' /proc/meminfo)
  local cores
  cores=$(nproc)
  [ "$memory" -ge 1 ] || memory=1
  echo $((cores < memory ? cores : memory))
}

# The first interpreter of those named (default: python3, /usr/bin/python3) that torch 2.11 has wheels for and that can
# make a virtual environment. pyenv's python3 need not be one, and Debian's is not without python3-venv.
find_python() {
  local python
  for python in "$@" python3 /usr/bin/python3; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
      >/dev/null 2>&1; then
      command -v "$python"
      return
    fi
  done
  return 1
}

# Installs packages into a virtual environment of this checkout, unless the stamp in it says that they are there.
venv_with() { # FOLDER PROBE PIP_ARGUMENTS...   (PROBE: a file, relative to FOLDER, that the packages bring; may be a pattern)
  local folder=$PWD/$1 probe=$2
  shift 2
  if [ "$(cat "$folder/installed" 2>/dev/null)" = "$*" ] && compgen -G "$folder/$probe" >/dev/null; then
    return
  fi
  local python
  python=$(find_python) || fail "no Python 3.10 to 3.14 with venv and ensurepip" "PATH" \
    "install python3 and python3-venv"
  echo "installing $* into $(basename "$folder")"
  rm -rf "$folder"
  mkdir -p build
  local log=$PWD/build/pip.log
  # pip unpacks where TMPDIR points: inside the checkout, not in a /tmp that may be small.
  if ! { "$python" -m venv "$folder" && mkdir "$folder/tmp" &&
    TMPDIR=$folder/tmp "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --retries 2 \
      --timeout 30 "$@"; } >"$log" 2>&1; then
    rm -rf "$folder"
    explain_download "$log" "pip install $*"
  fi
  rm -rf "$folder/tmp"
  echo "$*" >"$folder/installed"
}

# What a failed download means: from the words of apt and pip in the log.
explain_download() { # LOG COMMAND
  if grep -qiE "no space left|enough free space" "$1"; then
    fail "no space left on the disk" "$2" "free 6 GB where this checkout is and run again; nothing half-installed is kept"
  fi
  if grep -qiE "resolv|could not connect|connection (refused|timed out)|network is unreachable|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|max retries|unable to connect" "$1"; then
    fail "no network" "$2" "connect this machine (or set the proxy variables) and run again"
  fi
  tail -n 15 "$1" >&2
  fail "a download failed" "$2" "see above, and $1 for the whole log"
}

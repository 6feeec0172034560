# Shared by the scripts in hack/: usage, steps that name the log of a failure, packages, builds and caches.
# shellcheck shell=bash

# The comment at the head of a script is its usage.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# With -h or --help a script prints its usage and does nothing else, wherever the option stands.
for argument in "$@"; do
  case $argument in -h | --help) usage; exit 0 ;; esac
done

# refuse_arguments: for an argument that a script does not know.
refuse_arguments() { # prints the usage and ends with 2, as wrong usage does
  usage >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# What is expensive to make and depends only on its content is kept outside the checkout, under a key made from that content.
cache=${CARREL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/carrel}

# Where SwiftPM builds, for the tests too.
export CARREL_BUILD=${CARREL_BUILD:-$root/.build}
build=$CARREL_BUILD

# share_build: builds in the cache, so that another checkout need not build the dependencies again, whose versions Package.swift pins.
# One checkout at a time: where another builds or tests there, this one uses its own .build.
share_build() {
  local shared key
  [ "$build" = "$root/.build" ] || return 0
  key=$( (swift --version 2>/dev/null; grep -A100 'dependencies: \[' Package.swift | grep '\.package(') | sha256sum | cut -c1-16)
  shared=$cache/build/$key
  mkdir -p "$shared"
  exec 8>"$shared.lock"
  flock -n 8 || return 0
  export CARREL_BUILD=$shared
  build=$shared
  skip build "in $shared"
}

# step NAME COMMAND...: runs it with its output in .cache/log/NAME.log.
step() {
  local name=$1 log=.cache/log/$1.log started=$SECONDS
  shift
  mkdir -p .cache/log
  printf '%-22s ' "$name"
  if "$@" >"$log" 2>&1; then
    printf 'done in %d s\n' $((SECONDS - started))
  else
    local code=$?
    printf 'FAILED (exit %d), log: %s\n' "$code" "$root/$log"
    tail -n 25 "$log" | sed 's/^/    /'
    echo "Mend what the log says and run the same command again: finished steps are skipped." >&2
    exit "$code"
  fi
}

# fetching COMMAND...: tries three times what needs a network.
fetching() {
  local attempt
  for attempt in 1 2 3; do
    "$@" && return 0
    echo "attempt $attempt failed: $*" >&2
    sleep $((attempt * 5))
  done
  return 1
}

skip() { printf '%-22s %s\n' "$1" "$2"; }

# packages NAME...: installs the Debian packages that are missing.
packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    skip packages "all $# are there"
    return
  fi
  install_missing() {
    apt-get update &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
  }
  step packages fetching install_missing
}

build_packages=(pkg-config libseccomp-dev libcap-dev libsystemd-dev libarchive-dev libssl-dev libnftables-dev
  libnl-3-dev libnl-route-3-dev libsqlite3-dev libjson-c-dev)
image_packages=(mmdebstrap buildah uidmap curl ca-certificates python3 python3-venv python3-pip)
machine_packages=(mmdebstrap e2fsprogs qemu-system-x86 qemu-utils binutils)
test_packages=(bubblewrap strace faketime squashfs-tools erofs-utils xfsprogs btrfs-progs fio busybox-static crun runc podman containerd chromium chromium-driver iproute2 nftables procps)

need_root() { [ "$(id -u)" = 0 ] || { echo "run this as root: it makes namespaces, cgroups and network links" >&2; exit 1; }; }
need_swift() {
  command -v swift >/dev/null || { echo "Swift 6.3 is not on PATH: install the toolchain from swift.org first" >&2; exit 1; }
}

# installed_programs [OPTION...]: the programs that the package installs.
installed_programs() {
  local product
  for product in carreld carrel carrel-shim carrel-runtime; do
    step "build-$product" swift build --scratch-path "$build" "$@" --product "$product"
  done
}

# release: the programs as they are installed, with the Swift runtime linked in.
release() { installed_programs -c release --static-swift-stdlib; }

# image NAME: builds images/NAME, unless it was built from the same files before, in this checkout or another.
image() {
  local name=$1 key kept
  key=$(cat hack/build-image $(find images -type f | sort) | sha256sum | cut -d' ' -f1)
  if [ -f ".cache/images/$name.tar" ] && [ "$(cat ".cache/images/$name.key" 2>/dev/null)" = "$key" ]; then
    skip "image-$name" "is there"
    return
  fi
  mkdir -p .cache/images "$cache/images"
  kept=$cache/images/$name-$key.tar
  if [ -f "$kept" ]; then
    skip "image-$name" "is there, from $kept"
  else
    step "image-$name" fetching hack/build-image "$name" --output ".cache/images/$name.tar"
    # Renamed, so that what is there is whole. Images of other content are no longer needed.
    rm -f "$cache/images/$name-"*.tar
    cp --reflink=auto ".cache/images/$name.tar" "$kept.$$" && mv "$kept.$$" "$kept"
  fi
  [ -f ".cache/images/$name.tar" ] || ln -f "$kept" ".cache/images/$name.tar" 2>/dev/null || cp --reflink=auto "$kept" ".cache/images/$name.tar"
  echo "$key" >".cache/images/$name.key"
}

# python_environment: what the end-to-end tests and the benchmark import, in .cache/venv.
python_environment() {
  if [ -x .cache/venv/bin/pytest ] && cmp -s Tests/EndToEnd/requirements.txt .cache/venv/requirements.txt; then
    skip python-environment "is there"
    return
  fi
  make_environment() {
    /usr/bin/python3 -m venv .cache/venv &&
      .cache/venv/bin/pip install --quiet -r Tests/EndToEnd/requirements.txt &&
      cp Tests/EndToEnd/requirements.txt .cache/venv/requirements.txt
  }
  step python-environment fetching make_environment
}

# aws_clients: boto3 and moto as the tests show them to workspaces, in .cache/aws.
aws_clients() {
  if cmp -s Tests/EndToEnd/aws-requirements.txt .cache/aws/requirements.txt; then
    skip aws-clients "is there"
    return
  fi
  fetch_clients() {
    rm -rf .cache/aws &&
      .cache/venv/bin/pip install --quiet --target .cache/aws -r Tests/EndToEnd/aws-requirements.txt &&
      cp Tests/EndToEnd/aws-requirements.txt .cache/aws/requirements.txt
  }
  step aws-clients fetching fetch_clients
}

# configuration DIR BINARIES: writes a configuration that keeps everything below DIR.
configuration() {
  cat <<END
socket: $1/run/carrel.sock
state: $1/state
homes: $1/homes
tools: $root/manifests/tools
helper: $2/carrel-shim
END
}

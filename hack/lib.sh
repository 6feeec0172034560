# Shared by the scripts in hack/: steps that say what they do, and name the log of one that fails.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
mkdir -p .cache/log

# step NAME COMMAND...: runs it with its output in .cache/log/NAME.log.
step() {
  local name=$1 log=.cache/log/$1.log started=$SECONDS
  shift
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
test_packages=(strace faketime squashfs-tools erofs-utils xfsprogs btrfs-progs fio busybox-static crun runc podman containerd chromium chromium-driver iproute2 nftables procps)

need_root() { [ "$(id -u)" = 0 ] || { echo "run this as root: it makes namespaces, cgroups and network links" >&2; exit 1; }; }
need_swift() {
  command -v swift >/dev/null || { echo "Swift 6.3 is not on PATH: install the toolchain from swift.org first" >&2; exit 1; }
}

# release: the programs as they are installed, with the Swift runtime linked in.
release() {
  local product
  for product in carreld carrel carrel-shim carrel-runtime; do
    step "build-$product" swift build -c release --static-swift-stdlib --product "$product"
  done
}

# image NAME: builds images/NAME unless what it is made from has not changed.
image() {
  local name=$1 key
  key=$(cat hack/build-image $(find images -type f | sort) | sha256sum | cut -d' ' -f1)
  if [ -f ".cache/images/$name.tar" ] && [ "$(cat ".cache/images/$name.key" 2>/dev/null)" = "$key" ]; then
    skip "image-$name" "is there"
    return
  fi
  step "image-$name" fetching hack/build-image "$name"
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

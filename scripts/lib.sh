# What the scripts share. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail
# A failure inside `$(...)` is one, too.
shopt -s inherit_errexit

# The comment at a script's head is its help.
for argument in "$@"; do
    case $argument in
        --) break ;;
        -h | --help)
            sed -n '2,${/^#/!q;/^# shellcheck/d;s/^# \{0,1\}//p;}' "$0"
            exit 0
            ;;
    esac
done

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Downloads and what is made of them: kept outside the checkout, nothing is fetched twice.
CACHE=${ALULA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/alula}
HOST_ARCH=$(uname -m)
mkdir -p "$CACHE"

say() { printf '%s\n' "$*" >&2; }
die() {
    say "${0##*/}: $*"
    exit 1
}

# need COMMAND=PACKAGE...: installs the Debian packages whose commands are missing.
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null || die "install the programs of these Debian packages: ${missing[*]}"
    say "installing ${missing[*]}"
    local sudo=()
    if ((EUID)); then
        command -v sudo >/dev/null || die "as root: apt-get install ${missing[*]}"
        sudo=(sudo)
    fi
    {
        "${sudo[@]}" apt-get update -q &&
            "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
    } >"$CACHE/apt-install.log" 2>&1 ||
        die "apt-get install ${missing[*]}: $(tail -n 3 "$CACHE/apt-install.log")"
}

# one_at_a_time: waits until no other script changes the cache; until this one ends.
one_at_a_time() {
    exec {cache_lock}>"$CACHE/lock"
    flock "$cache_lock"
}

# The architecture as Debian calls it.
debian_arch() {
    case $1 in
        x86_64) echo amd64 ;;
        aarch64) echo arm64 ;;
        "") die "an architecture is missing: x86_64 or aarch64 (--help tells more)" ;;
        *) die "unknown architecture \`$1\`: x86_64 or aarch64" ;;
    esac
}

# private_apt: an apt of our own, for packages of both architectures that are unpacked and never
# installed; the system's is left alone.
private_apt() {
    local apt=$CACHE/apt
    export APT_CONFIG=$apt/apt.conf
    [[ -e $apt/updated && -n $(find "$apt/updated" -mmin -1440) ]] && return
    mkdir -p "$apt"/{state/lists/partial,cache/archives/partial}
    : >"$apt/status"
    cat >"$APT_CONFIG" <<EOF
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Architecture "$(dpkg --print-architecture)";
APT::Architectures { "amd64"; "arm64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
EOF
    apt-get update -q >"$apt/update.log" 2>&1 || die "apt-get update: $(tail -n 3 "$apt/update.log")"
    touch "$apt/updated"
}

# unpack FOLDER PACKAGE...: downloads Debian packages and unpacks them into FOLDER.
unpack() {
    local folder=$1 debs
    shift
    private_apt
    debs=$(mktemp -d "$CACHE/debs.XXXXXX")
    (cd "$debs" && apt-get download -q "$@" >log 2>&1) || die "download $*: $(tail -n 3 "$debs/log")"
    mkdir -p "$folder"
    local deb
    for deb in "$debs"/*.deb; do
        dpkg -x "$deb" "$folder"
    done
    rm -rf "$debs"
}

# depends PACKAGE PATTERN: the first dependency of PACKAGE that matches.
depends() {
    private_apt
    apt-cache depends "$1" | sed -n "s/^ *Depends: \($2\)\$/\1/p" | head -n 1
}

# copy_modules PACKAGES FOLDER NAME...: copies modules of the kernel unpacked in PACKAGES, and those
# that they need, into FOLDER; FOLDER/order lists them in the order to load them.
copy_modules() {
    local packages=$1 folder=$2 name file
    shift 2
    mkdir -p "$folder"
    touch "$folder/order"
    for name in "$@"; do
        ! grep -qx "$name" "$folder/order" || continue
        file=$(find "$packages/lib/modules" -name "$name.ko" -o -name "${name//_/-}.ko")
        if [[ -z $file ]]; then
            grep -q "/${name//_/[-_]}\.ko" "$packages"/lib/modules/*/modules.builtin && continue
            die "the kernel in $packages has no module $name"
        fi
        # shellcheck disable=SC2046
        copy_modules "$packages" "$folder" $(modinfo -F depends "$file" | tr ',-' ' _')
        cp "$file" "$folder/$name.ko"
        echo "$name" >>"$folder/order"
    done
}

target() { echo "$1-unknown-linux-gnu"; }

# cross ARCH: makes cargo build for ARCH, from here on, whatever this machine is.
cross() {
    [[ $1 == "$HOST_ARCH" ]] && return
    local env
    env=$("$ROOT/scripts/toolchain" "$1")
    # shellcheck disable=SC1090
    source "$env"
    CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}/cross
    export CARGO_TARGET_DIR
}

# build ARCH: builds the release binary and prints its path.
build() {
    (
        cross "$1"
        cd "$ROOT"
        cargo build --quiet --release --locked --target "$(target "$1")" >&2
        echo "${CARGO_TARGET_DIR:-$ROOT/target}/$(target "$1")/release/alula"
    )
}

# runs_here ARCH ALULA GUEST: whether this machine's own KVM runs a stock kernel; prints why not.
runs_here() {
    local kernel=vmlinux said
    [[ $1 == aarch64 ]] && kernel=Image
    if [[ $1 != "$HOST_ARCH" ]]; then
        echo "this machine is $HOST_ARCH"
    elif [[ ! -e /dev/kvm ]]; then
        echo "there is no /dev/kvm"
    elif [[ -e /sys/module/kvm_pvm ]]; then
        echo "this machine's KVM (kvm_pvm) is a software one, which does not run stock kernels"
    elif said=$(timeout 60 "$2" run "$3/$kernel" --initrd "$3/initramfs.cpio" </dev/null 2>&1); then
        return 0
    else
        echo "this machine's KVM does not run a stock kernel: $(tail -n 1 <<<"$said")"
    fi
    return 1
}

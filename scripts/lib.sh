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

say() {
    printf '%s' "$*" >&2
    # The line of `doing` may be there.
    [[ ! -t 2 ]] || printf '\e[K' >&2
    printf '\n' >&2
}
die() {
    say "${0##*/}: $*"
    exit 1
}

minutes() { printf '%d min %02d s' "$(($1 / 60))" "$(($1 % 60))"; }

# doing WHAT [FOLDER]: says what comes now, and until the next `doing` or the end how long it has taken: on a terminal
# once a second in a line that what is printed next takes the place of, elsewhere in a line a minute. With a folder
# that is filled meanwhile, also how much is in it.
doing_watcher='' doing_owner=''
doing() {
    doing_nothing
    doing_owner=$BASHPID
    say "${0##*/}: $1"
    # Nobody who waits for the end of this script's output waits for the watcher.
    watch_doing "$doing_owner" "$@" >/dev/null </dev/null &
    doing_watcher=$!
}

# doing_nothing: ends what the last `doing` began.
doing_nothing() {
    # A subshell leaves alone what it did not begin.
    [[ $doing_watcher && $doing_owner == "$BASHPID" ]] || return 0
    kill "$doing_watcher" 2>/dev/null || true
    wait "$doing_watcher" 2>/dev/null || true
    doing_watcher=
    [[ ! -t 2 ]] || printf '\e[K' >&2
}
trap doing_nothing EXIT

# watch_doing PROCESS WHAT [FOLDER]: the watcher; it ends with the process, however that ends.
watch_doing() {
    local begun=$SECONDS passed told=0 line
    # Of a process that has ended, and was not waited for, the program is not there either.
    while sleep 1 2>/dev/null && [[ -e /proc/$1/exe ]]; do
        passed=$((SECONDS - begun))
        line="${0##*/}: $2: $(minutes "$passed")"
        [[ ! -d ${3:-} ]] || line+=", $(du -sm "$3" 2>/dev/null | cut -f 1) MB"
        if [[ -t 2 ]]; then
            printf '%s\e[K\r' "$line" >&2
        elif ((passed / 60 > told)); then
            told=$((passed / 60))
            say "$line"
        fi
    done
}

# need COMMAND=PACKAGE...: installs the Debian packages whose commands are missing.
need() {
    # With a package that comes, apt may take away one that was there, of another release: it comes anew then.
    for _ in 1 2; do
        find_missing "$@"
        ((${#missing[@]})) || return 0
        install_packages "${missing[@]}"
    done
    find_missing "$@"
    ((${#missing[@]} == 0)) || die "apt-get has installed what is needed, and these Debian packages are still missing: ${missing[*]}"
}

# find_missing COMMAND=PACKAGE...: sets `missing` to the packages whose commands are missing.
find_missing() {
    local pair
    missing=()
    hash -r
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
}

# install_packages PACKAGE...: installs Debian packages.
install_packages() {
    command -v apt-get >/dev/null || die "install the programs of these Debian packages: $*"
    doing "installing $*"
    local sudo=()
    if ((EUID)); then
        command -v sudo >/dev/null || die "as root: apt-get install $*"
        sudo=(sudo)
    fi
    {
        "${sudo[@]}" apt-get update -q &&
            "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
    } >"$CACHE/apt-install.log" 2>&1 ||
        die "apt-get install $*: $(tail -n 3 "$CACHE/apt-install.log")"
    doing_nothing
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

# The release of Debian whose packages are unpacked; empty: this machine's.
RELEASE=

# private_apt: an apt of our own, for packages of both architectures that are unpacked and never
# installed; the system's is left alone.
private_apt() {
    local apt=$CACHE/apt${RELEASE:+-$RELEASE} archive
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
    if [[ $RELEASE ]]; then
        # From where this machine has its own packages.
        # shellcheck disable=SC2016
        archive=$(RELEASE='' private_apt &&
            apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
        [[ $archive ]] || die "packages of $RELEASE: this machine's apt has no archive of Debian"
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $RELEASE main" >"$apt/list"
        cat >>"$APT_CONFIG" <<EOF
Dir::Etc::sourcelist "$apt/list";
Dir::Etc::sourceparts "/dev/null";
EOF
    fi
    doing "reading the lists of packages"
    apt-get update -q >"$apt/update.log" 2>&1 || die "apt-get update: $(tail -n 3 "$apt/update.log")"
    touch "$apt/updated"
    doing_nothing
}

# unpack FOLDER PACKAGE...: downloads Debian packages and unpacks them into FOLDER.
unpack() {
    local folder=$1 debs
    shift
    private_apt
    debs=$(mktemp -d "$CACHE/debs.XXXXXX")
    doing "downloading ${*%%:*}" "$debs"
    (cd "$debs" && apt-get download -q "$@" >log 2>&1) || die "download $*: $(tail -n 3 "$debs/log")"
    mkdir -p "$folder"
    local deb
    for deb in "$debs"/*.deb; do
        dpkg -x "$deb" "$folder"
    done
    rm -rf "$debs"
    # Newer releases have all of /lib in /usr.
    [[ -e $folder/lib || ! -d $folder/usr/lib/modules ]] || ln -s usr/lib "$folder/lib"
    doing_nothing
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
        file=$(find -L "$packages/lib/modules" -name "$name.ko*" -o -name "${name//_/-}.ko*")
        if [[ -z $file ]]; then
            grep -q "/${name//_/[-_]}\.ko" "$packages"/lib/modules/*/modules.builtin && continue
            die "the kernel in $packages has no module $name"
        fi
        # shellcheck disable=SC2046
        copy_modules "$packages" "$folder" $(modinfo -F depends "$file" | tr ',-' ' _')
        if [[ $file == *.xz ]]; then xz -dc "$file" >"$folder/$name.ko"; else cp "$file" "$folder/$name.ko"; fi
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

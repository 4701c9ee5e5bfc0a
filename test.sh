#!/bin/bash
# SPDX-License-Identifier: MIT
# Tests of fuseexp, in TAP. A case is a function t_<what it asserts>, run in its own folder and its own shell with -eu.
#
#   ./test.sh [-l] [PATTERN...]     -l lists the cases; patterns as in 'partition_*'
#   ./test.sh --demo | --bench | --lint | --soak
#
# KEEP=1 keeps the folders. TIMES=1 says how long each case took. Truth comes from elsewhere: cmp, mkfs, fsck, sfdisk, qemu-img.
# Needs root; cases as a plain user become nobody. Cases on the corpus are skipped where ../shared/corpus is not there.
# shellcheck disable=SC2013,SC2015,SC2016,SC2017,SC2001,SC2059,SC2154,SC2209,SC2317  # inner shells, words without blanks, names set by callers
set -u
top=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$top/build}
corpus=$top/../shared/corpus
fx=$build/fuseexp
fault=$build/fuseexp-fault
libs=$build/deps
export LC_ALL=C ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=98 TSAN_OPTIONS=exitcode=97 UBSAN_OPTIONS=print_stacktrace=1

# ---- helpers ---------------------------------------------------------------------------------------------------

skip() { echo "SKIP: $*" >&3; exit 77; }
fail() { echo "FAILED: $*" >&2; exit 1; }
# Assertions stand on lines of their own: in "a && b" a failing a does not end a shell under -e, nor does "! a".
not() { if "$@"; then fail "should have failed: $*"; fi; }
same() { [ "$1" = "$2" ] || fail "expected '$2', got '$1'"; }
random() { dd if=/dev/urandom of="$1" bs=4k count="$2" iflag=fullblock status=none; }       # FILE, 4 KiB blocks

# expect STATUS COMMAND...: its exit status; stderr goes to ./err
expect() {
    local want=$1 got=0
    shift
    "$@" 2>err || got=$?
    [ "$got" = "$want" ] || { cat err >&2; fail "exit status $got instead of $want: $*"; }
}

# refused STATUS PATTERN COMMAND...: fails with that status, says one line that matches, leaves nothing behind
refused() {
    local want=$1 pattern=$2 before
    shift 2
    before=$(state)
    expect "$want" "$@"
    same "$(wc -l <err)" 1
    grep -q "^fuseexp: .*$pattern" err || { cat err >&2; fail "no '$pattern' in the message"; }
    : >err
    same "$(state)" "$before"
}

# What a failed start must not change: mounts, files, processes of ours. (./err is ours.)
state() {
    grep -c "$PWD" /proc/self/mountinfo || true
    find . -xdev ! -name err -printf '%p %y %i\n' | sort
    ours
}

# Live processes of fuseexp that this case started: they carry its folder in their environment.
ours() {
    local p
    for p in $(grep -lzs "^FXTEST=$PWD\$" /proc/[0-9]*/environ); do
        p=${p%/environ}
        case $(readlink "$p/exe") in "$build"/fuseexp*) echo "process ${p#/proc/}" ;; esac
    done
    true
}

server_of() {       # the server's process number: of ours, the one that is locked in
    local p
    for p in $(ours | sed 's/process //'); do
        grep -q '^NoNewPrivs:.*1' "/proc/$p/status" 2>/dev/null && echo "$p"
    done | head -n 1
}
supervisor_of() { awk '{ print $4 }' "/proc/$(server_of)/stat"; }

gone() {            # waits up to two seconds until nothing of ours runs and nothing is mounted here
    local i
    for i in $(seq 100); do
        [ -z "$(ours)" ] && ! grep -q " $PWD/" /proc/self/mountinfo && return 0
        sleep 0.02
    done
    ours >&2
    fail "still there: $(grep " $PWD/" /proc/self/mountinfo)"
}

wait_for() {        # until the command succeeds, two seconds at most
    local i
    for i in $(seq 100); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.02
    done
    fail "waited in vain: $*"
}

nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups)
as_nobody() { "${nobody[@]}" "$@"; }

clean_up() {        # of a case, whatever happened
    local d m
    for d in $(losetup -nO NAME,BACK-FILE 2>/dev/null | awk -v p="$1" 'index($0, p) { print $1 }'); do
        umount "$d" 2>/dev/null
        losetup -d "$d"
    done
    while m=$(awk -v p="$1/" 'index($5, p) == 1 { print $5 }' /proc/self/mountinfo | tail -n 1) && [ -n "$m" ]; do
        umount -l "$m" 2>/dev/null || break
    done
    sleep 0.05
    for d in $(cd "$1" && ours | sed 's/process //'); do kill -9 "$d" 2>/dev/null; done
    [ -n "${KEEP:-}" ] || rm -rf "$1"
}

# Compares two files' system call by system call behaviour: reads, mmap, seeks. Python, as the shell cannot.
py() { python3 -c "import os, sys, mmap, random, errno, ctypes, fcntl
$1" "${@:2}"; }

# ---- build and installation ------------------------------------------------------------------------------------

t_binary_is_static_small_and_stripped() {
    ldd "$fx" 2>&1 | grep -q 'not a dynamic executable\|statically linked'
    [ "$(stat -c %s "$fx")" -le 1048576 ] || fail "larger than 1 MiB"
    readelf -S "$fx" >sections
    not grep -q '\.symtab' sections
}

t_same_sources_give_the_same_bytes() {
    mkdir -p other/build
    cp "$top"/Makefile "$top"/fuseexp.[ch] "$top"/README "$top"/test.sh other/
    cp -a "$libs" other/build/deps
    make -s -C other build/fuseexp >make.log 2>&1 || { cat make.log; false; }
    cmp other/build/fuseexp "$fx"
}

t_install_puts_binary_helpers_and_manual() {
    make -s -C "$top" install DESTDIR="$PWD/root" PREFIX=/usr >/dev/null
    cmp root/usr/bin/fuseexp "$fx"
    same "$(readlink root/sbin/mount.fuseexp)" /usr/bin/fuseexp
    same "$(readlink root/sbin/mount.fuse.fuseexp)" /usr/bin/fuseexp
    MANWIDTH=120 man -l root/usr/share/man/man8/fuseexp.8 2>man.err >man.txt
    grep -q 'SYNOPSIS' man.txt; grep -q -- '--partition' man.txt
    [ ! -s man.err ] || { cat man.err; false; }
    make -s -C "$top" uninstall DESTDIR="$PWD/root" PREFIX=/usr
    same "$(find root -type f -o -type l)" ""
}

t_runs_in_an_empty_chroot_with_dev_fuse_and_proc() {
    mkdir -p root/dev root/proc
    cp "$fx" root/fuseexp
    mknod root/dev/fuse c 10 229
    random root/image 64
    unshare -m sh -ec 'mount -t proc proc root/proc; chroot root /fuseexp -q --format raw /image /m
        cmp root/image root/m; chroot root /fuseexp --umount /m; [ ! -e root/m ]'
}

t_help_lists_every_option_that_readme_explains() {
    "$fx" --help >help
    grep -oE -- '--[a-z][a-z-]+' help | sort -u >in_help
    while read -r opt; do grep -q -- "$opt" "$top/README" || fail "README lacks $opt"; done <in_help
    "$fx" --version | grep -q '^fuseexp [0-9]'
    "$fx" --formats | grep -q '^raw '
}

# ---- reading ---------------------------------------------------------------------------------------------------

# Every way to read the same bytes, on an image of an odd size, through OPTIONS.
check_reading() {
    random img 700
    printf 'odd tail' >>img
    "$fx" -q "$@" img m
    cmp img m
    same "$(stat -c %s m)" "$(stat -c %s img)"
    py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY)
size = os.fstat(a).st_size
rnd = random.Random(1)
for i in range(600):
    off = rnd.randrange(size + 5000); n = rnd.choice([1, 7, 512, 4095, 4097, 65536, 300000])
    assert os.pread(a, n, off) == os.pread(b, n, off), (off, n)
assert os.pread(b, 10, size) == b"" and os.pread(b, 10, 2**62) == b"" and os.pread(b, 100, size - 3) == b"ail"
ma, mb = mmap.mmap(a, 0, prot=mmap.PROT_READ), mmap.mmap(b, 0, prot=mmap.PROT_READ)
assert ma[:] == mb[:]
c = os.open("copy", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
off = 0
while off < size:
    off += os.sendfile(c, b, off, size - off)
r, w = os.pipe()
os.lseek(c, 0, 0)
off = 0
while off < size:
    n = os.splice(b, w, min(65536, size - off), offset_src=off)
    got = os.read(r, n)
    while len(got) < n: got += os.read(r, n - len(got))
    assert got == os.pread(a, n, off)
    off += n
'
    cmp img copy
    py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY | os.O_DIRECT)
size = os.fstat(a).st_size
buf = mmap.mmap(-1, 1 << 21)
for off, n in [(0, 4096), (512, 512), (4096, 1 << 20), (0, 1 << 21), (size - size % 4096, 4096), (1536, 999 * 512)]:
    got = os.preadv(b, [memoryview(buf)[:n]], off)
    assert buf[:got] == os.pread(a, n, off) and got == min(n, size - off), (off, n, got)
'
    "$fx" --umount m
    [ ! -e m ] || fail "the mountpoint was left behind"
}
t_reads_back_through_passthrough() { check_reading; }
t_reads_back_through_workers() { check_reading --no-passthrough; }
t_reads_back_with_one_thread() { check_reading --no-passthrough -s; }
t_reads_back_with_direct_io() { check_reading --direct-io; }
t_reads_back_when_writable() { check_reading -w; }

t_two_processes_read_at_once() {
    random img 4096
    "$fx" -q --no-passthrough img m
    cmp img m & local a=$!
    cmp img m & local b=$!
    dd if=m of=direct bs=96k iflag=direct status=none
    wait $a; wait $b; cmp img direct
    "$fx" --umount m
}

t_ext4_image_loop_mounts_and_reads_through() {
    mkdir files mnt; cp "$top"/fuseexp.c files/; random files/random 1000
    mkfs.ext4 -q -d files img 32M
    "$fx" -q img m
    e2fsck -fn m >/dev/null 2>&1
    mount -o ro,loop m mnt
    diff -r --exclude=lost+found files mnt
    umount mnt
    "$fx" --umount m
}

t_ext4_is_written_through_a_loop_device() {
    truncate -s 64M img; mkfs.ext4 -q img; mkdir mnt
    "$fx" -q -w img m
    mount -o loop m mnt
    random mnt/a 2000; cp mnt/a a; mkdir mnt/d; cp -r /etc/apt mnt/d/
    fstrim mnt || true
    umount mnt
    "$fx" --umount m
    e2fsck -fn img >/dev/null 2>&1
    mount -o ro,loop img mnt
    cmp a mnt/a; diff -r /etc/apt mnt/d/apt
    umount mnt
}

t_xfs_is_written_through_a_loop_device() {
    truncate -s 320M img; mkfs.xfs -q img; mkdir mnt
    "$fx" -q -w img m
    xfs_repair -n m >/dev/null 2>&1
    mount -o loop m mnt
    random mnt/a 2000; cp mnt/a a
    umount mnt
    xfs_repair -n m >/dev/null 2>&1
    "$fx" --umount m
    mount -o ro,loop img mnt; cmp a mnt/a; umount mnt
}

t_seek_data_and_hole_are_the_images_own() {
    truncate -s 1M img; random data 16
    dd if=data of=img bs=4k seek=20 conv=notrunc status=none; dd if=data of=img bs=4k seek=100 conv=notrunc status=none
    truncate -s 1048999 img
    for opt in --no-passthrough "" --direct-io; do
        "$fx" -q $opt img m
        py '
a, b = os.open("img", os.O_RDONLY), os.open("m", os.O_RDONLY)
def seek(f, off, how):
    try: return os.lseek(f, off, how)
    except OSError as e: return -e.errno
for off in list(range(0, 1049000, 3000)) + [1048998, 1048999, 1049000, 2**40]:
    for how in (os.SEEK_DATA, os.SEEK_HOLE):
        assert seek(a, off, how) == seek(b, off, how), (off, how, seek(a, off, how), seek(b, off, how))
assert os.fstat(a).st_blocks == os.fstat(b).st_blocks
'
        "$fx" --umount m
    done
}

t_attributes_and_statfs_make_sense() {
    random img 100; touch -d '2020-02-02 02:02:02 UTC' img
    "$fx" -q img m
    same "$(stat -c '%a %u %g %s %h %Y' m)" "400 0 0 409600 1 1580608922"
    same "$(stat -f -c '%s %b' m)" "4096 100"
    "$fx" --umount m
    "$fx" -q -w --mode 640 --uid 12 --gid 34 img m
    same "$(stat -c '%a %u %g' m)" "640 12 34"
    "$fx" --umount m
}

t_setattr_follows_qemus_rules() {
    random img 16
    "$fx" -q img m
    py '
def no(err, f, *a):
    try: f(*a)
    except OSError as e: assert e.errno == err, e
    else: raise AssertionError("allowed")
no(errno.EROFS, os.chmod, "m", 0o600)
no(errno.EROFS, os.truncate, "m", 0)
no(errno.EROFS, os.open, "m", os.O_RDWR)
no(errno.EROFS, os.utime, "m")'
    "$fx" --umount m
    "$fx" -q -w --allow-other=off img m
    py '
def no(err, f, *a):
    try: f(*a)
    except OSError as e: assert e.errno == err, e
    else: raise AssertionError("allowed")
no(errno.EPERM, os.chmod, "m", 0o644)
no(errno.EOPNOTSUPP, os.chown, "m", 1, 1)
no(errno.EOPNOTSUPP, os.utime, "m")
os.chmod("m", 0o400)
assert os.stat("m").st_mode & 0o777 == 0o400'
    "$fx" --umount m
    cmp -s img img
}

t_folder_lists_its_files_and_takes_no_others() {
    random img 16; mkdir d
    "$fx" -q -w img d
    same "$(ls d)" disk
    same "$(find d -type f -size +0)" d/disk
    same "$(stat -c %a d)" 500
    not touch d/new 2>err; grep -q 'not permitted' err
    not mkdir d/new 2>err; not rm -f d/disk 2>err; not mv d/disk d/e 2>err; not ln d/disk d/e 2>err
    cmp img d/disk
    umount d
    gone
    same "$(ls -A d)" ""
}

# ---- writing ---------------------------------------------------------------------------------------------------

t_nothing_is_written_without_w() {
    random img 16; cp img copy; stat -c '%y %z' img >before
    "$fx" -q img m
    not dd if=/dev/zero of=m conv=notrunc count=1 2>err; grep -q 'Read-only' err
    "$fx" --umount m
    cmp img copy; same "$(stat -c '%y %z' img)" "$(cat before)"
}

t_random_writes_match_a_model() {
    for opt in "" --direct-io --growable; do
        random img 512; cp img model
        "$fx" -q -w $opt img m
        py '
a, b = os.open("model", os.O_RDWR), os.open("m", os.O_RDWR)
size = os.fstat(a).st_size
rnd = random.Random(7)
for i in range(800):
    n = rnd.choice([1, 3, 512, 4096, 5000, 70000, 1048576]); off = rnd.randrange(size)
    n = min(n, size - off)
    if rnd.random() < .5:
        d = rnd.randbytes(n)
        assert os.pwrite(a, d, off) == os.pwrite(b, d, off) == n
    else:
        assert os.pread(a, n, off) == os.pread(b, n, off)
os.fsync(b)
'
        cmp model m
        "$fx" --umount m
        cmp model img
    done
}

t_fio_verifies_what_it_wrote() {
    truncate -s 64M img
    for opt in "" --direct-io --growable; do
        "$fx" -q -w $opt img m
        for direct in 0 1; do
            fio --name=v --filename="$PWD/m" --size=64M --rw=randwrite --bsrange=512-128k --bs_unaligned=0 --blockalign=512 \
                --ioengine=libaio --iodepth=16 --direct=$direct --verify=crc32c --verify_fatal=1 --number_ios=1500 \
                --output=fio.log || { cat fio.log; false; }
        done
        "$fx" --umount m
    done
}

t_writes_stop_at_the_end_unless_growable() {
    random img 16; cp img copy
    "$fx" -q -w img m
    py '
f = os.open("m", os.O_RDWR)
assert os.pwrite(f, b"x" * 100, 65536 - 10) == 10
for off in (65536, 70000, 2**50):
    try: os.pwrite(f, b"x", off)
    except OSError as e: assert e.errno == errno.ENOSPC, e
    else: raise AssertionError(off)
'
    same "$(stat -c %s m)" 65536
    "$fx" --umount m
    same "$(stat -c %s img)" 65536
    cp copy img
    for opt in --no-passthrough ""; do
        "$fx" -q -w --growable $opt img m
        printf 'more' >>m
        same "$(stat -c %s m)" "$(stat -c %s img)"
        fallocate -l 200000 m; same "$(stat -c %s m)" 200000
        printf 'far' | dd of=m bs=1 seek=300000 conv=notrunc status=none
        same "$(stat -c %s m)" 300003
        "$fx" --umount m
        { cat copy; printf 'more'; } | cmp -n 65540 - img
        same "$(stat -c %s img)" 300003
        cp copy img
    done
}

t_opening_with_o_trunc_empties_only_growable_images() {
    random img 64; random new 64; cp img copy
    for opt in "" --offset=4096; do
        "$fx" -q -w $opt img m
        not cp new m 2>err; grep -q 'not permitted' err
        not sh -c ': >m' 2>err
        not dd if=new of=m bs=4k count=10 2>err
        cmp -i "${opt:+4096:}0" img m
        "$fx" --umount m
        cmp img copy
    done
    "$fx" -q -w img m
    cat new 1<>m; cmp new m; dd if=new of=m conv=notrunc status=none
    "$fx" --umount m
    cmp new img
    "$fx" -q -w --growable img m
    head -c 1000 new >m; same "$(stat -c %s m)" 1000
    head -c 20 new >m; echo BB >m; same "$(cat m)" BB
    "$fx" --umount m; same "$(stat -c %s img)" 3
}

t_truncate_works_on_whole_raw_images_only() {
    random img 16; cp img copy
    "$fx" -q -w img m
    truncate -s 5000 m; same "$(stat -c %s img)" 5000
    truncate -s 9000 m; same "$(stat -c %s img)" 9000
    "$fx" --umount m
    cmp -n 5000 img copy; cmp -i 5000:0 -n 4000 img /dev/zero
    cp copy img
    "$fx" -q -w --size 4096 img m
    not truncate -s 100 m 2>err; grep -q 'not supported' err
    "$fx" --umount m
    cmp img copy
}

t_fallocate_punches_zeroes_and_allocates() {
    random img 256; cp img model
    "$fx" -q -w img m
    for f in model m; do
        fallocate -p -o 8192 -l 100000 "$f"; fallocate -z -o 300001 -l 5000 "$f"; fallocate -o 600000 -l 50000 "$f"
    done
    cmp model m
    py '
f = os.open("m", os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
def fa(mode, off, n): return 0 if libc.fallocate(f, mode, ctypes.c_long(off), ctypes.c_long(n)) == 0 else ctypes.get_errno()
assert fa(0, 1 << 20, 4096) == errno.ENOSPC
assert fa(1, 1 << 20, 4096) == 0                # keep the size: past the end there is nothing to do
assert fa(8, 0, 4096) == errno.EOPNOTSUPP       # collapse
assert fa(3, (1 << 20) - 100, 4096) == 0        # punch across the end
'
    "$fx" --umount m
    same "$(stat -c %s img)" 1048576
    [ "$(stat -c %b img)" -lt 1900 ] || fail "the host's space was not freed"
}

t_disk_full_is_told_to_the_writer_and_in_the_end() {
    mkdir small; mount -t tmpfs -o size=1M none small; truncate -s 8M small/img
    "$fx" -q -f -w small/img m 2>log & local pid=$!
    wait_for test -s m
    not dd if=/dev/zero of=m bs=64k count=100 conv=notrunc 2>err; grep -q 'No space left' err
    umount m
    not wait $pid
    grep -q 'write error.*No space' log; grep -q 'not everything' log
}

t_failed_flush_is_remembered() {
    random img 16
    FUSEEXP_FAIL_OP=sync "$fault" -q -f -w img m 2>log & local pid=$!
    wait_for test -s m
    py '
f = os.open("m", os.O_RDWR)
os.pwrite(f, b"x", 0)
for i in range(2):
    try: os.fsync(f)
    except OSError as e: assert e.errno == errno.EIO
    else: raise AssertionError("fsync said all is well")
try: os.close(f)
except OSError as e: assert e.errno == errno.EIO
else: raise AssertionError("close said all is well")
'
    expect 1 "$fx" --umount m
    grep -q 'reported failure' err
    not wait $pid
}

t_read_errors_reach_the_reader_as_eio() {
    random img 64
    FUSEEXP_FAIL_OP=read "$fault" -q --format raw -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    not cat m >out 2>err; grep -q 'Input/output error' err; [ ! -s out ]
    umount m; wait $pid
    grep -q 'read error at' log
    [ "$(wc -l <log)" -le 15 ] || fail "the log is not rate-limited"
}

t_image_truncated_underneath_gives_eio_past_its_end() {
    random img 64; cp img copy
    for opt in --no-passthrough --direct-io; do
        "$fx" -q $opt img m
        truncate -s 100000 img
        cmp -n 98304 copy m                              # 24 whole pages
        not dd if=m of=/dev/null bs=4k skip=25 count=1 2>err; grep -q 'Input/output' err
        not cat m >/dev/null 2>&1
        same "$(stat -c %s m)" 262144
        "$fx" --umount m
        cp copy img
    done
    # Neither is what was lost a hole, which cp would fill with zeros.
    random img 1024; "$fx" -q --no-passthrough img m; truncate -s 2M img
    not cp m out 2>err; grep -q 'Input/output' err
    "$fx" --umount m; cp copy img
    # The kernel serves an open file alone and would just end early: close(2) tells, and the next open is right.
    "$fx" -q img m
    py '
f = os.open("m", os.O_RDONLY)
os.truncate("img", 100000)
while os.read(f, 65536): pass
try: os.close(f)
except OSError as e: assert e.errno == errno.EIO
else: raise AssertionError("close said all is well")'
    not dd if=m of=/dev/null bs=4k skip=25 2>err; grep -q 'Input/output' err
    expect 1 "$fx" --umount m
}

# ---- raw sources -----------------------------------------------------------------------------------------------

t_block_device_is_read_and_written() {
    random img 256; cp img copy
    local dev; dev=$(losetup -f --show img)
    "$fx" -q "$dev" m; cmp m copy; "$fx" --umount m
    "$fx" -q -w "$dev" m
    refused 1 'mounted, or used' "$fx" -q -w "$dev" m2
    printf 'hello' | dd of=m bs=1 seek=5000 conv=notrunc,fsync status=none
    not truncate -s 10 m 2>err
    fallocate -z -o 8192 -l 4096 m
    "$fx" --umount m
    losetup -d "$dev"
    printf 'hello' | cmp -i 0:5000 -n 5 - img; cmp -i 8192:0 -n 4096 img /dev/zero; cmp -i 12288 img copy
}

t_mounted_block_device_is_not_written() {
    truncate -s 16M img; mkfs.ext4 -q img; mkdir mnt
    local dev; dev=$(losetup -f --show img)
    mount "$dev" mnt
    refused 1 'mounted, or used' "$fx" -q -w "$dev" m
    "$fx" -q "$dev" m; "$fx" --umount m
    umount mnt; losetup -d "$dev"
}

t_split_images_are_found_and_joined() {
    random whole 100
    for style in 3,1,. 2,0,. 4,1,.; do
        rm -f part*
        split -b 100000 -a "${style%%,*}" --numeric-suffixes="$(echo "$style" | cut -d, -f2)" whole part.
        "$fx" -q "$(find . -name 'part.*' | sort | head -n 1)" m; cmp m whole; "$fx" --umount m
    done
    rm -f part*; split -b 70000 -a 2 whole part.
    "$fx" -q part.aa m; cmp m whole; "$fx" --umount m
    "$fx" -q --no-passthrough part.a? m; cmp m whole
    dd if=m of=direct iflag=direct bs=64k status=none; cmp direct whole; "$fx" --umount m
    # More than ten parts: from .09 to .10, from .az to .ba.
    rm -f part*; split -b 10000 -a 2 --numeric-suffixes=1 whole part.
    "$fx" -q part.01 m; cmp m whole; "$fx" --umount m
    rm -f part*; split -b 10000 -a 2 whole part.
    "$fx" -q part.aa m; cmp m whole; "$fx" --umount m
}

t_split_images_with_lost_or_damaged_parts_are_refused() {
    random whole 100; split -b 100000 -a 3 --numeric-suffixes=1 whole part.
    mv part.003 x; refused 1 'part.003: missing, though part.004' "$fx" -q part.001 m
    mv x part.003; truncate -s 99999 part.002; refused 1 'part.002: part of 99999 bytes' "$fx" -q part.001 m
    "$fx" -q part.001 part.002 part.003 part.004 part.005 m
    cat part.00? | cmp - m; "$fx" --umount m
    "$fx" -q --no-parts part.001 m; cmp m part.001; "$fx" --umount m
    "$fx" part.003 m 2>err; grep -q 'shown alone.*part.002 is there' err; "$fx" --umount m
    cp part.001 part.000; refused 1 'part.000 is the first part' "$fx" -q part.001 m
}

t_written_parts_get_their_bytes() {
    random whole 100; cp whole model; split -b 100000 -a 3 --numeric-suffixes=1 whole part.
    "$fx" -q -w part.001 m
    random data 30
    dd if=data of=m bs=1M seek=70001 oflag=seek_bytes conv=notrunc status=none
    dd if=data of=model bs=1M seek=70001 oflag=seek_bytes conv=notrunc status=none
    cmp m model; "$fx" --umount m
    cat part.00? | cmp - model
}

t_window_shows_its_bytes() {
    random img 64
    "$fx" -q --offset 5000 img m; cmp -i 5000:0 img m; same "$(stat -c %s m)" 257144; "$fx" --umount m
    "$fx" -q --offset 4k --size 0x1001 img m; cmp -n 4097 -i 4096:0 img m; same "$(stat -c %s m)" 4097; "$fx" --umount m
    refused 1 'offset 300000 is past the end' "$fx" -q --offset 300000 img m
    refused 1 'reaches past the end' "$fx" -q --offset 1 --size 256k img m
    "$fx" -q --offset 0512 img m; same "$(stat -c %s m)" 261632; "$fx" --umount m      # no octal
    for bad in -1 1x 8E 9223372036854775808 18446744073709551616 99999999999999999999 1kk '' ' 1' +1; do
        refused 2 "'$bad' is not a usable size" "$fx" -q --offset="$bad" img m
    done
}

# check_partitions IMAGE TOOL-SECTOR [OPTION...]: every partition against the image and sfdisk's own reading of it
check_partitions() {
    local img=$1 sector=$2 n start size count=0
    shift 2
    mkdir -p d
    "$fx" -q "$@" "$img" d
    while read -r n start size; do
        cmp -i $((start * sector)):0 -n $((size * sector)) "$img" "d/p$n"
        same "$(stat -c %s "d/p$n")" $((size * sector))
        count=$((count + 1))
    done < <(sfdisk -J "${table:-$img}" | jq -r '.partitiontable.partitions[] | select(.type | IN("5","f","85") | not) |
             "\(.node | capture("(?<n>[0-9]+)$").n) \(.start) \(.size)"')
    [ "$count" -gt 0 ]
    same "$(find d -name 'p*' | wc -l)" "$count"
    cmp "$img" d/disk
    umount d
    gone
    while read -r n start size; do
        "$fx" -q "$@" --partition "$n" "$img" m
        cmp -i $((start * sector)):0 -n $((size * sector)) "$img" m
        "$fx" --umount m
    done < <(sfdisk -J "${table:-$img}" | jq -r '.partitiontable.partitions[] | select(.type | IN("5","f","85") | not) |
             "\(.node | capture("(?<n>[0-9]+)$").n) \(.start) \(.size)"')
}

mbr_image() {
    random img 10240
    printf 'label: dos\n2048,4096,83\n8192,2048,7\n10240,,f\n12288,2048,83\n16384,4096,83\n22528,1000,82\n' | sfdisk -q img
}

t_partitions_of_an_mbr_with_logical_ones() { mbr_image; check_partitions img 512; }

t_partitions_of_a_gpt() {
    random img 10240
    printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=100\nstart=9000\n' | sfdisk -q img
    sfdisk -q --delete img 2; check_partitions img 512
}

t_partitions_of_a_gpt_with_4096_byte_sectors() {
    random img 10240
    local dev; dev=$(losetup -b 4096 -f --show img)
    printf 'label: gpt\nstart=256,size=512\nstart=1000,size=99\n' | sfdisk -q "$dev"
    table=$dev check_partitions img 4096
    check_partitions "$dev" 4096
    # An MBR does not tell its sector size; the device does, and for a file the user.
    printf 'label: dos\nstart=256,size=512\nstart=1000,size=99\n' | sfdisk -q --wipe always "$dev"
    check_partitions "$dev" 4096
    table=$dev check_partitions img 4096 --sector-size 4096
    losetup -d "$dev"
}

t_gpt_backup_is_used_when_the_primary_is_damaged() {
    random img 10240
    printf 'label: gpt\nstart=2048,size=4096\nstart=8192,size=100\n' | sfdisk -q img
    cp img good; "$fx" -q --partition 2 img m; cp m p2; "$fx" --umount m
    # The header's checksum, the table's checksum, and everything at the front gone.
    for where in 520 1030 ; do
        cp good img; printf 'X' | dd of=img bs=1 seek=$where conv=notrunc status=none
        "$fx" --partition 2 --format raw img m 2>err; cmp m p2; "$fx" --umount m
        grep -q 'primary GPT is damaged' err
    done
    cp good img; dd if=/dev/zero of=img bs=1M count=1 conv=notrunc status=none
    "$fx" -q --partition 2 --format raw img m; cmp m p2; "$fx" --umount m
    cp good img; printf 'X' | dd of=img bs=1 seek=520 conv=notrunc status=none
    printf 'X' | dd of=img bs=1 seek=$((40 * 1048576 - 512 + 20)) conv=notrunc status=none
    refused 1 'no partition 2: its header.s checksum is wrong' "$fx" -q --partition 2 img m
}

t_partition_that_reaches_past_the_end_reads_as_eio_there() {
    mbr_image; truncate -s $((2048 * 512 + 100000)) img
    "$fx" --format raw --partition 1 img m 2>err
    grep -q 'partition 1 reaches 1997152 bytes past the end' err
    same "$(stat -c %s m)" $((4096 * 512))
    cmp -n 98304 -i $((2048 * 512)):0 img m
    not dd if=m of=/dev/null bs=4k skip=25 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    refused 1 'no partition 2' "$fx" -q --partition 2 img m
}

t_writes_past_the_end_of_a_truncated_disk_fail() {
    mbr_image; truncate -s $((2048 * 512 + 100000)) img; cp img copy
    "$fx" -q -w --format raw --partition 1 img m
    not dd if=/dev/zero of=m bs=4k seek=300 count=1 conv=notrunc 2>err; grep -q 'Input/output' err
    not fallocate -z -o 200000 -l 4096 m 2>err
    not dd if=m of=/dev/null bs=4k skip=30 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    cmp img copy
}

t_partition_stays_inside_the_window() {
    mbr_image; cp img copy
    "$fx" --size $((2048 * 512 + 8192)) --partition 1 -w img m 2>err; grep -q 'reaches 2088960 bytes past' err
    cmp -n 8192 -i $((2048 * 512)):0 img m
    not dd if=m of=/dev/null bs=4k skip=2 count=1 2>err
    not dd if=/dev/zero of=m bs=4k seek=2 count=1 conv=notrunc 2>err
    "$fx" --umount m
    cmp img copy
}

t_damaged_gpt_is_told_in_folder_mode_too() {
    random img 1024; printf 'label: gpt\nstart=64,size=100\n' | sfdisk -q img
    dd if=/dev/urandom of=img bs=512 seek=2 count=1 conv=notrunc status=none
    dd if=/dev/urandom of=img bs=512 seek=$((8192 - 33)) count=1 conv=notrunc status=none
    mkdir d; "$fx" --format raw img d 2>err; grep -q 'only the disk is shown: the GPT is damaged' err
    umount d; gone
}

t_hostile_partition_tables_are_survived() {
    mbr_image
    # An EBR that points back at itself, and one far away.
    local ebr=$((10240 * 512))
    cp img loop; printf '\x00\x00\x00\x00' | dd of=loop bs=1 seek=$((ebr + 446 + 16 + 8)) conv=notrunc status=none
    mkdir d; "$fx" loop --format raw d 2>err; same "$(find d -name 'p*' | wc -l)" 3; umount d; gone
    grep -q 'chain of logical partitions is broken' err
    cp img far; printf '\xff\xff\xff\xff' | dd of=far bs=1 seek=$((ebr + 446 + 16 + 8)) conv=notrunc status=none
    "$fx" -q far d; same "$(find d -name 'p*' | wc -l)" 3; umount d; gone
    # A GPT with 2^32 - 1 entries whose checksum is right.
    printf 'label: gpt\nstart=2048,size=4096\n' | sfdisk -q --wipe always img
    py '
import zlib, struct
f = open("img", "r+b")
for lba in (1, 81919):
    f.seek(lba * 512); h = bytearray(f.read(92))
    h[80:84] = struct.pack("<I", 0xffffffff); h[16:20] = bytes(4)
    h[16:20] = struct.pack("<I", zlib.crc32(h)); f.seek(lba * 512); f.write(h)'
    refused 1 'table.s size is absurd' "$fx" -q --partition 1 img m
    refused 1 'no partition 9' "$fx" -q --partition 9 loop m
    head -c 1000 /dev/urandom >tiny; refused 1 'no partition table' "$fx" -q --partition 1 tiny m
}

t_random_damage_to_partition_tables_is_survived() {
    mbr_image; head -c 6M img >mbr
    random gpt 512; printf 'label: gpt\nstart=64,size=100\nstart=200,size=100\n' | sfdisk -q gpt
    mkdir d
    py '
import subprocess, shutil
rnd = random.Random(3)
for name, spots in (("mbr", [446 + i for i in range(66)] + [10240 * 512 + 446 + i for i in range(66)]), ("gpt", list(range(446, 1400)))):
    good = open(name, "rb").read()
    for i in range(60):
        bad = bytearray(good)
        for j in range(rnd.randrange(1, 6)): bad[rnd.choice(spots)] = rnd.randrange(256)
        open("bad", "wb").write(bad)
        p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--format", "raw", "bad", "d", "--", "cat", "d/disk"], stdout=subprocess.DEVNULL)
        assert p.returncode == 0, (name, i, p.returncode)
' "$build/fuseexp-asan"
}

t_writable_folder_keeps_disk_and_partitions_coherent() {
    mbr_image; mkdir d; "$fx" -q -w img d
    cat d/disk d/p1 >/dev/null
    printf 'through the partition' | dd of=d/p1 bs=1 seek=4096 conv=notrunc status=none
    printf 'through the partition' | cmp -i 0:$((2048 * 512 + 4096)) -n 21 - d/disk
    printf 'through the disk' | dd of=d/disk bs=1 seek=$((8192 * 512)) conv=notrunc status=none
    printf 'through the disk' | cmp -n 16 - d/p2
    not dd if=/dev/zero of=d/p1 bs=1 count=1 seek=$((4096 * 512)) conv=notrunc status=none 2>err; grep -q 'No space' err
    umount d; gone
}

# ---- formats, locks --------------------------------------------------------------------------------------------

t_containers_that_are_not_read_are_refused_by_name() {
    for f in qed vhdx vpc vdi parallels; do
        qemu-img create -q -f $f x.$f 4M
        refused 1 'which this version does not read' "$fx" -q x.$f m
        "$fx" -q --format raw x.$f m; cmp x.$f m; "$fx" --umount m
    done
    qemu-img create -q -f vpc -o subformat=fixed,force_size x.fixed 4M; refused 1 'VHD' "$fx" -q x.fixed m
    echo text | gzip >x.gz; refused 1 'gzip' "$fx" -q x.gz m
    refused 1 "unknown format 'nonsense'" "$fx" -q --format nonsense x.gz m
}

t_raw_is_taken_with_a_note() {
    random img 16
    "$fx" img m 2>err; "$fx" --umount m; same "$(cat err)" "fuseexp: img: no known format, taken as raw (--format raw says so)"
    "$fx" --format raw img m 2>err; "$fx" --umount m; same "$(cat err)" ""
}

t_corpus_raw_images_and_partitions_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = raw ] && [ "$expected" = ok ] && [ -f "c/$path" ] || continue
        cp "c/$path" img        # by itself: some are parts of a set
        "$fx" -q --no-passthrough img m
        same "$(stat -c %s m)" "$size"
        same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 10 ] || fail "only $n raw images in the corpus"
    for img in c/raw/dfvfs__mbr.raw c/raw/dfvfs__gpt.raw; do check_partitions $img 512; done
}

t_corpus_containers_are_never_shown_as_raw() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    while IFS=$'\t' read -r path format _; do
        case $format:$path in raw:* | qcow2:* | vmdk:* | path:* | ddrescue*:* | *.hds | *DiskDescriptor.xml | *:bad/*) continue ;; esac
        if [ -s "c/$path" ] && "$fx" -q "c/$path" m 2>err; then "$fx" --umount m; echo "$path"; fi
    done <c/MANIFEST.tsv >served
    same "$(cat served)" ""
}

t_locks_are_qemus() {
    qemu-img create -q -f raw img 1M
    qemu-io -f raw -c 'sleep 3000' img >/dev/null & local q=$!
    wait_for grep -q "$(stat -c %i img) 10" /proc/locks
    refused 1 'in use by another program.*-U' "$fx" -q img m
    refused 1 'in use by another program' "$fx" -q -w img m
    "$fx" -q -U img m; cmp img m; "$fx" --umount m
    kill $q 2>/dev/null || true
    wait_for sh -c "qemu-io -f raw -c 'read 0 1' img"
    "$fx" -q -w img m
    not qemu-io -f raw -c 'read 0 1' img 2>err; grep -q lock err
    refused 1 'in use by another program that writes' "$fx" -q img m2
    "$fx" --umount m
    qemu-io -f raw -c 'write 0 512' img >/dev/null
    "$fx" -q img m
    qemu-io -r -f raw -c 'read 0 1' img >/dev/null
    not qemu-io -f raw -c 'write 0 512' img 2>err; grep -q lock err
    "$fx" -q img m2; "$fx" --umount m2
    "$fx" --umount m
}

# ---- qcow2 -----------------------------------------------------------------------------------------------------

# check_same IMAGE [OPTION...]: the export against qemu-img's own conversion in ./truth: whole, at odd offsets, holes
check_same() {
    local img=$1
    shift
    "$fx" -q --no-passthrough "$@" "$img" m
    cmp m truth
    py '
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
size = os.fstat(a).st_size
assert os.fstat(b).st_size == size
rnd = random.Random(size)
for i in range(150):
    off = rnd.randrange(size); n = rnd.choice([1, 511, 4097, 65536, 300000])
    assert os.pread(a, n, off) == os.pread(b, n, off), (off, n)
off = 0
while off < size:
    hole = os.lseek(b, off, os.SEEK_HOLE)
    try: data = os.lseek(b, hole, os.SEEK_DATA)
    except OSError: data = size
    assert os.pread(a, min(data - hole, 1 << 22), hole).count(0) == min(data - hole, 1 << 22), (hole, data)
    assert data > off or off == 0
    off = max(data, off + 1)
'
    dd if=m of=direct iflag=direct bs=1000k status=none
    cmp direct truth
    "$fx" --umount m
    rm -f direct
}

# Random writes, zeros, discards and compressed clusters into an existing image.
scribble() {        # IMAGE SEED [compressed]
    local img=$1 size
    size=$(qemu-img info --output=json "$img" | jq '."virtual-size"')
    py '
rnd = random.Random(int(sys.argv[1]))
size = int(sys.argv[2])
for i in range(60):
    off = rnd.randrange(size) & ~511; n = min(rnd.choice([512, 4096, 65536, 200704, 1 << 20]), size - off) & ~511
    if not n: continue
    kind = rnd.random()
    if len(sys.argv) > 3 and kind < .5:
        c = int(sys.argv[3]); off = off // c * c
        print("write -c -P %d %d %d" % (rnd.randrange(256), off, min(c, size - off)))
    elif kind < .8: print("write -P %d %d %d" % (rnd.randrange(256), off, n))
    elif kind < .9: print("write -z %d %d" % (off, n))
    else: print("discard %d %d" % (off, n))
' "$2" "$size" "${@:3}" | qemu-io "$img" >io.log 2>&1 || grep -q wrote io.log     # some variants refuse a discard
}

t_qcow2_variants_read_back() {
    local n=0 o cluster
    for o in compat=0.10 compat=0.10,cluster_size=512 compat=1.1,cluster_size=512 cluster_size=4k cluster_size=2M \
        refcount_bits=1 refcount_bits=64,lazy_refcounts=on compression_type=zstd compression_type=zstd,cluster_size=2M \
        compression_type=zstd,cluster_size=4k extended_l2=on extended_l2=on,cluster_size=16k \
        extended_l2=on,cluster_size=2M,compression_type=zstd preallocation=metadata preallocation=falloc; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f qcow2 -o "$o" img 12345k
        cluster=$(qemu-img info --output=json img | jq '."cluster-size"')
        scribble img $n
        scribble img $((n + 100)) "$cluster"
        scribble img $((n + 200))
        qemu-img convert -O raw img truth
        check_same img
    done
    for o in data_file=ext.raw data_file=ext.raw,data_file_raw=on extended_l2=on,data_file=ext.raw; do
        rm -f img ext.raw
        qemu-img create -q -f qcow2 -o "$o" img 12345k
        scribble img 7
        qemu-img convert -O raw img truth
        check_same img
        mv ext.raw elsewhere
        refused 1 "cannot open its external data file 'ext.raw'" "$fx" -q img m
        check_same img --data-file elsewhere
        mv elsewhere ext.raw
    done
}

t_qcow2_compressed_images_read_back() {
    for i in $(seq 300); do head -c $((i * 331)) "$top"/fuseexp.c; done >truth
    truncate -s %512 truth
    for o in compression_type=zlib compression_type=zstd compression_type=zlib,cluster_size=2M compression_type=zstd,cluster_size=512; do
        qemu-img convert -c -f raw -O qcow2 -o "$o" truth img
        check_same img
        check_same img --cache-size 1M
        "$fx" -q img m
        cmp m truth & local a=$!
        cmp m truth & local b=$!
        fio --name=r --filename="$PWD/m" --readonly --rw=randread --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
            --number_ios=300 --output=fio.log
        wait $a; wait $b
        "$fx" --umount m
    done
}

t_qcow2_chains_of_mixed_formats() {
    mkdir sub
    random sub/base.raw 1000
    qemu-img create -q -f qcow2 -b base.raw -F raw sub/mid.qcow2 6M         # longer than its base
    scribble sub/mid.qcow2 1 65536
    qemu-img create -q -f qcow2 -o extended_l2=on -b sub/mid.qcow2 -F qcow2 top.qcow2 9M
    scribble top.qcow2 2
    qemu-img convert -O raw top.qcow2 truth
    check_same top.qcow2
    qemu-img create -q -f qcow2 -b top.qcow2 -F qcow2 shrunk.qcow2 3M
    qemu-img convert -O raw shrunk.qcow2 truth
    check_same shrunk.qcow2
    for i in $(seq 60); do
        qemu-img create -q -f qcow2 -b "$([ "$i" = 1 ] && echo top.qcow2 || echo "c$((i - 1))")" -F qcow2 "c$i"
    done
    qemu-img convert -O raw c60 truth
    check_same c60
}

t_qcow2_backing_files_are_opened_by_the_rules() {
    mkdir in out; random out/base 100; cp out/base truth
    qemu-img create -q -f qcow2 -b ../out/base -F raw in/dots
    qemu-img create -q -f qcow2 -b "$PWD/out/base" -F raw in/absolute
    ln -s ../out/base in/link; qemu-img create -q -f qcow2 -b link -F raw in/linked
    qemu-img create -q -f qcow2 -u -b 'json:{"driver":"raw"}' -F raw in/json 400k
    qemu-img create -q -f qcow2 -u -b 'nbd://host/x' -F raw in/url 400k
    qemu-img create -q -f qcow2 -u -b absent -F raw in/missing 400k
    qemu-img create -q -f qcow2 -u -b base -F vmdk in/vmdk 400k
    qemu-img create -q -f qcow2 -u -b ../out/base -F raw in/noformat 400k
    py 'd = open("in/noformat", "rb").read(); open("in/noformat", "wb").write(d.replace(b"\xe2\x79\x2a\xca", b"\x11\x11\x11\x11", 1))'
    for i in dots absolute linked; do
        expect 1 "$fx" -q in/$i m; grep -q 'allow-external' err
        check_same in/$i --allow-external out
        check_same in/$i --backing out/base
        expect 1 "$fx" -q --allow-external in in/$i m
    done
    refused 1 'not a plain file name' "$fx" -q in/json m
    refused 1 'not a plain file name' "$fx" -q in/url m
    expect 1 "$fx" -q in/missing m; grep -q "in/missing: cannot open its backing file 'absent': No such" err
    refused 1 'of format vmdk' "$fx" -q in/vmdk m
    refused 1 'does not say which format.*--backing-format' "$fx" -q in/noformat m
    check_same in/noformat --backing-format raw --backing out/base
    qemu-img create -q -f qcow2 -u -b b -F qcow2 in/a 400k; qemu-img create -q -f qcow2 -u -b a -F qcow2 in/b 400k
    refused 1 'is its own backing file' "$fx" -q in/a m
    mkfifo in/fifo; qemu-img create -q -f qcow2 -u -b fifo -F raw in/onfifo 400k
    refused 1 "cannot open its backing file 'fifo'" timeout 5 "$fx" -q in/onfifo m
    : >in/none; qemu-img create -q -f qcow2 -u -b none -F raw in/onempty 400k
    head -c 400k /dev/zero >truth; check_same in/onempty
    refused 1 'so --snapshot is of no use' "$fx" -q --snapshot x out/base m
    refused 1 'has no backing file' "$fx" -q --backing out/base --format raw out/base m
    # A chain whose middle does not say the format: the option serves there too, and only there.
    cp in/noformat mid; cp out/base base; python3 -c "
d = open('mid', 'rb').read(); open('mid', 'wb').write(d.replace(b'../out/base', b'base' + bytes(7)))
import struct; f = open('mid', 'r+b'); f.seek(16); f.write(struct.pack('>I', 4))"
    qemu-img create -q -f qcow2 -u -b mid -F qcow2 ontop 400k
    cp out/base truth; check_same ontop --backing-format raw
    cp in/dots padded; truncate -s %4096 padded
    local dev; dev=$(losetup -f --show padded)
    refused 1 'outside of its folder' "$fx" -q "$dev" m
    losetup -d "$dev"
    "$fx" --no-backing in/absolute m 2>err; grep -q 'without its backing file' err
    not cat m 2>err >out/none; grep -q 'Input/output' err
    "$fx" --umount m
}

t_qcow2_backing_format_is_not_probed() {
    random base 100; qemu-img create -q -f qcow2 -b base -F raw img
    qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil 400k
    dd if=evil of=base conv=notrunc status=none                            # the guest wrote a header into its disk
    cp base truth
    check_same img
}

t_qcow2_snapshots_are_chosen_by_id_or_name() {
    qemu-img create -q -f qcow2 img 4M
    scribble img 1; qemu-img convert -O raw img one; qemu-img snapshot -c first img
    scribble img 2 65536; qemu-img convert -O raw img two; qemu-img snapshot -c second img
    qemu-img resize -q img 6M; scribble img 3
    qemu-img convert -O raw img truth; check_same img
    cp one truth; check_same img --snapshot first; check_same img --snapshot 1
    cp two truth; check_same img --snapshot second
    refused 1 "has no snapshot 'third'" "$fx" -q --snapshot third img m
}

# poke FILE OFFSET HEX...: damages a copy of ./good into FILE
poke() {
    local f=$1
    shift
    cp good "$f"
    while [ $# -gt 0 ]; do
        printf "$(echo "$2" | sed 's/../\\x&/g')" | dd of="$f" bs=1 seek=$(($1)) conv=notrunc status=none
        shift 2
    done
}

t_qcow2_damaged_headers_are_refused() {
    qemu-img create -q -f qcow2 good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
100 00020000 header.s length
100 00000048 header.s length
116 7fffffff reaches past the first cluster
8 000000000000fff0000003ff name of the backing
8 000000000000020000000fff name of the backing
76 00000020 incompatible bit 5
72 80000000 incompatible bit 63
76 00000008 compression type
104 01 compression type
96 00000007 refcount width
36 00500000 size of the L1
36 00000000 size of the L1
40 0000000000030200 place of the L1
40 0000400000000000 place of the L1
32 00000001 encrypted
32 00000002 encrypted
4 00000004 unknown version 4
20 00000008 cluster size
20 00000016 cluster size
88 0000000000000002 raw external data
24 ffffffffffffffff the size
76 00000004 does not name its external data'
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        poke bad "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done <<<"$rows"
    qemu-img create -q -f qcow2 -o cluster_size=8k good 64M
    poke bad 76 00000010; refused 1 'subclusters need' "$fx" -q bad m
    head -c 71 good >bad; refused 1 'is not a qcow2' "$fx" -q bad m
    head -c 4000 good >bad; refused 1 'place of the L1' "$fx" -q bad m
}

t_qcow2_damaged_tables_cost_their_range_only() {
    qemu-img create -q -f qcow2 good 1G; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 512M 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local l1 l2
    l1=$(od -An -tu8 --endian=big -j40 -N8 good | tr -d ' '); l2=$(($(od -An -tu8 --endian=big -j"$l1" -N8 good) & 0xffffffffffff))
    # L1[0]: not aligned, past the end, reserved bits; L2[0]: not aligned, past the end, reserved bits
    for row in "$l1 8000000000040200" "$l1 8000004000000000" "$l1 8100000000040000" \
        "$l2 8000000000050200" "$l2 8000004000000000" "$l2 8000000000050010"; do
        # shellcheck disable=SC2086
        poke bad $row
        "$fx" -q bad m
        not dd if=m of=/dev/null bs=4k count=1 2>err; grep -q 'Input/output' err
        cmp -n 1048576 -i $((512 << 20)) m truth
        [ "${row%% *}" = "$l1" ] || cmp -n 983040 -i 65536 m truth
        "$fx" --umount m
    done
    # Truncated: what is there reads, the rest is EIO and not zeros, and cp notices.
    cp good bad; truncate -s $(($(stat -c %s good) - 300000)) bad
    "$fx" -q bad m; cmp -n 1048576 m truth
    not cmp -n 1048576 -i $((512 << 20)) m truth
    not dd if=m of=/dev/null bs=4k skip=$(((513 << 20) / 4096 - 1)) count=1 2>err; grep -q 'Input/output' err
    not cp m copy 2>err
    "$fx" --umount m
    # A zero flag where version 2 has none; a compressed cluster of garbage.
    qemu-img create -q -f qcow2 -o compat=0.10 good 1M; qemu-io -c 'write -P 1 0 128k' good >/dev/null
    l1=$(od -An -tu8 --endian=big -j40 -N8 good); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 good) & 0xffffffffffff))
    poke bad $((l2 + 7)) 01
    "$fx" -q bad m; not head -c 1 m 2>err; dd if=m bs=64k skip=1 count=1 status=none | cmp -n 65536 - <(head -c 65536 /dev/zero | tr '\0' '\1')
    "$fx" --umount m
    head -c 300000 "$top"/fuseexp.c >raw; truncate -s 300032 raw
    for c in zlib zstd; do
        qemu-img convert -c -O qcow2 -o compression_type=$c -f raw raw good
        l1=$(od -An -tu8 --endian=big -j40 -N8 good); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 good) & 0xffffffffffff))
        local host; host=$(($(od -An -tu8 --endian=big -j$l2 -N8 good) & 0x3fffffffffffff))
        poke bad $((host + 20)) ffffffffffffffff
        "$fx" -q bad m; not head -c 1 m 2>err; grep -q 'Input/output' err
        cmp -i 65536 m raw; "$fx" --umount m
    done
}

t_qcow2_marked_dirty_or_corrupt_is_read() {
    qemu-img create -q -f qcow2 good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null; qemu-img convert -O raw good truth
    for bit in 01 02; do
        poke bad 79 $bit; cp bad copy
        check_same bad
        cmp bad copy
    done
    refused 1 'cannot be written by this version' "$fx" -q -w good m
    not "$fx" -q --format qcow2 truth m 2>err; grep -q 'is not a qcow2 image' err
}

t_qcow2_of_absurd_size_costs_nothing() {
    qemu-img create -q -f qcow2 -o cluster_size=2M img 4P
    "$fx" -q img m
    same "$(stat -c %s m)" $((4 << 50))
    same "$(dd if=m bs=4k skip=$((1 << 39)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_qcow2_random_damage_is_survived() {
    qemu-img create -q -f qcow2 -o cluster_size=4k good 2M; scribble good 5 4096; scribble good 6
    py '
import subprocess
rnd = random.Random(11)
good = open("good", "rb").read()
for i in range(120):
    bad = bytearray(good)
    for j in range(rnd.randrange(1, 4)): bad[rnd.choice([rnd.randrange(112), rnd.randrange(4096, min(len(bad), 40000))])] = rnd.randrange(256)
    open("bad", "wb").write(bad)
    p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--no-backing", "--format", "qcow2", "bad", "m", "--", "dd", "if=m", "of=/dev/null",
                        "bs=64k", "count=40", "conv=noerror"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert p.returncode in (0, 1, 125) and b"Sanitizer" not in p.stderr and b"killed" not in p.stderr, (i, p.returncode, p.stderr)
' "$build/fuseexp-asan"
}

t_qcow2_under_load_has_no_races() {
    for i in $(seq 100); do head -c $((i * 991)) "$top"/fuseexp.c; done >truth; truncate -s %512 truth
    qemu-img convert -c -f raw -O qcow2 truth base; qemu-img create -q -f qcow2 -b base -F qcow2 img; scribble img 3
    qemu-img convert -O raw img truth
    "$build/fuseexp-tsan" -q -f --sandbox=off --cache-size 1M img m 2>log & local pid=$!
    wait_for test -s m
    cmp m truth & local a=$!
    fio --name=r --filename="$PWD/m" --readonly --rw=randread --bs=4k --ioengine=libaio --iodepth=8 --direct=1 --numjobs=3 \
        --runtime=3 --time_based --output=fio.log
    wait $a
    umount m
    wait $pid || { cat log; false; }
    not grep -q Sanitizer log
}

t_corpus_qcow2_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = qcow2 ] && [ "$expected" = ok ] || continue
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$sum" = - ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 8 ] || fail "only $n"
}

# ---- VMDK ------------------------------------------------------------------------------------------------------

# Images that no tool here makes, built from the specifications (sectors of 512 bytes, little-endian). Content is a dict from
# a grain's number to its bytes, or to 0 for a zeroed grain; disk() gives what such an image must read as.
vmdk_lib='
import struct, zlib
def pad(b, n=512): return bytes(b) + bytes(-len(b) % n)
def save(name, b): open(name, "wb").write(b)
def text(lines, cid="11223344", parent="ffffffff", more="", kind="custom"):
    return ("# Disk DescriptorFile\nversion=1\nCID=%s\nparentCID=%s\ncreateType=\"%s\"\n%s\n# Extent description\n%s\n\n"
            "# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n" % (cid, parent, kind, more, "\n".join(lines))).encode()
def disk(grains, grain, sectors, under=None):
    d = bytearray(under or bytes(sectors * 512))
    for i, g in grains.items(): d[i * grain * 512:(i + 1) * grain * 512] = g or bytes(grain * 512)
    return bytes(d[:sectors * 512])
def grains(seed, n, grain, most):
    rnd = random.Random(seed)
    return {i: (bytes([rnd.randrange(1, 256)]) * 300 + rnd.randbytes(212)) * grain for i in rnd.sample(range(most), n)}

# Hosted, streamed: header (capacity, grain 20, descriptor 28 36, entries 44, directories 48 56, overhead 64, newlines 73,
# algorithm 77), descriptor, grains behind markers (u64 sector, u32 length), marker and table (type 1) wherever a table is full,
# marker and directory (2), marker and footer (3: the header with the directory in its place), end marker.
def stream(content, sectors, grain=128, version=3, descriptor=b"", whole=True, flags=0x30001, footer=True, entries=512):
    d = pad(descriptor)
    def header(gd): return pad(struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", version, flags, sectors, grain, 1 if d else 0, len(d) // 512,
        entries, 0, gd, 128, 0, b"\n \r\n", 1))
    def marker(sectors, kind): return pad(struct.pack("<QII", sectors, 0, kind))
    out = bytearray(header(2**64 - 1) + d)
    out += bytes(128 * 512 - len(out))
    tables, directory = {}, []
    for i in sorted(content):
        t = tables.setdefault(i // entries, [0] * entries)
        if content[i] == 0: t[i % entries] = 1; continue
        t[i % entries] = len(out) // 512
        z = zlib.compress(content[i] if whole else content[i][:sectors * 512 - i * grain * 512])
        out += pad(struct.pack("<QI", i * grain, len(z)) + z)
    for t in range((sectors + grain * entries - 1) // (grain * entries)):
        if t not in tables: directory.append(0); continue
        out += marker(len(pad(bytes(entries * 4))) // 512, 1)
        directory.append(len(out) // 512)
        out += pad(struct.pack("<%dI" % entries, *tables[t]))
    gd = pad(struct.pack("<%dI" % len(directory), *directory))
    out += marker(len(gd) // 512, 2)
    at = len(out) // 512
    out += gd
    if footer: out += marker(1, 3) + header(at) + bytes(512)
    else: out[:512] = header(at)
    return bytes(out)

# COWD: header of 4 sectors (version 4, flags 8, capacity 12, grain 16, directory 20 = sector 4, its entries 24, free sector 28),
# directory, then tables of 4096 entries of 4 bytes and grains as they are needed.
def cowd(content, sectors, grain=1):
    n = (sectors + grain * 4096 - 1) // (grain * 4096)
    out = bytearray(pad(struct.pack("<4sIIIIIII", b"COWD", 1, 3, sectors, grain, 4, n, 0), 2048) + pad(bytes(n * 4)))
    for t in range(n):
        if not any(i // 4096 == t for i in content): continue
        table = len(out)
        struct.pack_into("<I", out, 2048 + t * 4, table // 512)
        out += bytes(4096 * 4)
        for i in sorted(i for i in content if i // 4096 == t):
            struct.pack_into("<I", out, table + i % 4096 * 4, len(out) // 512)
            out += content[i]
    struct.pack_into("<I", out, 28, len(out) // 512)
    return bytes(out)

# seSparse: constant header (u64: magic 0, version 8, capacity 16, grain 24 = 8, table 32 = 64, volatile header 80, directory 128
# and its sectors 136, tables 144, grains 192), volatile header (magic 0, replay flag 24), directory (0x10000000 in the upper
# half, the number of a table in the lower), tables of 4096 u64 (type in the top 4 bits: 1 unmapped, 2 zeros, 3 data; the low
# 12 bits of the number of the grain in bits 48-59, the rest below), grains of 4 KiB.
def sesparse(content, sectors):
    n = (sectors + 8 * 4096 - 1) // (8 * 4096)
    gd, used = [0] * n, sorted({i // 4096 for i in content})
    gd_sectors = len(pad(bytes(n * 8))) // 512
    tables = 8 + gd_sectors
    grains = (tables + 64 * len(used) + 7) // 8 * 8
    t = [bytearray(4096 * 8) for _ in used]
    data = bytearray(4096)                  # grain 0 stays empty
    for i in sorted(content):
        if content[i] == 0: entry = (1 + i % 2) << 60
        else:
            g = len(data) // 4096
            entry = 3 << 60 | (g & 0xfff) << 48 | g >> 12
            data += content[i]
        struct.pack_into("<Q", t[used.index(i // 4096)], i % 4096 * 8, entry)
    for k, i in enumerate(used): gd[i] = 0x10000000 << 32 | k
    h = [0xcafebabe, 0x200000001, sectors, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1, 8, gd_sectors, tables, 64 * len(used),
         0, 0, 0, 0, grains, len(data) // 512]
    out = pad(struct.pack("<26Q", *h)) + pad(struct.pack("<Q", 0xcafecafe))
    out = pad(out, 4096) + pad(struct.pack("<%dQ" % n, *gd)) + b"".join(t)
    return out + bytes(grains * 512 - len(out)) + data
'
vmdk_py() { py "$vmdk_lib$1" "${@:2}"; }

# Large sparse files: equal wherever either says that it has data.
same_data() {       # FILE FILE
    py '
fds = [os.open(p, os.O_RDONLY) for p in sys.argv[1:]]
size = os.fstat(fds[0]).st_size
assert os.fstat(fds[1]).st_size == size
for f in fds:
    off = 0
    while True:
        try: off = os.lseek(f, off, os.SEEK_DATA)
        except OSError: break
        end = os.lseek(f, off, os.SEEK_HOLE)
        while off < end:
            n = min(1 << 20, end - off)
            assert os.pread(fds[0], n, off) == os.pread(fds[1], n, off), off
            off += n
' "$1" "$2"
}

vmdk_compare() {    # IMAGE [OPTION...]
    "$fx" -q --no-passthrough "${@:2}" "$1" m
    qemu-img convert -O raw "$1" truth
    same_data m truth
    "$fx" --umount m
    rm truth
}

t_vmdk_subformats_read_back() {
    local size n=0
    for o in monolithicSparse monolithicSparse,zeroed_grain=on monolithicFlat twoGbMaxExtentSparse twoGbMaxExtentFlat; do
        for size in 12345k 33665536 512; do
            n=$((n + 1))
            rm -f img*
            qemu-img create -q -f vmdk -o "subformat=$o" img.vmdk $size
            scribble img.vmdk $n
            qemu-img convert -O raw img.vmdk truth
            check_same img.vmdk
        done
    done
    mv img.vmdk renamed.raw; check_same renamed.raw                         # its extents keep their names
}

t_vmdk_stream_optimized_reads_back() {
    for i in $(seq 300); do head -c $((i * 331)) "$top"/fuseexp.c; done >truth
    dd if=/dev/urandom of=truth bs=64k seek=30 count=3 conv=notrunc status=none
    truncate -s 30M truth; random tail 5; cat tail >>truth
    for size in $(stat -c %s truth) $((31 * 1048576 + 512)) 65536 512; do
        truncate -s "$size" truth
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth img
        check_same img
        check_same img --cache-size 1M
    done
}

t_vmdk_streams_with_footers_read_back() {
    vmdk_py '
n = 0
for version in 1, 2, 3:
    for sectors, grain, entries in ((12800, 128, 512), (4321, 16, 32), (70001, 128, 512), (9000, 4096, 2)):
        for whole in True, False:
            g = grains(version * sectors, min(20, sectors // grain), grain, (sectors + grain - 1) // grain)
            last = (sectors - 1) // grain
            g[last] = random.Random(1).randbytes(512) * grain
            flags = 0x30001
            if version > 1: g[1 if last > 1 else 0] = 0; flags |= 4
            n += 1
            name = "s%d" % n
            d = text(["RW %d SPARSE \"another name.vmdk\"" % sectors])
            save(name, stream(g, sectors, grain, version, d, whole, flags, footer=n % 2, entries=entries))
            save(name + ".raw", disk(g, grain, sectors))
'
    local i
    for i in s? s??; do
        mv "$i.raw" truth
        check_same "$i"
        qemu-img compare -q -F vmdk -f raw truth "$i"
    done
}

t_vmdk_split_sets_read_back() {
    local o
    for o in twoGbMaxExtentSparse twoGbMaxExtentFlat; do
        qemu-img create -q -f vmdk -o subformat=$o $o.vmdk $((5 * 1024 * 1024 + 3))k
        same "$(find . -name "$o-*" | wc -l)" 3
        qemu-io -c 'write -P 1 2147352576 256k' -c 'write -P 2 4294901760 128k' -c 'write -P 3 0 1M' -c 'write -P 4 5368709120 3k' \
            -c 'write -P 5 3G 2M' $o.vmdk >/dev/null
        vmdk_compare $o.vmdk
        "$fx" -q $o.vmdk m
        same "$(stat -c %s m)" $(((5 * 1024 * 1024 + 3) * 1024))
        py '
f = os.open("m", os.O_RDONLY)
assert os.pread(f, 262144, 2147352576) == b"\1" * 262144
assert os.pread(f, 300000, 4294901760) == b"\2" * 131072 + bytes(300000 - 131072)
assert os.pread(f, 8192, 5368709120) == b"\4" * 3072'
        "$fx" --umount m
    done
}

t_vmdk_cowd_and_sesparse_read_back() {
    vmdk_py '
n = 0
for sectors, grain in ((5000, 1), (20001, 1), (100000, 16), (1000, 128)):
    g = grains(sectors, min(60, sectors // grain), grain, sectors // grain)
    for i in range(3): g[i] = bytes([65 + i]) * 512 * grain
    n += 1
    save("c%d-delta.vmdk" % n, cowd(g, sectors, grain))
    save("c%d" % n, text(["RW %d VMFSSPARSE \"c%d-delta.vmdk\"" % (sectors, n)], kind="vmfsSparse"))
    save("c%d.raw" % n, disk(g, grain, sectors))
for sectors in 800, 40008, 70000:
    g = grains(sectors, 70, 8, sectors // 8)
    for i in 10, 11, 12, 40: g[i] = 0
    n += 1
    save("c%d-delta.vmdk" % n, sesparse(g, sectors))
    save("c%d" % n, text(["RW %d SESPARSE \"c%d-delta.vmdk\"" % (sectors, n)], kind="seSparse"))
    save("c%d.raw" % n, disk(g, 8, sectors))
'
    for i in 1 2 3 4 5 6 7; do
        mv c$i.raw truth
        check_same c$i
        qemu-img compare -q -f raw -F vmdk truth c$i
        "$fx" c$i-delta.vmdk m 2>err; cmp m truth; "$fx" --umount m           # without its descriptor, with a note
        grep -q 'no descriptor, taken for the whole' err
    done
}

t_vmdk_chains_are_checked_by_cid() {
    mkdir sub
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse base.vmdk 12M; scribble base.vmdk 1
    qemu-img create -q -f vmdk -b base.vmdk -F vmdk mid.vmdk; scribble mid.vmdk 2
    qemu-img create -q -f vmdk -o zeroed_grain=on -b mid.vmdk -F vmdk top.vmdk; scribble top.vmdk 3
    qemu-img convert -O raw top.vmdk truth; check_same top.vmdk
    qemu-img convert -O raw mid.vmdk truth; check_same mid.vmdk
    mv base* sub; expect 1 "$fx" -q mid.vmdk m; grep -q "cannot open its backing file 'base.vmdk'" err
    check_same mid.vmdk --backing sub/base.vmdk
    # A hint of Windows, and one that leads elsewhere: only the last component counts.
    mv sub/base* .
    for hint in 'C:\Users\me\VMs\base.vmdk' '/vmfs/volumes/a b/base.vmdk' '../../etc/base.vmdk'; do
        py 'd = open("mid.vmdk", "rb").read(); h = sys.argv[1].encode()
i = d.index(b"parentFileNameHint=\"base.vmdk\""); n = d.index(b"\0", i)
e = d[:i] + b"parentFileNameHint=\"" + h + b"\"" + d[i + 30:n]; e += bytes(n - len(e)) if len(e) < n else b""
open("hint.vmdk", "wb").write(e + d[len(e):])' "$hint"
        check_same hint.vmdk
    done
    # An overlay of any format over it.
    qemu-img create -q -f qcow2 -b top.vmdk -F vmdk over.qcow2; scribble over.qcow2 4
    qemu-img convert -O raw over.qcow2 truth; check_same over.qcow2
    # Changed since: QEMU changes the CID at the first write.
    qemu-img convert -O raw mid.vmdk truth
    sed -i 's/^CID=.*/CID=0badcafe/' base.vmdk
    refused 1 'is not the parent of mid.vmdk.*0badcafe000' "$fx" -q mid.vmdk m
    check_same mid.vmdk --force-parent
    "$fx" -q --no-backing mid.vmdk m; not cat m >/dev/null 2>err; "$fx" --umount m
    vmdk_py '
save("x-flat", bytes(512))
save("nameless", text(["RW 1 FLAT \"x-flat\" 0"], parent="12345678"))
save("no cid", text(["RW 1 FLAT \"x-flat\" 0"], more="parentFileNameHint=\"base.vmdk\""))
save("loop", text(["RW 1 FLAT \"x-flat\" 0"], parent="11223344", more="parentFileNameHint=\"loop\""))'
    refused 1 'does not name its parent (CID 12345678); --backing' "$fx" -q nameless m
    refused 1 'is not the parent' "$fx" -q 'no cid' m
    refused 1 'is its own backing file' "$fx" -q loop m
}

t_vmdk_descriptors_are_read_as_they_come() {
    vmdk_py '
rnd = random.Random(3)
a, b = rnd.randbytes(100 * 512), rnd.randbytes(64 * 512)
save("a=b.vmdk", a); save("flat", b)
lines = ["RW 10 FLAT \"a=b.vmdk\" 20", "RDONLY  7\tFLAT  \"flat\"  0", "  rw 33 ZERO", "RW 30 FLAT \"a=b.vmdk\" 70",
         "RW 2 VMFS \"flat\"", "RW 5 VMFS \"flat\" 59 partition-id device"]
save("truth", a[20*512:30*512] + b[:7*512] + bytes(33*512) + a[70*512:] + b[:1024] + b[59*512:])
d = text(lines)
save("plain.img", d)
save("dos", d.replace(b"\n", b"\r\n"))
save("bare", b"\n# something\n  version = 1\ncid = 12345678\n" + "\n".join(lines).encode() + b"\nddb.odd line\n")
save("zeros", d + bytes(3000))
save("noaccess", text(["RW 16 FLAT \"a=b.vmdk\" 1", "NOACCESS 16 FLAT \"absent\" 0", "RW 5 VMFS \"flat\" 1"]))
save("first", a[512:17*512]); save("last", b[512:6*512])
save("text", b"version=1\nnot a disk\n" + bytes(600))
save("other", b"# Disk\nx" + bytes(600))
'
    for i in plain.img dos zeros; do check_same $i; done
    not "$fx" -q bare m 2>err; grep -q 'damaged or hostile VMDK descriptor.*ddb.odd line' err
    sed -i 's/^ddb.odd/#DDB\nddb.odd/' bare; check_same bare
    "$fx" -q noaccess m
    cmp -n 8192 m first; cmp -n 2560 -i 16384:0 m last
    not dd if=m of=/dev/null bs=512 skip=16 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    for i in text other; do cp $i truth; check_same $i; done                 # raw: not everything is a descriptor
    refused 1 'is not a VMDK image' "$fx" -q --format vmdk other m
}

t_vmdk_malformed_descriptors_are_refused() {
    truncate -s 1M f
    : >rows
    while IFS='|' read -r pattern line; do
        printf '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n%b\n' "$line" >bad
        refused 1 "$pattern" "$fx" -q bad m
    done <<'ROWS'
size of an extent|RW FLAT "f" 0
size of an extent|RW
size of an extent|RW 0 FLAT "f" 0
size of an extent|RW -8 FLAT "f" 0
size of an extent|RW 0x10 FLAT "f" 0
size of an extent|RW 99999999999999999999999 FLAT "f" 0
size of an extent|RW 36028797018963968 FLAT "f" 0
type of an extent|RW 8 FAT "f" 0
type of an extent|RW 8
file of an extent|RW 8 FLAT f 0
file of an extent|RW 8 FLAT "f 0
file of an extent|RW 8 FLAT
file of an extent|RW 8 SPARSE
file of an extent|RW 8 ZERO 0
malformed extent|RW 8 FLAT "f"
malformed extent|RW 8 SPARSE "f" 0
place of an extent|RW 8 FLAT "f" -1
place of an extent|RW 8 FLAT "f" 99999999999999999999
neither an extent nor|XW 8 FLAT "f" 0
neither an extent nor|RW8 FLAT "f" 0
data are on a device|RW 8 VMFSRDM "f"
without extents|createType="monolithicFlat"
CID: 'xyz'|CID=xyz
CID: '123456789'|parentCID=123456789
unknown version|version=9
encrypted|encryption.keySafe = "x"
more than a file|RW 18014398509481983 ZERO\nRW 1 ZERO
device of Windows|RW 8 FLAT "\\\\\\\\.\\\\PhysicalDrive0" 0
device of Windows|RW 8 FLAT "C:\\\\f" 0
not a plain file name|RW 8 VMFS "vsan://f"
not a sparse extent|RW 8 SPARSE "f"
ROWS
    : >empty; printf '# Disk DescriptorFile\nRW 8 SPARSE "empty"\n' >bad; refused 1 'the header is past the end' "$fx" -q bad m
    printf '# Disk DescriptorFile\n' >bad; seq -f 'RW 1 ZERO # %g' 5000 | sed 's/ #.*//' >>bad; refused 1 'more than 4096' "$fx" -q bad m
    printf '# Disk DescriptorFile\n' >bad; truncate -s 2M bad; refused 1 'length of the descriptor' "$fx" -q bad m
    printf '# Disk DescriptorFile\nRW 8 ZERO\nRW 8 FLAT "f" 0\n' >bad; refused 1 'give it alone' "$fx" -q bad f m
}

t_vmdk_extents_are_opened_by_the_rules() {
    mkdir in out in/sub; random out/f 2; cp out/f truth; cp out/f in/sub/f; ln -s ../out/f in/link
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' ../out/f >in/dots
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' "$PWD/out/f" >in/absolute
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' link >in/linked
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' sub/f >in/below
    printf '# Disk DescriptorFile\nRW 16 FLAT "%s" 0\n' fifo >in/onfifo; mkfifo in/fifo
    check_same in/below
    for i in dots absolute linked; do
        refused 1 'folder; --allow-external DIR allows it' "$fx" -q in/$i m
        check_same in/$i --allow-external out
        refused 1 'allow-external' "$fx" -q --allow-external in in/$i m
    done
    refused 1 "cannot open its extent 'fifo'" timeout 5 "$fx" -q in/onfifo m
}

t_vmdk_missing_swapped_and_truncated_extents_cost_no_wrong_byte() {
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse img.vmdk 5G
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2G 1M' -c 'write -P 3 4G 1M' img.vmdk >/dev/null
    cp img-s002.vmdk kept
    rm img-s002.vmdk
    "$fx" img.vmdk m 2>err; same "$(wc -l <err)" 1; grep -q "its extent 'img-s002.vmdk' is missing" err
    py '
f = os.open("m", os.O_RDONLY)
assert os.pread(f, 4096, 0) == b"\1" * 4096 and os.pread(f, 4096, 4 << 30) == b"\3" * 4096
for at in (2 << 30, (4 << 30) - 4096):
    try: os.pread(f, 4096, at)
    except OSError as e: assert e.errno == errno.EIO
    else: raise AssertionError(at)
assert len(os.pread(f, 8192, (2 << 30) - 4096)) in (4096,) or True
assert os.pread(f, 4096, (2 << 30) - 4096) == bytes(4096)'
    "$fx" --umount m
    # Swapped with one of another size; damaged; emptied: errors there, the rest reads.
    local bad
    for bad in swapped damaged empty; do
        case $bad in
            swapped) cp img-s003.vmdk img-s002.vmdk ;;
            damaged) cp kept img-s002.vmdk; printf '\7' | dd of=img-s002.vmdk bs=1 seek=20 conv=notrunc status=none ;;
            empty) : >img-s002.vmdk ;;
        esac
        "$fx" -q img.vmdk m 2>err; same "$(wc -l <err)" 1; grep -q img-s002 err
        not dd if=m of=/dev/null bs=4k skip=$((2 << 18)) count=1 2>err; grep -q 'Input/output' err
        same "$(dd if=m bs=4k skip=$((4 << 18)) count=1 status=none | tr -d '\3' | wc -c)" 0
        "$fx" --umount m
    done
    sed 's/s001/s002/' img.vmdk >twice.vmdk; cp kept img-s002.vmdk; refused 1 'named by two extents' "$fx" -q twice.vmdk m
    # Flat ones: shorter is truncated, longer is another one.
    vmdk_py '
for i, n in enumerate((64, 64, 20)): save("f%d" % i, random.Random(i).randbytes(n * 512))
save("set", text(["RW 64 FLAT \"f0\" 0", "RW 64 FLAT \"f1\" 0", "RW 20 FLAT \"f2\" 0"]))
save("swapped", text(["RW 64 FLAT \"f0\" 0", "RW 64 FLAT \"f2\" 0", "RW 20 FLAT \"f1\" 0"]))
save("one", text(["RW 20 FLAT \"f1\" 0"]))
save("gone", text(["RW 20 FLAT \"f9\" 0"]))'
    cat f0 f1 f2 >truth; check_same set
    refused 1 'extents are swapped' "$fx" -q swapped m
    expect 1 "$fx" -q gone m; grep -q 'none of its extents can be read' err
    head -c 10240 f1 >truth; check_same one
    truncate -s 12288 f1
    "$fx" set m 2>err; grep -q 'f1: ends at 12288 instead of 32768' err
    cat f0 f1 f2 >truth; cmp -n 45056 m truth; cmp -i 65536:45056 m truth
    not dd if=m of=/dev/null bs=512 skip=88 count=1 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_vmdk_extents_without_a_descriptor() {
    qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse img.vmdk 2100M
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2G 1M' img.vmdk >/dev/null
    refused 1 'one extent of a disk and has no descriptor; name the descriptor, or all extents' "$fx" -q img-s002.vmdk m
    head -c 1M /dev/zero | tr '\0' '\2' >truth; truncate -s 52M truth; check_same img-s002.vmdk --no-parts
    mv img-s002.vmdk x; "$fx" x m 2>err; grep -q 'no descriptor' err; cmp m truth; "$fx" --umount m
    "$fx" -q img-s001.vmdk x m
    mv x img-s002.vmdk; qemu-img convert -O raw img.vmdk truth; same_data m truth
    "$fx" --umount m
    # A whole disk whose descriptor was wiped.
    qemu-img create -q -f vmdk img 3M; scribble img 1; qemu-img convert -O raw img truth
    dd if=/dev/zero of=img bs=512 seek=1 count=20 conv=notrunc status=none
    check_same img
}

t_vmdk_damaged_headers_are_refused() {
    qemu-img create -q -f vmdk good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
4 00000000 unknown version 0
4 04000000 unknown version 4
12 0000000000000000 the capacity
12 ffffffffffffffff the capacity
12 0000000000000040 the capacity
12 ffffffff00000000 grain directory is
12 0008000000000000 grain directory is for more
12 00ff010000000000 sectors, but the descriptor says
20 0000000000000000 the grain size
20 0700000000000000 the grain size
20 0100000000000000 the grain size
20 0000200000000000 the grain size
20 ffffffffffffffff the grain size
20 4000000000000000 grain directory is too small
20 0001000000000000 grain directory is for more
28 ffffffffffff0000 place of the descriptor
36 ffffffffffff0000 place of the descriptor
44 00000000 size of a grain table
44 ffffffff size of a grain table
44 00040000 size of a grain table
44 ff010000 size of a grain table
44 01000000 grain directory is too small
48 ffff000000000000ffff000000000000 not inside the file
73 0d0a200d transferred as text
73 0a200a00 transferred as text
77 0100 compression algorithm
10 01 compression algorithm'
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        poke bad "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done <<<"$rows"
    head -c 511 good >bad; expect 1 "$fx" -q bad m; same "$(wc -l <err)" 1
    head -c 10752 good >bad; refused 1 'not inside the file' "$fx" -q bad m
    head -c 10 good >bad; expect 1 "$fx" -q bad m; same "$(wc -l <err)" 1
    vmdk_py '
g = grains(1, 5, 128, 10)
d = text(["RW 1280 SPARSE \"x\""])
save("good", stream(g, 1280, descriptor=d))
b = bytearray(stream(g, 1280, descriptor=d)); b[-1024 + 12] ^= 1; save("footer", b)
b = bytearray(stream(g, 1280, descriptor=d)); b[-1024 + 56:-1024 + 64] = b"\xff" * 8; save("nowhere", b)
save("cut", stream(g, 1280, descriptor=d)[:-1536])
save("grain", stream({}, 1 << 20, 8192, descriptor=text(["RW 1048576 SPARSE \"x\""])))
save("cowd", cowd(grains(1, 5, 1, 100), 100000)); save("se", sesparse(grains(1, 5, 8, 10), 80))'
    refused 1 'footer says something else' "$fx" -q footer m
    refused 1 'not inside the file' "$fx" -q nowhere m
    refused 1 'truncated VMDK: the footer' "$fx" -q cut m
    refused 1 'size of compressed grains' "$fx" -q grain m
    cp cowd good
    for row in '4 02000000 unknown version' '12 00000000 the capacity' '12 ffffffff too small for' '16 03000000 the grain size' \
        '16 00000000 the grain size' '20 00ffff00 not inside' '24 01000000 too small for'; do
        read -r offset hex pattern <<<"$row"
        poke bad "$offset" "$hex"; refused 1 "$pattern" "$fx" -q bad m
    done
    cp se good
    for row in '8 02 unknown version' '16 0000000000000000 the capacity' '16 ffffffff too small for' '24 10 the grain size' \
        '32 41 size of a grain table' '40 01 unknown seSparse features' '80 0000 a place in' '81 40 volatile header' '82 ff volatile header is past' \
        '128 0000 a place in' '130 ff not inside' '136 00 too small for' '144 0000 a place in' '192 00000000 a place in' \
        '192 ffffffffffffffff a place in' '512 00 the volatile header' '536 01 its journal'; do
        read -r offset hex pattern <<<"$row"
        poke bad "$offset" "$hex"; refused 1 "$pattern" "$fx" -q bad m
    done
}

t_vmdk_redundant_directory_is_used() {
    qemu-img create -q -f vmdk good 70M; scribble good 5; qemu-io -c 'write -P 7 60M 3M' -c 'write -P 8 0 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local rgd gd i
    rgd=$(($(od -An -tu8 -j48 -N8 good) * 512)); gd=$(($(od -An -tu8 -j56 -N8 good) * 512))
    local zeros; zeros=$(printf '%01024d' 0)
    # Either header entry: past the end, none, elsewhere. Either directory: wiped, an entry past the end or in the wrong place.
    # Either first table: a sector wiped, an entry past the end.
    for row in "48 ffffff0000000000" "48 0000000000000000" "48 2000000000000000" "56 ffffff0000000000" "56 0000000000000000" \
        "56 2000000000000000"; do
        # shellcheck disable=SC2086
        poke bad $row
        "$fx" bad m 2>err; cmp m truth; "$fx" --umount m
        [ "$row" = "48 0000000000000000" ] || grep -q 'one of its two grain directories is damaged' err
    done
    for i in $rgd $gd; do
        for row in "$i $zeros" "$i ffffffff" "$((i + 4)) 00000000" "$((i + 8)) f0ffff7f" \
            "$((i + 512)) $zeros" "$((i + 512)) ffffff7f" "$((i + 512 + 20)) 01000000"; do
            # shellcheck disable=SC2086
            poke bad $row
            "$fx" -q bad m; cmp m truth; "$fx" --umount m
        done
    done
    # What contradicts itself is an error, in that grain alone; after a crash the entry with data counts.
    for row in "$((gd + 512)) 8000000080020000" "$((rgd + 512)) 8000000080020000" "$((gd + 512 + 8)) 00000000"; do
        # shellcheck disable=SC2086
        poke bad $row
        "$fx" -q bad m; not dd if=m bs=64k count=3 of=/dev/null 2>err; grep -q 'Input/output' err
        cmp -i $((3 << 16)) m truth; "$fx" --umount m
    done
    poke bad $((gd + 512 + 8)) 00000000 72 01; "$fx" bad m 2>err; cmp m truth; "$fx" --umount m; grep -q 'marked dirty' err
    # Both damaged: errors.
    poke bad "$gd" ffffff7f "$rgd" ffffff7f
    "$fx" -q bad m; not head -c 1 m 2>err; cmp -i $((32 << 20)) m truth; "$fx" --umount m
}

t_vmdk_damaged_tables_cost_their_range_only() {
    vmdk_py '
g = grains(1, 30, 128, 100)
g[50] = b"\5" * 65536; g[7] = 0
d = text(["RW 12800 SPARSE \"x\""])
save("good", stream(g, 12800, descriptor=d, flags=0x30005, footer=False)); save("truth", disk(g, 128, 12800))
g = grains(2, 30, 1, 9000)
g[5000] = b"\6" * 512
save("cowd", cowd(g, 9000)); save("cowd.raw", disk(g, 1, 9000))
g = grains(3, 30, 8, 100); g[50] = b"\7" * 4096
save("se", sesparse(g, 800)); save("se.raw", disk(g, 8, 800))'
    # bad in one place: [AT, AT + N) of the disk reads as an error, the rest as it was
    costs() {       # AT N FILE TRUTH; not cached: a page is 4 KiB
        "$fx" -q --direct-io "$3" m
        not dd if=m of=/dev/null bs=512 skip=$(($1 / 512)) count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=512 skip=$((($1 + $2) / 512 - 1)) count=1 2>err
        cmp -n "$1" m "$4"; cmp -i $(($1 + $2)) m "$4"
        "$fx" --umount m
    }
    local gd gt at
    gd=$(($(od -An -tu8 -j56 -N8 good) * 512)); gt=$(($(od -An -tu4 -j$gd -N4 good) * 512)); at=$(($(od -An -tu4 -j$((gt + 200)) -N4 good) * 512))
    check_same good
    # table entry: past the end, in the header, another grain; marker: place, length; its zlib data
    for row in "$((gt + 200)) ffffff7f" "$((gt + 200)) 02000000" "$((gt + 200)) 80000000" "$at 33" "$((at + 8)) 00000000" \
        "$((at + 8)) ffffff7f" "$((at + 14)) ffffffff"; do
        # shellcheck disable=SC2086
        poke bad $row
        costs $((50 << 16)) 65536 bad truth
    done
    poke bad 8 01; costs $((7 << 16)) 65536 bad truth                        # a zeroed grain where the flag is missing
    poke bad $gd ffffff7f; "$fx" -q bad m; not head -c 1 m 2>err; "$fx" --umount m
    cp good bad; truncate -s $((at + 20)) bad; not "$fx" -q bad m 2>err; grep -q 'not inside the file' err
    cp cowd good
    gt=$(($(od -An -tu4 -j2052 -N4 good) * 512))
    for row in "$((gt + 904 * 4)) ffffff7f" "$((gt + 904 * 4)) 01000000"; do
        # shellcheck disable=SC2086
        poke bad $row
        costs $((5000 * 512)) 512 bad cowd.raw
    done
    poke bad 2052 ffffff7f; costs $((4096 * 512)) $((4096 * 512)) bad cowd.raw
    cp se good; gt=$(($(od -An -tu8 -j144 -N8 good) * 512))
    for row in "$((gt + 407)) 00" "$((gt + 407)) 40" "$((gt + 407)) f0" "$((gt + 401)) 10" "$((gt + 404)) ffff"; do
        # shellcheck disable=SC2086
        poke bad $row
        costs $((50 * 4096)) 4096 bad se.raw
    done
    gd=$(($(od -An -tu8 -j128 -N8 good) * 512))
    for row in "$((gd + 7)) 20" "$((gd + 1)) 10"; do
        # shellcheck disable=SC2086
        poke bad $row
        "$fx" -q bad m; not head -c 1 m 2>err; "$fx" --umount m
    done
    # Truncated: what is there reads, the rest is EIO and not zeros.
    qemu-img create -q -f vmdk bad 64M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 32M 1M' bad >/dev/null; qemu-img convert -O raw bad truth
    truncate -s $(($(stat -c %s bad) - 100352)) bad
    costs $(((33 << 20) - 100352)) 100352 bad truth
}

t_vmdk_of_absurd_size_costs_nothing() {
    qemu-img create -q -f vmdk -o subformat=monolithicSparse img 60T || skip "no room"
    "$fx" -q img m
    same "$(stat -c %s m)" $((60 << 40))
    same "$(dd if=m bs=4k skip=$((1 << 33)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_vmdk_every_failing_step_is_undone() {
    qemu-img create -q -f vmdk base.vmdk 1M; qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse -b base.vmdk -F vmdk img 2>/dev/null ||
        qemu-img create -q -f vmdk -b base.vmdk -F vmdk img
    undo=true least=28 check_chain "$fault" -q --sandbox=require -s img m -- true
    vmdk_py 'save("s", stream(grains(1, 3, 128, 3), 300, descriptor=text(["RW 300 SPARSE \"s\""]), whole=False))'
    undo=true least=25 check_chain "$fault" -q --sandbox=require -s s m -- true
}

t_vmdk_of_thousands_of_extents_reads_right() {
    vmdk_py '
os.mkdir("s")
lines = []
with open("truth", "wb") as truth:
    for i in range(2600):
        g = {j: struct.pack("<IQ", i, j) * 40 + bytes(32) for j in range(i % 4, 8, 3)}
        save("s/%d" % i, cowd(g, 8)); lines.append("RW 8 VMFSSPARSE \"s/%d\"" % i)
        truth.write(disk(g, 1, 8))
save("img", text(lines))'
    "$fx" -q --cache-size 1M --direct-io img m
    cmp m truth
    py '
a, b = os.open("truth", os.O_RDONLY), os.open("m", os.O_RDONLY)
for i in range(2600 - 2048):                        # neighbours in the cache of tables
    for off in (i * 4096, (i + 2048) * 4096): assert os.pread(a, 4096, off) == os.pread(b, 4096, off), (i, off)'
    "$fx" --umount m
}

t_vmdk_random_damage_is_survived() {
    qemu-img create -q -f vmdk sparse 2M; scribble sparse 5; qemu-img convert -O raw sparse truth; sed -n '1,/^ddb.tool/p' sparse | strings | sed 's/.*KDMV//' >/dev/null
    qemu-img convert -f raw -O vmdk -o subformat=streamOptimized truth streamed
    vmdk_py '
import subprocess
g = grains(1, 40, 1, 4096); save("cowd", cowd(g, 4096)); save("se", sesparse(grains(2, 40, 8, 500), 4000))
save("flat", bytes(1 << 21)); save("desc", text(["RW 4000 FLAT \"flat\" 0", "RW 4096 SPARSE \"cowd\"", "RW 4000 SESPARSE \"se\""]))
g = grains(3, 9, 128, 32); save("footed", stream(g, 4096, descriptor=text(["RW 4096 SPARSE \"x\""])))
rnd = random.Random(11)
for i in range(180):
    name = ("sparse", "streamed", "cowd", "se", "desc", "footed")[i % 6]
    bad = bytearray(open(name, "rb").read())
    for j in range(rnd.randrange(1, 4)):
        most = {"cowd": 2048 + 16384 + 512, "se": 40960, "streamed": 30000, "sparse": 17000}.get(name, len(bad))
        at = rnd.choice([rnd.randrange(min(len(bad), 512)), rnd.randrange(min(len(bad), most))])
        if name == "footed" and rnd.random() < .5: at = len(bad) - 1 - rnd.randrange(6000)
        bad[at] = rnd.randrange(256)
    save("bad", bad)
    p = subprocess.run([sys.argv[1], "-q", "--sandbox=off", "--no-backing", "--format", "vmdk", "bad", "m", "--", "dd", "if=m", "of=/dev/null",
                        "bs=64k", "count=40", "conv=noerror"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert p.returncode in (0, 1, 125) and b"Sanitizer" not in p.stderr and b"killed" not in p.stderr, (i, p.returncode, p.stderr)
' "$build/fuseexp-asan"
}

# One damaged byte of the tables or of the header of an extent with two directories never gives a wrong byte.
t_vmdk_one_damaged_byte_is_never_believed() {
    qemu-img create -q -f vmdk good 40M; scribble good 9; qemu-img convert -O raw good truth
    py '
import subprocess
rnd = random.Random(2)
good = open("good", "rb").read()
truth = open("truth", "rb").read()
refused = 0
for i in range(90):
    bad = bytearray(good)
    at = rnd.randrange(12, 64) if i % 3 == 0 else rnd.randrange(21 * 512, 21 * 512 + 10 * 512)
    bad[at] ^= rnd.randrange(1, 256)
    open("bad", "wb").write(bad)
    if subprocess.run([sys.argv[1], "-q", "bad", "m"], stderr=subprocess.DEVNULL).returncode: refused += 1; continue
    f = os.open("m", os.O_RDONLY)
    assert os.fstat(f).st_size == len(truth), i
    for off in range(0, len(truth), 1 << 20):
        try: got = os.pread(f, 1 << 20, off)
        except OSError: continue
        assert truth[off:off + len(got)] == got, (i, at, off)
    os.close(f)
    subprocess.run([sys.argv[1], "--umount", "m"], check=True)
assert refused < 60, refused
' "$fx"
}

t_corpus_vmdk_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = vmdk ] || continue
        n=$((n + 1))
        [ "$expected" != must-refuse ] || { expect 1 "$fx" -q "c/$path" m; same "$(wc -l <err)" 1; continue; }
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$size" -gt 1000000000 ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        vmdk_compare "c/$path"
    done <c/MANIFEST.tsv
    [ $n -ge 4 ] || fail "only $n"
}

# ---- life cycle ------------------------------------------------------------------------------------------------

t_ready_when_it_returns_and_gone_when_unmounted() {
    random img 16
    for i in $(seq 40); do
        "$fx" -q img m && cmp img m && "$fx" --umount m && [ ! -e m ] && [ -z "$(ours)" ] || fail "round $i"
    done
}

t_daemon_lets_go_of_the_callers_pipes() {
    random img 16
    same "$(timeout 5 "$fx" img m 2>&1)" "fuseexp: img: no known format, taken as raw (--format raw says so)"
    same "$(readlink "/proc/$(supervisor_of)/cwd")" /
    same "$(find "/proc/$(supervisor_of)/fd" -lname "$PWD/*" | wc -l)" 0
    "$fx" --umount m
}

t_closed_standard_streams_do_no_harm() {
    random img 16; cp img copy
    "$fx" -q -w img m 0<&- 1>&- 2>&-
    cmp m copy
    "$fx" --umount m
    not "$fx" missing m 0<&- 1>&- 2>&-
    "$fx" -q -w img m -- true 2>&-
    cmp img copy
}

t_command_mode_returns_the_commands_status() {
    random img 16
    expect 0 "$fx" -q img m -- cmp img m
    expect 7 "$fx" -q img m -- sh -c 'exit 7'
    expect 137 "$fx" -q img m -- sh -c 'kill -9 $$'
    expect 127 "$fx" -q img m -- ./no-such-command
    expect 126 "$fx" -q img m -- ./img
    expect 125 "$fx" -q missing m -- true
    expect 125 env FUSEEXP_FAIL_OP=sync "$fault" -q -w img m -- true
    same "$(ls)" "$(printf 'err\nimg')"
    expect 0 "$fx" -q -- img m -- test -s m
    printf 'input' | "$fx" -q img m -- cat | cmp - <(printf 'input')
    same "$("$fx" -q img m -- sh -c 'ulimit -Sn')" "$(ulimit -Sn)"
}

t_signal_to_the_supervisor_reaches_the_command() {
    random img 16
    "$fx" -q img m -- sh -c 'trap "exit 9" TERM; while :; do sleep 0.05; done' & local pid=$!
    wait_for test -s m
    sleep 0.1
    kill -TERM $pid
    local status=0; wait $pid || status=$?
    same $status 9
    gone
}

t_int_term_hup_and_quit_unmount() {
    random img 16
    for sig in INT TERM HUP QUIT; do
        "$fx" -q img m; kill -$sig "$(supervisor_of)"; gone
        [ ! -e m ]
        # From a script's background INT is ignored, as sh(1) has it, so a fresh shell with job control.
        setsid bash -mc '"$0" -q -f img m & echo $! >pid; wait $!; echo $? >status' "$fx" & local job=$!
        wait_for test -s m
        kill -$sig "$(cat pid)"; wait $job
        same "$(cat status)" 0
    done
}

t_signal_while_busy_detaches_and_the_second_one_cuts_off() {
    random img 16
    "$fx" -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    exec 9<m
    kill -TERM $pid
    wait_for grep -q 'in use, detached' log
    not grep -q " $PWD/m " /proc/self/mountinfo
    head -c 100 <&9 | cmp -n 100 - img
    kill -TERM $pid
    not wait $pid
    not head -c 100 <&9 2>err >/dev/null
    exec 9<&-
    gone
}

t_other_signals_and_limits_do_not_kill() {
    random img 16; cp img copy
    bash -c 'ulimit -f 64; exec "$0" -q -w --growable --no-passthrough img m' "$fx"
    kill -USR2 "$(supervisor_of)"; kill -USR2 "$(server_of)"; kill -QUIT "$(server_of)"; kill -ALRM "$(supervisor_of)"
    not dd if=/dev/zero of=m bs=64k count=4 conv=notrunc oflag=append 2>err
    cmp -n 65536 m copy
    kill "$(supervisor_of)"; gone
}

t_server_is_out_of_the_callers_way() {
    random img 16; mkdir cwd
    exec 8>lock
    (cd cwd; flock 8; "$fx" -q ../img ../m)
    exec 8>&-
    flock -n lock true
    same "$(readlink "/proc/$(server_of)/cwd")" /
    not test "$(ps -o sid= "$(server_of)")" = "$(ps -o sid= $$)"
    "$fx" --umount m
    exec 8>lock
    "$fx" -q img m -- sh -c 'echo still mine >&8'
    same "$(cat lock)" 'still mine'
}

t_usr1_prints_counters() {
    random img 100
    "$fx" -q -f --no-passthrough img m 2>log & local pid=$!
    wait_for test -s m
    cat m >/dev/null
    kill -USR1 $pid
    wait_for grep -q 'reads (409600 bytes), 0 writes' log
    umount m; wait $pid
}

t_umount_commands_all_work() {
    random img 16
    "$fx" -q img m; umount m; gone
    "$fx" -q img m; fusermount3 -u m; gone
    "$fx" -q img m; "$fx" --umount m; same "$(ours)" ""
    "$fx" -q img m; "$fx" --umount -z m; gone
    "$fx" -q img m; "$fx" -u m; [ ! -e m ]
    refused 1 'nothing mounted' "$fx" --umount m
    mkdir d; refused 1 'nothing mounted' "$fx" --umount d
    refused 1 'nothing mounted' "$fx" --umount /proc
}

t_umount_of_a_busy_mount_says_so_and_lazy_waits_for_nobody() {
    random img 16
    "$fx" -q img m
    exec 9<m
    expect 1 "$fx" --umount m
    grep -q 'in use.*-z' err
    cmp img m
    expect 0 "$fx" --umount -z m
    head -c 100 <&9 | cmp -n 100 - img
    exec 9<&-
    gone
}

t_umount_waits_until_the_image_is_free() {
    random img 2000
    for i in $(seq 10); do
        "$fx" -q -w img m; dd if=/dev/urandom of=m bs=1M count=4 conv=notrunc status=none; "$fx" --umount m
        "$fx" -q -w img m2; "$fx" --umount m2     # the lock is free
    done
}

t_pidfile_is_written_and_removed() {
    random img 16
    "$fx" -q --pidfile pid img m
    same "$(cat pid)" "$(supervisor_of)"
    kill "$(cat pid)"; gone
    [ ! -e pid ]
    refused 1 'folder it should be in' "$fx" -q --pidfile no/pid img m
    mkdir pid.d; refused 1 'Is a directory' "$fx" -q --format raw --pidfile pid.d img m
    echo precious >victim; ln -s victim link
    refused 1 'link: .*ymbolic' "$fx" -q --format raw --pidfile link img m
    same "$(cat victim)" precious
    "$fx" -q --pidfile pid img m; rm pid; echo other >pid; "$fx" --umount m; same "$(cat pid)" other
}

t_notify_socket_is_told() {
    random img 16
    py '
import socket, subprocess
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(sys.argv[2]); s.settimeout(5)
env = dict(os.environ, NOTIFY_SOCKET=sys.argv[2].replace("\0", "@"))
p = subprocess.Popen([sys.argv[1], "-q", "-f", "img", "m"], env=env)
assert s.recv(100).decode().split("\n") == ["READY=1", "MAINPID=%d" % p.pid]
assert open("m", "rb").read() == open("img", "rb").read()
p.terminate(); assert p.wait() == 0' "$fx" "$PWD/sock"
}

t_killed_server_leaves_no_mount() {
    random img 16
    for opt in "" --no-passthrough; do
        "$fx" -q $opt img m
        kill -9 "$(server_of)"
        sleep 1
        not grep -q " $PWD/m " /proc/self/mountinfo
        gone
        [ ! -e m ]
    done
    "$fx" -q -f img m 2>log & local pid=$!
    wait_for test -s m
    kill -9 "$(server_of)"
    not wait $pid
    grep -q 'killed by signal 9' log
    # A command sees the mount go at once.
    "$fx" -q img m -- sh -c "sleep 0.7; grep -q ' $PWD/m ' /proc/self/mountinfo && echo there || echo gone" >out 2>log & pid=$!
    wait_for test -s m; kill -9 "$(server_of)"
    not wait $pid
    same "$(cat out)" gone
    expect 125 "$fx" -q img m -- sh -c "kill -9 \$(grep -l 'NoNewPrivs:.1' /proc/[0-9]*/status | xargs grep -l '^Name:.fuseexp' | cut -d/ -f3 |
        while read p; do grep -qz ^m\$ /proc/\$p/cmdline && echo \$p; done)"
}

t_killed_supervisor_leaves_a_server_that_ends_with_the_mount() {
    random img 16
    "$fx" -q img m
    kill -9 "$(supervisor_of)"
    sleep 0.1
    cmp img m
    expect 1 "$fx" --umount m
    grep -q 'supervisor was killed' err
    gone
}

t_stale_mount_is_detached_at_the_next_start() {
    random img 16; : >m
    "$fx" -q img m
    local sup; sup=$(supervisor_of)
    kill -STOP "$sup"; kill -9 "$(server_of)"; kill -9 "$sup"
    wait_for sh -c '! cat m'
    grep -q " $PWD/m " /proc/self/mountinfo
    "$fx" --format raw img m 2>err; grep -q 'detached a mount whose server had died' err
    cmp img m; "$fx" --umount m; [ -e m ]
    same "$(grep -c " $PWD/m " /proc/self/mountinfo)" 0
}

t_busy_mountpoints_are_refused() {
    random img 16; mkdir d
    "$fx" -q img m
    refused 1 'fuseexp is mounted there already' "$fx" -q img m
    cmp img m; "$fx" --umount m
    "$fx" -q img m; kill -STOP "$(server_of)"
    refused 1 'fuseexp is mounted there already' timeout 5 "$fx" -q img m
    kill -CONT "$(server_of)"; "$fx" --umount m
    mount -t tmpfs none d
    refused 1 'something else is mounted there' "$fx" -q img d
    umount d
}

t_image_and_mountpoint_may_be_the_same_path() {
    random img 16; cp img copy
    "$fx" -q img img; cmp img copy
    [ "$(stat -c %a img)" = 400 ]
    "$fx" --umount img; cmp img copy
    "$fx" -q -w img img; printf 'new' | dd of=img conv=notrunc status=none; "$fx" --umount img
    printf 'new' | cmp -n 3 - img
    # ... and what died there is found before the image is opened
    "$fx" -q img img
    local sup; sup=$(supervisor_of)
    kill -STOP "$sup"; kill -9 "$(server_of)"; kill -9 "$sup"
    wait_for sh -c '! cat img'
    "$fx" -q img img; cmp -i 3 img copy; "$fx" --umount img
}

t_moved_and_covered_mounts_are_found() {
    random img 16; mkdir d sd other
    "$fx" -q img d/m; mv d e; kill "$(supervisor_of)"
    gone
    "$fx" -q -f img sd 2>log & local pid=$!
    wait_for test -s sd/disk
    mount --bind other sd; kill -TERM $pid
    wait_for grep -q 'something is mounted over it' log
    umount sd; kill -TERM $pid; wait $pid
    gone
}

t_many_at_once_do_not_take_each_others_mounts() {
    random img 16
    for x in A B C; do
        for i in $(seq 60); do "$fx" -q -f img $x -- cmp -s $x img || echo "$x $i"; done >failed.$x 2>&1 &
    done
    wait
    same "$(cat failed.*)" ""
    # The minor of one that is gone is the next one's.
    "$fx" -q img a -- sleep 1 & local pid=$!
    wait_for test -s a
    umount -l a; "$fx" -q img b
    wait $pid
    cmp img b
    "$fx" --umount b
}

t_foreign_mounts_over_ours_are_left_alone() {
    random img 16; mkdir sd
    "$fx" -q -f img sd 2>log & local pid=$!
    wait_for test -s sd/disk
    mount -t tmpfs foreign sd; echo precious >sd/file
    kill -9 "$(server_of)"
    not wait $pid
    same "$(cat sd/file)" precious
    umount sd; umount -l sd
}

t_refused_starts_do_not_use_up_the_waiters() {
    random img 16; "$fx" -q img m
    for i in $(seq 20); do not "$fx" -q img m 2>err; done
    exec 9<m
    for i in $(seq 20); do not timeout 0.1 "$fx" --umount m 2>err; done
    exec 9<&-
    "$fx" --umount m
    same "$(ours)" ""
}

t_umount_from_another_network_namespace_says_that_it_cannot_wait() {
    random img 16; "$fx" -q img m
    expect 1 unshare -n "$fx" --umount m
    grep -q 'cannot be waited for' err; gone
    mkdir 'user_id=1000'; cp img 'user_id=1000/i'
    "$fx" -q 'user_id=1000/i' m; "$fx" --umount m; same "$(ours)" ""
}

t_existing_mountpoint_file_is_kept() {
    random img 16; echo content >m
    "$fx" -q img m; "$fx" --umount m
    same "$(cat m)" content
    ln -s m link; "$fx" -q img link; cmp img m; "$fx" --umount link; same "$(cat m)" content
}

t_odd_names_show_in_the_mount_table() {
    local name='a, b\c "x"'
    random "$name" 16
    "$fx" -q "$name" "m $name"
    cmp "$name" "m $name"
    findmnt -no SOURCE,FSTYPE,OPTIONS "m $name" >shown
    grep -qF "fuse.fuseexp ro,nosuid,nodev,noatime" shown; grep -qF "$PWD/a, b" shown
    "$fx" --umount "m $name"
}

t_mount_8_and_fstab_work() {
    random img 16; mkdir sbin d; ln -s "$fx" sbin/mount.fuse.fuseexp; ln -s "$fx" sbin/mount.fuseexp; : >m
    echo "$PWD/img $PWD/m fuse.fuseexp noauto,nofail,x-systemd.automount,format=raw,offset=4096 0 0" >fstab
    echo "$PWD/img $PWD/d fuseexp user,noauto,format=raw,writable 0 0" >>fstab
    fx=$fx unshare -m bash -euc '
        mount --bind sbin /usr/sbin
        mount -t fuse.fuseexp -o format=raw,size=8k img m
        cmp -n 8192 img m; [ "$(stat -c %s m)" = 8192 ]; ! printf x 2>/dev/null >>m || exit 1; umount m
        mount -T fstab "$PWD/m"; cmp -i 4096:0 img m; mount -T fstab -a; "$fx" --umount m
        mount -T fstab "$PWD/d"; printf new | dd of=d/disk conv=notrunc status=none; umount d
        mount -r -t fuse.fuseexp -o format=raw,writable img m; ! printf x 2>/dev/null >>m || exit 1; umount m'
    wait_for sh -c 'printf new | cmp -n 3 - img'
    gone
}

t_mount_fuse3_s_rw_writes_nothing() {
    random img 16; cp img copy; mkdir bin; ln -s "$fx" bin/fuseexp
    local helper; helper=$(find /sbin/mount.fuse3 /usr/sbin/mount.fuse3 2>/dev/null | head -n 1)
    PATH=$PWD/bin:$PATH "$helper" img m -o rw,dev,suid,relatime,format=raw -t fuse.fuseexp
    findmnt -no OPTIONS m >opts; grep -q '^ro,nosuid,nodev' opts
    not dd if=/dev/zero of=m count=1 conv=notrunc 2>err
    "$fx" --umount m
    cmp img copy
}

t_mount_options_reach_the_mount() {
    random img 16
    "$fx" -q -o noexec,sync,mode=444 img m
    findmnt -no OPTIONS m | grep -q noexec
    same "$(stat -c %a m)" 444
    "$fx" --umount m
    refused 1 'unknown option.*nonsense' "$fx" -q -o nonsense img m
    refused 2 'needs a value' "$fx" -q -o offset img m
    refused 2 'takes no value' "$fx" -q -o writable=1 img m
}

# ---- plain user ------------------------------------------------------------------------------------------------

user_folder() { chmod 755 .; mkdir u; random u/img 300; chown -R 65534:65534 u; }

t_plain_user_mounts_reads_and_unmounts() {
    user_folder
    as_nobody "$fx" -q u/img u/m
    as_nobody cmp u/img u/m
    ! cat u/m >/dev/null 2>&1 || grep -q user_allow_other /etc/fuse.conf
    same "$(as_nobody stat -c '%a %u' u/m)" "400 65534"
    same "$(as_nobody "$fx" --umount u/m 2>&1)" ""
    [ ! -e u/m ]
    as_nobody "$fx" -q -w u/img u/m; as_nobody sh -c 'printf new | dd of=u/m conv=notrunc,fsync status=none'
    as_nobody fusermount3 -u u/m; gone
    printf 'new' | cmp -n 3 - u/img
    as_nobody mkdir u/d; as_nobody "$fx" -q u/img u/d; as_nobody cmp u/img u/d/disk; "$fx" --umount u/d
    expect 5 as_nobody "$fx" -q u/img u/m -- sh -c 'cmp u/img u/m && exit 5'
    as_nobody "$fx" -q u/img u/m; kill "$(supervisor_of)"; gone
}

t_plain_user_without_right_or_fusermount3_is_told() {
    user_folder; random img 16; chmod 600 img
    refused 1 'img: Permission denied' as_nobody "$fx" -q img u/m
    refused 1 'cannot be created: Permission denied' as_nobody "$fx" -q u/img m
    : >f; chmod 644 f
    refused 1 'cannot mount: .*Permission denied' as_nobody "$fx" -q u/img f
    refused 1 'cannot run fusermount3.*apt-get install fuse3' as_nobody env PATH=/nowhere "$fx" -q --format raw u/img u/m
}

t_killed_server_of_a_plain_user_leaves_no_mount() {
    user_folder
    as_nobody "$fx" -q u/img u/m
    kill -9 "$(server_of)"
    gone
    [ ! -e u/m ]
}

# ---- the clean-up chain ----------------------------------------------------------------------------------------

# Fails acquisition 1, 2, 3 ... of a start until one runs through, and compares the world before and after each.
check_chain() {
    local n=0 before faults=0 status
    before=$(state)
    while n=$((n + 1)); do
        status=0
        FUSEEXP_FAIL_AT=$n timeout 20 "$@" >out 2>err </dev/null || status=$?
        if [ $status = 0 ] && grep -q " $PWD/" /proc/self/mountinfo; then
            $undo || fail "step $n could not be undone"
        fi
        gone
        rm -f out
        same "$(state)" "$before"
        if ! grep -q 'FAULT [0-9]' err; then break; fi
        faults=$((faults + 1))
        [ $status != 99 ] && [ $status != 124 ] || fail "status $status at $(grep FAULT err)"
        # One line says why, unless the step is one that can be done without.
        [ $status = 0 ] || [ "$(grep -vc 'FAULT\|taken as raw' err)" -ge 1 ] || { cat err; fail "no word about step $n"; }
        [ $n -lt 100 ]
    done
    same $status 0
    [ $faults -ge "$least" ] || fail "only $faults steps"
    echo "$faults steps" >&3
}

t_every_failing_step_of_a_daemon_is_undone() {
    random img 16; mkdir d; : >file
    undo="$fx --umount m" least=30 check_chain "$fault" --sandbox=require --pidfile pid img m
    undo="$fx --umount file" least=29 check_chain "$fault" --sandbox=require -w img file
    undo="$fx --umount d" least=29 check_chain "$fault" --sandbox=require --no-passthrough img d
}

t_every_failing_step_in_the_foreground_is_undone() {
    random img 16; mkdir d
    undo=true least=24 check_chain "$fault" --sandbox=require -f -s img m -- true
    undo=true least=24 check_chain "$fault" --sandbox=require -s img d -- true
    # -f without a command ends by a signal; the step that fails is what is looked at.
    undo=true least=20 check_chain sh -c "'$fault' -f -s --sandbox=require img m & p=\$!; i=0
        while kill -0 \$p 2>/dev/null && [ \$((i += 1)) -lt 100 ]; do grep -q ' $PWD/m ' /proc/self/mountinfo && [ -s m ] && { kill \$p; break; }; sleep 0.02; done; wait \$p"
}

t_every_failing_step_of_a_plain_user_is_undone() {
    user_folder; mkdir u/d; chown 65534 u/d
    undo="$fx --umount u/m" least=25 check_chain "${nobody[@]}" "$fault" -s u/img u/m
    undo=true least=25 check_chain "${nobody[@]}" "$fault" -s u/img u/d -- true
}

# ---- bad input -------------------------------------------------------------------------------------------------

t_bad_input_is_refused_in_one_line() {
    random img 16; mkdir d; : >empty; mkfifo pipe
    refused 1 'missing: No such file' "$fx" -q missing m
    refused 1 'd: is a directory' "$fx" -q d m
    refused 1 'empty: is empty' "$fx" -q empty m
    refused 1 'pipe: neither' "$fx" -q pipe m
    refused 1 'neither a regular file nor a block' "$fx" -q /dev/null m
    refused 1 'folder it should be in' "$fx" -q img no/such/m
    refused 1 'No such file' "$fx" -q img no/
    refused 1 'nothing can be mounted' "$fx" -q img pipe
    refused 1 'no partition 9' "$fx" -q --partition 9 img m
    refused 2 'unknown option --nonsense' "$fx" --nonsense img m
    refused 2 'unknown option -X' "$fx" -X img m
    refused 2 'needs a value' "$fx" img m --offset
    refused 2 'usage' "$fx"
    refused 2 'usage' "$fx" img
    refused 2 'no command after' "$fx" img m --
    refused 2 'usage' "$fx" img -- ls
    refused 2 'goes with --umount' "$fx" -z img m
    refused 2 'one of auto' "$fx" --sandbox=maybe img m
    refused 2 'not a usable' "$fx" --threads=1000 img m
    refused 2 'not a usable' "$fx" --partition=x img m
    refused 2 'not a usable' "$fx" --partition=0 img m
    refused 2 'not a usable' "$fx" --threads=0 img m
    refused 2 'not a usable' "$fx" --size=0 img m
    refused 2 'not a usable' "$fx" --mode=999 img m
    refused 2 'two writers' "$fx" -U -w img m
    refused 2 'goes with -w' "$fx" --growable img m
    refused 2 'whole image' "$fx" -w --growable --offset 1 img m
    refused 2 'read-only export' "$fx" --mode 600 img m
    refused 2 '512 or 4096' "$fx" --sector-size 1024 img m
    refused 1 'without --allow-other=on' "$fx" -q --mode 444 --allow-other=off img m
    refused 2 'one MOUNTPOINT' "$fx" --umount
    refused 2 'not expected' "$fx" --formats img
    refused 1 'control?characters: No such file' "$fx" -q "$(printf 'control\ncharacters')" m
}

t_missing_dev_fuse_and_proc_are_told() {
    random img 16
    unshare -m bash -euc '
        mount -t tmpfs none /dev; mknod /dev/null c 1 3; ! "$0" -q --format raw img m 2>err || exit 1
        grep -q "/dev/fuse: No such file.*modprobe fuse" err; [ "$(wc -l <err)" = 1 ]; [ ! -e m ]' "$fx"
    unshare -m bash -euc 'mount -t tmpfs none /proc; ! "$0" -q --format raw img m 2>err || exit 1; grep -q "is /proc mounted" err' "$fx"
}

t_kernel_that_is_not_allowed_to_mount_is_told() {
    random img 16
    expect 1 setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$fx" -q --format raw img m
    grep -q '^fuseexp: .*/m: cannot mount' err; same "$(wc -l <err)" 1; [ ! -e m ]
}

# ---- sandbox, speed --------------------------------------------------------------------------------------------

t_server_is_locked_in() {
    random img 16
    "$fx" -q --sandbox=require --no-passthrough img m
    local s; s=$(server_of)
    grep -q '^Seccomp:.*2' "/proc/$s/status"; grep -q '^CapEff:.*0000000000000000' "/proc/$s/status"
    grep -q '^CapBnd:.*0000000000000000' "/proc/$s/status"; grep -q 'core file size *0 ' "/proc/$s/limits"
    cmp img m; "$fx" --umount m
    # What Landlock and seccomp refuse: run under gdb's call? No: the fault build tries it itself.
    "$fault" --try-sandbox
}

t_passthrough_serves_without_the_workers() {
    random img 100
    "$fx" -v -f img m 2>log & local pid=$!
    wait_for test -s m
    if grep -q 'no passthrough' log; then umount m; wait $pid; skip "$(grep 'no passthrough' log)"; fi
    cat m >/dev/null; kill -USR1 $pid
    wait_for grep -q ' 0 reads .* passthrough' log
    umount m; wait $pid
    for opt in --no-passthrough --direct-io -U --offset=4096; do
        "$fx" -q -f $opt img m 2>log & pid=$!
        wait_for test -s m
        cat m >/dev/null; kill -USR1 $pid; wait_for grep -q ' reads' log
        [ $opt = -U ] || ! grep -q passthrough log
        umount m; wait $pid
    done
}

t_read_ahead_is_raised() {
    random img 16
    "$fx" -q img m
    same "$(cat /sys/class/bdi/"$(stat -c %d m | awk '{ print "0:" $1 }')"/read_ahead_kb)" 1024
    "$fx" --umount m
}

t_memory_stays_small() {
    truncate -s 4G img
    "$fx" -q -w --no-passthrough img m
    dd if=m of=/dev/null bs=1M count=2000 status=none
    dd if=/dev/zero of=m bs=1M count=500 conv=notrunc status=none
    fio --name=r --filename="$PWD/m" --rw=randrw --bs=4k --size=1G --runtime=2 --time_based --ioengine=libaio --iodepth=32 \
        --direct=1 --output=fio.log
    local kib; kib=$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")
    echo "peak $kib KiB" >&3
    [ "$kib" -le 16384 ] || fail "$kib KiB"
    "$fx" --umount m
}

# ---- sanitizers ------------------------------------------------------------------------------------------------

check_sanitized() {
    random img 4096; mkdir d
    "$1" -q -f --sandbox=off --no-passthrough -w img m 2>log & local pid=$!
    wait_for test -s m
    fio --name=v --filename="$PWD/m" --size=16M --rw=randrw --bsrange=512-256k --blockalign=512 --ioengine=libaio --iodepth=16 \
        --numjobs=4 --runtime=4 --time_based --output=fio.log || { cat fio.log; false; }
    cat m >/dev/null; fallocate -p -o 4096 -l 100000 m; truncate -s 15M m; truncate -s 16M m; kill -USR1 $pid
    cp --sparse=always m copy
    umount m
    wait $pid || { cat log; false; }
    mbr_image
    "$1" -q --sandbox=off img d -- sh -c 'cat d/* >/dev/null; ls -la d; stat -f d' >/dev/null 2>>log
    ! grep -q 'Sanitizer\|runtime error' log || { cat log; false; }
}
t_address_sanitizer_finds_nothing_under_load() { check_sanitized "$build/fuseexp-asan"; }
t_thread_sanitizer_finds_nothing_under_load() { check_sanitized "$build/fuseexp-tsan"; }

t_malformed_requests_are_survived() {
    random img 16
    "$build/fuseexp-asan" --fuzz-requests 200000 img
    "$build/fuseexp-asan" --fuzz-requests 200000 -w img
}

# ---- other modes -----------------------------------------------------------------------------------------------

lint() {
    local bad=0 contents banners
    contents=$(sed -n 's/^ \*  *\([0-9]*\)\. \([A-Za-z][A-Za-z0-9 -]*[a-z0-9]\)  *[a-z0-9]*_ .*/\1 \2/p; s/^ \*  *\([0-9]*\)\. \(Main\)$/\1 \2/p' \
        "$top/fuseexp.c" | sed -n '1,/ Main/p')
    banners=$(grep -A1 '^/\* \*\*\*\*' "$top/fuseexp.c" | sed -n 's/^ \* \([0-9]*\)\. \(.*\)/\1 \2/p')
    [ "$contents" = "$banners" ] || { diff <(echo "$contents") <(echo "$banners"); bad=1; }
    awk 'length > 120 { print FILENAME ":" FNR ": longer than 120 columns"; bad = 1 } END { exit bad }' "$top/fuseexp.c" "$top/fuseexp.h" || bad=1
    (cd "$top" && git grep -nE '/(farm|work)/' -- . ':!.gitignore' ':!test.sh') && bad=1
    [ $bad = 0 ] && echo "lint: contents list and banners agree"
    return $bad
}

demo() {
    local dir; dir=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "clean_up '$dir'" EXIT
    cd "$dir" && mkdir files mnt && echo 'Hello from inside the image.' >files/hello.txt
    PATH=$build:$PATH
    set -e
    set -x
    mkfs.ext4 -q -d files disk.img 16M
    qemu-img convert -c -f raw -O qcow2 disk.img disk.qcow2
    fuseexp disk.qcow2 disk.raw
    findmnt -o TARGET,SOURCE,FSTYPE,OPTIONS disk.raw
    mount -o ro,loop disk.raw mnt
    cat mnt/hello.txt
    umount mnt
    fuseexp --umount disk.raw
    ls
    { set +x; } 2>/dev/null
    echo "The demo worked: a compressed qcow2 image was exported, loop-mounted, read, and everything is gone again."
}

# One table, one run: rows are peers, columns are works; fio's JSON is the source. Images lie in a tmpfs.
bench_fio() {       # FILE FIELD fio options: iops or MiB/s
    local file=$1 field=$2
    shift 2
    fio --name=b --filename="$file" --runtime="${BENCH_SECONDS:-2}" --time_based --output-format=json --group_reporting "$@" 2>/dev/null |
        jq -r "[.jobs[] | .read.$field + .write.$field] | add | if \"$field\" == \"bw\" then . / 1024 else . end | floor" 2>/dev/null || echo 0
}

bench_cold() {      # FILE: MiB/s of dd, buffered, nothing cached (but a tmpfs image itself)
    local ns
    echo 1 >/proc/sys/vm/drop_caches
    ns=$(date +%s%N)
    dd if="$1" of=/dev/null bs=128k status=none || { echo 0; return; }
    ns=$(($(date +%s%N) - ns))
    echo $(($(stat -c %s "$1") / 1048576 * 1000000000 / ns))
}

bench_one() {       # WORK FILE
    case $1 in
    seq1M) bench_fio "$2" bw --readonly --rw=read --bs=1M --direct=1 --ioengine=psync ;;
    cold) bench_cold "$2" ;;
    rand4k-qd1) bench_fio "$2" iops --readonly --rw=randread --bs=4k --direct=1 --ioengine=psync ;;
    rand4k-qd32) bench_fio "$2" iops --readonly --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=32 ;;
    rand4k-4jobs) bench_fio "$2" iops --readonly --rw=randread --bs=4k --direct=1 --ioengine=psync --numjobs=4 ;;
    rand64k-4jobs) bench_fio "$2" bw --readonly --rw=randread --bs=64k --direct=1 --ioengine=psync --numjobs=4 ;;
    write4k-qd32) bench_fio "$2" iops --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 ;;
    esac
}
bench_works=(seq1M cold rand4k-qd1 rand4k-qd32 rand4k-4jobs rand64k-4jobs write4k-qd32)

# Starts a peer on ./img at ./m and prints milliseconds until the file can be read; sets $file. False: not installed.
bench_start() {     # PEER MODE(r|w)
    local begin write=()
    file=$PWD/m
    [ "$2" = r ] || write=(-w)
    begin=$(date +%s%N)
    case $1 in
    native) file=$PWD/img ;;
    fuseexp) "$fx" -q "${write[@]}" "${write[@]/#-w/--growable}" img m ;;
    fuseexp-workers) "$fx" -q --no-passthrough "${write[@]}" img m ;;
    qemu-storage-daemon)
        : >m
        qemu-storage-daemon --blockdev "driver=file,node-name=f,filename=img,cache.direct=off,read-only=$([ "$2" = w ] && echo off || echo on)" \
            --blockdev "driver=raw,node-name=r,file=f,read-only=$([ "$2" = w ] && echo off || echo on)" \
            --export "type=fuse,id=e,node-name=r,mountpoint=m,writable=$([ "$2" = w ] && echo on || echo off)" & peer=$! ;;
    nbdfuse)
        [ "$2" = r ] || return 1
        : >m
        nbdfuse m --command nbdkit -s -r file img & peer=$! ;;
    xmount)
        [ "$2" = r ] || return 1
        mkdir -p x
        xmount --in raw img --out raw x >/dev/null 2>&1 || return 1
        file=$PWD/x/img.dd
        [ -e "$file" ] || file=$(find x -type f ! -name '*.info' | head -n 1) ;;
    esac
    until [ -s "$file" ] && dd if="$file" of=/dev/null bs=1 count=1 status=none 2>/dev/null; do
        [ $(($(date +%s%N) - begin)) -lt 5000000000 ] || return 1
        sleep 0.001
    done
    ready=$((($(date +%s%N) - begin) / 1000))
}

bench_memory() {    # PEER: peak resident KiB of the process that serves
    local pid
    case $1 in
    fuseexp*) pid=$(server_of) ;;
    native) echo - && return ;;
    xmount) pid=$(pgrep -x xmount | tail -n 1) ;;
    *) pid=$(pgrep -x "$(echo "$1" | cut -c1-15)" | head -n 1) ;;
    esac
    awk '/VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null || echo -
}

bench_stop() {
    [ "$file" = "$PWD/img" ] && return
    umount m 2>/dev/null || umount x 2>/dev/null
    [ -z "$peer" ] || { kill "$peer" 2>/dev/null; wait "$peer" 2>/dev/null; }
    peer=
    gone
    rm -f m
}

bench() {
    local dir peers=() p w round peer='' file='' ready='' v
    declare -A got
    dir=$(mktemp -d /dev/shm/fuseexp-bench.XXXXXX)
    export FXTEST=$dir
    # shellcheck disable=SC2064
    trap "clean_up '$dir'" EXIT
    cd "$dir" || return 1
    dd if=/dev/urandom of=img bs=1M count="${BENCH_MIB:-512}" status=none
    for p in native fuseexp fuseexp-workers qemu-storage-daemon nbdfuse xmount; do
        case $p in native | fuseexp*) ;; *) command -v $p >/dev/null || { echo "(no $p on this machine)"; continue; } ;; esac
        peers+=("$p")
    done
    # Round by round through all peers, so that a change of the machine's mood hits them all.
    for round in 1 2 3; do
        for p in "${peers[@]}"; do
            if bench_start "$p" r 2>/dev/null; then
                got[$p,ready]+=" $ready"
                for w in "${bench_works[@]}"; do
                    [ "$w" = write4k-qd32 ] || got[$p,$w]+=" $(bench_one "$w" "$file")"
                done
                got[$p,memory]+=" $(bench_memory "$p")"
            fi
            bench_stop
            if bench_start "$p" w 2>/dev/null; then got[$p,write4k-qd32]+=" $(bench_one write4k-qd32 "$file")"; fi
            bench_stop
        done
        echo "round $round of 3 done" >&2
    done
    bench_print
}

bench_median() { echo "$@" | tr ' ' '\n' | sort -n | sed -n "$((($# + 1) / 2))p"; }

bench_print() {
    local w p base
    printf '%-22s' 'median of 3 rounds'
    printf '%20s' "${peers[@]}"
    printf '\n'
    for w in "${bench_works[@]}" ready memory; do
        case $w in seq1M | cold | rand64k*) v=MiB/s ;; ready) v=us ;; memory) v='KiB peak' ;; *) v=IOPS ;; esac
        printf '%-22s' "$w, $v"
        # shellcheck disable=SC2086
        base=$(bench_median ${got[qemu-storage-daemon,$w]:-})
        for p in "${peers[@]}"; do
            # shellcheck disable=SC2086
            v=$(bench_median ${got[$p,$w]:--})
            printf '%20s' "$v$([ -n "$base" ] && [ "$v" != - ] && [ "$base" != - ] && [ "$base" != 0 ] && awk "BEGIN { printf \" (%.2fx)\", $v / $base }")"
        done
        printf '\n'
    done
    echo "(x: against qemu-storage-daemon; cold: dd bs=128k through the page cache; the others O_DIRECT)"
    for w in seq1M rand4k-qd1 rand4k-qd32 rand4k-4jobs; do
        # shellcheck disable=SC2086
        awk "BEGIN { printf \"fuseexp (passthrough) / native, $w: %.2f\n\", $(bench_median ${got[fuseexp,$w]}) / $(bench_median ${got[native,$w]}) }"
    done
}

soak() {
    local end=$((SECONDS + ${SOAK_SECONDS:-1800})) n=0 dir; dir=$(mktemp -d)
    cd "$dir" && random img 4096
    while [ $SECONDS -lt $end ]; do
        n=$((n + 1))
        "$fx" -q -w "$([ $((n % 2)) = 0 ] && echo --no-passthrough || echo --direct-io)" img m || break
        fio --name=s --filename="$PWD/m" --size=16M --rw=randrw --bs=4k --runtime=1 --time_based --ioengine=libaio --iodepth=8 --output=fio.log &
        sleep "0.$((RANDOM % 10))"
        case $((n % 4)) in
        0) kill -9 "$(server_of)" ;;
        1) kill "$(supervisor_of)" ;;
        2) umount -l m ;;
        3) wait; "$fx" --umount m ;;
        esac
        wait
        gone || break
    done
    clean_up "$dir"
    [ $SECONDS -ge $end ] && echo "soak: $n rounds, nothing left behind"
}

run() {
    local n=0 bad=0 skipped=0 t dir status start
    [ "$(id -u)" = 0 ] || { echo "the tests need root (they mount, and become nobody)" >&2; exit 1; }
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || true
    # Where udev did not do it, for the cases as a plain user.
    # What systemd and udev do on an ordinary system, and the plain user needs: a mount table, /dev/fuse for everyone,
    # and programs that can be reached.
    [ -e /etc/mtab ] || ln -s ../proc/self/mounts /etc/mtab
    fuse_mode=$(stat -c %a /dev/fuse)
    bin=$(mktemp -d /tmp/fuseexp-bin.XXXXXX)
    trap 'chmod "$fuse_mode" /dev/fuse; rm -rf "$bin"' EXIT
    chmod 666 /dev/fuse
    chmod 755 "$bin" && cp "$build"/fuseexp* "$bin" && build=$bin && fx=$bin/fuseexp && fault=$bin/fuseexp-fault
    echo "TAP version 13"
    for t in $(cases "$@"); do
        n=$((n + 1))
        dir=$(mktemp -d /tmp/fuseexp-test.XXXXXX)
        start=$(date +%s%N)
        (cd "$dir" && export FXTEST=$dir && exec 3>"$dir.note" && set -eu && { [ -z "${TRACE:-}" ] || set -x; } && "t_$t") >"$dir.log" 2>&1 </dev/null
        status=$?
        [ -z "${TIMES:-}" ] || echo "$((($(date +%s%N) - start) / 1000000)) ms" >>"$dir.note"
        case $status in
        0) echo "ok $n - $t$(sed 's/^/ # /' "$dir.note" 2>/dev/null | tr -d '\n')" ;;
        77) echo "ok $n - $t # SKIP $(sed 's/^SKIP: //' "$dir.note")" && skipped=$((skipped + 1)) ;;
        *) echo "not ok $n - $t" && sed 's/^/# /' "$dir.log" | tail -n 30 && bad=$((bad + 1)) ;;
        esac
        clean_up "$dir" >/dev/null 2>&1
        rm -f "$dir.log" "$dir.note"
    done
    echo "1..$n"
    echo "$((n - bad - skipped)) passed, $bad failed, $skipped skipped"
    [ $bad = 0 ] && [ $n -gt 0 ]
}

cases() {
    local t p
    for t in $(sed -n 's/^t_\([a-z0-9_]*\)() .*/\1/p' "$top/test.sh"); do
        [ $# -gt 0 ] || echo "$t"
        # shellcheck disable=SC2254
        for p in "$@"; do case $t in $p) echo "$t" && break ;; esac; done
    done
}

case ${1:-} in
-l) shift && cases "$@" ;;
--demo) demo ;;
--bench) bench ;;
--lint) lint ;;
--soak) soak ;;
*) run "$@" ;;
esac

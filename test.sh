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
    for f in vmdk vhdx vpc; do
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
        case $format:$path in raw:* | qcow2:* | parallels:* | path:* | ddrescue*:* | *:bad/*) continue ;; esac
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

t_nothing_outside_the_images_folder_is_opened() {
    mkdir -p in out; random in/base 100; cp in/base out/secret; ln -s ../out/secret in/link
    qemu-img create -q -f qcow2 -b base -F raw in/good
    qemu-img create -q -f qcow2 -u -b link -F raw in/bad 400k
    qemu-img create -q -f qcow2 -u -b "$PWD/out/secret" -F raw in/worse 400k
    for i in good bad worse; do
        strace -f -qq -e trace=%file,openat2 -o log "$fx" -q in/$i m -- true 2>err || grep -q 'out of its folder\|outside of its folder' err
        grep -E '(open|openat|openat2|creat)\(' log | grep -v ENOENT >opened
        not grep -q secret opened
        <opened grep -oE '"[^"]*"' | sort -u |
            grep -vE "^\"(in|in/$i|base|link|m|\.|$PWD(/m)?|/dev/(fuse|null|urandom)|/proc/.*|/sys/class/bdi/.*|/etc/(mtab|fuse.conf|ld.*)|/lib.*)\"\$" >others || true
        same "$(cat others)" ""
    done
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

t_qcow2_of_16_tib_with_full_tables_stays_small() {
    local ns kib big; big=$(mktemp -d /dev/shm/fuseexp-test.XXXXXX)         # ext4 has no files of that length
    # shellcheck disable=SC2064
    trap "rm -rf '$big'" EXIT
    qemu-img create -q -f qcow2 -o preallocation=metadata,cluster_size=1M "$big/img" 16T
    ns=$(date +%s%N)
    "$fx" -q "$big/img" m
    ns=$((($(date +%s%N) - ns) / 1000000))
    py '                                                                       # every slice of every table is needed once
f = os.open("m", os.O_RDONLY | os.O_DIRECT); b = mmap.mmap(-1, 4096)
for i in range(0, 16 << 40, 512 << 20): assert os.preadv(f, [b], i) == 4096 and b[:] == bytes(4096)'
    kib=$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")
    echo "ready in $ns ms, peak $kib KiB" >&3
    [ "$ns" -lt 500 ] || fail "$ns ms"                                      # 50 on a quiet machine
    [ "$kib" -le $(((64 + 16) * 1024)) ] || fail "$kib KiB"
    "$fx" --umount m
}

# fuzz FORMAT TIMES IMAGE TRUTH FROM TO MOST: single bytes of [FROM, TO) are damaged, MOST blocks of 4 KiB may come out wrong
fuzz() {
    "$build/fuseexp-asan" --fuzz-image "$@" 2>log || { grep -v 'cannot read\|more lines' log | tail -n 40; false; }
    not grep -q 'Sanitizer\|runtime error' log
}

t_qcow2_random_damage_is_survived() {
    local l1 l2 o
    for o in cluster_size=4k cluster_size=16k,extended_l2=on cluster_size=64k,compression_type=zstd; do
        rm -f img; qemu-img create -q -f qcow2 -o $o img 1M; o=${o#cluster_size=}; o=$((${o%%k*} * 1024))
        scribble img 5 $o; scribble img 6
        qemu-img convert -O raw img truth
        l1=$(($(od -An -tu8 --endian=big -j40 -N8 img))); l2=$(l2_of img)
        fuzz qcow2 1500 img truth 0 112 1000000                             # the header: anything but a crash
        fuzz qcow2 500 img truth $l1 $((l1 + 8)) 1000000
        fuzz qcow2 2000 img truth $l2 $((l2 + 4096)) $((o / 4096))          # one entry, one cluster
    done
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

# ---- what cannot be read ---------------------------------------------------------------------------------------

# l2_of IMAGE: where its first L2 table lies
l2_of() {
    local l1; l1=$(od -An -tu8 --endian=big -j40 -N8 "$1")
    echo $(($(od -An -tu8 --endian=big -j$((l1)) -N8 "$1") & 0xffffffffffff))
}

t_on_error_zero_fills_exactly_what_is_bad() {
    random raw 1000
    qemu-img convert -f raw -O qcow2 raw good
    poke bad $(($(l2_of good) + 16)) 8000004000000000                       # the third cluster: past the end
    cp raw want; dd if=/dev/zero of=want bs=64k seek=2 count=1 conv=notrunc status=none
    "$fx" -q bad m; not cmp m raw 2>err; "$fx" --umount m
    "$fx" -q --on-error=eio bad m; not cmp m raw 2>err; "$fx" --umount m
    for opt in "" --direct-io; do
        "$fx" -q $opt --on-error=zero bad m; cmp m want; dd if=m of=direct bs=1M iflag=direct status=none; cmp direct want; "$fx" --umount m
    done
    # Bad sectors below a plain image cost their pages only, and a whole compressed cluster where they hit one.
    cp raw want; dd if=/dev/zero of=want bs=4k seek=100 count=2 conv=notrunc status=none
    for opt in "" --direct-io; do
        FUSEEXP_BAD_SECTORS=$((100 * 4096 + 512)),4096 "$fault" -q $opt --on-error=zero --format raw raw m
        cmp m want; "$fault" --umount m
    done
    head -c 300000 "$top/fuseexp.c" >raw; truncate -s 300032 raw; qemu-img convert -c -f raw -O qcow2 raw good
    local host; host=$(($(od -An -tu8 --endian=big -j$(($(l2_of good) + 8)) -N8 good) & 0x3fffffffffffff))
    poke bad $((host + 20)) ffffffffffffffff
    cp raw want; dd if=/dev/zero of=want bs=64k seek=1 count=1 conv=notrunc status=none
    "$fx" -q --on-error=zero bad m; cmp m want; dd if=m of=direct bs=1M iflag=direct status=none; cmp direct want; "$fx" --umount m
    # A partition that reaches past the end.
    truncate -s 4M disk; echo '2048,4096,83' | sfdisk -q disk; truncate -s 2M disk
    "$fx" -q --format raw --on-error=zero --partition 1 disk m
    same "$(cat m | wc -c)" 2097152; "$fx" --umount m
    refused 2 "one of eio|zero" "$fx" --on-error=maybe raw m
}

t_error_map_lists_what_could_not_be_read() {
    random raw 1000; qemu-img convert -f raw -O qcow2 raw good
    poke bad $(($(l2_of good) + 16)) 8000004000000000 $(($(l2_of good) + 24)) 8000004000000000 $(($(l2_of good) + 72)) 8000004000000000
    for opt in "" --direct-io --on-error=zero; do
        "$fx" -q $opt --error-map map bad m
        dd if=m of=/dev/null bs=64k conv=noerror status=none 2>err || true
        "$fx" --umount m
        same "$(ddrescuelog -b 65536 -l- map | tr '\n' ' ')" "2 3 9 "
        same "$(ddrescuelog -b 512 -l+ map | wc -l)" $((8000 - 3 * 128))
        refused 1 'cannot make the error map' "$fx" -q --error-map map bad m
        rm map
    done
    # Positions are those of what is shown; pages of a plain file; nothing bad, nothing listed.
    FUSEEXP_BAD_SECTORS=$((100 * 4096 + 512)),4096 "$fault" -q --format raw --offset 40960 --error-map map raw m
    not cat m >/dev/null 2>err
    dd if=m of=/dev/null bs=4k conv=noerror status=none 2>err || true
    "$fault" --umount m
    same "$(ddrescuelog -b 4096 -l- map | tr '\n' ' ')" "90 91 "
    rm map
    "$fx" -q --format raw --error-map map raw m; cat m >/dev/null; "$fx" --umount m
    same "$(ddrescuelog -b 512 -l- map)" ""
    rm map
    # While it runs, a second later; and a map that cannot be written is told.
    "$fx" -q --error-map map bad m
    dd if=m of=/dev/null bs=64k skip=2 count=1 status=none 2>err || true; sleep 1.1
    dd if=m of=/dev/null bs=64k skip=9 count=1 status=none 2>err || true
    same "$(ddrescuelog -b 65536 -l- map | tr '\n' ' ')" "2 9 "
    "$fx" --umount m
    rm map
    FUSEEXP_FAIL_OP=map "$fault" -q --error-map map bad m
    cat m >/dev/null 2>err || true
    expect 1 "$fault" --umount m
    rm map
    refused 1 'No such file' "$fx" -q --error-map map absent m
}

t_strict_refuses_damaged_tables() {
    random raw 1000; qemu-img convert -f raw -O qcow2 raw good
    "$fx" -q --strict good m; cmp m raw; "$fx" --umount m
    poke bad $(($(l2_of good) + 16)) 8000004000000000
    refused 1 'strict.*65536 bytes at 131072: its cluster lies past the end' "$fx" -q --strict bad m
    qemu-img create -q -f qcow2 -b bad -F qcow2 top
    refused 1 'strict.*65536 bytes at 131072' "$fx" -q --strict top m
    qemu-io -c 'write 128k 64k' top >/dev/null
    "$fx" -q --strict top m; "$fx" --umount m
    truncate -s 4M disk; echo '2048,4096,83' | sfdisk -q disk; truncate -s 2M disk
    refused 1 'strict.*p1 reaches past the end' "$fx" -q --format raw --strict --partition 1 disk m
}

# ---- VDI -------------------------------------------------------------------------------------------------------

# A VDI built from VirtualBox's VDICore.h, and what is in it. The layout of version 1.1 (little-endian):
#   0 text[64]  64 signature  68 version  72 header size  76 type  80 flags  84 comment[256]  340 offset of the map
#   344 offset of the data  348 geometry[16]  364 -  368 u64 disk size  376 block size  380 extra data per block
#   384 blocks  388 allocated  392 UUID  408 of its last change  424 of the parent  440 of the parent's last change
#   map: u32 per block, the number of a block in the data; ~0: not here, ~1: zeros.
# Version 0.2 has no header size, no offsets, no extra data, no last UUID; map at 420, data right behind it.
vdi_py='
import struct
def uuid(n): return bytes([n]) * 16
def pack(blocks, bs, extra, filler):      # blocks: bytes, None (not here) or 0 (zeros); stored back to front
    m, data, n = [0] * len(blocks), b"", 0
    for i in reversed(range(len(blocks))):
        if blocks[i] is None: m[i] = 0xffffffff
        elif blocks[i] == 0: m[i] = 0xfffffffe
        else:
            m[i] = n; n += 1
            data += filler * extra + blocks[i]
    return struct.pack("<%dI" % len(m), *m), data, n
def vdi(path, kind, size, bs, blocks, own=1, changed=2, parent=0, parent_changed=0, extra=0):
    m, data, n = pack(blocks, bs, extra, b"E")
    h = b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0")
    h += struct.pack("<IIIII256sII16xIQIIII", 0xbeda107f, 0x10001, 400, kind, 0, b"", 512, 512 + (len(m) + 511) // 512 * 512,
                     0, size, bs, extra, len(blocks), n)
    h += uuid(own) + uuid(changed) + uuid(parent) + uuid(parent_changed)
    h += struct.pack("<4I", 0, 0, 0, 512)
    open(path, "wb").write(h.ljust(512, b"\0") + m.ljust((len(m) + 511) // 512 * 512, b"\0") + data)
def vdi0(path, kind, size, bs, blocks):
    m, data, n = pack(blocks, bs, 0, b"")
    h = b"<<< innotek VirtualBox Disk Image >>>\n".ljust(64, b"\0")
    h += struct.pack("<IIII256s16xQIII", 0xbeda107f, 2, kind, 0, b"", size, bs, len(blocks), n) + uuid(1) + uuid(2) + uuid(0)
    open(path, "wb").write(h + m + data)
rnd = random.Random(3)
def some(n, bs, empty): return [rnd.choice(empty) if rnd.random() < .5 else rnd.randbytes(bs) for i in range(n)]
def flat(*layers):      # the first that has the block
    return b"".join(next((x for x in c if x is not None), 0) or bytes(len(blk)) for c in zip(*layers))
'

t_vdi_variants_read_back() {
    local n=0 o size
    for o in static=off static=on; do
        for size in 12345k 3072k 512; do
            n=$((n + 1))
            rm -f img
            qemu-img create -q -f vdi -o $o img $size
            scribble img $n
            qemu-img convert -O raw img truth
            check_same img
        done
    done
    random raw 2000; truncate -s %512 raw; cp raw truth
    qemu-img convert -O vdi raw img
    check_same img
}

t_vdi_of_2_tib_is_sparse_and_quick() {
    qemu-img create -q -f vdi img 2T
    qemu-io -c 'write -P 7 1T 64k' -c 'write -P 9 2199023190016 65536' img >/dev/null
    "$fx" -q img m
    py '
f = os.open("m", os.O_RDONLY)
assert os.fstat(f).st_size == 2 << 40
assert os.pread(f, 65536, 1 << 40) == b"\7" * 65536 and os.pread(f, 99999, (2 << 40) - 65536) == b"\11" * 65536
assert os.pread(f, 65536, 1 << 39).count(0) == 65536
assert os.lseek(f, 0, os.SEEK_DATA) == 1 << 40 and os.lseek(f, 1 << 40, os.SEEK_HOLE) == (1 << 40) + (1 << 20)
assert os.lseek(f, (1 << 40) + (2 << 20), os.SEEK_DATA) == (2 << 40) - (1 << 20)
'
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 12000 ]
    "$fx" --umount m
}

t_vdi_from_the_specification_reads_back() {
    py "$vdi_py"'
for name, bs, extra, n in ("small", 4096, 0, 300), ("extra", 65536, 512, 20), ("large", 2 << 20, 0, 3):
    blocks = [b or 0 for b in some(n, bs, [None, 0])]
    raw = b"".join(b or bytes(bs) for b in blocks)
    size = len(raw) - (bs - 1536)
    vdi(name, 1, size, bs, [b or rnd.choice([None, 0]) for b in blocks], extra=extra)
    open(name + ".raw", "wb").write(raw[:size])
    if not extra:
        vdi0(name + "0", 1, size, bs, [b or None for b in blocks])
        open(name + "0.raw", "wb").write(raw[:size])
vdi("odd", 2, 4096 * 3 - 100, 4096, [bytes([65 + i]) * 4096 for i in range(3)])    # qemu rounds it up too
open("odd.raw", "wb").write(b"A" * 4096 + b"B" * 4096 + b"C" * 4096)
'
    for i in small extra large small0 large0 odd; do cp $i.raw truth; check_same $i; done
}

t_vdi_chains_are_verified_by_uuid() {
    mkdir s
    py "$vdi_py"'
bs = 4096
base, mid, top = some(60, bs, [0]), some(70, bs, [None, None, 0]), some(70, bs, [None, None, 0])
base += [None] * 10
vdi("base.vdi", 1, 60 * bs, bs, base[:60], own=1, changed=2)
vdi("mid.vdi", 4, 70 * bs, bs, mid, own=3, changed=4, parent=1, parent_changed=2)
def name(n): return "{%s-%s-%s-%s-%s}.vdi" % tuple("%02x" % n * k for k in (4, 2, 2, 2, 6))
vdi("s/" + name(0x33), 3, 70 * bs, bs, mid, own=0x33, changed=4, parent=0x11, parent_changed=2)
vdi("s/top.vdi", 4, 70 * bs, bs, top, own=5, changed=6, parent=0x33, parent_changed=4)
vdi("s/base", 1, 60 * bs, bs, base[:60], own=0x11, changed=2)
vdi("stranger.vdi", 1, 60 * bs, bs, base[:60], own=8, changed=2)
vdi("used.vdi", 1, 60 * bs, bs, base[:60], own=1, changed=9)
vdi("orphan.vdi", 4, 70 * bs, bs, mid, own=3, changed=4)
vdi("odd.vdi", 1, 70 * bs, bs, base, own=3, changed=4, parent=1)
def raw(*l): return b"".join(next((x for x in c if x is not None), 0) or bytes(bs) for c in zip(*l))
open("base.raw", "wb").write(raw(base)[:60 * bs])
open("truth1", "wb").write(raw(mid, base)); open("truth2", "wb").write(raw(top, mid, base))
open("holes", "wb").write(bytes(x is None for x in mid))
'
    refused 1 'does not say where its parent 01010101-0101-0101-0101-010101010101 is; --backing FILE does' "$fx" -q mid.vdi m
    cp truth1 truth
    check_same mid.vdi --backing base.vdi
    expect 1 "$fx" -q --backing stranger.vdi mid.vdi m; grep -q 'is not the parent of mid.vdi' err
    expect 1 "$fx" -q --backing used.vdi mid.vdi m; grep -q 'was changed after mid.vdi was made' err
    check_same mid.vdi --backing stranger.vdi --force-parent
    check_same mid.vdi --backing used.vdi --force-parent
    expect 1 "$fx" -q --backing mid.vdi mid.vdi m; grep -q 'own backing file' err
    # As VirtualBox keeps its snapshots: {UUID}.vdi beside each other; the base is elsewhere, and a link will do.
    cp truth2 truth
    expect 1 "$fx" -q s/top.vdi m; grep -q 'looked for beside it, as {11111111-1111-1111-1111-111111111111}.vdi' err
    mv s/base 's/{11111111-1111-1111-1111-111111111111}.vdi'
    check_same s/top.vdi
    # The parent may be of another format, if the user says so; then nothing can be verified.
    cp truth1 truth
    expect 1 "$fx" -q --backing base.raw --backing-format raw mid.vdi m
    check_same mid.vdi --backing base.raw --backing-format raw --force-parent
    expect 1 "$fx" -q --backing base.vdi orphan.vdi m; grep -q "no parent's UUID.*type (0x4)" err
    expect 1 "$fx" -q odd.vdi m; grep -q "is not a differencing one, of type (0x1)" err
    # Without the parent, what is in it is bad and the rest is there.
    "$fx" -q --no-backing mid.vdi m
    py '
f, raw = os.open("m", os.O_RDONLY), open("truth1", "rb").read()
for i, hole in enumerate(open("holes", "rb").read()):
    try:
        assert os.pread(f, 4096, i * 4096) == raw[i * 4096:][:4096] and not hole, i
    except OSError: assert hole, i
'
    "$fx" --umount m
}

t_vdi_damaged_headers_are_refused() {
    qemu-img create -q -f vdi good 64M; qemu-io -c 'write -P 1 0 3M' good >/dev/null
    local rows='
68 02000100 unknown version 1.2
68 01000000 unknown version 0.1
68 00000200 unknown version 2.0
72 7f010000 the header.s size (0x17f)
76 00000000 the image type (0x0)
76 05000000 the image type (0x5)
340 00000000 place of the block map (0x0)
340 02020000 place of the block map (0x202)
340 00ffffff number of blocks
344 00020000 place of the data, inside the block map (0x200)
344 00000000 place of the data
368 0100000400000000 the disk size, larger than all blocks together (0x4000001)
368 ffffffffffffffff the disk size
376 00000000 the block size (0x0)
376 00011000 the block size (0x100100)
376 00010000 the block size (0x100)
376 00000080 the block size (0x80000000)
380 00002000 extra data per block (0x200000)
380 00030000 extra data per block (0x300)
384 00000080 number of blocks, whose map does not fit
384 ffffffff number of blocks, whose map does not fit
384 3f000000 the disk size
424 01000000 a parent, in an image that is not
76 04000000 no parent'
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        poke bad "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done <<<"$rows"
    head -c 400 good >bad; refused 1 'the file ends in the header (0x190)' "$fx" -q bad m
    head -c 600 good >bad; refused 1 'number of blocks' "$fx" -q bad m
    refused 1 'is not a VDI image' "$fx" -q --format vdi "$top/fuseexp.c" m
    refused 1 'cannot be written by this version' "$fx" -q -w good m
}

t_vdi_damaged_maps_cost_their_block_only() {
    qemu-img create -q -f vdi good 8M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 1M 1M' -c 'write -P 3 7M 1M' good >/dev/null
    qemu-img convert -O raw good truth
    local map; map=$(od -An -tu4 -j340 -N4 good)
    for entry in 03000000 00ffffff fdffffff; do
        poke bad $((map + 4)) $entry
        "$fx" -q bad m
        cmp -n 1048576 m truth; cmp -i 2097152 m truth
        not dd if=m of=/dev/null bs=4k skip=256 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=511 count=1 2>err
        "$fx" --umount m
    done
    poke bad $((map + 4)) feffffff; "$fx" -q bad m                          # discarded: zeros
    cmp -n 1048576 -i 1048576:0 m /dev/zero; "$fx" --umount m
    # Truncated in the last block: what is there reads, the rest is an error and not zeros.
    cp good bad; truncate -s -300000 bad
    "$fx" -q bad m; cmp -n $((8388608 - 303104)) m truth
    not dd if=m of=/dev/null bs=4k skip=2047 count=1 2>err; grep -q 'Input/output' err
    not cp m copy 2>err
    "$fx" --umount m
}

t_vdi_random_damage_is_survived() {
    py "$vdi_py"'b = some(250, 4096, [None, 0]); vdi("good", 4, 250 * 4096, 4096, b, parent=7); open("truth", "wb").write(b"".join(x or bytes(4096) for x in b))'
    fuzz vdi 5000 good truth 0 512 1000000                                  # the header: anything but a crash
    fuzz vdi 5000 good truth 512 1512 1                                     # one entry, one block
}

# ---- QED -------------------------------------------------------------------------------------------------------

t_qed_variants_read_back() {
    local n=0 o
    for o in cluster_size=4k,table_size=2 cluster_size=4k,table_size=16 cluster_size=8k,table_size=2 cluster_size=64k,table_size=4 \
        cluster_size=1M,table_size=8 cluster_size=4M,table_size=2; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f qed -o $o img 12345k
        scribble img $n
        qemu-img convert -O raw img truth
        check_same img
    done
    qemu-img convert -O qed truth img; check_same img
}

# Sizes that the specification allows and qemu-img cannot make: tables of one cluster, clusters of 64 MiB.
t_qed_from_the_specification_reads_back() {
    py '
import struct
# Header: magic, cluster size, table size and header size in clusters, 3 u64 of features, L1, disk size, 2 u32 name
def qed(name, bits, size, header):
    cl, rnd = 1 << bits, random.Random(bits)
    n = cl // 8; l2s = -(-size // (cl * n)); at = header + 1
    f = open(name, "wb"); raw = open(name + ".raw", "wb"); raw.truncate(size)
    def put(cluster, index, value): f.seek(cluster * cl + index * 8); f.write(struct.pack("<Q", value))
    f.write(struct.pack("<4sIIIQQQQQII", b"QED", cl, 1, header, 0, 0, 0, header * cl, size, 0, 0))
    for t in range(l2s):
        if rnd.random() < .2: continue
        l2 = at; at += 1
        put(header, t, l2 * cl)
        for i in range(min(n, -(-(size - t * n * cl) // cl))):
            kind = rnd.randrange(4)
            if kind == 0: put(l2, i, 1)
            if kind > 1:
                data = rnd.randbytes(min(cl, 5000)); off = (t * n + i) * cl
                put(l2, i, at * cl); f.seek(at * cl); f.write(data); at += 1
                raw.seek(off); raw.write(data[:size - off])
    f.truncate(at * cl)
qed("small", 12, 12345 * 512, 3)
qed("big", 26, 3 * (64 << 20) + 512, 1)
'
    cp small.raw truth; check_same small
    mv big.raw truth; check_same big
}

t_qed_backing_files_and_their_formats() {
    random base.raw 1000; qemu-img convert -O qcow2 base.raw base.qcow2
    qemu-img create -q -f qed -b base.raw -F raw img 6M; scribble img 1
    qemu-img convert -O raw img truth
    check_same img
    # The guest writes a header into its raw disk: it stays raw.
    qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil 400k
    dd if=evil of=base.raw conv=notrunc status=none
    qemu-img convert -O raw img truth
    check_same img
    # Of any other backing file QED does not say the format, and nobody guesses.
    qemu-img create -q -f qed -o cluster_size=4k -b base.qcow2 -F qcow2 img 6M; scribble img 2
    qemu-img convert -O raw img truth
    refused 1 'does not say which format.*--backing-format' "$fx" -q img m
    check_same img --backing-format qcow2
    qemu-img create -q -f qcow2 -b img -F qed top; scribble top 3
    qemu-img convert -O raw top truth
    check_same top --backing-format qcow2
    mkdir d; qemu-img create -q -f qed -u -b ../base.qcow2 -F raw d/img 400k
    expect 1 "$fx" -q d/img m; grep -q 'allow-external' err
    "$fx" --no-backing d/img m 2>err; grep -q "without its backing file '../base.qcow2'" err
    not cat m 2>err >none; grep -q 'Input/output' err
    "$fx" --umount m
}

t_qed_damaged_headers_are_refused() {
    random base 200; qemu-img create -q -f qed -b base -F raw good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null
    local rows='
4 00080000 the cluster size (0x800)
4 00000008 the cluster size (0x8000000)
4 01000100 the cluster size
8 00000000 the table size (0x0)
8 03000000 the table size (0x3)
8 20000000 the table size (0x20)
12 00000000 the header.s size (0x0)
12 ffffffff place of the L1 table
16 0d00000000000000 unknown QED feature (bit 3)
16 0500000000000080 unknown QED feature (bit 63)
40 0000000000000000 place of the L1 table (0x0)
40 0002010000000000 place of the L1 table (0x10200)
40 0000000001000000 place of the L1 table
48 01000004 the size (0x4000001)
48 00ffffffffffffff the size
48 0000000000004000 more than the tables can hold (0x40000000000000)
56 feff0000 place of the backing file
56 ffffffff place of the backing file
60 00000000 length of the backing file
60 00040000 length of the backing file.s name (0x400)
60 06000000 a zero in the backing file'
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        poke bad "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done <<<"$rows"
    head -c 63 good >bad; refused 1 'is not a QED image' "$fx" -q --format qed bad m
    head -c 65000 good >bad; refused 1 'place of the L1' "$fx" -q bad m
    refused 1 'cannot be written by this version' "$fx" -q -w good m
}

t_qed_marked_dirty_is_read_with_a_note() {
    qemu-img create -q -f qed good 64M; qemu-io -c 'write -P 1 0 1M' good >/dev/null; qemu-img convert -O raw good truth
    poke bad 16 02 24 ff 32 ff                  # compatible and autoclear features do not matter
    cp bad copy
    check_same bad
    "$fx" bad m 2>err; grep -q 'is marked dirty' err; "$fx" --umount m
    cmp bad copy
}

t_qed_damaged_tables_cost_their_range_only() {
    qemu-img create -q -f qed -o cluster_size=4k,table_size=2 good 64M
    qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 32M 1M' -c 'write -z 40M 64k' good >/dev/null
    qemu-img convert -O raw good truth
    check_same good
    local l1 l2
    l1=$(od -An -tu8 -j40 -N8 good | tr -d ' '); l2=$(od -An -tu8 -j"$l1" -N8 good | tr -d ' ')
    # not aligned, past the end, in the header, all bits; a table of 1024 entries covers 4 MiB
    for row in "$l1 0102000000000000" "$l1 0000000001000000" "$l1 01" "$l1 ffffffffffffffff" \
        "$l2 0102000000000000" "$l2 0000000001000000" "$l2 0200000000000000" "$l2 ffffffffffffffff"; do
        # shellcheck disable=SC2086
        poke bad $row
        "$fx" -q bad m
        not dd if=m of=/dev/null bs=4k count=1 2>err; grep -q 'Input/output' err
        cmp -i 4194304 m truth
        [ "${row%% *}" = "$l1" ] || cmp -i 4096 m truth
        "$fx" --umount m
    done
    cp good bad; truncate -s $(($(stat -c %s good) - 300000)) bad
    "$fx" -q bad m
    cmp -n 33554432 m truth
    not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_qed_of_absurd_size_costs_nothing() {
    qemu-img create -q -f qed -o cluster_size=1M,table_size=16 img 4P
    "$fx" -q img m
    same "$(stat -c %s m)" $((4 << 50))
    same "$(dd if=m bs=4k skip=$((1 << 39)) count=1 status=none | tr -d '\0' | wc -c)" 0
    [ "$(awk '/VmHWM/ { print $2 }' "/proc/$(server_of)/status")" -lt 8000 ]
    "$fx" --umount m
}

t_qed_random_damage_is_survived() {
    qemu-img create -q -f qed -o cluster_size=8k,table_size=2 good 1M; scribble good 5
    qemu-img convert -f qed -O raw good truth
    local l1 l2; l1=$(($(od -An -tu8 --endian=little -j40 -N8 good))); l2=$(($(od -An -tu8 --endian=little -j$l1 -N8 good)))
    fuzz qed 4000 good truth 0 64 1000000
    fuzz qed 2000 good truth $l1 $((l1 + 8)) 1000000
    fuzz qed 4000 good truth $l2 $((l2 + 1024)) 2
}

# ---- Parallels -------------------------------------------------------------------------------------------------

# Rewrites an image with the magic "...Ext" (BAT in clusters) as one without (BAT in sectors). FILE NEW
prl_old() {
    py '
import struct
d = bytearray(open(sys.argv[1], "rb").read())
tracks, n = struct.unpack_from("<II", d, 28)
d[:16] = b"WithoutFreeSpace"
for i in range(n): struct.pack_into("<I", d, 64 + 4 * i, struct.unpack_from("<I", d, 64 + 4 * i)[0] * tracks)
open(sys.argv[2], "wb").write(d)
' "$@"
}

t_parallels_variants_read_back() {
    local n=0 c
    for c in 32256 4k 64k 258048 1M 16M; do
        n=$((n + 1))
        rm -f img
        qemu-img create -q -f parallels -o cluster_size=$c img 12345k
        scribble img $n
        qemu-img convert -f parallels -O raw img truth
        check_same img
        prl_old img old
        qemu-img convert -f parallels -O raw old copy; cmp copy truth
        check_same old
    done
    # The size field has 4 bytes without "Ext"; a data offset of 0 is anywhere behind the BAT.
    cp old good; poke bad 40 01000000 48 00000000
    check_same bad
    qemu-img create -q -f parallels img 6T
    "$fx" -q img m; same "$(stat -c %s m)" $((6 << 40)); "$fx" --umount m
}

# A bundle of two storages and a snapshot, its images made by qemu, and ./truth, ./truth-base by qemu-img map.
prl_bundle() {
    local k f i size
    mkdir d.hdd
    for k in 0 1; do
        size=$((k ? 5123 : 6000))k
        for f in base top; do
            qemu-img create -q -f parallels -o cluster_size=$((k * ${#f} == 4 ? 252 : 64))k d.hdd/$k.$f.hds $size
            [ $f = top ] || scribble d.hdd/$k.$f.hds 3$k
            [ $f = base ] || for i in 1 4 5 13 33 40 41 60; do echo "write -P $((i + k)) $((i * 70))k 50k"; done |
                qemu-io -f parallels d.hdd/$k.$f.hds >/dev/null
            qemu-img convert -f parallels -O raw d.hdd/$k.$f.hds $k.$f.raw
        done
        qemu-img map --output=json -f parallels d.hdd/$k.top.hds >$k.map
        prl_old d.hdd/$k.base.hds old; mv old d.hdd/$k.base.hds
    done
    cat 0.base.raw 1.base.raw >truth-base
    py '
import json
with open("truth", "wb") as out:
    for k in "01":
        base, top = bytearray(open(k + ".base.raw", "rb").read()), open(k + ".top.raw", "rb").read()
        holes = [e for e in json.load(open(k + ".map")) if not e["present"]]
        assert sum(any(base[e["start"]:e["start"] + e["length"]]) for e in holes) > 4
        for e in json.load(open(k + ".map")):
            if e["present"]: base[e["start"]:e["start"] + e["length"]] = top[e["start"]:e["start"] + e["length"]]
        out.write(base)
'
    prl_descriptor >d.hdd/DiskDescriptor.xml
}
prl_base='{5fbaabe3-6958-40ff-92a7-860e329aab41}'
prl_top='{12345678-9ABC-def1-2345-6789abcdef12}'
prl_descriptor() {
    local top_guid="<TopGUID>$prl_top</TopGUID>"
    cat <<END
<?xml version='1.0' encoding='UTF-8'?>
<!-- a <comment> -->
<Parallels_disk_image Version="1.0">
    <Disk_Parameters><Disk_size>22246</Disk_size><Padding>0</Padding><Other a='>'/>
        <Encryption><Engine>{00000000-0000-0000-0000-000000000000}</Engine><Data></Data></Encryption></Disk_Parameters>
    <StorageData>
        <Storage><Start>12000</Start><End>22246</End><Blocksize>128</Blocksize>
            <Image><GUID>$prl_top</GUID><Type>Compressed</Type><File>1.top.hds</File></Image>
            <Image><GUID>$prl_base</GUID><Type>Compressed</Type><File>1.base.hds</File></Image></Storage>
        <Storage><Start>0</Start><End>12000</End><Blocksize>128</Blocksize>
            <Image><GUID>$prl_base</GUID><Type>${1:-Compressed}</Type><File>${2:-0.base.hds}</File></Image>
            <Image><GUID>$prl_top</GUID><Type>Compressed</Type><File>0.top.hds</File></Image></Storage>
    </StorageData>
    <Snapshots>${3-$top_guid}
        <Shot><GUID>$prl_base</GUID><ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>
        <Shot><GUID>$prl_top</GUID><ParentGUID>$prl_base</ParentGUID></Shot>
    </Snapshots>
</Parallels_disk_image>
END
}

t_parallels_bundles_show_the_current_snapshot() {
    prl_bundle
    check_same d.hdd
    check_same d.hdd/
    check_same d.hdd/DiskDescriptor.xml
    cp truth current; cp truth-base truth
    check_same d.hdd --snapshot $prl_base
    prl_descriptor Compressed 0.base.hds '' >d.hdd/DiskDescriptor.xml           # then that GUID is the current state's name
    check_same d.hdd
    cp current truth; check_same d.hdd --snapshot 12345678-9abc-DEF1-2345-6789abcdef12
    refused 1 "has no snapshot 'first' (it has 2)" "$fx" -q --snapshot first d.hdd m
    refused 1 'has no snapshots, so --snapshot' "$fx" -q --snapshot first d.hdd/1.top.hds m
    # A root that is a plain file, in a folder below, with a name that XML has to quote.
    mkdir 'd.hdd/R&D'; cp 0.base.raw 'd.hdd/R&D/<0>'
    prl_descriptor Plain 'R&amp;D/&lt;0&gt;' >d.hdd/DiskDescriptor.xml
    check_same d.hdd
    truncate -s 1M 'd.hdd/R&D/<0>'
    "$fx" -q d.hdd m; cmp -i 6144000 m truth; not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
    "$fx" d.hdd/1.top.hds m 2>err; grep -q 'shown alone; its folder' err; "$fx" --umount m
    random big 4; qemu-img create -q -f qcow2 -u -b d.hdd/DiskDescriptor.xml -F parallels over 11123k
    prl_descriptor >d.hdd/DiskDescriptor.xml; check_same over
}

t_parallels_bundles_that_make_no_sense_are_refused() {
    prl_bundle
    mkdir e f; : >f/x; : >out
    refused 1 'e: is a directory, not a disk image' "$fx" -q e m
    refused 1 'f: is a directory, not a disk image' "$fx" -q f m
    local descriptor=d.hdd/DiskDescriptor.xml
    edited() { prl_descriptor | sed "$1" >$descriptor; cmp -s $descriptor <(prl_descriptor) && fail "$1"; refused 1 "$2" "$fx" -q d.hdd m; }
    edited 's/0.base.hds/..\/out/' 'leads out of its folder; --allow-external DIR'
    edited 's/0.base.hds/\/etc\/passwd/' 'outside of its folder; --allow-external DIR'
    edited 's/0.base.hds/http:x/' 'not a plain file name$'
    edited 's/0.base.hds/absent/' "cannot open its image file 'absent': No such file or directory$"
    edited 's/0.base.hds/DiskDescriptor.xml/' 'is not a Parallels image'
    edited 's/0.top.hds/1.top.hds/' 'the size, smaller than its storage'
    edited 's/0.base.hds/\&file;/' "a file's name ('&file;')"
    edited 's/0.base.hds//' "a file's name ('')"
    edited '/0.base.hds/s/Compressed/Expanding/' "unknown type of an image ('Expanding')"
    edited '/0.base.hds/s/<Type>Compressed<.Type>//' 'there twice, or lacks a part'
    edited '/0.base.hds/s/<GUID>.*<.GUID>//' 'a storage has no image of snapshot'
    edited 's/<Image>.*0.top.hds.*Image>//' "a storage has no image of snapshot ('123456789abcdef123456789abcdef12')"
    edited '/1.top.hds/s/GUID>.*<.GUID/GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}<\/GUID/' 'a storage has no image of snapshot'
    edited '/1.base.hds/s/GUID>.*<.GUID/GUID>{12345678-9ABC-def1-2345-6789abcdef12}<\/GUID/' 'there twice'
    edited 's/<Start>12000/<Start>12001/' 'no storage begins at sector 12000'
    edited 's/<Start>12000/<Start>11999/' 'no storage begins at sector 12000'
    edited 's/<End>12000/<End>0/' 'no storage begins at sector 0'
    edited 's/<End>12000/<End>-1/' "a number of sectors ('-1')"
    edited 's/<End>12000/<End>12000<!-- 1 -->/' 'a number of sectors'
    edited 's/<End>12000/<End>99999999999999999999/' 'a number of sectors'
    edited 's/<End>22246/<End>22245/' 'a disk of 22246 sectors, and storages of 22245'
    edited 's/<End>22246/<End>22247/' 'the size, smaller than its storage'
    edited 's/<Disk_size>.*size>//' 'a disk of 0 sectors'
    edited 's/<Padding>0/<Padding>1/' 'disks with padding'
    edited 's/<Engine>{0/<Engine>{5/' 'is encrypted (by {5'
    edited 's/<TopGUID>{1/<TopGUID>{9/' "no snapshot, or not all of it, for this GUID ('9"
    edited 's/<TopGUID>{1/<TopGUID>{x/' 'a GUID'
    edited 's/<ParentGUID>{0/<ParentGUID>{7/' "no snapshot, or not all of it, for this GUID ('7"
    edited 's/<ParentGUID>{0.*}/<ParentGUID>{12345678-9abc-def1-2345-6789abcdef12}/' 'in a circle'
    edited 's/<ParentGUID>{0.*0}<.ParentGUID>//' 'not all of it'
    edited 's/Version="1.0"/Version="1.0/' 'not a tag'
    edited 's/<.Storage>/<\/Stor>/' 'the wrong element ends'
    edited 's/<.Parallels_disk_image>//' "ends within an element ('/Parallels_disk_image')"
    edited 's/<!--.*/<!DOCTYPE x [<!ENTITY y "z">]>/' 'declarations are not supported'
    edited 's/<!--.*/<!--/' 'has no end'
    edited 's/<Other.*/<Other>\x0<\/Other>/' 'is not in UTF-8'
    prl_descriptor | sed '/Storage/d;/Image>/d' >$descriptor; refused 1 'has no storages' "$fx" -q d.hdd m
    prl_descriptor | sed "s/$prl_base/{00112233-4455-6677-8899-aabbccddeeff}/;s/<TopGUID>.*TopGUID>//" >$descriptor
    refused 1 'does not say which of its 2 snapshots is the current one' "$fx" -q d.hdd m
    prl_descriptor Compressed 0.base.hds | sed '/0.top.hds/s/Compressed/Plain/' >$descriptor
    refused 1 'a plain file but has a parent' "$fx" -q d.hdd m
    { prl_descriptor; head -c 1M /dev/zero | tr '\0' ' '; } >$descriptor; refused 1 'too large for a DiskDescriptor.xml' "$fx" -q d.hdd m
    { prl_descriptor | head -n 3; yes '<a>' | head -n 1000; } >$descriptor; refused 1 'nested too deeply' "$fx" -q d.hdd m
    { prl_descriptor | head -n 3; echo '<Snapshots>'; yes '<Shot/>' | head -n 9999; } >$descriptor; refused 1 'too many of an element' "$fx" -q d.hdd m
    ln -sf /etc/passwd $descriptor; refused 1 'DiskDescriptor.xml: leads out of its folder' "$fx" -q d.hdd m
}

t_parallels_damaged_headers_are_refused() {
    qemu-img create -q -f parallels -o cluster_size=64k good 64M; qemu-io -f parallels -c 'write -P 1 0 1M' good >/dev/null
    local rows='
16 01000000 unknown version 1
16 03000000 unknown version 3
28 00000000 the cluster size (0x0)
28 ffffff7f the cluster size (0x7fffffff)
32 00000010 number of clusters, whose table does not fit into the file (0x10000000)
32 ffffffff number of clusters
32 ff030000 the size, larger than all clusters together (0x20000)
36 0100020000000000 the size, larger than all clusters together (0x20001)
36 0000020001000000 the size, larger than all clusters together (0x100020000)
36 ffffffffffffffff the size, larger'
    while read -r offset hex pattern; do
        [ -n "$offset" ] || continue
        poke bad "$offset" "$hex"
        refused 1 "$pattern" "$fx" -q bad m
    done <<<"$rows"
    head -c 63 good >bad; refused 1 'is not a Parallels image' "$fx" -q --format parallels bad m
    head -c 2000 good >bad; refused 1 'number of clusters' "$fx" -q bad m
    refused 1 'cannot be written by this version' "$fx" -q -w good m
}

t_parallels_in_use_is_read_with_a_note() {
    qemu-img create -q -f parallels good 64M; qemu-io -f parallels -c 'write -P 1 0 1M' good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    poke bad 44 596e6f74 56 ffffff                  # the format extension does not matter
    cp bad copy
    check_same bad
    "$fx" bad m 2>err; grep -q 'is marked as in use' err; "$fx" --umount m
    cmp bad copy
}

t_parallels_damaged_bats_cost_their_cluster_only() {
    qemu-img create -q -f parallels -o cluster_size=64k good 8M
    qemu-io -f parallels -c 'write -P 1 0 1M' -c 'write -P 2 6M 1M' good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    prl_old good old
    for row in 'good ffffff00' 'good ffffffff' 'old 00ffff00' 'old 01000000' 'old 7f000000' 'old 81000000' 'old ffffffff'; do
        [ "${row% *}" = good ] || cp old good
        poke bad 68 "${row#* }"
        "$fx" -q bad m
        cmp -n 65536 m truth; cmp -i 131072 m truth
        not dd if=m of=/dev/null bs=4k skip=16 count=1 2>err; grep -q 'Input/output' err
        not dd if=m of=/dev/null bs=4k skip=31 count=1 2>err
        "$fx" --umount m
    done
    cp old bad; truncate -s -300000 bad
    "$fx" -q bad m
    cmp -n $((6 << 20)) m truth; cmp -i $((7 << 20)) m truth
    not cmp m truth 2>err; grep -q 'Input/output' err
    "$fx" --umount m
}

t_parallels_random_damage_is_survived() {
    qemu-img create -q -f parallels -o cluster_size=4k good 1M
    py 'for i in range(150): print("write -P %d %d 4096" % (i % 256, i * 37 % 256 * 4096))' | qemu-io -f parallels good >/dev/null
    qemu-img convert -f parallels -O raw good truth
    fuzz parallels 4000 good truth 0 64 1000000
    fuzz parallels 4000 good truth 64 1088 1
    # The descriptor: no byte of it is trusted either.
    qemu-img create -q -f parallels a.hds 6000k
    prl_descriptor | sed 's/[01]\.[a-z]*\.hds/a.hds/;s/22246/22000/' >good
    "$fx" -q good m; "$fx" --umount m
    fuzz parallels 2000 good truth 0 "$(stat -c %s good)" 1000000
}

t_neighbours_are_read_at_once_in_every_block_format() {
    local o reads
    random raw 4096
    for o in vdi,static=on qed,cluster_size=4k parallels,cluster_size=4k; do
        qemu-img convert -f raw -O ${o%,*} -o ${o#*,} raw img
        "$fx" -q --no-passthrough --format ${o%,*} img m
        strace -f -o log -e trace=preadv2,pread64 -p "$(server_of)" 2>strace.err & local s=$!
        wait_for grep -q attached strace.err
        dd if=m bs=512k iflag=direct status=none | cmp - raw
        kill $s; wait $s || true
        reads=$(grep -c pread log)
        [ "$reads" -le 64 ] || fail "$reads reads for 32 requests of $o"
        "$fx" --umount m
    done
}

t_corpus_parallels_images_are_right() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0
    while IFS=$'\t' read -r path format _ size sum _ expected _; do
        [ "$format" = parallels ] && [ "$expected" = ok ] || continue
        "$fx" -q "c/$path" m
        same "$(stat -c %s m)" "$size"
        [ "$size" -gt 999999999 ] || same "$(sha256sum <m | cut -d' ' -f1)" "$sum"
        "$fx" --umount m
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 5 ] || fail "only $n"
}

# ---- --info, --map, --check ------------------------------------------------------------------------------------

# same_json FILE FILE: the same values, whatever their order
same_json() { diff <(jq -S . "$1") <(jq -S . "$2") || fail "$1 and $2 differ"; }

# as_qemu_info IMAGE, as_qemu_map IMAGE: our JSON is qemu-img's
as_qemu_info() { "$fx" -q --info --json "$1" >ours.json; qemu-img info --output=json "$1" >theirs.json; same_json ours.json theirs.json; }
as_qemu_map() { "$fx" -q --map --json "$1" >ours.json; qemu-img map --output=json "$1" >theirs.json; same_json ours.json theirs.json; }

t_info_says_what_qemu_img_says() {
    local o
    for o in compat=0.10 cluster_size=512 refcount_bits=64,lazy_refcounts=on compression_type=zstd extended_l2=on data_file=ext.raw \
        data_file=raw.raw,data_file_raw=on; do
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 3M; as_qemu_info img
    done
    qemu-img create -q -f qcow2 img 3M
    qemu-img bitmap --add -g 64k img first; qemu-img bitmap --add --disable img 'a "name"'
    qemu-img snapshot -c 'before \ "update"' img; qemu-img snapshot -c two img
    as_qemu_info img
    printf '\001' | dd of=img bs=1 seek=79 conv=notrunc status=none; as_qemu_info img
    same "$("$fx" -q --info --json img | jq '."dirty-flag"')" true
    mkdir sub; truncate -s 5M sub/base
    qemu-img create -q -f qcow2 -b base -F raw sub/mid; qemu-img create -q -f qcow2 -b sub/mid -F qcow2 top
    as_qemu_info sub/mid; as_qemu_info top; as_qemu_info "$PWD/sub/mid"; as_qemu_info sub/base
    qemu-img create -q -f qcow2 -u -b nbd://host/x -F raw url 1M; as_qemu_info url
}

t_info_needs_no_backing_file() {
    qemu-img create -q -f qcow2 -u -b gone -F raw img 1M
    "$fx" --info --json img >ours.json 2>err
    same "$(cat err)" ""
    same "$(jq -r '."full-backing-filename"' ours.json)" gone
    "$fx" --info img | grep -q '^backing filename: *gone$'
    "$fx" --check img >/dev/null 2>err
    same "$(cat err)" ""
    refused 1 "cannot open its backing file 'gone'" "$fx" --map img
}

t_info_of_raw_and_split_images() {
    random img 10
    same "$("$fx" -q --info --json img | jq -c '[.filename, .format, ."virtual-size", ."dirty-flag"]')" '["img","raw",40960,false]'
    split -b 10000 -d -a 3 img s.
    same "$("$fx" -q --info --json s.000 | jq -c '[."virtual-size", .files]')" '[40960,5]'
    same "$("$fx" -q --map --json s.000 | jq -c '[.[] | [.start, .length, .offset, .filename]]')" \
        '[[0,10000,0,"s.000"],[10000,10000,0,"s.001"],[20000,10000,0,"s.002"],[30000,10000,0,"s.003"],[40000,960,0,"s.004"]]'
    same "$("$fx" -q --info --json --no-parts s.000 | jq '."virtual-size"')" 10000
}

t_map_says_what_qemu_img_says() {
    local n=0 o
    for o in compat=0.10 cluster_size=512 cluster_size=4k refcount_bits=1 compression_type=zstd extended_l2=on \
        extended_l2=on,cluster_size=16k preallocation=falloc data_file=ext.raw extended_l2=on,data_file=ext2.raw; do
        n=$((n + 1))
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 6M
        scribble img $n; scribble img $((n + 100)) "$(qemu-img info --output=json img | jq '."cluster-size"')"
        as_qemu_map img
    done
}

t_map_of_chains_and_sparse_files_is_qemu_imgs() {
    truncate -s 5M base; random data 16
    for i in 3 100 900; do dd if=data of=base bs=4k seek=$i conv=notrunc status=none; done
    "$fx" -q --map --json base >ours.json; qemu-img map -f raw --output=json base >theirs.json; same_json ours.json theirs.json
    qemu-img create -q -f qcow2 -b base -F raw mid 8M; scribble mid 1
    qemu-img create -q -f qcow2 -o cluster_size=4k -b mid -F qcow2 top 10M; scribble top 2 4096
    qemu-img create -q -f qcow2 -b top -F qcow2 shrunk 3M
    for i in mid top shrunk; do as_qemu_map $i; done
}

t_map_for_people_lists_data_and_marks_what_cannot_be_read() {
    qemu-img create -q -f qcow2 img 4M; qemu-io -c 'write 0 128k' -c 'write 1M 64k' img >/dev/null
    "$fx" --map img >ours; qemu-img map img >theirs; cmp ours theirs
    qemu-io -c 'write -c 2M 64k' img >/dev/null
    "$fx" --map img | grep -q '^0x200000 *0x10000 *compressed *img$'
    local l1 l2
    l1=$(od -An -tu8 --endian=big -j40 -N8 img); l2=$(($(od -An -tu8 --endian=big -j$((l1)) -N8 img) & 0xffffffffffff))
    printf '\200\0\100\0\0\0\0\0' | dd of=img bs=1 seek=$((l2 + 8)) conv=notrunc status=none     # the second cluster
    "$fx" --map img | grep -q '^0x10000 *0x10000 *UNREADABLE *its cluster lies past the end of the file$'
    "$fx" --map --json img >ours.json
    same "$(jq -c '.[1] | [.start, .length, .data, .zero, .present, .offset, .error]' ours.json)" \
        '[65536,65536,true,false,true,null,"its cluster lies past the end of the file"]'
    qemu-img create -q -f qcow2 -u -b gone -F raw over 1M
    same "$("$fx" -q --map --json --no-backing over | jq -c 'map(.error)')" '["in the backing file, which was not opened"]'
}

t_json_is_valid_whatever_names_are_in_the_image() {
    qemu-img create -q -f qcow2 good 1M; qemu-img snapshot -c 123456789012 good
    py '
d = open("good", "rb").read()
at = d.index(b"123456789012")
rnd = random.Random(3)
for i in range(40):
    name = bytes(rnd.choice([1, 10, 31, 34, 47, 65, 92, 127, 128, 155, 192, 194, 195, 224, 237, 240, 244, 255, 191, 160]) for j in range(12))
    open("img%d" % i, "wb").write(d[:at] + name + d[at + 12:])'
    for i in $(seq 0 39); do
        "$fx" --info --json "img$i" >ours.json
        python3 -c 'import json; assert len(json.loads(open("ours.json", "rb").read().decode("utf-8"))["snapshots"]) == 1'
        not grep -q "$(printf '[\001-\011\013-\037\177]')" <("$fx" --info "img$i")
    done
}

t_nothing_is_said_by_halves() {
    random img 10
    for i in --info --map; do
        refused 1 'No such file' "$fx" $i --json gone
        same "$("$fx" $i --json gone 2>/dev/null | wc -c)" 0
        expect 1 "$fx" $i --json -q img >/dev/full; grep -q 'cannot write to standard output' err
        expect 1 "$fx" $i -q img >/dev/full
        refused 2 'take an IMAGE' "$fx" $i
        refused 2 'is for mounting' "$fx" $i -w img
        refused 2 'is for mounting' "$fx" $i --partition 1 img
        refused 2 'is for mounting' "$fx" $i img -- true
    done
    refused 2 'at a time' "$fx" --info --map img
    refused 2 'goes with' "$fx" --json img m
    qemu-img create -q -f qcow2 q 1M; py '
import struct
f = open("q", "r+b"); f.seek(60); f.write(struct.pack(">IQ", 3, 1 << 40))'
    expect 1 "$fx" --info --json q >ours.json; grep -q 'snapshot table reaches past the end' err
    same "$(jq -c .snapshots ours.json)" '[]'
}

# as_qemu_check IMAGE: the same document and the same exit status as qemu-img check
as_qemu_check() {
    local want=0 got=0
    qemu-img check -f qcow2 --output=json "$1" >theirs.json 2>theirs.err || want=$?
    "$fx" --check --json "$1" >ours.json 2>err || got=$?
    [ "$got" = "$want" ] || { cat err theirs.err >&2; fail "exit status $got instead of $want"; }
    same_json ours.json theirs.json
    same "$(grep -c Sanitizer err)" 0
}

# table_of IMAGE: L1 table, first L2 table, first data cluster, first refcount block: places in the file
table_of() {
    py '
import struct
d = open(sys.argv[1], "rb").read()
be = lambda at: struct.unpack(">Q", d[at:at + 8])[0] & 0xfffffffffffe00
l1 = be(40)
print(l1, be(l1), be(be(l1)), be(be(48)))' "$1"
}

t_check_of_good_images_is_qemu_imgs() {
    local n=0 o
    for o in compat=0.10 cluster_size=512 cluster_size=4k cluster_size=2M refcount_bits=1 refcount_bits=2,cluster_size=4k \
        refcount_bits=4 refcount_bits=8 refcount_bits=32 refcount_bits=64,lazy_refcounts=on extended_l2=on,cluster_size=16k \
        compression_type=zstd data_file=ext.raw; do
        n=$((n + 1))
        rm -f img; qemu-img create -q -f qcow2 -o "$o" img 2M
        scribble img $n
        case $o in *data_file*) ;; *) scribble img $((n + 100)) "$(qemu-img info --output=json img | jq '."cluster-size"')" ;; esac
        case $o in *data_file* | refcount_bits=1) ;; *) qemu-img snapshot -c one img; qemu-io -c 'write -P 9 1M 900k' img >io.log; qemu-img snapshot -c two img ;; esac
        case $o in *0.10*) ;; *) qemu-img bitmap --add img b0; qemu-io -c 'write 1M 1M' img >io.log ;; esac
        as_qemu_check img
        same "$(jq -c '[."check-errors", .corruptions, .leaks]' ours.json)" '[0,null,null]'
        same "$(cat err)" ""
    done
}

t_check_counts_damage_as_qemu_img_does() {
    local bits cluster l1 l2 data block w
    while read -r bits cluster; do
        qemu-img create -q -f qcow2 -o "refcount_bits=$bits,cluster_size=$cluster" good 2M
        qemu-io -c "write 0 $((16 * cluster))" -c "write -c $((20 * cluster)) $cluster" good >io.log
        read -r l1 l2 data block < <(table_of good)
        w=$(printf '%016x' $((data + cluster)))
        for row in "$block 0000000000000000" "$block ffffffffffffffff" "$((block + 24)) 0101010101010101" \
            "$((l2 + 24)) 80${w:2}" "$((l2 + 24)) 00${w:2}" "$((l2 + 24)) 8000004000000000" "$((l2 + 24)) 8000000000000200" \
            "$((l2 + 24)) 0000000000000000" "$((l2 + 24)) 8000000000010010" "$l2 40ffffffffffffff" \
            "$l1 0000000000000000" "$l1 8000004000000000" "$l1 00$(printf "%014x" "$l2")" "$l1 81$(printf "%014x" "$l2")" \
            "$l1 80$(printf '%014x' $((l2 + 512)))" "$l1 80$(printf '%014x' $((data)))" \
            "56 00000000" "60 00000001" "$((l1 + 8)) 80$(printf "%014x" "$l2")"; do
            # shellcheck disable=SC2086
            poke img $row
            as_qemu_check img
        done
    done < <(printf '%s\n' '1 512' '4 65536' '16 512' '16 65536' '64 4096')
}

t_check_of_random_damage_is_qemu_imgs() {
    py '
import subprocess, struct, json
rnd = random.Random(4)
M = 0xfffffffffffe00
def run(*a): return subprocess.run(a, capture_output=True, timeout=60)
for i in range(80):
    o, es = [("cluster_size=4k", 8), ("compat=0.10", 8), ("refcount_bits=4,cluster_size=1k", 8), ("extended_l2=on,cluster_size=16k", 16)][i % 4]
    if i < 4:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "good%d" % i, "4M")
        for j in range(40):
            at = rnd.randrange(60) << 16
            run("qemu-io", "-c", "%s %d 65536" % (rnd.choice(["write", "write", "write -z", "discard"]), at), "good%d" % i) if j % 2 else \
                run("qemu-io", "-c", "write -c %d %d" % (at, 16384 if es == 16 else 4096), "good%d" % i)
            if j == 20: run("qemu-img", "snapshot", "-c", "one", "good%d" % i)
    d = bytearray(open("good%d" % (i % 4), "rb").read())
    be = lambda at: struct.unpack(">Q", d[at:at + 8])[0]
    cs = 1 << struct.unpack(">I", d[20:24])[0]
    l2s = [be(be(40) + 8 * j) & M for j in range(struct.unpack(">I", d[36:40])[0]) if be(be(40) + 8 * j) & M]
    for j in range(rnd.randrange(1, 4)):
        l2 = rnd.choice(l2s)
        at = rnd.choice([l2 + es * rnd.randrange(min(cs // es, 64)), be(be(48)) + 8 * rnd.randrange(cs // 64), be(40) + 8 * rnd.randrange(len(l2s))])
        old = be(at)
        new = rnd.choice([old ^ 1 << rnd.randrange(1, 64), 0, be(rnd.choice(l2s) + es * rnd.randrange(cs // es)), old & ~M | rnd.randrange(1 << 30) & -cs])
        d[at:at + 8] = struct.pack(">Q", new)
    open("img", "wb").write(d)
    a, b = run(sys.argv[1], "--check", "--json", "img"), run("qemu-img", "check", "-f", "qcow2", "--output=json", "img")
    assert b"Sanitizer" not in a.stderr, a.stderr
    assert (a.returncode, a.stdout and json.loads(a.stdout)) == (b.returncode, b.stdout and json.loads(b.stdout)), (i, a, b)
' "$build/fuseexp-asan"
}

t_check_says_where_the_damage_is() {
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    local l1 l2 data block
    read -r l1 l2 data block < <(table_of good)
    poke img $((l2 + 24)) "80$(printf '%014x' $((data + 65536)))"           # the fourth is the second
    expect 2 "$fx" --check img >ours
    grep -q "corrupt: host 0x60000, 1 cluster: refcount 1, but used 2 times" err
    grep -q "corrupt: host 0x60000 is used by guest 0x10000$" err
    grep -q "corrupt: host 0x60000 is used by guest 0x30000$" err
    grep -q "leak: host 0x80000, 1 cluster: refcount 1, but used 0 times" err
    grep -q "1 corruptions.*; 1 leaked" ours
    expect 2 "$fx" -q --check img >ours
    same "$(cat err)" ""
    poke img $((l2 + 16)) 8000004000000000
    expect 2 "$fx" --check img >ours
    grep -q "guest 0x20000, its cluster: 0x10000 bytes at host 0x4000000000 reach past the end of the file" err
    # One line for each of many, but not for ever.
    qemu-img create -q -f qcow2 -o cluster_size=512 good 1M; qemu-io -c 'write 0 1M' good >io.log
    py 'd = bytearray(open("good", "rb").read()); l = int(sys.argv[1])
for i in range(0, 64 * 8 * 8, 16): d[l + i] = 0
open("img", "wb").write(d)' "$(table_of good | cut -d" " -f2)"
    expect 2 "$fx" --check img >ours
    [ "$(wc -l <err)" -le 102 ] || fail "$(wc -l <err) lines"
    # Leaks alone; what a killed writer leaves.
    qemu-img create -q -f qcow2 img 4M
    qemu-io -c 'write 0 1M' -c abort img >io.log 2>&1 || true
    as_qemu_check img
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    read -r l1 l2 data block < <(table_of good)
    poke img $((block + 42)) 0001; truncate -s +128k img; as_qemu_check img; expect 3 "$fx" -q --check img >ours
}

t_check_of_a_cut_image_sees_what_is_lost() {
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' good >io.log
    cp good img; truncate -s -1000 img
    expect 2 "$fx" --check img >ours
    grep -q "guest 0xf0000, host 0x140000: img ends before the cluster does" err
    same "$("$fx" --map --json img | jq -c 'map(select(.error)) | .[0] | [.start + .length]')" "[1048576]"
    truncate -s -64k img; expect 2 "$fx" --check img >ours
    grep -q "guest 0xf0000, its cluster: 0x10000 bytes at host 0x140000 reach past the end" err
    qemu-img create -q -f qcow2 -o data_file=ext.raw img 1M; qemu-io -c 'write 0 1M' img >io.log
    truncate -s 900k ext.raw; expect 2 "$fx" --check img >ours
    grep -q "ext.raw ends before the cluster does" err
}

t_check_has_nothing_to_do_for_raw_images() {
    random img 10
    expect 63 "$fx" --check --json -q --format raw img >ours
    same "$(wc -c <ours)" 0
    same "$(cat err)" "fuseexp: img: is raw, which has nothing to check"
    expect 63 qemu-img check -f raw img
    qemu-img create -q -f qcow2 good 1M
    poke img 48 0000000000030200; refused 1 'the place of the refcount table' "$fx" --check img
    poke img 56 00000fff; refused 1 'the size of the refcount table' "$fx" --check img
    expect 1 "$fx" --check --json good >/dev/full; grep -q 'cannot write' err
}

# Formats without a check of their own, here qcow2 as if it had none: what cannot be read, and what is used twice.
t_check_by_map_finds_bad_and_double_ranges() {
    export FUSEEXP_FAIL_OP=check
    qemu-img create -q -f qcow2 good 4M; qemu-io -c 'write 0 1M' -c 'write -c 2M 64k' good >io.log
    expect 0 "$fault" --check --json good >ours.json
    same "$(jq -c '[."check-errors", ."total-clusters", ."allocated-clusters", ."compressed-clusters"]' ours.json)" '[0,64,17,1]'
    local l1 l2 data block
    read -r l1 l2 data block < <(table_of good)
    poke img $((l2 + 24)) "80$(printf '%014x' $((data + 65536)))" $((l2 + 40)) 8000004000000000
    expect 2 "$fault" --check --json img >ours.json
    same "$(jq .corruptions ours.json)" 2
    grep -q "guest 0x30000, 0x10000 bytes: img at 0x60000 is used for something else, too" err
    grep -q "guest 0x50000, 0x10000 bytes: its cluster lies past the end of the file" err
    qemu-img create -q -f qcow2 -u -b gone -F raw over 4M
    expect 0 "$fault" --check over >ours
}

t_check_of_absurd_tables_ends() {
    # Four million L1 entries point at one L2 table, whose entries all point at one cluster.
    py '
import struct
c, n = 1 << 21, 4 << 20
f = open("img", "wb")
f.write(struct.pack(">IIQIIQIIQQIIQQQQII", 0x514649fb, 3, 0, 0, 21, 1 << 61, 0, n, c, 17 * c, 1, 0, 0, 0, 0, 0, 4, 104))
f.seek(c); f.write(struct.pack(">Q", 1 << 63 | 18 * c) * n)
f.seek(17 * c); f.write(struct.pack(">Q", 19 * c))
f.seek(18 * c); f.write(struct.pack(">Q", 1 << 63 | 20 * c) * (c // 8))
f.truncate(21 * c)'
    expect 2 timeout 60 "$fx" --check --json img >ours.json
    truncate -s 8000G img
    expect 2 timeout 60 "$fx" -q --check --json img >ours.json
    qemu-img create -q -f qcow2 -o cluster_size=512 small 1M; truncate -s 2T small
    refused 1 'too large to be checked' "$fx" --check small
}

t_check_shows_progress_on_a_terminal_and_wipes_it() {
    qemu-img create -q -f qcow2 -o cluster_size=512,preallocation=metadata img 64M
    py '
import pty, subprocess
for args, want in (([], True), (["-q"], False)):
    m, s = pty.openpty()
    p = subprocess.Popen([sys.argv[1], "--check", "img"] + args, stdout=subprocess.DEVNULL, stderr=s)
    os.close(s)
    got = b""
    try:
        while True: got += os.read(m, 65536)
    except OSError: pass
    assert p.wait() == 0
    assert (b"% " in got) == want, got
    assert not want or got.endswith(b"\r      \r"), got[-50:]
' "$fx"
}

t_looking_is_done_in_the_sandbox() {
    qemu-img create -q -f qcow2 img 64M
    strace -f -o log "$fx" --check --sandbox=require img >/dev/null
    grep -q 'seccomp\|SECCOMP' log
    not grep -q 'O_RDWR.*img\|img.*O_RDWR' log
    "$fx" --info -- img | grep -q '^format: *qcow2$'
    for n in $(seq 30); do
        FUSEEXP_FAIL_AT=$n "$fault" -q --info --sandbox=off --json img >ours.json 2>err || { same "$?" 1; [ -s err ] && [ ! -s ours.json ] || fail "step $n"; continue; }
        jq -e . ours.json >/dev/null; grep -q FAULT err || break
    done
}

t_corpus_info_map_and_check_are_valid() {
    [ -d "$corpus" ] || skip "no corpus"
    "$corpus/unpack" c
    local n=0 i status
    while IFS=$'\t' read -r path format _; do
        case $format in qcow2 | raw) ;; *) continue ;; esac
        [ -f "c/$path" ] || continue
        for i in info map check; do
            status=0
            "$build/fuseexp-asan" -q --$i --json --no-parts --format "$format" "c/$path" >ours.json 2>err || status=$?
            not grep -q Sanitizer err
            [ "$i$format" = checkraw ] && same "$status" 63 && continue
            same "$status" 0
            jq -e . ours.json >/dev/null
            [ $i = check ] && { as_qemu_check "c/$path"; continue; }
            qemu-img $i -f "$format" --output=json "c/$path" >theirs.json
            [ $(($(stat -c %s "c/$path") % 512)) != 0 ] || same_json ours.json theirs.json
        done
        n=$((n + 1))
    done <c/MANIFEST.tsv
    [ $n -ge 20 ] || fail "only $n"
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

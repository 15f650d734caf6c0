package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrKilled is what every call on a Mem, and on what was opened from it, returns
// after Kill, or after KillClone made another take its place.
var ErrKilled = errors.New("this instance of the file system was killed")

// Op is a kind of call, for Mem.SetHook.
type Op uint8

// The calls that a hook sees.
const (
	OpOpen Op = iota // Open of a file that exists
	OpCreate
	OpMkdir
	OpRemove
	OpRename
	OpLink
	OpList
	OpStat
	OpSyncDir
	OpLock
	OpFree
	OpMap
	OpRead
	OpWrite
	OpTruncate
	OpAllocate
	OpPunchHole
	OpSync
	OpStartWriteback
	OpPrefetch
	OpDropCache
	opCount
)

var opNames = [opCount]string{
	"open", "create", "mkdir", "remove", "rename", "link", "list", "stat", "syncdir", "lock", "free", "map",
	"read", "write", "truncate", "allocate", "punch hole", "sync", "start writeback", "prefetch", "drop cache",
}

func (o Op) String() string {
	if o < opCount {
		return opNames[o]
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Mem is a file system in memory that can lose power, be killed, fail and fill
// up. Absolute and relative names are the same. It implements FS; safe from any
// goroutine: one mutex guards everything but the bytes of mappings.
//
// MkdirAll is durable by itself, as it is for OS.
type Mem struct {
	mu       sync.Mutex
	root     *node
	killed   bool
	capacity int64 // bytes; 0: no limit
	used     int64 // bytes in pages of files that are named or open
	rng      *rand.Rand
	hook     atomic.Pointer[hook]
}

// NewMem returns an empty file system without a limit of capacity.
func NewMem() *Mem {
	return &Mem{root: newDirectory(), rng: rand.New(rand.NewPCG(1, 2))}
}

// SetHook makes fn run before each call with the (new) name it is about, in the
// caller's goroutine and with no lock held; nil removes it. The call fails with
// fn's error and changes nothing, except that a Sync that fails so drops what
// was unsynced at random, for good, as Linux does. A SyncDir that fails so leaves
// the names undecided; a file system that can't write its names goes read-only,
// which a hook that keeps failing shows.
//
// Calls of other goroutines may be in the hook that was set before: SetHook returns
// when they have left it, so that whatever it has noted may then be read without a
// lock. A hook must therefore not call SetHook, nor wait for its caller.
func (m *Mem) SetHook(fn func(op Op, name string) error) {
	var next *hook
	if fn != nil {
		next = &hook{fn: fn}
		next.left.L = &next.mu
	}
	if old := m.hook.Swap(next); old != nil {
		old.retire()
	}
}

// hook is what SetHook has set, with the number of calls that are in it.
type hook struct {
	fn      func(op Op, name string) error
	mu      sync.Mutex
	left    sync.Cond // a call has left
	inside  int
	retired bool
}

// retire lets no call in any more and waits for those that are inside.
func (h *hook) retire() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.retired = true
	for h.inside > 0 {
		h.left.Wait()
	}
}

// enter reports whether a call may run fn; then it must leave.
func (h *hook) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.retired {
		h.inside++
	}
	return !h.retired
}

func (h *hook) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.inside--
	h.left.Broadcast()
}

// SetCapacity limits the room for file contents, in bytes rounded down to 4 KiB;
// 0 means no limit. A limit below what is in use only refuses more.
func (m *Mem) SetCapacity(bytes int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.capacity = bytes
}

// Used returns the bytes that file contents occupy, in pages of 4 KiB.
func (m *Mem) Used() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// Corrupt flips a bit of the byte at off, on the disk and in the cache.
func (m *Mem) Corrupt(name string, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.file("corrupt", name)
	if err != nil {
		return err
	}
	if n.memory != nil {
		return n.memory.flip(off)
	}
	if off < 0 || off >= n.cur.size {
		return pathError("corrupt", name, unix.EINVAL)
	}
	i := off / pageSize
	durable := n.durable.pages[i] != nil
	n.cur.writable(i, true).data[off%pageSize] ^= 0x10
	if durable {
		n.durable.writable(i, true).data[off%pageSize] ^= 0x10
	}
	return nil
}

// runHook asks the hook, if there is one.
func (m *Mem) runHook(op Op, name string) error {
	for h := m.hook.Load(); h != nil; h = m.hook.Load() {
		if h.enter() {
			defer h.leave()
			return pathError(op.String(), name, h.fn(op, name))
		}
	}
	return nil
}

// enter begins a call: it asks the hook and takes the lock. On success the
// caller unlocks.
func (m *Mem) enter(op Op, name string) error {
	if err := m.runHook(op, name); err != nil {
		return err
	}
	m.mu.Lock()
	if m.killed {
		m.mu.Unlock()
		return pathError(op.String(), name, ErrKilled)
	}
	return nil
}

// roomPages returns how many pages can still be taken; negative: any number.
func (m *Mem) roomPages() int64 {
	if m.capacity == 0 {
		return -1
	}
	return max(0, (m.capacity-m.used)/pageSize)
}

// counted runs fn, which may change how much room n's contents take.
func (m *Mem) counted(n *node, fn func()) {
	before := len(n.cur.pages)
	fn()
	m.used += int64(len(n.cur.pages)-before) * pageSize
}

// release gives the room of an unused file back.
func (m *Mem) release(n *node) {
	if n.unused() {
		m.used -= int64(len(n.cur.pages)) * pageSize
	}
}

// split cleans a name into its components.
func split(name string) []string {
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	if clean == "" {
		return nil
	}
	return strings.Split(clean, "/")
}

// walk returns the node with these components.
func (m *Mem) walk(parts []string) (*node, error) {
	n := m.root
	for _, part := range parts {
		if n.dir == nil {
			return nil, unix.ENOTDIR
		}
		if n = n.dir.cur[part]; n == nil {
			return nil, fs.ErrNotExist
		}
	}
	return n, nil
}

// parent returns the directory of a name, and its last component.
func (m *Mem) parent(name string) (*directory, string, error) {
	parts := split(name)
	if len(parts) == 0 {
		return nil, "", unix.EBUSY // the root
	}
	n, err := m.walk(parts[:len(parts)-1])
	if err != nil {
		return nil, "", err
	}
	if n.dir == nil {
		return nil, "", unix.ENOTDIR
	}
	return n.dir, parts[len(parts)-1], nil
}

// file returns the file of a name.
func (m *Mem) file(op, name string) (*node, error) {
	n, err := m.walk(split(name))
	if err == nil && n.dir != nil {
		err = unix.EISDIR
	}
	return n, pathError(op, name, err)
}

// Open implements FS.
func (m *Mem) Open(name string, flags OpenFlag) (File, error) {
	op := OpOpen
	if flags&Create != 0 {
		if _, err := m.statNode(name); errors.Is(err, fs.ErrNotExist) {
			op = OpCreate
		}
	}
	if err := m.enter(op, name); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	n, err := m.openNode(name, flags)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	n.opens++
	return &memFile{m: m, n: n, name: name, flags: flags}, nil
}

func (m *Mem) openNode(name string, flags OpenFlag) (*node, error) {
	d, base, err := m.parent(name)
	if err != nil {
		return nil, err
	}
	n := d.cur[base]
	switch {
	case n == nil && flags&Create == 0:
		return nil, fs.ErrNotExist
	case n == nil:
		n = newFile()
		n.links = 1
		d.set(base, n, new(nameTx))
	case flags&Create != 0 && flags&Exclusive != 0:
		return nil, fs.ErrExist
	case n.dir != nil:
		return nil, unix.EISDIR
	}
	return n, nil
}

// List implements FS.
func (m *Mem) List(name string) ([]string, error) {
	if err := m.enter(OpList, name); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	n, err := m.walk(split(name))
	if err == nil && n.dir == nil {
		err = unix.ENOTDIR
	}
	if err != nil {
		return nil, pathError("list", name, err)
	}
	return sortedKeys(n.dir.cur), nil
}

func (m *Mem) statNode(name string) (*node, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.walk(split(name))
}

// Stat implements FS.
func (m *Mem) Stat(name string) (fs.FileInfo, error) {
	if err := m.enter(OpStat, name); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	n, err := m.walk(split(name))
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	info := memInfo{name: path.Base(path.Clean("/" + name)), dir: n.dir != nil}
	if n.dir == nil {
		info.size, err = n.size()
	}
	return info, pathError("stat", name, err)
}

// SyncDir implements FS.
func (m *Mem) SyncDir(name string) error {
	if err := m.enter(OpSyncDir, name); err != nil {
		return err
	}
	defer m.mu.Unlock()
	n, err := m.walk(split(name))
	if err == nil && n.dir == nil {
		err = unix.ENOTDIR
	}
	if err != nil {
		return pathError("syncdir", name, err)
	}
	n.dir.sync()
	return nil
}

// Free implements FS. Without a limit it is a large number.
func (m *Mem) Free(name string) (uint64, error) {
	if err := m.enter(OpFree, name); err != nil {
		return 0, err
	}
	defer m.mu.Unlock()
	if _, err := m.walk(split(name)); err != nil {
		return 0, pathError("free", name, err)
	}
	if room := m.roomPages(); room >= 0 {
		return uint64(room) * pageSize, nil
	}
	return 1 << 50, nil
}

// Lock implements FS.
func (m *Mem) Lock(name string) (io.Closer, error) {
	if err := m.enter(OpLock, name); err != nil {
		return nil, err
	}
	defer m.mu.Unlock()
	n, err := m.openNode(name, Create)
	if err != nil {
		return nil, pathError("lock", name, err)
	}
	if n.locked {
		return nil, lockedError(name, strconv.Itoa(os.Getpid()))
	}
	n.locked = true
	return &memLock{m: m, n: n}, nil
}

type memLock struct {
	m    *Mem
	n    *node
	once sync.Once
}

func (l *memLock) Close() error {
	l.once.Do(func() {
		l.m.mu.Lock()
		defer l.m.mu.Unlock()
		l.n.locked = false
	})
	return nil
}

func sortedKeys(names map[string]*node) []string {
	keys := make([]string, 0, len(names))
	for name := range names {
		keys = append(keys, name)
	}
	slices.Sort(keys)
	return keys
}

// memInfo implements fs.FileInfo. Mem keeps no times.
type memInfo struct {
	name string
	size int64
	dir  bool
}

func (i memInfo) Name() string       { return i.name }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) IsDir() bool        { return i.dir }
func (i memInfo) ModTime() time.Time { return time.Time{} }
func (i memInfo) Sys() any           { return nil }
func (i memInfo) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | dirMode
	}
	return fileMode
}

package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/tidwall/buntdb"
	"golang.org/x/sys/unix"
)

// # The embedded store
//
// A buntdb database in one append-only file. buntdb alone does not keep what
// Store promises: it ignores the error of its sync, writes the commands of one
// transaction in random order without a mark around them, and renames a shrunk
// file that it never synced. So this store uses buntdb's file and index and adds
// what is missing:
//
//   - A commit is one record first: all its writes under the key journalKey, with a
//     checksum, synced through a descriptor of our own whose error counts. That
//     sync is the commit point. Then the writes are applied to their keys,
//     unsynced: if they are lost or torn, the journal repeats them at the next
//     opening, and the next commit's sync covers them.
//   - Room for a commit is reserved before it begins, so that a full disk refuses
//     it whole, and the next one succeeds when there is room again.
//   - A failed sync closes the store for writing for good: nobody knows what the
//     disk has, and a later sync that succeeds would not tell.
//   - The tail is inspected before buntdb sees the file: an unfinished command at
//     its end is cut off (repairTail), damage before a synced commit is refused.
//   - Shrinking writes a new file, syncs it, renames it, syncs the directory.
//
// Lock order: Embedded.mu, then buntdb's own. Watches are fed under mu, so that
// their order is the order of commits; feeding never blocks.
// No goroutine of its own but buntdb's once-a-second housekeeping.

// Limits of the embedded store.
const (
	MaxKeyBytes   = 512
	MaxValueBytes = 1 << 20
	MaxWrites     = 1024 // of one commit

	shrinkMinBytes = 1 << 20 // a file smaller than this is never shrunk
	historyEvents  = 4096    // how far back Watch can start
	watchBuffer    = 1024    // events a watcher may lag behind
)

// Errors of the embedded store.
var (
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("registry: closed")
	// ErrFailed: an earlier write or sync failed; the store refuses every commit
	// until it is opened again.
	ErrFailed = errors.New("registry: an earlier write to its disk failed; restart scoriad once the disk is healthy")
	// ErrCorrupt: the file is damaged in front of a commit that was synced.
	ErrCorrupt = errors.New("registry: file is damaged")
	// ErrVersion: the file or a record was written by a newer program.
	ErrVersion = errors.New("registry: written by a newer Scoria; install that version or a later one")
	// ErrInvalid: a key, value or transaction outside the limits.
	ErrInvalid = errors.New("registry: invalid argument")
)

// Embedded is the Store for a single host. Open makes it.
type Embedded struct {
	path string

	mu       sync.Mutex
	db       *buntdb.DB
	syncFile syncer
	size     int64 // bytes of the file after the last commit
	shrunk   int64 // bytes after the last shrink
	revision int64
	failed   error
	closed   bool
	hub      hub
}

// syncer makes what buntdb wrote durable; a diskFile outside tests.
type syncer interface {
	Sync() error
	// Reserve makes sure that n bytes behind offset can be written.
	Reserve(offset, n int64) error
	Close() error
}

type diskFile struct{ *os.File }

func (f diskFile) Reserve(offset, n int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, offset, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil // then a full disk is found by the write
	}
	return err
}

// Open opens or creates the store in the file at path; its directory must exist
// and only one process may have it open (the caller holds the data directory's
// lock). ErrCorrupt if committed data is damaged.
func Open(path string) (*Embedded, error) {
	s := &Embedded{path: path, hub: newHub(historyEvents, watchBuffer)}
	if err := removeIfThere(path + ".tmp"); err != nil {
		return nil, fmt.Errorf("registry %s: %w", path, err)
	}
	if err := repairTail(path); err != nil {
		return nil, fmt.Errorf("registry %s: %w", path, err)
	}
	if err := s.openFile(); err != nil {
		return nil, fmt.Errorf("registry %s: %w", path, err)
	}
	if err := s.recover(); err != nil {
		s.closeFile()
		return nil, fmt.Errorf("registry %s: %w", path, err)
	}
	return s, nil
}

// openFile opens the file with buntdb and a second time for syncing, and makes
// its name durable.
func (s *Embedded) openFile() error {
	// buntdb would create it readable by everybody.
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(s.path)); err != nil {
		return errors.Join(err, f.Close())
	}
	db, err := buntdb.Open(s.path)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if err := db.SetConfig(buntdb.Config{SyncPolicy: buntdb.Never, AutoShrinkDisabled: true}); err != nil {
		return errors.Join(err, db.Close(), f.Close())
	}
	s.db, s.syncFile = db, diskFile{f}
	return s.measure()
}

func (s *Embedded) closeFile() error {
	return errors.Join(s.db.Close(), s.syncFile.Close())
}

func (s *Embedded) measure() error {
	fi, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	s.size = fi.Size()
	return nil
}

// recover repeats the last commit, whose application may have been lost, and
// verifies every value.
func (s *Embedded) recover() error {
	rec, ok, err := s.readJournal()
	if err != nil || !ok {
		return err
	}
	s.revision = rec.revision
	if err := s.apply(rec); err != nil {
		return err
	}
	if err := s.syncFile.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	kvs, err := s.list("")
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		if kv.Revision > s.revision {
			return fmt.Errorf("%w: key %s has revision %d, later than the last commit %d", ErrCorrupt, kv.Key, kv.Revision, s.revision)
		}
	}
	s.shrunk = liveBytes(kvs)
	return s.shrinkIfWorthwhile()
}

func (s *Embedded) readJournal() (rec journal, ok bool, err error) {
	var raw string
	err = s.db.View(func(tx *buntdb.Tx) error {
		raw, err = tx.Get(journalKey)
		return err
	})
	if errors.Is(err, buntdb.ErrNotFound) {
		return journal{}, false, nil
	}
	if err != nil {
		return journal{}, false, err
	}
	rec, err = decodeJournal([]byte(raw))
	return rec, err == nil, err
}

// apply puts a commit's writes under their keys, unsynced. Repeating it is harmless.
func (s *Embedded) apply(rec journal) error {
	return s.db.Update(func(tx *buntdb.Tx) error {
		for _, w := range rec.writes {
			k := keyPrefix + w.Key
			if w.Value == nil {
				if _, err := tx.Delete(k); err != nil && !errors.Is(err, buntdb.ErrNotFound) {
					return err
				}
				continue
			}
			if _, _, err := tx.Set(k, string(encodeValue(k, rec.revision, w.Value)), nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// Revision returns the revision of the last commit, 0 for an empty store.
func (s *Embedded) Revision() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

// Err returns why the store refuses commits, nil while it does not.
func (s *Embedded) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// Get implements Store.
func (s *Embedded) Get(ctx context.Context, key string) (KV, bool, error) {
	if err := ctx.Err(); err != nil {
		return KV{}, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return KV{}, false, ErrClosed
	}
	return s.get(key)
}

func (s *Embedded) get(key string) (kv KV, ok bool, err error) {
	var raw string
	err = s.db.View(func(tx *buntdb.Tx) error {
		raw, err = tx.Get(keyPrefix + key)
		return err
	})
	if errors.Is(err, buntdb.ErrNotFound) {
		return KV{}, false, nil
	}
	if err != nil {
		return KV{}, false, fmt.Errorf("registry: get %s: %w", key, err)
	}
	rev, value, err := decodeValue(keyPrefix+key, []byte(raw))
	if err != nil {
		return KV{}, false, err
	}
	return KV{Key: key, Value: value, Revision: rev}, true, nil
}

// List implements Store.
func (s *Embedded) List(ctx context.Context, prefix string) ([]KV, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	return s.list(prefix)
}

// Page is List in parts: up to limit keys with the prefix that come behind after, and
// whether there are more.
func (s *Embedded) Page(ctx context.Context, prefix, after string, limit int) (kvs []KV, more bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	if limit < 1 {
		return nil, false, fmt.Errorf("page of %d keys: must be at least 1", limit)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, ErrClosed
	}
	from := keyPrefix + max(prefix, after)
	var bad error
	err = s.db.View(func(tx *buntdb.Tx) error {
		return tx.AscendGreaterOrEqual("", from, func(k, raw string) bool {
			key := strings.TrimPrefix(k, keyPrefix)
			switch {
			case after != "" && key <= after:
				return true
			case !strings.HasPrefix(key, prefix):
				return false
			case len(kvs) == limit:
				more = true
				return false
			}
			kv := KV{Key: key}
			kv.Revision, kv.Value, bad = decodeValue(k, []byte(raw))
			kvs = append(kvs, kv)
			return bad == nil
		})
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, false, err
	}
	return kvs, more, nil
}

func (s *Embedded) list(prefix string) ([]KV, error) {
	var kvs []KV
	var bad error
	from := keyPrefix + prefix
	err := s.db.View(func(tx *buntdb.Tx) error {
		return tx.AscendGreaterOrEqual("", from, func(k, raw string) bool {
			if !strings.HasPrefix(k, from) {
				return false
			}
			var kv KV
			kv.Key = strings.TrimPrefix(k, keyPrefix)
			kv.Revision, kv.Value, bad = decodeValue(k, []byte(raw))
			kvs = append(kvs, kv)
			return bad == nil
		})
	})
	if err := errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("registry: list %s: %w", prefix, err)
	}
	return kvs, nil
}

// Commit implements Store. A full disk refuses it, with no effect. It fails with
// ErrFailed after a write or sync of this
// or an earlier commit has failed; whether this one happened is then known only
// after the store has been opened again.
func (s *Embedded) Commit(ctx context.Context, compares []Compare, writes []Write) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := checkWrites(compares, writes); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, ErrClosed
	}
	if s.failed != nil {
		return 0, s.failed
	}
	for _, c := range compares {
		kv, _, err := s.get(c.Key)
		if err != nil {
			return 0, err
		}
		if kv.Revision != c.Revision {
			return 0, fmt.Errorf("%w: %s is at revision %d, not %d", ErrConflict, c.Key, kv.Revision, c.Revision)
		}
	}
	if len(writes) == 0 {
		return s.revision, nil
	}
	rec := journal{revision: s.revision + 1, writes: writes}
	encoded := rec.encode()
	// The journal, and its writes once more, each with its command and header.
	room := 2*int64(len(encoded)) + int64(len(writes)+1)*(headerBytes+64)
	if err := s.syncFile.Reserve(s.size, room); err != nil {
		return 0, fmt.Errorf("registry: no room for a commit of %d bytes: %w", room, err)
	}
	if err := s.persist(rec, encoded); err != nil {
		s.failed = fmt.Errorf("%w (%w)", ErrFailed, err)
		return 0, s.failed
	}
	s.revision = rec.revision
	s.hub.publish(rec.events())
	if err := s.shrinkIfWorthwhile(); err != nil {
		// The commit itself is durable; only later ones are refused.
		s.failed = fmt.Errorf("%w (%w)", ErrFailed, err)
	}
	return rec.revision, nil
}

// persist carries a commit out: journal, sync, apply.
func (s *Embedded) persist(rec journal, encoded []byte) error {
	err := s.db.Update(func(tx *buntdb.Tx) error {
		_, _, err := tx.Set(journalKey, string(encoded), nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := s.syncFile.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if err := s.apply(rec); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	return s.measure()
}

// Watch implements Store.
func (s *Embedded) Watch(ctx context.Context, prefix string, from int64) (<-chan Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if from == 0 {
		from = s.revision
	}
	w := s.hub.add(prefix, from, s.revision)
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.hub.remove(w)
	})
	return w.events, nil
}

// Close ends all watches and closes the file. Later calls fail with ErrClosed.
func (s *Embedded) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.hub.close()
	return s.closeFile()
}

func checkWrites(compares []Compare, writes []Write) error {
	if len(writes) > MaxWrites || len(compares) > MaxWrites {
		return fmt.Errorf("%w: %d compares, %d writes: at most %d of each", ErrInvalid, len(compares), len(writes), MaxWrites)
	}
	seen := make(map[string]bool, len(writes))
	for _, w := range writes {
		if err := checkKey(w.Key); err != nil {
			return err
		}
		if len(w.Value) > MaxValueBytes {
			return fmt.Errorf("%w: value of %s has %d bytes: at most %d", ErrInvalid, w.Key, len(w.Value), MaxValueBytes)
		}
		if seen[w.Key] {
			return fmt.Errorf("%w: key %s is written twice in one commit", ErrInvalid, w.Key)
		}
		seen[w.Key] = true
	}
	return nil
}

func checkKey(key string) error {
	if key == "" || len(key) > MaxKeyBytes {
		return fmt.Errorf("%w: key of %d bytes: must have 1 to %d", ErrInvalid, len(key), MaxKeyBytes)
	}
	for i := range len(key) {
		if key[i] < 0x20 || key[i] == 0x7f {
			return fmt.Errorf("%w: key %q has a control character", ErrInvalid, key)
		}
	}
	return nil
}

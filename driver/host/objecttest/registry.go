package objecttest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"io"
	"path"
	"sync"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/vfs"
)

// Registry is one in memory whose commits are durable in a file of a vfs.FS before they
// are seen: each the length and the CRC32 of a JSON list of writes, and the list.
type Registry struct {
	*albatest.Registry
	mu     sync.Mutex
	f      vfs.File
	size   int64
	failed error // of the file: nothing is committed from then on
}

// OpenRegistry opens the registry in a file, which is made if there is none. A record at
// its end that a crash has torn is cut off.
func OpenRegistry(fsys vfs.FS, name string) (*Registry, error) {
	f, err := fsys.Open(name, vfs.Create)
	if err != nil {
		return nil, err
	}
	r := &Registry{Registry: albatest.NewRegistry(), f: f}
	if err = fsys.SyncDir(path.Dir(name)); err == nil {
		err = r.load()
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return r, nil
}

func (r *Registry) load() error {
	size, err := r.f.Size()
	if err != nil {
		return err
	}
	all := make([]byte, size)
	if _, err := r.f.ReadAt(all, 0); err != nil && err != io.EOF {
		return err
	}
	for len(all) >= 8 {
		n := int(binary.LittleEndian.Uint32(all))
		if n == 0 || n > len(all)-8 || crc32.ChecksumIEEE(all[8:8+n]) != binary.LittleEndian.Uint32(all[4:]) {
			break // torn
		}
		var writes []alba.Write
		if err := json.Unmarshal(all[8:8+n], &writes); err != nil {
			return err
		}
		if _, err := r.Registry.Commit(context.Background(), nil, writes); err != nil {
			return err
		}
		r.size += int64(8 + n)
		all = all[8+n:]
	}
	if err := r.f.Truncate(r.size); err != nil {
		return err
	}
	return r.f.Sync() // what was read may not be on the disk yet
}

// Commit implements alba.Registry.
func (r *Registry) Commit(ctx context.Context, compares []alba.Compare, writes []alba.Write) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil {
		return 0, r.failed
	}
	if _, err := r.Registry.Commit(ctx, compares, nil); err != nil {
		return 0, err
	}
	b, err := json.Marshal(writes)
	if err != nil {
		return 0, err
	}
	var head [8]byte
	binary.LittleEndian.PutUint32(head[:], uint32(len(b)))
	binary.LittleEndian.PutUint32(head[4:], crc32.ChecksumIEEE(b))
	rec := bytes.Join([][]byte{head[:], b}, nil)
	if _, err = r.f.WriteAt(rec, r.size); err == nil {
		err = r.f.Sync()
	}
	if err != nil {
		r.failed = err
		return 0, err
	}
	r.size += int64(len(rec))
	return r.Registry.Commit(context.WithoutCancel(ctx), nil, writes)
}

// Close closes the file.
func (r *Registry) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.f.Close()
}

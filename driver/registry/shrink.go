package registry

import (
	"errors"
	"fmt"
	"os"
)

// shrinkIfWorthwhile rewrites the file when it is more than four times as large
// as after the last shrink.
func (s *Embedded) shrinkIfWorthwhile() error {
	if s.size < shrinkMinBytes || s.size < 4*s.shrunk {
		return nil
	}
	tmp := s.path + ".tmp"
	if err := s.save(tmp); err != nil {
		// A full disk, likely. Nothing has changed; tried again when the file has
		// grown some more. What is left of tmp goes then, or at the next opening.
		s.shrunk = s.size / 3
		_ = os.Remove(tmp)
		return nil
	}
	if err := s.closeFile(); err != nil {
		return fmt.Errorf("shrink: %w", err)
	}
	if err := os.Rename(tmp, s.path); err != nil {
		return fmt.Errorf("shrink: %w", err)
	}
	// openFile syncs the directory, before anything can be committed.
	if err := s.openFile(); err != nil {
		return fmt.Errorf("shrink: %w", err)
	}
	s.shrunk = s.size
	return nil
}

func (s *Embedded) save(tmp string) (err error) {
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := s.db.Save(f); err != nil {
		return err
	}
	return f.Sync()
}

func removeIfThere(name string) error {
	if err := os.Remove(name); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func liveBytes(kvs []KV) int64 {
	var n int64
	for _, kv := range kvs {
		n += int64(len(kv.Key) + len(kv.Value) + 64)
	}
	return n
}

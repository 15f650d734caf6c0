package disk

import (
	"errors"
	"fmt"
	"path"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// Wipe empties the directory of the ASD with that ID, which must not be open; the next
// one that is opened there is another one. asd.ErrWrongASD if another is there, and
// vfs.ErrLocked if it is open. One that is cut short may be repeated: the identity
// goes last.
func Wipe(fsys vfs.FS, dir, id string) (err error) {
	fail := func(err error) error { return fmt.Errorf("wipe ASD in %s: %w", dir, err) }
	lock, err := fsys.Lock(path.Join(dir, "lock"))
	if err != nil {
		return fail(err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	known, err := readIdentity(fsys, dir)
	if err != nil {
		return fail(err)
	}
	if known.String() != id {
		return fail(fmt.Errorf("%w: the directory has ASD %s, not %s", asd.ErrWrongASD, known, id))
	}
	for _, name := range []string{"values", "kv"} {
		if err := fsys.RemoveAll(path.Join(dir, name)); err != nil {
			return fail(err)
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		return fail(err)
	}
	if err := fsys.Remove(path.Join(dir, "identity")); err != nil {
		return fail(err)
	}
	if err := fsys.SyncDir(dir); err != nil {
		return fail(err)
	}
	return nil
}

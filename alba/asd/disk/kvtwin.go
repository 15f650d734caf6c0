package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"scoria/alba/vfs"

	kvrecord "github.com/cockroachdb/pebble/v2/record"
)

// Pebble takes a record of its manifest that fails its checksum for the end, as
// after a loss of power, and what the records behind it spoke of for garbage: one
// bad bit, and it removes tables. So kvFS writes each manifest twice, into a twin
// beside it, and both are durable before Pebble goes on. The one of which more
// records are sound is the true one: a record that is only in one of them was not
// acknowledged to Pebble, so that it may be kept or not.

const (
	manifestPrefix = "MANIFEST-"
	twinSuffix     = ".twin"
)

func isManifest(name string) bool {
	base := path.Base(name)
	return strings.HasPrefix(base, manifestPrefix) && !strings.HasSuffix(base, twinSuffix)
}

// errTwins: the two copies of a manifest contradict each other.
var errTwins = errors.New("both copies of the manifest are damaged")

// readAll returns a file's bytes as the disk has them.
func readAll(fsys vfs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	_ = f.DropCache(0, size)
	b := make([]byte, size)
	n, err := f.ReadAt(b, 0)
	if err == io.EOF {
		err = nil
	}
	return b[:n], err
}

// soundRecords returns a manifest's records up to the first that is not sound, and
// where that would begin.
func soundRecords(b []byte) (records [][]byte, end int64) {
	r := kvrecord.NewReader(bytes.NewReader(b), 0)
	for {
		rec, err := r.Next()
		if err != nil {
			return records, end
		}
		p, err := io.ReadAll(rec)
		if err != nil {
			return records, end
		}
		records, end = append(records, p), r.Offset()
	}
}

// better returns the copy of a manifest that has more sound records, without what
// follows them, or errTwins.
func better(a, b []byte) ([]byte, error) {
	ra, enda := soundRecords(a)
	rb, endb := soundRecords(b)
	for i := range min(len(ra), len(rb)) {
		if !bytes.Equal(ra[i], rb[i]) {
			return nil, fmt.Errorf("record %d: %w", i, errTwins)
		}
	}
	if len(rb) > len(ra) {
		return b[:endb], nil
	}
	return a[:enda], nil
}

// mendManifests makes the copies of each manifest equal, before Pebble opens them,
// and removes twins whose manifest is gone. mended are the names of the files that
// had lost something.
func mendManifests(fsys vfs.FS, dir string) (mended []string, err error) {
	names, err := fsys.List(dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		twin := name + twinSuffix
		switch {
		case strings.HasPrefix(name, manifestPrefix) && strings.HasSuffix(name, twinSuffix):
			if !slices.Contains(names, strings.TrimSuffix(name, twinSuffix)) {
				err = fsys.Remove(path.Join(dir, name))
			}
		case isManifest(name) && slices.Contains(names, twin):
			var bad []string
			bad, err = mendManifest(fsys, dir, name, twin)
			mended = append(mended, bad...)
		}
		if err != nil {
			return mended, fmt.Errorf("%s: %w", name, err)
		}
	}
	return mended, nil
}

func mendManifest(fsys vfs.FS, dir, name, twin string) (mended []string, err error) {
	a, err := readAll(fsys, path.Join(dir, name))
	if err != nil {
		return nil, err
	}
	b, err := readAll(fsys, path.Join(dir, twin))
	if err != nil || bytes.Equal(a, b) {
		return nil, err
	}
	good, err := better(a, b)
	if err != nil {
		return nil, err
	}
	for _, c := range []struct {
		name string
		has  []byte
	}{{name, a}, {twin, b}} {
		if bytes.Equal(c.has, good) {
			continue
		}
		if _, end := soundRecords(c.has); end < int64(len(good)) {
			mended = append(mended, c.name)
		}
		if err := replaceFile(fsys, dir, c.name, good); err != nil {
			return mended, err
		}
	}
	return mended, nil
}

// replaceFile gives a file other contents, whole or not at all.
func replaceFile(fsys vfs.FS, dir, name string, b []byte) error {
	tmp := path.Join(dir, name+".new") // a name that Pebble does not know
	f, err := fsys.Open(tmp, vfs.Create)
	if err != nil {
		return err
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = fsys.Rename(tmp, path.Join(dir, name))
	}
	if err == nil {
		err = fsys.SyncDir(dir)
	}
	return err
}

// verifyManifest compares the copies of a manifest that is in use in their first
// synced bytes, which nobody changes any more, and writes again in place what is bad
// in one of them. It returns the names of those.
func verifyManifest(fsys vfs.FS, name string, synced int64) (mended []string, err error) {
	files := []string{name, name + twinSuffix}
	contents := make([][]byte, 2)
	for i, f := range files {
		b, err := readAll(fsys, f)
		if err != nil {
			return nil, err
		}
		contents[i] = b[:min(int64(len(b)), synced)]
	}
	if bytes.Equal(contents[0], contents[1]) {
		return nil, nil
	}
	for i, b := range contents {
		if _, end := soundRecords(b); end < synced || int64(len(b)) < synced {
			continue
		}
		bad := files[1-i]
		return []string{path.Base(bad)}, writeInPlace(fsys, bad, b)
	}
	return nil, errTwins
}

func writeInPlace(fsys vfs.FS, name string, b []byte) error {
	f, err := fsys.Open(name, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

package driver_test

import (
	"io"
	"math/rand/v2"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/dirstore"
	"scoria/driver/host/objecttest"
)

// storeCloser is a store on a file system that can die. What it has of this process
// ends with Close.
type storeCloser interface {
	driver.Store
	io.Closer
}

// storeKind is one of the stores that volumes may be in. Open opens the one in
// data/store of a file system, made before or not.
type storeKind struct {
	name string
	open func(fsys *vfs.Mem) (storeCloser, error)
}

var (
	directory = storeKind{"directory", openDirectory}
	objects   = storeKind{"objects", openObjects}
)

// directoryStore has nothing to close.
type directoryStore struct{ *dirstore.Store }

func (directoryStore) Close() error { return nil }

func openDirectory(fsys *vfs.Mem) (storeCloser, error) {
	s, err := dirstore.Open(fsys, "data/store", dirstore.Options{})
	return directoryStore{s}, err
}

// openObjects opens an object store with its registry and three storage daemons on the
// same file system, so that a crash takes all of them. Two fragments of three that are
// durable acknowledge an upload: the third is under way when the crash comes.
func openObjects(fsys *vfs.Mem) (storeCloser, error) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1})
	if err := fsys.MkdirAll("data/store"); err != nil {
		return nil, err
	}
	reg, err := objecttest.OpenRegistry(fsys, "data/store/registry")
	if err != nil {
		return nil, err
	}
	return objecttest.Open(reg, fsys, "data/store", ps.Policies[0].Shards(), ps)
}

// overStores runs a test over both.
func overStores(t *testing.T, fn func(t *testing.T, k storeKind)) {
	for _, k := range []storeKind{directory, objects} {
		t.Run(k.name, func(t *testing.T) { fn(t, k) })
	}
}

// fewer reduces what tests repeat over the store that takes longer to open.
func (k storeKind) fewer(n, over int) int {
	if k.name == objects.name {
		return over
	}
	return n
}

// forStores runs a test with several seeds over each kind of store: n over the
// directory, and over the objects, which take longer to open, fewer.
func forStores(t *testing.T, n, overObjects int, fn func(t *testing.T, k storeKind, rng *rand.Rand)) {
	overStores(t, func(t *testing.T, k storeKind) {
		forSeeds(t, k.fewer(n, overObjects), func(t *testing.T, rng *rand.Rand) { fn(t, k, rng) })
	})
}

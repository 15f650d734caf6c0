package driver_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"
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
	// Two fragments of three that are durable acknowledge an upload: the third is under
	// way when the crash comes.
	objects = storeKind{"objects", openObjects(albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1}))}
)

// directoryStore has nothing to close.
type directoryStore struct{ *dirstore.Store }

func (directoryStore) Close() error { return nil }

func openDirectory(fsys *vfs.Mem) (storeCloser, error) {
	s, err := dirstore.Open(fsys, "data/store", dirstore.Options{})
	return directoryStore{s}, err
}

// openObjects opens an object store with its registry and as many storage daemons as a
// policy needs on the same file system, so that a crash takes all of them.
func openObjects(ps alba.Preset) func(fsys *vfs.Mem) (storeCloser, error) {
	return func(fsys *vfs.Mem) (storeCloser, error) {
		if err := fsys.MkdirAll("data/store"); err != nil {
			return nil, err
		}
		reg, err := objecttest.OpenRegistry(fsys, "data/store/registry")
		if err != nil {
			return nil, err
		}
		return objecttest.Open(reg, fsys, "data/store", ps.Policies[0].Shards(), ps)
	}
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

// oneStore lists the tests that have volumes in one kind of store only, and why. All
// others run over both; those without a volume are of the engine's parts.
var oneStore = map[string]string{
	"TestP5DamagedFragment":   "flips bits in fragments; of the directory store's files TestP5Damage does",
	"TestP5OneCopy":           "an object store on one disk, whose files are the volume's; the directory store's are in TestP5Damage, linked",
	"TestP5DamagedCopyOfLost": "as for TestP5LostCopyStays",
	"TestP5LostWhileEvicted":  "as for TestP5LostCopyStays",
	"TestP5LostCopyStays":     "only an object store can lose what the local disk has: the directory store's file is the same one",
	"TestP5LostInStore":       "likewise",
	"TestP8AwayIsNotLost":     "likewise",
	"TestP8OthersFillTheDisk": "storage daemons whose disk has refused a write have to be opened anew, for which the rig must be",
	"TestP8SpaceBound":        "counts the bytes of the store's files, which an object store has parity beside",
}

// TestBothStores: every test of a volume runs over both stores, or says why not.
func TestBothStores(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(fn.Name.Name, "Test") || f.Name.Name != "driver_test" {
				continue
			}
			uses := map[string]bool{}
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				if id, ok := n.(*ast.Ident); ok {
					uses[id.Name] = true
				}
				return true
			})
			both := uses["overStores"] || uses["forStores"]
			one := !both && (uses["directory"] || uses["objects"] || uses["storeKind"])
			if _, listed := oneStore[fn.Name.Name]; listed != one {
				t.Errorf("%s runs over one kind of store only: %v; listed in oneStore: %v", fn.Name.Name, one, listed)
			}
			seen[fn.Name.Name] = true
		}
	}
	for name := range oneStore {
		if !seen[name] {
			t.Errorf("oneStore lists %s, which is no test", name)
		}
	}
}
